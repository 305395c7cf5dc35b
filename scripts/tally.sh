#!/usr/bin/env bash
# tally.sh COMMAND...: runs each command (a string for the shell) and adds up the last `N passed, N failed` line of each
# into one last line. A command that ends without that line, or with an error status and nothing failed, is one failure.
# Exits 1 when anything failed.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0
for command in "$@"; do
    bash -c "$command" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -1)
    if [ -z "$line" ]; then
        echo "FAILED: $command (exit status $status, and no line 'N passed, N failed')"
        line="0 passed, 1 failed"
    fi
    p=${line%% passed*}
    f=${line#*passed, }
    f=${f%% failed*}
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then
        echo "FAILED: $command (exit status $status)"
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

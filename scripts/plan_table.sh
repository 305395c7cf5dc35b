#!/usr/bin/env bash
# plan_table.sh [PROGRAM]: what --dry-run says of machines that are not here, as the table of dev/results/ranks-model.md
# and, shorter, that of README.md. PROGRAM is a stand-in build, which takes name, memory and rates of a card from the
# environment; without it, that of `make simt`. A step has four examples a card.
set -euo pipefail
cd "$(dirname "$0")/.."
program=${1:-build/release/simt/train_llama}
[ -x "$program" ] || { echo "no $program: make simt" >&2; exit 1; }

# Memory in MiB as CUDA gives it; multiprocessors, highest clocks and the bus's width as NVIDIA states them.
card() {
    case $1 in
        4090) echo "24207|8.9|NVIDIA GeForce RTX 4090:128:2520:10501:384|RTX 4090, 24 GB" ;;
        h100) echo "80998|9.0|NVIDIA H100 80GB HBM3:132:1980:2619:5120|H100, 80 GB" ;;
        h200) echo "143155|9.0|NVIDIA H200:132:1980:3201:6144|H200, 141 GB" ;;
        *) echo "unknown card $1" >&2; exit 1 ;;
    esac
}

# A line of both tables: R CARD LINK MODEL, and further options.
full='' short=''
row() {
    local ranks=$1 name=$2 link=$3 model=$4 out memory capability rates label
    shift 4
    IFS='|' read -r memory capability rates label <<<"$(card "$name")"
    out=$(SIMT_MEMORY_MB=$memory SIMT_CAPABILITY=$capability SIMT_CARD=$rates "$program" -m "shape:$model" --dry-run \
        --ranks "$ranks" --link "$link" -b $((4 * ranks)) "$@" 2>&1)
    local line passes where form
    line=$(grep -E '^# [0-9]+ ranks? at ' <<<"$out")
    passes=$(sed -nE 's/^# +activations \(passes of ([0-9]+) tokens, recompute (.*)\) .*/\1; \2/p' <<<"$out")
    where=''
    if grep -q 'embedding on the host' <<<"$out"; then
        where=', embedding on the host'
    fi
    form='GB/s: ([0-9.]+ [A-Z]B) a rank; a step of ([0-9,]+) tokens ([0-9.]+) s = compute ([0-9.]+) \+ other ranks '
    form+='([0-9.]+) \(([^)]*) each way\); ([0-9.]+) tok/s together, efficiency ([0-9]+) %'
    if grep -q warning <<<"$out" || ! [[ $line =~ $form ]]; then
        echo "$ranks $name, $link GB/s, $model $*:"$'\n'"$out" >&2
        exit 1
    fi
    local bytes=${BASH_REMATCH[1]} tokens=${BASH_REMATCH[2]} step=${BASH_REMATCH[3]} compute=${BASH_REMATCH[4]}
    local others=${BASH_REMATCH[5]} moved=${BASH_REMATCH[6]} rate=${BASH_REMATCH[7]} efficiency=${BASH_REMATCH[8]}
    local settings=${*:+\`$*\`}
    local what="| ${model^^} | $ranks x $label | $link GB/s | $settings | $bytes"
    full+="$what$where | $passes | $tokens | $step | $compute | $others | $moved | $rate | $efficiency % |"$'\n'
    short+="$what | $rate | $efficiency % |"$'\n'
}

row 8 4090 16 8b
row 4 4090 16 70b --shard-base
row 2 4090 16 70b --shard-base --paged-optimizer -t 512
row 8 h100 160 70b
row 8 h100 16 70b
row 8 h200 160 70b
row 8 h100 160 405b --shard-base
row 8 h100 16 405b --shard-base
row 8 h100 16 405b --shard-base --pass-tokens 8192
row 8 h200 160 405b --shard-base

head='| model | ranks | link | options | memory of a rank |'
echo "$head tokens of a pass; recompute | tokens of a step | step, s | compute, s | other ranks, s | each way |" \
    'tok/s | efficiency |'
echo "|---|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
printf '%s\n' "$full"
echo "$head tok/s | efficiency |"
echo "|---|---|---:|---|---:|---:|---:|"
printf '%s' "$short"

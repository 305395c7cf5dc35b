#!/usr/bin/env bash
# Compares with the real libraries: makes build/venv from scripts/requirements.txt (VENV= for one that exists already),
# then runs each check. A peer that is missing is a failure, never a skip. Ends with `N passed, N failed`.
set -u
cd "$(dirname "$0")/.." || exit 1
venv=${VENV:-build/venv}
python=$venv/bin/python

# What is installed decides, so that a venv of another day with other versions is not taken for this one.
complete() {
    [ -x "$python" ] && "$python" - scripts/requirements.txt <<'PYTHON'
import importlib.metadata, sys
for line in open(sys.argv[1]):
    name, _, version = line.strip().partition("==")
    if name and not name.startswith("#"):
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            sys.exit(f"{name}: found {found}, need {version}")
PYTHON
}
if ! complete; then
    echo "installing the peers into $venv"
    mkdir -p "$(dirname "$venv")"
    { [ -x "$python" ] || python3 -m venv "$venv"; } && "$python" -m pip install -q -r scripts/requirements.txt
    if ! complete; then
        echo "error: the peers could not be installed into $venv"
        echo "hint: python3 with its venv module, and access to PyPI, are needed (apt-get install python3-venv)"
        echo "0 passed, 1 failed"
        exit 1
    fi
fi
"$python" --version
sed 's/^/  /' scripts/requirements.txt

${MAKE:-make} -s train_llama tools || { echo "0 passed, 1 failed"; exit 1; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
exec scripts/tally.sh "$python scripts/dump_reference.py --check" "$python scripts/check_nf4.py" \
    "$python scripts/check_tokenizer.py" "$python scripts/check_training.py" "$python scripts/check_bf16.py" \
    "$python scripts/check_saved_base.py"

#!/usr/bin/env bash
# kernels_tested.sh BUILD NAMES: the GPU kernels in the objects that nvcc made (BUILD/kernels/gpu*.o), against NAMES,
# the kernels that tests have launched on the stand-in (`make test` writes build/release/simt/kernels.txt). Every
# instantiation that is in the program must have run. Needs nm.
set -u
if [ $# != 2 ] || [ ! -s "$2" ]; then
    echo "error: ${2:-the list of kernels that ran} is missing or empty"
    echo "hint: make test; then scripts/kernels_tested.sh BUILD build/release/simt/kernels.txt"
    exit 1
fi
shopt -s nullglob
objects=("$1"/kernels/gpu*.o)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A kernel's own symbol in an object is the host's function that launches it: `void name<arguments>(parameters)`. Names
# are compared without blanks, since demanglers differ in them.
short() { sed -E 's/^void //; s/^([^(<]*)(<.*>)?\(.*$/\1\2/' | tr -d ' ' | sort -u; }
if [ ${#objects[@]} = 0 ] || ! nm "${objects[@]}" >/dev/null; then
    echo "error: no objects of nvcc in $1/kernels"
    exit 1
fi
# device_probe_kernel is asked about and never run (kernels/device.cuh). Tests have kernels of their own as well.
nm -C "${objects[@]}" | grep -E '^[0-9a-f]+ [tTwWu] ' | sed -E 's/^[0-9a-f]+ . //' | grep -v '\[clone' |
    grep -E '^(void )?[a-z0-9_]+_kernel[0-9]*[<(]' | short | grep -v '^device_probe_kernel$' >"$work/there"
sed 's/$/()/' "$2" | short >"$work/ran"
missing=$(comm -23 "$work/there" "$work/ran")
if [ ! -s "$work/there" ]; then
    echo "error: no kernels in $1/kernels/gpu*.o"
    exit 1
fi
echo "$(wc -l <"$work/there") kernels in the objects, $(comm -12 "$work/there" "$work/ran" | wc -l) of them tested"
if [ -n "$missing" ]; then
    echo "error: no test launches"
    sed 's/^/    /' <<<"$missing"
    echo "hint: a test in dev/tests/gpu_*.cpp, or remove the instantiation"
    exit 1
fi

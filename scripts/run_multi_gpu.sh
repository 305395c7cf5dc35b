#!/usr/bin/env bash
# All GPUs of this machine, one rank each:
#
#   scripts/run_multi_gpu.sh -m DIR -i data.jsonl -r 16 [any option of train_llama]
#
#   RANKS=4     fewer ranks than GPUs
#   GRACE=60    seconds that Ctrl-C or TERM leaves for the step at hand and its checkpoint, before mpirun kills (its own
#               default is 1; it waits them out, also when a rank has died)
#   MPIRUN=     another mpirun than that of the path
#
# A base that does not fit one card: add --shard-base. Look first: --dry-run.
set -eu
program=$(cd "$(dirname "$0")/.." && pwd)/train_llama
mpirun=${MPIRUN:-mpirun}

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}
[ $# -gt 0 ] || fail "no options for train_llama" "scripts/run_multi_gpu.sh -m DIR -i data.jsonl -r 16"
[ -x "$program" ] || fail "$program is not there" "make train_llama"
command -v "$mpirun" >/dev/null || fail "no mpirun" "make deps train_llama"
if [ -z "${RANKS:-}" ]; then
    command -v nvidia-smi >/dev/null || fail "no nvidia-smi, so the GPUs cannot be counted" "RANKS=8 $0 ..."
    RANKS=$(nvidia-smi --list-gpus | wc -l)
    [ "$RANKS" -gt 0 ] || fail "nvidia-smi lists no GPU" "without one: mpirun -n 2 ./train_llama --device cpu ..."
fi

# Open MPI's mpirun kills one second after it has passed a signal on; its variables mean nothing to another mpirun.
export OMPI_MCA_odls_base_sigkill_timeout=${GRACE:-60} PRTE_MCA_odls_base_sigkill_timeout=${GRACE:-60}
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
exec "$mpirun" -n "$RANKS" "$program" --device cuda "$@"

#!/usr/bin/env bash
# Two machines (or more) without a batch system, over ssh:
#
#   HOSTS="alpha beta" scripts/run_two_nodes.sh -m DIR -i data.jsonl -r 16 [any option of train_llama]
#
#   PER_HOST=8    ranks on each: its GPUs, or 1 for CPUs (default: the GPUs that nvidia-smi lists here, else 1)
#   NETWORK=eth0  the interface between them, where there are several (an address range does for MPI: 10.0.0.0/24;
#                 NCCL then chooses by itself)
#   GRACE=60      seconds that Ctrl-C or TERM leaves for the step at hand and its checkpoint, before mpirun kills (its
#                 own default is 1; it waits them out, also when a rank has died)
#   AGENT=ssh     how a command is started on another host
#   MPIRUN=       another mpirun than that of the path (Open MPI)
#
# The program, the model and the data lie under the same paths on all of them; the run directory is written on the first.
set -eu
program=$(cd "$(dirname "$0")/.." && pwd)/train_llama
mpirun=${MPIRUN:-mpirun}
agent=${AGENT:-ssh}

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}
[ -n "${HOSTS:-}" ] && [ $# -gt 0 ] || fail "HOSTS or the options for train_llama are missing" \
    'HOSTS="alpha beta" scripts/run_two_nodes.sh -m DIR -i data.jsonl -r 16'
[ -x "$program" ] || fail "$program is not there" "make train_llama"
if [ -z "${PER_HOST:-}" ]; then
    PER_HOST=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$PER_HOST" -gt 0 ] || PER_HOST=1
fi

own=$(sha256sum <"$program")
list="" ranks=0
for host in $HOSTS; do
    theirs=$($agent "$host" "sha256sum <'$program'") ||
        fail "$host cannot be reached, or $program is not there" "$agent $host must work without a password"
    [ "$theirs" = "$own" ] || fail "$program on $host is another build than here" "copy this one there"
    list="$list${list:+,}$host:$PER_HOST"
    ranks=$((ranks + PER_HOST))
done

network=()
if [ -n "${NETWORK:-}" ]; then
    export OMPI_MCA_btl_tcp_if_include=$NETWORK
    export OMPI_MCA_oob_tcp_if_include=$NETWORK PRTE_MCA_prte_if_include=$NETWORK
    case $NETWORK in
        */*) ;;  # NCCL takes names alone
        *) export NCCL_SOCKET_IFNAME=$NETWORK && network=(-x NCCL_SOCKET_IFNAME) ;;
    esac
fi
# Open MPI 4 reads OMPI_*; the launcher of 5 reads PRTE_*.
export OMPI_MCA_odls_base_sigkill_timeout=${GRACE:-60} PRTE_MCA_odls_base_sigkill_timeout=${GRACE:-60}
export OMPI_MCA_plm_rsh_agent=$agent PRTE_MCA_plm_ssh_agent=$agent
exec "$mpirun" -n "$ranks" --host "$list" --bind-to none "${network[@]}" "$program" "$@"

#!/usr/bin/env bash
# Llama-3.1-8B under SLURM, two nodes of eight GPUs, past the time limit as often as it takes:
#
#   sbatch scripts/slurm_8b.sh MODEL_DIR data.jsonl runs/mine
#
# from the project's folder, whose ./train_llama it starts.
#
# Two minutes before the limit SLURM sends TERM to every rank: they finish the step, save, and end with 143. The job
# then puts itself into the queue again and goes on from that checkpoint. So does a job that SLURM itself has requeued.
# The run directory, the model and the data must lie where all nodes see them.
#SBATCH --job-name=train_llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train_llama-%j.out
set -u
if [ $# != 3 ] || [ ! -x ./train_llama ]; then
    echo "usage, in the project's folder, after make train_llama:" >&2
    echo "  sbatch scripts/slurm_8b.sh MODEL_DIR DATA.jsonl RUN_DIR" >&2
    exit 2
fi

# srun does not take --cpus-per-task over from sbatch since Slurm 22.05.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# --resume begins afresh where there is no checkpoint yet. --mpi: the plug-in that your MPI speaks (srun --mpi=list);
# --kill-on-bad-exit: a rank that dies takes the others with it.
srun --mpi="${MPI_PLUGIN:-pmix}" --kill-on-bad-exit=1 \
    ./train_llama -m "$1" -i "$2" -o "$3" -r 16 --save-every 100 --resume
status=$?
if [ $status = 143 ]; then
    echo "stopped at the time limit: into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status

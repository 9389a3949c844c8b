#!/usr/bin/env bash
# SLURM with GPUs: `sbatch launch/slurm.sh`, from the root of the repository. One process a GPU, as
# JAX's own detection of SLURM has it; it finds the other processes by SLURM's variables.
#
#SBATCH --job-name=stvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# May be put back into the queue, and keeps its number: the same workdir, the same log.
#SBATCH --requeue
# Two minutes before its time is over every process gets SIGUSR1: all save, and end with 75. Without
# "B:" it goes to the processes of srun, not to this shell.
#SBATCH --signal=USR1@120
#
# Follow it:   tail -f stvit-JOBID.log
# End it:      scancel JOBID; SIGTERM comes first, and with it KillWait (30 seconds) to save.
# Curves:      metrics.jsonl and TensorBoard files in the workdir.
set -uo pipefail

# All nodes see these two. Data are read at random: a fast disk of each node is better than NFS.
: "${WORKDIR:=runs/stvit_small}" "${DATA_DIR:=/scratch/$USER/tensorflow_datasets}"
: "${CONFIG:=configs/stvit_small.py}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/stvit_jax}"
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# Where one process fails, the others end by themselves, within two minutes. SLURM must not end them:
# the first that ends with 75 would take along those that are about to.
srun --kill-on-bad-exit=0 python train.py --config "$CONFIG" --workdir "$WORKDIR" \
    --config.data.dir="$DATA_DIR" "$@"
code=$?

# srun's code is the highest of its processes'. 75: stopped and saved, the same command continues.
if [ "$code" -eq 75 ]; then
    echo "stopped; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

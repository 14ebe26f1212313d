#!/usr/bin/env bash
#SBATCH --job-name=oput --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=01:00:00
# An example for Slurm: sbatch launch/slurm.sh --optimizer lamb --parallel zero2-ds. Arguments go to launch/train.py.
# One task is one rank; the first node's first rank is where ranks meet.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
srun "${OPUT_PYTHON:-.venv/bin/python}" launch/train.py "$@"

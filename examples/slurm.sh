#!/usr/bin/env bash
#SBATCH --job-name=judge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
# Evaluate a model on several machines under Slurm. On each machine, torchrun starts a process for each GPU.
#
#     sbatch examples/slurm.sh runs/carso --data data/cifar10.npz --protocol standard
#
# The arguments are those of `purify-fast evaluate`. The folder of the report must be visible on all machines. If a job
# ends early, submit it again with the same arguments, on as many GPUs (with --batch-size, on any number). It then
# continues after the last finished attack. This script is tested with two processes on a single machine. It has not yet
# been run on several machines or on GPUs.
set -euo pipefail
PYTHON=${PYTHON:-python}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-2}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m purify_fast evaluate "$@"

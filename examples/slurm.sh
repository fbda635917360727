#!/usr/bin/env bash
#SBATCH --job-name=judge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
# An evaluation on several machines under Slurm: one torchrun on each machine, which starts one process for each GPU.
#
#     sbatch examples/slurm.sh runs/carso --data data/cifar10.npz --protocol standard
#
# The words behind the script's name are those of `purify-fast evaluate`. The report goes to a folder that all machines
# see. A job that ended early is submitted again with the same words, on any number of machines: it goes on from the
# batches that are finished. Nothing of this has been run on several machines or on GPUs yet; the script is rehearsed
# with two processes on one machine.
set -euo pipefail
PYTHON=${PYTHON:-python}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-2}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m purify_fast evaluate "$@"

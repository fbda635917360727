#!/usr/bin/env bash
# Train in several processes with torchrun: a process for each GPU, or two processes on a CPU.
#
#     bash examples/multi_gpu.sh                  # uses all GPUs of this machine, and MNIST from data/mnist.npz
#     bash examples/multi_gpu.sh --tiny           # uses two CPU processes and digits, and takes seconds
#
# Each process computes a part of the batch. BatchNorm uses the statistics of the whole batch. The resulting weights are
# those of a single process, up to rounding. This script is tested on CPUs. It has not yet been run on several GPUs.
set -euo pipefail
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/multi_gpu}

if [[ ${1:-} == --tiny ]]; then
  processes=2
  options=(--data digits --eps 0.2 --device cpu --batch-size 64)
  classifier=(--steps 2 --epochs 1)
  carso=(--steps 2 --epochs 3)
  export OMP_NUM_THREADS=1
else
  processes=$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")
  options=(--data data/mnist.npz --eps 0.3)
  classifier=(--epochs 20)
  carso=(--epochs 20)
fi

run() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m purify_fast train "$@"; }

run classifier "${options[@]}" "${classifier[@]}" --out "$OUT/classifier"
run carso "${options[@]}" "${carso[@]}" --classifier "$OUT/classifier" --out "$OUT/carso"
echo "trained in $processes processes: $OUT/carso"

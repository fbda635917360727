"""Run every op once with each of its example inputs, so that compute-sanitizer can check the kernels."""

from __future__ import annotations

import argparse
import math

import torch

from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.examples import tensors, to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    count = 0
    for name, op in REGISTRY.items():
        for example in op.examples:
            for out in tensors(op.handle(*to(example.make(example.dtypes[0], 0), device))):
                assert out.dtype == torch.uint8 or math.isfinite(out.double().sum()), (name, example.name)
            count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(REGISTRY)} ops, {count} examples on {device}")


if __name__ == "__main__":
    main()

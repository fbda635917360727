"""What the kernels and their launchers share.

The kernels take float16, bfloat16 and float32 and compute in float32; the op sends float64 to the reference.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements per program of elementwise kernels, and of one trip of a loop over a sample.
BLOCK = 1024
#: Elements a program of a per-sample sum goes through; fixed, so that the result is independent of the batch.
CHUNK = 8192


def on(x: Tensor):
    """x's device as the current one while a kernel is launched; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last, and not contiguous too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def warps(block: int) -> int:
    """Warps for a program of ``block`` elements: eight elements per thread, one to eight warps."""
    return max(1, min(8, block // 256))


@triton.jit
def log1p(y):
    # log(1 + y) for y in [0, 1]: what the rounding of 1 + y loses, the quotient restores
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    # the same device; it needs |x| small, and beyond 1 nothing cancels
    u = tl.exp(x)
    near = (u - 1.0) * (x / tl.where(u == 1.0, 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 1.0, near, u - 1.0))

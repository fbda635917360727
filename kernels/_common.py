"""The parts that the kernels and their launchers share.

The kernels take float16, bfloat16 and float32 and compute in float32; the op sends float64 to the reference.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of one trip of a sum over a sample, and those that a program adds. They decide the order of the sum: the
#: same on every device and in any batch.
BLOCK = 1024
CHUNK = 8192
#: Warps of an elementwise program, and 16-byte vectors that a thread moves of each tensor, by the major compute
#: capability; others as 9. Counted, not measured: bandwidth times 0.7 us of latency is 13 kB in flight on each
#: multiprocessor of an A100, 18 to 25 of an H100 or H200, 38 of a B200, 7 of an RTX 5090; one vector in each of its
#: 1,536 or 2,048 threads is 24 or 32 kB for every tensor that is read.
WARPS = 4
VECTORS = {8: 1, 9: 1, 10: 2, 12: 1}


def on(x: Tensor):
    """x's device as the current one while a kernel is launched; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x is channels_last, and not contiguous too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x contiguous, from a multiple of 16 bytes on: elsewhere a thread gets other elements, and a sum another order."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def warps(block: int) -> int:
    """Warps for a sum over ``block`` elements at once: eight elements per thread, one to eight warps."""
    return max(1, min(8, block // 256))


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def tile(size: int, *tensors: Tensor) -> tuple[int, int]:
    """Elements and warps of an elementwise program over rows of ``size`` elements of these tensors.

    A thread moves whole 16-byte vectors of the narrowest elements, and so twice as many of those twice as wide.
    """
    vector = 16 // min(x.element_size() for x in tensors)
    most = 32 * WARPS * VECTORS.get(_major(tensors[0].device), VECTORS[9]) * vector
    width = min(most, max(32, triton.next_power_of_2(size)))
    return width, max(1, min(WARPS, width // (32 * vector)))


def sum_tile(size: int, most: int = BLOCK) -> tuple[int, int]:
    """Elements and warps of a program that sums rows of ``size`` elements, the same on every device."""
    width = min(most, max(32, triton.next_power_of_2(size)))
    return width, warps(width)


#: The most programs along the second and the third axis of a launch.
MOST_PROGRAMS = 65535


def grid(rows: int, blocks: int) -> tuple[int, int, int]:
    """The programs for ``blocks`` blocks of each of ``rows`` rows; `program` tells a program which is its own.

    The axes of a launch save every thread a division by the number of blocks.
    """
    third = triton.cdiv(rows, MOST_PROGRAMS)
    return blocks, triton.cdiv(rows, third), third


@triton.jit
def program(rows):
    """The row and the block of this program, int32. Programs beyond the last row do its work again, to the same end."""
    row = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    return tl.minimum(row, rows - 1), tl.program_id(0)


@triton.jit
def first_of(block, size, WIDTH: tl.constexpr):
    """The first element of a block of a row of ``size`` elements, in as few bits as hold every element of the block."""
    first = (size * 0 + block) * WIDTH  # int64 if the size is
    return first if first.dtype == tl.int64 else first.to(tl.uint32, bitcast=True)


@triton.jit
def log1p(y):
    # log(1 + y) for finite y above -1: what the rounding of 1 + y loses, the quotient restores
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1: where that would lose digits a polynomial, fitted on [-0.7, 0.7] with an error of 2^-24.8."""
    p = tl.fma(x, 0.00019855325808748603, 0.0014098193496465683)
    p = tl.fma(x, p, 0.008334292098879814)
    p = tl.fma(x, p, 0.04166172817349434)
    p = tl.fma(x, p, 0.16666646301746368)
    p = tl.fma(x, p, 0.5000002980232239)
    return tl.where(tl.abs(x) < 0.7, tl.fma(x * p, x, x), tl.exp(x) - 1.0)

"""Code that the kernels and their launchers share.

The kernels accept float16, bfloat16 and float32, and compute in float32. For float64 the ops use the reference.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: A program that sums over a sample adds at most BLOCK elements in each iteration, or 2 * BLOCK in some kernels. If a
#: kernel divides the sample into chunks, a program adds the CHUNK elements of one chunk. These numbers determine the
#: order of the additions, so they are the same for every device and batch.
BLOCK = 1024
CHUNK = 8192
#: WARPS is the number of warps of an elementwise program. VECTORS is the number of 16-byte vectors that a thread moves
#: per tensor, by major compute capability. Other devices use the value for 9. The values are calculated, not measured.
#: At a latency of 0.7 us, the bandwidth requires this much data in flight on each multiprocessor: 13 kB (A100), 18 to
#: 25 kB (H100, H200), 38 kB (B200), 7 kB (RTX 5090). One vector in each of 1,536 or 2,048 threads is 24 or 32 kB per
#: tensor that is read.
WARPS = 4
VECTORS = {8: 1, 9: 1, 10: 2, 12: 1}
#: The results of the functions that compute the layout of a launch are kept, at most this many of each.
KEPT = 4096


def is_channels_last(x: Tensor) -> bool:
    """Return True if x is channels_last and not contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """Return x, contiguous and with an address that is a multiple of 16 bytes.

    With another address, Triton would assign the elements to threads differently, which changes the order of a sum.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def cdiv(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up, like ``triton.cdiv``, but in less time."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Return the least power of 2 that is at least ``number``, like ``triton.next_power_of_2``, but in less time."""
    return 1 << max(0, number - 1).bit_length()


def limited(registers: int) -> dict[str, int]:
    """Return the option that limits the registers of a thread, if the GPU's compiler has it: NVIDIA's, not AMD's."""
    return {} if torch.version.hip else {"maxnreg": registers}


def warps(block: int) -> int:
    """Return the number of warps, 1 to 8, of a program that sums ``block`` elements together, eight in each thread."""
    return max(1, min(8, block // 256))


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def tile(size: int, *tensors: Tensor) -> tuple[int, int]:
    """Return the number of elements, and of warps, of an elementwise program on tensors with ``size`` elements per row.

    A thread moves whole 16-byte vectors of the narrowest dtype. For a dtype twice as wide, it moves twice as many
    vectors.
    """
    return _tile(size, min(map(Tensor.element_size, tensors)), _major(tensors[0].device))


@functools.lru_cache(KEPT)
def _tile(size: int, bytes_of_element: int, major: int) -> tuple[int, int]:
    vector = 16 // bytes_of_element
    most = 32 * WARPS * VECTORS.get(major, VECTORS[9]) * vector
    width = min(most, max(32, next_power_of_2(size)))
    return width, max(1, min(WARPS, width // (32 * vector)))


@functools.lru_cache(KEPT)
def sum_tile(size: int, most: int = BLOCK) -> tuple[int, int]:
    """Return the number of elements, and of warps, of a program that sums rows of ``size`` elements, on any device."""
    width = min(most, max(32, next_power_of_2(size)))
    return width, warps(width)


#: The largest number of programs along the second and the third axis of a launch.
MOST_PROGRAMS = 65535
#: The largest number of rows of a launch: `program` computes the index of a row in int32.
MOST_ROWS = 2**31 - 1 - MOST_PROGRAMS


def grid(rows: int, blocks: int) -> tuple[int, int, int]:
    """Return the launch grid for ``rows`` rows with ``blocks`` blocks each. `program` returns a program's indices."""
    if rows > MOST_ROWS:
        raise ValueError(f"a kernel computes at most {MOST_ROWS} rows in a call, got {rows}: divide the call")
    third = cdiv(rows, MOST_PROGRAMS)
    return blocks, cdiv(rows, third), third


@triton.jit
def program(rows):
    """Return the row and the block of this program, int32. Programs beyond the last row repeat the last row."""
    row = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    return tl.minimum(row, rows - 1), tl.program_id(0)


@triton.jit
def first_of(block, size, WIDTH: tl.constexpr):
    """Return the index of a block's first element in a row of ``size`` elements: int64 if ``size`` is, else uint32."""
    # Adding size * 0 gives the sum the type of `size`.
    first = (size * 0 + block) * WIDTH
    return first if first.dtype == tl.int64 else first.to(tl.uint32, bitcast=True)


@triton.jit
def log1p(y):
    # Returns log(1 + y) for finite y above -1. The quotient corrects the rounding error of 1 + y.
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """Return exp(x) - 1. Near 0, where the difference would lose digits, a polynomial is used: a fit on [-0.7, 0.7]."""
    p = tl.fma(x, 0.00019855325808748603, 0.0014098193496465683)
    p = tl.fma(x, p, 0.008334292098879814)
    p = tl.fma(x, p, 0.04166172817349434)
    p = tl.fma(x, p, 0.16666646301746368)
    p = tl.fma(x, p, 0.5000002980232239)
    return tl.where(tl.abs(x) < 0.7, tl.fma(x * p, x, x), tl.exp(x) - 1.0)


@triton.jit
def clamp(x, lo, hi):
    """Return min(max(x, lo), hi). A NaN stays NaN."""
    x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load(pointer, at, inside):
    """Return the numbers at some places in float32, and 0 for places that are not inside."""
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def place(element, plane, channels, CHANNELS_LAST: tl.constexpr):
    """Return the place of each element of an image in a tensor with ``channels`` planes, channels_last or not."""
    if CHANNELS_LAST:
        plane, channels = tl.cast(plane, element.dtype), tl.cast(channels, element.dtype)
        channel = element // plane
        element = (element - channel * plane) * channels + channel
    return element


@triton.jit
def places(rows, sizes, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's row, the places of its elements in contiguous images and in those of `place`, and which exist.

    ``sizes`` are the numbers of elements of a row, of elements of a plane, and of planes.
    """
    size, plane, channels = sizes
    row, block = program(rows)
    element, first = first_of(block, size, WIDTH) + tl.arange(0, WIDTH), row.to(tl.int64) * size
    return row, first + element, first + place(element, plane, channels, LAST), element < size

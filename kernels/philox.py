"""`philox` in Triton: the kernel of this op, and device functions with which other kernels draw random numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, first_of, grid, program, tile
from ._launch import launch


@triton.jit
def words(seed, group, draw, sample, stream):
    """Return the four uint32 words of each group of four elements.

    ``group`` is a block of group numbers; the other arguments are scalars.
    """
    c0 = group.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(seed, c0, zero + draw.to(tl.uint32), zero + sample.to(tl.uint32), zero + stream)


@triton.jit
def uniform(word):
    """Convert the 24 high bits of a word to a float32 number in [0, 1)."""
    # The factor is 2^-24.
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def cos_sin(angle):
    """Return cos and sin of angles in [0, 2 pi], within about one ulp.

    The functions of the CUDA libraries would use float64 and local memory. Adding 1.5 * 2^23 rounds the number of
    quarter turns, and moves it into the low bits. The quarter turns are subtracted in three parts, whose products with
    0..4 are exact. The polynomials were fitted on [-pi / 4, pi / 4].
    """
    shifted = tl.fma(angle, 0.6366197723675814, 12582912.0)
    quarter, turn = shifted.to(tl.uint32, bitcast=True), shifted - 12582912.0
    r = tl.fma(turn, -1.2675900507019833e-06, tl.fma(turn, -1.5707950592041016, angle))
    r = tl.fma(turn, -7.443547480486623e-13, r)
    z = r * r
    sin = tl.fma(z, tl.fma(z, -0.00019516977772582322, 0.008332176133990288), -0.16666655242443085)
    sin = tl.fma(r * z, sin, r)
    cos = tl.fma(z, tl.fma(z, 2.4438089894829318e-05, -0.0013887364184483886), 0.04166664555668831)
    cos = tl.fma(z, tl.fma(z, cos, -0.5), 1.0)
    odd = (quarter & 1) == 1
    a, b = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return _negated(a, (quarter + 1) << 30), _negated(b, quarter << 30)


@triton.jit
def _negated(x, bits):
    """Return -x where the highest bit of ``bits`` is set, and x elsewhere."""
    return (x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _radius(word):
    """Return sqrt(-2 log u), where u in (0, 1] comes from the 24 high bits of a word.

    u = 2^e (1 + r) with r in [-1/3, 1/3]. The polynomial is a fit of -2 log(1 + r). A library's logarithm needs 50 %
    more instructions, because it also handles numbers that u never has: 0, infinity, and numbers below 2^-126.
    """
    # The bits of u, which is 2^-24 times the integer (word >> 8) + 1.
    bits = ((word >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True) - 0x0C000000
    exponent = (bits - 0x3F2AAAAB) & -0x00800000
    r = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(r, -0.280527263879776, 0.3077709376811981)
    p = tl.fma(r, p, -0.2799161374568939)
    p = tl.fma(r, p, 0.3283191919326782)
    p = tl.fma(r, p, -0.40022337436676025)
    p = tl.fma(r, p, 0.5001564025878906)
    p = tl.fma(r, p, -0.6666639447212219)
    p = tl.fma(r, p, 0.9999987483024597)
    p = tl.fma(r, p, -2.0)
    # The factor is 2 log(2) 2^-23.
    return tl.sqrt(tl.fma(r, p, exponent.to(tl.float32) * -1.6525916589736e-07))


@triton.jit
def box_muller(a, b):
    """Make two normal numbers from two words."""
    radius = _radius(a)
    # The factor is 2 pi 2^-24.
    cos, sin = cos_sin((b >> 8).to(tl.float32) * 3.745070282923929e-07)
    return radius * cos, radius * sin


@triton.jit
def in_order(a, b, c, d):
    """Interleave four blocks, of the first to the fourth number of each group of four elements, in element order."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def in_pairs(a, b, c, d, e, f, g, h):
    """Interleave eight blocks into one block, in the order of the elements.

    Four adjacent elements are a group. The first four blocks have the first, second, third and fourth element of each
    even group, and the last four blocks have those of each odd group.
    """
    return tl.interleave(in_order(a, c, e, g), in_order(b, d, f, h))


@triton.jit
def _four(seed, group, draw, sample, stream, NORMAL: tl.constexpr):
    """Return the four numbers of each group of four elements: normal numbers, or uniform numbers in [0, 1)."""
    a, b, c, d = words(seed, group, draw, sample, stream)
    if NORMAL:
        w, x = box_muller(a, b)
        y, z = box_muller(c, d)
    else:
        w, x, y, z = uniform(a), uniform(b), uniform(c), uniform(d)
    return w, x, y, z


@triton.jit
def noise(seed, first, draw, sample, stream, GROUPS: tl.constexpr, PAIRS: tl.constexpr, NORMAL: tl.constexpr = True):
    """Return the numbers of ``GROUPS`` groups of four elements, beginning with group ``first``, in element order.

    With ``PAIRS``, a thread draws two neighboring groups. These are the eight 16-bit elements that the thread loads and
    stores together. If it drew single groups, numbers would have to move between threads through shared memory.
    """
    if PAIRS:
        group = first + 2 * tl.arange(0, GROUPS // 2)
        a, b, c, d = _four(seed, group, draw, sample=sample, stream=stream, NORMAL=NORMAL)
        e, f, g, h = _four(seed, group + 1, draw, sample=sample, stream=stream, NORMAL=NORMAL)
        out = in_pairs(a, b, c, d, e=e, f=f, g=g, h=h)
    else:
        a, b, c, d = _four(seed, first + tl.arange(0, GROUPS), draw, sample=sample, stream=stream, NORMAL=NORMAL)
        out = in_order(a, b, c, d)
    return out


@triton.jit
def _philox(
    seed_ptr, ids_ptr, out_ptr, rows, numel, draws, first_draw, stream, KIND: tl.constexpr, GROUPS: tl.constexpr
):
    """A program writes some numbers of one row, in groups of four: the words of a Philox block, or what they become."""
    # seed_ptr: [1], int64; ids_ptr: [rows / draws], int64; out_ptr: [rows, numel], int32 or float32
    row, block = program(rows)
    seed, sample, draw = tl.load(seed_ptr), tl.load(ids_ptr + row // draws), row % draws + first_draw
    first = first_of(block, numel, GROUPS)
    if KIND == 0:
        a, b, c, d = words(seed, first + tl.arange(0, GROUPS), draw, sample, stream)
        out = in_order(a, b, c, d).to(tl.int32, bitcast=True)
    else:
        out = noise(seed, first, draw, sample=sample, stream=stream, GROUPS=GROUPS, PAIRS=False, NORMAL=KIND == 2)
    element = first_of(block, numel, GROUPS * 4) + tl.arange(0, GROUPS * 4)
    tl.store(out_ptr + row.to(tl.int64) * numel + element, out, mask=element < numel)


def forward(
    seed: Tensor, sample_ids: Tensor, numel: int, stream: int, distribution: int, draws: int = 1, first_draw: int = 0
) -> Tensor:
    """Draw [B, draws, numel], int32 bits or float32, as defined by `purify_fast.ops.philox.reference`."""
    dtype = torch.int32 if distribution == 0 else torch.float32
    out = torch.empty((sample_ids.shape[0], draws, numel), dtype=dtype, device=sample_ids.device)
    if out.numel() == 0:
        return out
    block, warps = tile(numel, out)
    rows = sample_ids.shape[0] * draws
    given = seed.contiguous(), sample_ids.contiguous(), out, rows, numel, draws, first_draw, stream
    shape = {"GROUPS": block // 4, "num_warps": warps}
    launch(_philox, grid(rows, cdiv(numel, block)), *given, KIND=distribution, **shape, enable_fp_fusion=True)
    return out

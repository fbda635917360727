"""Philox4x32-10 in Triton: the device functions other kernels draw with, and the op `philox`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on, tile


@triton.jit
def words(seed, group, draw, sample, stream):
    """The four uint32 words of each group of four elements; ``group`` is a block, the others scalars."""
    c0 = group.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(seed, c0, zero + draw.to(tl.uint32), zero + sample.to(tl.uint32), zero + stream)


@triton.jit
def uniform(word):
    """A word as float32 in [0, 1): its 24 high bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def cos_sin(angle):
    """cos and sin for angles in [0, 2 pi], to about one ulp; the libraries' versions pull in float64 and local memory.

    The quarter turn is subtracted in three parts whose products with 0..4 are exact; then Taylor's series.
    """
    turn = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - turn * 1.5707950592041016) - turn * 1.2675900507019833e-06) - turn * 7.443547480486623e-13
    z = r * r
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    quarter = turn.to(tl.int32)
    swap = (quarter & 1) == 1
    a, b = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -a, a), tl.where((quarter & 2) == 2, -b, b)


@triton.jit
def box_muller(a, b):
    """Two normals from two words."""
    radius = tl.sqrt_rn(-2.0 * tl.log(((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08))
    cos, sin = cos_sin((b >> 8).to(tl.float32) * 3.745070282923929e-07)  # 2 pi 2^-24
    return radius * cos, radius * sin


@triton.jit
def in_order(a, b, c, d):
    """Four blocks of one word each -> one block, four times as long, in the order of the elements."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def normals(seed, group, draw, sample, stream):
    """The normals of the elements 4 group .. 4 group + 3, in order."""
    w0, w1, w2, w3 = words(seed, group, draw, sample, stream)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return in_order(n0, n1, n2, n3)


@triton.jit
def _philox(
    seed_ptr, ids_ptr, out_ptr, numel, draws, first_draw, stream, blocks, KIND: tl.constexpr, GROUPS: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    row, block = pid // blocks, pid % blocks
    group = block * GROUPS + tl.arange(0, GROUPS)
    seed, sample = tl.load(seed_ptr), tl.load(ids_ptr + row // draws)
    draw = row % draws + first_draw
    if KIND == 2:
        out = normals(seed, group, draw, sample, stream)
    else:
        w0, w1, w2, w3 = words(seed, group, draw, sample, stream)
        if KIND == 1:
            out = in_order(uniform(w0), uniform(w1), uniform(w2), uniform(w3))
        else:
            out = in_order(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    element = block * GROUPS * 4 + tl.arange(0, GROUPS * 4)
    tl.store(out_ptr + row * numel + element, out, mask=element < numel)


def philox(
    seed: Tensor, sample_ids: Tensor, numel: int, stream: int, distribution: int, draws: int = 1, first_draw: int = 0
) -> Tensor:
    """`purify_fast.ops.philox.reference`'s contract: [B, draws, numel], int32 bits or float32."""
    dtype = torch.int32 if distribution == 0 else torch.float32
    out = torch.empty((sample_ids.shape[0], draws, numel), dtype=dtype, device=sample_ids.device)
    if out.numel() == 0:
        return out
    block, warps = tile(numel, out)
    blocks = triton.cdiv(numel, block)
    with on(out):
        _philox[(sample_ids.shape[0] * draws * blocks,)](
            seed.contiguous(),
            sample_ids.contiguous(),
            out,
            numel,
            draws,
            first_draw,
            stream,
            blocks,
            KIND=distribution,
            GROUPS=block // 4,
            num_warps=warps,
        )
    return out

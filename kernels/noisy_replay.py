"""`noisy_replay` in Triton: elementwise, with noise only for replayed samples, and with the bits of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, clamp, load, tile
from ._launch import launch
from .philox import noise

#: The fourth word of Philox's counter: `purify_fast.ops.philox.Stream.REPLAY_NOISE`.
REPLAY_NOISE = 5


@triton.jit(do_not_specialize=["blocks"])
def _forward(
    x_ptr,  # [B, size]
    adv_ptr,  # [B, size]
    drift_ptr,  # [B]
    tau_ptr,  # []
    eps_ptr,  # [B]
    seed_ptr,  # [1], int64
    ids_ptr,  # [B], int64
    out_ptr,  # [B, size]
    size,
    blocks,
    lo,
    hi,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program writes some elements of one sample."""
    # clamp(x + eps (2 r - 1), lo, hi) if drift > tau, else x_adv.
    pid = tl.program_id(0).to(tl.int64)
    row, block = pid // blocks, pid % blocks
    element = block * GROUPS * 4 + tl.arange(0, GROUPS * 4)
    at, inside = row * size + element, element < size
    if tl.load(drift_ptr + row) > tl.load(tau_ptr):
        sample = tl.load(ids_ptr + row)
        seed, first = tl.load(seed_ptr), block * GROUPS
        r = noise(seed, first, sample * 0, sample, STREAM, GROUPS=GROUPS, PAIRS=PAIRS, NORMAL=False)
        x = load(x_ptr, at, inside) + tl.load(eps_ptr + row).to(tl.float32) * (2 * r - 1)
        x = clamp(x, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + at, tl.load(adv_ptr + at, mask=inside, other=0.0), mask=inside)


def forward(
    x: Tensor,
    x_adv: Tensor,
    drift: Tensor,
    tau: Tensor,
    eps: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    lo: float,
    hi: float,
) -> Tensor:
    """Return x with noise for samples whose drift is above tau, and x_adv for all other samples, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    size = x.numel() // x.shape[0]
    block, warps = tile(size, x)
    blocks = cdiv(size, block)
    tensors = [one.contiguous() for one in (x, x_adv, drift, tau, eps, seed, sample_ids)]
    given = *tensors, out, size, blocks, float(lo), float(hi)
    shape = {"GROUPS": block // 4, "PAIRS": x.element_size() == 2, "num_warps": warps}
    launch(_forward, (x.shape[0] * blocks,), *given, STREAM=REPLAY_NOISE, **shape, enable_fp_fusion=False)
    return out

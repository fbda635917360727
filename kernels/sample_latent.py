"""`sample_latent` in Triton: one program per sample. The kernel draws the noise, and the backward draws it again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import dense, expm1, sum_tile, tile
from ._launch import launch
from .philox import noise

#: The fourth word of Philox's counter: `purify_fast.ops.philox.Stream.LATENT`.
LATENT = 1


@triton.jit
def _forward(
    mu_ptr,  # [B, dim]
    logvar_ptr,  # [B, dim]
    seed_ptr,  # [1], int64
    ids_ptr,  # [B], int64
    z_ptr,  # [B, dim]
    kl_ptr,  # [B], float32
    dim,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program writes the latent of one sample, and its divergence."""
    # z = mu + e exp(logvar / 2), kl = 1/2 sum (mu^2 + exp(logvar) - logvar - 1).
    row = tl.program_id(0).to(tl.int64)
    seed, sample = tl.load(seed_ptr), tl.load(ids_ptr + row)
    zero = sample * 0
    total = tl.zeros((GROUPS * 4,), tl.float32)
    for first in range(0, dim, GROUPS * 4):
        drawn = noise(seed, first // 4, zero, sample=sample, stream=STREAM, GROUPS=GROUPS, PAIRS=PAIRS)
        element = first + tl.arange(0, GROUPS * 4)
        inside = element < dim
        m = tl.load(mu_ptr + row * dim + element, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + row * dim + element, mask=inside, other=0.0).to(tl.float32)
        tl.store(z_ptr + row * dim + element, (m + drawn * tl.exp(0.5 * v)).to(z_ptr.dtype.element_ty), mask=inside)
        # Elements outside the row add 0.
        total += m * m + tl.exp(v) - v - 1.0
    tl.store(kl_ptr + row, 0.5 * tl.sum(total, 0))


@triton.jit
def _backward(
    dz_ptr,  # [B, dim]
    dkl_ptr,  # [B]
    mu_ptr,  # [B, dim]
    logvar_ptr,  # [B, dim]
    seed_ptr,  # [1], int64
    ids_ptr,  # [B], int64
    dmu_ptr,  # [B, dim]
    dlogvar_ptr,  # [B, dim]
    dim,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program writes some gradients of mu and logvar of one sample."""
    # dmu = dz + dkl mu, dlogvar = dz e exp(logvar / 2) / 2 + dkl (exp(logvar) - 1) / 2.
    row = tl.program_id(0).to(tl.int64)
    seed, sample, dkl = tl.load(seed_ptr), tl.load(ids_ptr + row), tl.load(dkl_ptr + row).to(tl.float32)
    zero = sample * 0
    for first in range(0, dim, GROUPS * 4):
        drawn = noise(seed, first // 4, zero, sample=sample, stream=STREAM, GROUPS=GROUPS, PAIRS=PAIRS)
        element = first + tl.arange(0, GROUPS * 4)
        inside = element < dim
        at = row * dim + element
        m = tl.load(mu_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dv = 0.5 * (dz * (drawn * tl.exp(0.5 * v)) + dkl * expm1(v))
        tl.store(dmu_ptr + at, (dz + dkl * m).to(dmu_ptr.dtype.element_ty), mask=inside)
        tl.store(dlogvar_ptr + at, dv.to(dlogvar_ptr.dtype.element_ty), mask=inside)


def _options(mu: Tensor, logvar: Tensor, tile: tuple[int, int]) -> dict[str, Any]:
    """Return the constants of a kernel for a tile's elements and warps, and the options of its launch."""
    # A thread processes eight 16-bit elements together.
    pairs, (block, warps) = min(mu.element_size(), logvar.element_size()) == 2, tile
    return {"STREAM": LATENT, "GROUPS": block // 4, "PAIRS": pairs, "num_warps": warps, "enable_fp_fusion": True}


def forward(mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (z [B, D], kl [B]) like the op."""
    z = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    kl = torch.empty(mu.shape[0], dtype=torch.float32, device=mu.device)
    if mu.numel() == 0:
        return z, kl.zero_()
    given = dense(mu), dense(logvar), seed.contiguous(), sample_ids.contiguous(), z, kl, mu.shape[1]
    launch(_forward, (mu.shape[0],), *given, **_options(mu, logvar, sum_tile(mu.shape[1])))
    return z, kl


def backward(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (dmu, dlogvar) [B, D], in the dtypes of mu and logvar."""
    dmu = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    dlogvar = torch.empty(mu.shape, dtype=logvar.dtype, device=mu.device)
    if mu.numel() == 0:
        return dmu, dlogvar
    inputs = (grad_z, grad_kl, mu, logvar, seed, sample_ids)
    given = *(one.contiguous() for one in inputs), dmu, dlogvar, mu.shape[1]
    launch(_backward, (mu.shape[0],), *given, **_options(mu, logvar, tile(mu.shape[1], mu, logvar)))
    return dmu, dlogvar

"""The reparameterised posterior sample of a variational autoencoder, and its divergence from the prior.

    z = mu + e exp(logvar / 2),   e ~ N(0, 1) from the Philox stream LATENT
    kl_b = 1/2 sum_d (mu^2 + exp(logvar) - logvar - 1)

Source: Kingma & Welling, ICLR 2014; CARSO (arXiv 2306.06081), section 4.3. Backward draws e again from the seed:

    dmu = dz + dkl mu,   dlogvar = dz e exp(logvar / 2) / 2 + dkl (exp(logvar) - 1) / 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _kept
from ._gradient import first_order, needs_gradient
from ._op import Launcher, define_op, wide
from .philox import Stream, check_stream, philox


def _noise(mu: Tensor, seed: Tensor, sample_ids: Tensor) -> Tensor:
    return philox(seed, sample_ids, mu.shape[1], stream=Stream.LATENT, distribution="normal")[:, 0]


def reference(mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: (z [B, D] in mu's dtype, kl [B] in float32; float64 for float64)."""
    mean, logs = wide(mu), wide(logvar)
    z = mean + _noise(mu, seed, sample_ids).to(mean.dtype) * torch.exp(0.5 * logs)
    return z.to(mu.dtype), 0.5 * (mean.square() + logs.exp() - logs - 1).sum(1)


def reference_backward(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) [B, D], in the dtypes of mu and logvar."""
    mean, logs, to_z, to_kl = wide(mu), wide(logvar), wide(grad_z), wide(grad_kl)[:, None]
    deviation = _noise(mu, seed, sample_ids).to(mean.dtype) * torch.exp(0.5 * logs)
    to_logvar = 0.5 * (to_z * deviation + to_kl * torch.expm1(logs))
    return (to_z + to_kl * mean).to(mu.dtype), to_logvar.to(logvar.dtype)


OP = define_op(
    "sample_latent",
    "(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda mu, logvar, seed, sample_ids: (mu.new_empty(mu.shape), wide(mu).new_empty(mu.shape[0])),
    triton=Launcher("sample_latent", "forward"),
    replaces_many=True,
)
BACKWARD = define_op(
    "sample_latent_backward",
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad_z, grad_kl, mu, logvar, seed, sample_ids: (mu.new_empty(mu.shape), logvar.new_empty(mu.shape)),
    triton=Launcher("sample_latent", "backward"),
    replaces_many=True,
)


#: z, kl, and the deviation e exp(logvar / 2) in the arithmetic's dtype; then the gradients from it.
KEEPING = _kept.kernel(
    "sample_latent_keeping",
    "(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor, Tensor)",
    lambda mu, logvar, seed, sample_ids: (
        mu.new_empty(mu.shape),
        wide(mu).new_empty(mu.shape[0]),
        wide(mu).new_empty(mu.shape),
    ),
)
FROM_KEPT = _kept.kernel(
    "sample_latent_from_kept",
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor deviation) -> (Tensor, Tensor)",
    lambda grad_z, grad_kl, mu, logvar, deviation: (mu.new_empty(mu.shape), logvar.new_empty(mu.shape)),
)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        z, kl, deviation = KEEPING(mu, logvar, seed, sample_ids)
        ctx.save_for_backward(mu, logvar, deviation)
        return z, kl

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        return (*FROM_KEPT(grad_z, grad_kl, *ctx.saved_tensors), None, None)


class _SampleLatent(torch.autograd.Function):
    @staticmethod
    def forward(mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        return OP.handle(mu, logvar, seed, sample_ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        return (*BACKWARD(grad_z, grad_kl, *ctx.saved_tensors), None, None)


def sample_latent(mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sample the posterior and measure it against the prior N(0, I).

    Args:
        mu: means, ``[B, D]``; float16, bfloat16, float32 or float64.
        logvar: logarithms of the variances, of mu's shape, dtype and device.
        seed: int64 ``[1]``, on mu's device.
        sample_ids: int64 ``[B]``, the global index of each sample (see `philox`).

    Returns:
        ``z [B, D]`` in mu's dtype and ``kl [B]`` in nats, float32 (float64 for float64 inputs), also under autocast.

    Raises:
        TypeError: seed or sample_ids is no tensor.
        ValueError: shapes, dtypes or devices disagree.

    First-order gradients only; deterministic given the seed; ``vmap`` is not supported by the kernels.
    """
    if mu.dim() != 2 or mu.shape != logvar.shape or mu.dtype != logvar.dtype or not mu.is_floating_point():
        raise ValueError(
            f"mu and logvar need one floating-point shape [B, D], got {mu.dtype} {list(mu.shape)} "
            f"and {logvar.dtype} {list(logvar.shape)}"
        )
    check_stream(seed, sample_ids)
    if sample_ids.shape[0] != mu.shape[0]:
        raise ValueError(f"sample_ids has {sample_ids.shape[0]} entries for a batch of {mu.shape[0]}")
    if not mu.device == logvar.device == seed.device:
        raise ValueError(f"mu is on {mu.device}, logvar on {logvar.device}, seed on {seed.device}: they must agree")
    if OP.plain(mu.device, mu.dtype, mu.numel()):
        return reference(mu, logvar, seed, sample_ids)
    if not needs_gradient(mu, logvar):
        return OP.handle(mu, logvar, seed, sample_ids)
    keeps = _kept.serves(BACKWARD, mu)
    return (_Kept if keeps else _SampleLatent).apply(mu, logvar, seed, sample_ids)

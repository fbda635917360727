"""Draws a sample from a variational autoencoder's posterior, and computes the posterior's divergence from the prior.

    z = mu + e exp(logvar / 2),   e ~ N(0, 1) from the Philox stream LATENT, drawn again in the backward
    kl_b = 1/2 sum_d (mu^2 + exp(logvar) - logvar - 1)
    dmu = dz + dkl mu,   dlogvar = dz e exp(logvar / 2) / 2 + dkl (exp(logvar) - 1) / 2

Source: Kingma & Welling, ICLR 2014; CARSO (arXiv 2306.06081), section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._tensors import check_alike
from .dispatch.examples import ROWS, examples, normal, stream
from .dispatch.gradient import cpu_kernel, define_backward, differentiable, needs_gradient, saves
from .dispatch.registry import define_op, wide
from .philox import Stream, default_stream, philox


def _noise(mu: Tensor, seed: Tensor, sample_ids: Tensor) -> Tensor:
    return philox(seed, sample_ids, mu.shape[1], stream=Stream.LATENT, distribution="normal")[:, 0]


def reference(mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch: (z [B, D] in mu's dtype, kl [B] in float32; float64 for float64)."""
    mean, logs = wide(mu), wide(logvar)
    z = mean + _noise(mu, seed, sample_ids).to(mean.dtype) * torch.exp(0.5 * logs)
    return z.to(mu.dtype).contiguous(), 0.5 * (mean.square() + logs.exp() - logs - 1).sum(1)


def reference_backward(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (dmu, dlogvar) [B, D], in the dtypes of mu and logvar."""
    mean, logs, to_z, to_kl = wide(mu), wide(logvar), wide(grad_z), wide(grad_kl)[:, None]
    deviation = _noise(mu, seed, sample_ids).to(mean.dtype) * torch.exp(0.5 * logs)
    to_logvar = 0.5 * (to_z * deviation + to_kl * torch.expm1(logs))
    return (to_z + to_kl * mean).to(mu.dtype).contiguous(), to_logvar.to(logvar.dtype).contiguous()


EXAMPLES = {((ROWS, 64),): "fb", ((ROWS, 37),): "h", ((ROWS, 2500),): ""}


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return normal(seed, *shape).to(dtype), normal(seed + 100, *shape).to(dtype), *stream(seed)


OP = define_op(
    "sample_latent",
    "(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda mu, logvar, seed, sample_ids: (mu.new_empty(mu.shape), wide(mu).new_empty(mu.shape[0])),
    examples=examples(_arguments, EXAMPLES, slack=16.0),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("",)},
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad_z, grad_kl, mu, logvar, seed, sample_ids: (mu.new_empty(mu.shape), logvar.new_empty(mu.shape)),
    size=lambda grad_z, *_: grad_z.numel(),
)


#: SAVING returns z, kl, and the deviation e exp(logvar / 2), from which FROM_SAVED computes the gradients.
SAVING = cpu_kernel(
    "sample_latent_keeping", "(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) -> (Tensor, Tensor, Tensor)"
)
FROM_SAVED = cpu_kernel(
    "sample_latent_from_kept",
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor deviation) -> (Tensor, Tensor)",
)


_with_saved = differentiable(SAVING, FROM_SAVED, lambda inputs, outputs: (*inputs[:2], outputs[2]), constants=1)
_sample_latent = differentiable(OP.handle, lambda *args: BACKWARD(*args))


def sample_latent(
    mu: Tensor, logvar: Tensor, seed: Tensor | None = None, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample the posterior, and compute its divergence from the prior N(0, I).

    Args:
        mu: means, ``[..., D]``, at least two dimensions; float16, bfloat16, float32 or float64.
        logvar: logarithms of the variances, with mu's shape, dtype and device.
        seed: int64 ``[1]``, on mu's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[N]``, the global index of each of the N vectors of mu (see `philox`). None: 0 to N - 1.

    Returns:
        ``z [..., D]`` in mu's dtype and ``kl [...]`` in nats; float32 (float64 for float64), also under autocast.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: shapes, dtypes or devices do not match.

    The op has first-order gradients only. For a given seed it is deterministic. The kernels do not support ``vmap``.
    """
    check_alike(mu=mu, logvar=logvar)
    if mu.dim() > 2:
        z, kl = sample_latent(mu.flatten(0, -2), logvar.flatten(0, -2), seed, sample_ids)
        return z.view(mu.shape), kl.view(mu.shape[:-1])
    seed, sample_ids = default_stream(seed, sample_ids, mu.shape[0], mu=mu)
    call: Callable[..., Any] = OP.handle
    if OP.uses_reference(mu.device, mu.numel()):
        call = reference
    elif needs_gradient(mu, logvar):
        call = _with_saved if saves(BACKWARD, mu) else _sample_latent
    z, kl, *_ = call(mu, logvar, seed, sample_ids)
    return z, kl

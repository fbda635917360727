"""Noisy replay: a sample whose representation has drifted gets random noise in this step, in place of an attack.

    out_b = clamp(x_b + u, lo, hi)   if drift_b > tau,    u = eps_b (2 r - 1), uniform in [-eps_b, eps_b)
            x_adv_b                  otherwise

r in [0, 1) comes from the Philox stream REPLAY_NOISE, draw 0. Source: ARREST (arXiv 2308.16454). Its threshold of 30
degrees is tau = 1 - cos(30 deg) = 0.1339746 for the drift that `representation_distance` returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._tensors import check_alike, check_floating, check_form, per_image, per_sample
from .dispatch.examples import IMAGES, ROWS, examples, stream, uniform, wide_dtype
from .dispatch.registry import define_op, wide
from .philox import Stream, default_stream, philox


def reference(
    x: Tensor, x_adv: Tensor, drift: Tensor, tau: Tensor, eps: Tensor, seed: Tensor, sample_ids: Tensor, *box: float
) -> Tensor:
    """Compute the op by PyTorch in float32 (float64 for float64) to x's dtype. drift and eps are [B], and tau is []."""
    clean = wide(x)
    r = philox(seed, sample_ids, math.prod(x.shape[1:]), stream=Stream.REPLAY_NOISE).view(x.shape).to(clean.dtype)
    noisy = (clean + per_image(eps.to(clean.dtype), x) * (2 * r - 1)).clamp(*box).to(x.dtype)
    return torch.where(per_image(drift > tau, x), noisy, x_adv).contiguous()


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor | float, ...]:
    inner = wide_dtype(dtype)
    x, adversarial = (uniform(seed + i, *shape).to(dtype) for i in (0, 100))
    drift, radius = torch.tensor([0.9, 0.1, 0.6], dtype=inner), torch.full((ROWS,), 8 / 255, dtype=inner)
    return x, adversarial, drift, torch.tensor(0.5, dtype=inner), radius, *stream(seed), 0.0, 1.0


OP = define_op(
    "noisy_replay",
    "(Tensor x, Tensor x_adv, Tensor drift, Tensor tau, Tensor eps, Tensor seed, Tensor sample_ids, float lo, float hi)"
    " -> Tensor",
    reference=reference,
    examples=examples(_arguments, IMAGES, exact=True),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    cpu=2**16,
    in_graphs={"cuda": ("",)},
)


def noisy_replay(
    x: Tensor,
    x_adv: Tensor,
    drift: Tensor,
    tau: float | Tensor,
    eps: float | Tensor,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Choose what each sample is trained on: its adversarial example or, if it has drifted, its clean image with noise.

    Args:
        x: clean images, ``[B, ...]``; float16, bfloat16, float32 or float64; image units.
        x_adv: adversarial examples, with x's shape, dtype and device. Those of replayed samples are not read.
        drift: ``[B]``, floating point, the distance of each clean sample's representation from that in the teacher.
        tau: threshold, a number or a tensor ``[]``. A sample is replayed if its drift is above tau, compared in drift's
            precision (at least float32). A NaN drift is not above tau.
        eps: radius of the noise in image units, a number or ``[B]``.
        seed: int64 ``[1]``, on x's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each sample (see `philox`). None: 0 to B - 1.
        lo: lower end of the box to which noisy samples are clamped. Adversarial examples are not clamped.
        hi: upper end of the box, at least lo.

    Returns:
        The training inputs, with the shape and dtype of x, contiguous. There is no gradient.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: shapes, dtypes or devices do not match, eps is a number and negative or NaN, or lo > hi.

    For a given seed, the op is deterministic and has the same bits in every backend, for every batch split. NaN in x or
    in a tensor eps propagates.
    """
    check_alike(x=x, x_adv=x_adv)
    check_floating(drift=drift)
    check_form("drift", drift, drift.dtype, "[B]", x.shape[:1], x=x)
    seed, sample_ids = default_stream(seed, sample_ids, x.shape[0], x=x)
    if not lo <= hi:
        raise ValueError(f"lo must be at most hi, got lo = {lo} and hi = {hi}")
    if isinstance(tau, Tensor) and tau.dim():
        raise ValueError(f"tau must be a number or a tensor [], got {list(tau.shape)}")
    with torch.no_grad():
        drift, radius = wide(drift), per_sample("eps", eps, x)
        limit = tau.to(drift) if isinstance(tau, Tensor) else drift.new_full((), float(tau))
        return OP(x, x_adv, drift, limit, radius, seed, sample_ids, float(lo), float(hi))

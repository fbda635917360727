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

from .._tensors import check_alike, per_image, per_sample
from .dispatch.registry import wide
from .philox import Stream, default_stream, philox


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

    PyTorch's operators compute it from numbers of `philox`. For a given seed, it is deterministic and has the same bits
    for every batch split. NaN in x or in a tensor eps propagates.
    """
    check_alike(x=x, x_adv=x_adv)
    if drift.shape != x.shape[:1] or not drift.is_floating_point():
        got = f"{drift.dtype} {list(drift.shape)}"
        raise ValueError(f"drift must be a floating-point tensor [B] = [{x.shape[0]}], got {got}")
    seed, sample_ids = default_stream(seed, sample_ids, x.shape[0], x=x, drift=drift)
    if not lo <= hi:
        raise ValueError(f"lo must be at most hi, got lo = {lo} and hi = {hi}")
    if isinstance(tau, Tensor) and tau.dim() != 0:
        raise ValueError(f"tau must be a number or a tensor [], got {list(tau.shape)}")
    with torch.no_grad():
        clean, radius = wide(x), per_sample("eps", eps, x)
        r = philox(seed, sample_ids, math.prod(x.shape[1:]), stream=Stream.REPLAY_NOISE).view(x.shape).to(clean.dtype)
        noisy = (clean + per_image(radius, x) * (2 * r - 1)).clamp(float(lo), float(hi)).to(x.dtype)
        replayed = wide(drift) > (tau if isinstance(tau, Tensor) else float(tau))
        return torch.where(per_image(replayed, x), noisy, x_adv).contiguous()

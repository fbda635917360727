"""The set in which an attack may move an image: a ball around it, within the range of the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import Norm
from ..ops.pgd_step import per_sample, pgd_step
from ..ops.philox import Stream, philox
from .arguments import check_eps, check_seed, read_norm


@dataclass(frozen=True)
class Ball:
    """A ball around each image of a batch, within a box.

    Args:
        eps: the radius of each image's ball in image units, ``[B]``.
        norm: "linf", "l2" or "l1".
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.
    """

    eps: Tensor
    norm: Norm = "linf"
    clip_min: float = 0.0
    clip_max: float = 1.0

    @property
    def bounds(self) -> dict[str, Any]:
        """The norm and the box, as the arguments of `purify_fast.ops.pgd_step` and `apgd_step`."""
        return {"norm": self.norm, "lo": self.clip_min, "hi": self.clip_max}

    def take(self, index: Tensor | slice) -> Ball:
        """The balls of some of the images.

        Args:
            index: whose, an index of ``[B]``.
        """
        return Ball(self.eps[index], self.norm, self.clip_min, self.clip_max)


def ball_around(
    x: Tensor, eps: float | Tensor, norm: str = "linf", clip_min: float = 0.0, clip_max: float = 1.0
) -> Ball:
    """The ball around each image, of checked arguments.

    Args:
        x: images ``[B, ...]``.
        eps: the radius in image units, a number or ``[B]``.
        norm: a norm as `read_norm` takes it.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        The ball; its eps is on x's device, float32, or float64 where x is.

    Raises:
        ValueError: an unknown norm, or a radius of a wrong shape or size.
    """
    known = read_norm(norm)
    check_eps(eps, known, max(1.0, clip_max - clip_min))
    return Ball(per_sample("eps", eps, x), known, clip_min, clip_max)


def _names(x: Tensor, seed: int, sample_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """What names the random numbers of a start: the seed as int64 ``[1]`` and the sample ids, on x's device."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    check_seed(seed)
    # made on the device: a copy would wait for it
    return torch.full((1,), seed, dtype=torch.int64, device=x.device), ids


def normal_in_ball(x: Tensor, ball: Ball, std: float, *, seed: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """A point drawn from a normal distribution around each image, projected onto its ball and the box.

    Args:
        x: images ``[B, ...]``.
        ball: the ball around each.
        std: standard deviation in image units.
        seed: of the draw, by Philox stream ATTACK_START.
        sample_ids: int64 ``[B]``; an image's point depends on the seed and its id alone. None: 0 .. B - 1.

    Returns:
        The points, shape and dtype of x.
    """
    key, ids = _names(x, seed, sample_ids)
    noise = philox(key, ids, x[0].numel(), stream=Stream.ATTACK_START, distribution="normal")[:, 0]
    point = (x + std * noise.view_as(x)).to(x.dtype)
    # a step of length 0 is the projection alone
    return pgd_step(point, torch.zeros_like(x), x, torch.zeros_like(ball.eps), ball.eps, **ball.bounds)


def sample_in_ball(x: Tensor, ball: Ball, *, seed: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """A point drawn uniformly from the ball around each image, clamped to the box.

    Args:
        x: images ``[B, ...]``.
        ball: the ball around each.
        seed: of the draw, by Philox stream ATTACK_START.
        sample_ids: int64 ``[B]``; an image's point depends on the seed and its id alone. None: 0 .. B - 1.

    Returns:
        The points, shape and dtype of x.
    """
    key, ids = _names(x, seed, sample_ids)
    size = x[0].numel()
    if ball.norm == "linf":
        noise = 2 * philox(key, ids, size, stream=Stream.ATTACK_START)[:, 0] - 1
    else:
        if ball.norm == "l2":
            noise = philox(key, ids, size, stream=Stream.ATTACK_START, distribution="normal")[:, 0]
        else:
            # Laplace's distribution, by its inverse, at the middles of the 2^24 steps: none is 0 or infinite
            middles = 2 * philox(key, ids, size, stream=Stream.ATTACK_START)[:, 0] - (1 - 2**-24)
            noise = -middles.sign() * torch.log1p(-middles.abs())
        shrink = philox(key, ids, 1, stream=Stream.ATTACK_START, first_draw=1)[:, 0] ** (1 / size)
        noise = noise / noise.norm(p=2 if ball.norm == "l2" else 1, dim=1, keepdim=True) * shrink
    point = x + noise.view_as(x) * per_image(ball.eps, x)
    return point.clamp(ball.clip_min, ball.clip_max).to(x.dtype)

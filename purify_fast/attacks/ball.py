"""The points that an attack may try: those in a ball around the image and in the range of the pixels (the box)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._validation import Norm, read_norm
from ..ops.pgd_step import broadcastable, clamped, per_pixel, pgd_step
from ..ops.philox import Stream, philox, philox_key
from .arguments import can_read, check_eps, check_tensor, largest_distance


@dataclass(frozen=True)
class Ball:
    """A ball of radius ``eps``, ``[B]`` or of the images' shape, around each image, within [clip_min, clip_max]."""

    #: Not compared: a captured step takes the `inputs`, so it can be replayed for every radius and every range.
    eps: Tensor = field(compare=False)
    norm: Norm = "linf"
    clip_min: Any = 0.0
    clip_max: Any = 1.0

    @property
    def bounds(self) -> dict[str, Any]:
        """The norm and the box, as the arguments of `purify_fast.ops.pgd_step` and `apgd_step`."""
        return {"norm": self.norm, "lo": self.clip_min, "hi": self.clip_max}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The radius, and the ends of the box that are tensors, by the names in `bounds`."""
        return {"eps": self.eps, **{name: end for name, end in self.bounds.items() if isinstance(end, Tensor)}}

    def without_inputs(self) -> Ball:
        """Return the ball with a number for each end of the box that is a tensor, so that equal steps are equal."""
        low, high = (end if not isinstance(end, Tensor) else 0.0 for end in (self.clip_min, self.clip_max))
        return replace(self, clip_min=low, clip_max=high)

    def take(self, index: Tensor | slice) -> Ball:
        """Return the balls of some of the images."""
        return replace(self, eps=self.eps[index])


def ball_around(
    x: Tensor, eps: float | Tensor, norm: str = "linf", clip_min: float | Tensor = 0.0, clip_max: float | Tensor = 1.0
) -> Ball:
    """Check the radius ``eps``, see `Radius`, and make the balls around images."""
    width, pixels = clip_max - clip_min, x.shape[1:].numel()
    of_pixels, norm = isinstance(width, Tensor), read_norm(norm)
    if not isinstance(eps, Tensor):
        largest = 1.0 if isinstance(width, Tensor) else max(1.0, width)
        check_eps(eps, None if of_pixels else norm, largest, pixels=pixels)
    radii = per_pixel("eps", eps, x)
    if (isinstance(eps, Tensor) or of_pixels) and can_read(radii):
        widths = torch.as_tensor(width).clamp_min(0.0 if of_pixels else 1.0)
        # A radius for each image is compared with the widest range of a pixel.
        check_tensor("eps", radii, largest_distance(norm, pixels) * (widths if radii.dim() > 1 else widths.max()))
    return Ball(radii, norm, clip_min, clip_max)


def _numbers(x: Tensor, seed: int | Tensor, sample_ids: Tensor | None) -> Callable[..., Tensor]:
    """Make a function that returns random numbers for the first points of an attack, ``[B, 1, count]``."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    return partial(philox, philox_key(seed, x.device), ids, stream=Stream.ATTACK_START)


def projected(x: Tensor, point: Tensor, ball: Ball) -> Tensor:
    """Project points onto the balls around images x and then onto the box; in l1, onto their intersection."""
    # A step of length 0 only projects the point.
    return pgd_step(point, torch.zeros_like(x), x, 0.0, ball.eps, **ball.bounds)


def normal_in_ball(
    x: Tensor, ball: Ball, std: float, *, seed: int | Tensor = 0, sample_ids: Tensor | None = None
) -> Tensor:
    """Draw a point from a normal distribution around each image, and project it onto the ball and the box."""
    noise = _numbers(x, seed, sample_ids)(x[0].numel(), distribution="normal")
    return projected(x, (x + std * noise.view_as(x)).to(x.dtype), ball)


def sample_in_ball(x: Tensor, ball: Ball, *, seed: int | Tensor = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Draw a point uniformly from the ball around each image, and clamp it to the box."""
    draw, size = _numbers(x, seed, sample_ids), x[0].numel()
    if ball.norm == "linf":
        noise = 2 * draw(size)[:, 0] - 1
    else:
        if ball.norm == "l2":
            noise = draw(size, distribution="normal")[:, 0]
        else:
            # Draw from Laplace's distribution by the inverse of its distribution function. The uniform numbers are
            # multiples of 2^-24. They are shifted by 2^-25, so that no result is 0 or infinite.
            middles = 2 * draw(size)[:, 0] - (1 - 2**-24)
            noise = -middles.sign() * torch.log1p(-middles.abs())
        shrink = draw(1, first_draw=1)[:, 0] ** (1 / size)
        noise = noise / noise.norm(p=2 if ball.norm == "l2" else 1, dim=1, keepdim=True) * shrink
    point = x + noise.view_as(x) * broadcastable("eps", ball.eps, x)
    return clamped(point, ball.clip_min, ball.clip_max).to(x.dtype)

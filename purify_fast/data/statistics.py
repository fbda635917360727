"""What a network's normalization needs to know of its training images."""

from __future__ import annotations

import torch
from torch import Tensor

from .streaming import StreamedImages

#: How many images are read at a time.
_PART = 8192


def statistics(x: Tensor | StreamedImages) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, exact, from histograms.

    A channel that never changes gets a deviation of 1 / 255, so that it can be divided by.

    Args:
        x: uint8 ``[N, C, H, W]``.

    Returns:
        The means and the standard deviations, C numbers each, in image units ([0, 1]).

    Raises:
        ValueError: another dtype or shape, or no image.
    """
    if x.dtype != torch.uint8 or len(x.shape) != 4 or 0 in x.shape:
        raise ValueError(f"x must be uint8 [N, C, H, W] with at least one image, got {x.dtype} {list(x.shape)}")
    counts = torch.zeros(x.shape[1], 256, dtype=torch.float64)
    for first in range(0, len(x), _PART):
        for total, channel in zip(counts, x[first : first + _PART].unbind(1), strict=True):
            total += torch.bincount(channel.flatten(), minlength=256).cpu()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]).square()).sum(1)
    return mean.tolist(), variance.sqrt().clamp(min=1 / 255).tolist()

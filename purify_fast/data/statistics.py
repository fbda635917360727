"""What a network's normalisation needs to know of its training images."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 images ``[N, C, H, W]``, in image units ([0, 1]).

    Exact, from histograms. A channel that never changes gets a deviation of 1 / 255, so that it can be divided by.

    Raises:
        ValueError: another dtype or shape, or no image.
    """
    if x.dtype != torch.uint8 or x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be uint8 [N, C, H, W] with at least one image, got {x.dtype} {list(x.shape)}")
    values = torch.arange(256, device=x.device, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in x.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        m = (share * values).sum()
        mean.append(float(m))
        std.append(max(float((share * (values - m).square()).sum().sqrt()), 1 / 255))
    return mean, std

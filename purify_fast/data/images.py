"""Convert images and names of classes, compute statistics of images, and augment images on their device.

The augmentation of an image depends only on the seed, the epoch and the image's index in the data set.
"""

from __future__ import annotations

import unicodedata

import torch
from torch import Tensor

from .._validation import Range
from ..ops.philox import Stream, philox

#: The number of images that `statistics` reads at a time.
_PART = 8192


def same_name(name: str) -> str:
    """The name of a class in the composed form (NFC). macOS decomposes names: it writes an accent as a character."""
    return unicodedata.normalize("NFC", name)


def to_float(x: Tensor) -> Tensor:
    """Convert images of any shape from uint8 to float32 in [0, 1]. Another dtype raises a ValueError."""
    if x.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {x.dtype}")
    return x.float().div_(255)


def statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Compute the mean and standard deviation of each channel, for the normalization in a network.

    Args:
        x: images, uint8 ``[N, C, H, W]``, N at least 1.

    Returns:
        The exact means and standard deviations, C numbers each, in image units ([0, 1]). The standard deviations are at
        least 1 / 255, so that they can be divisors.
    """
    if x.dtype != torch.uint8 or len(x.shape) != 4 or 0 in x.shape:
        raise ValueError(f"x must be uint8 [N, C, H, W] with at least one image, got {x.dtype} {list(x.shape)}")
    counts = torch.zeros(x.shape[1], 256, dtype=torch.float64, device="cpu")
    for first in range(0, len(x), _PART):
        for total, channel in zip(counts, x[first : first + _PART].unbind(1), strict=True):
            total += torch.bincount(channel.flatten(), minlength=256).cpu()
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]).square()).sum(1)
    return mean.tolist(), variance.sqrt().clamp(min=1 / 255).tolist()


def crop_flip(
    x: Tensor, seed: int, sample_ids: Tensor, padding: int = 4, flip: bool = True, *, epoch: int = 0
) -> Tensor:
    """Pad each image with zeros, crop it to its old size at a random place, and mirror it with probability 1/2.

    Args:
        x: images ``[B, C, H, W]``, any dtype.
        seed: seed of the random draws.
        sample_ids: indices of the images in the data set, int64 ``[B]`` on the device of ``x``.
        padding: number of zero pixels on each side, at least 0. 0 means no crop.
        flip: whether to mirror left and right.
        epoch: number of the epoch. Each epoch has other draws.

    Returns:
        A new tensor of the shape and dtype of ``x``.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if sample_ids.shape != (x.shape[0],):
        raise ValueError(f"sample_ids must be [B] = [{x.shape[0]}], got {list(sample_ids.shape)}")
    Range(0).check("padding", padding)
    b, c, h, w = x.shape
    device = x.device
    u = _draws(seed, sample_ids, epoch)
    # The number u is below 1, but the product may be rounded up to the bound.
    shift = (u[:, :2] * (2 * padding + 1)).long().clamp(max=2 * padding) - padding
    rows = torch.arange(h, device=device) + shift[:, :1]
    cols = torch.arange(w, device=device).expand(b, w)
    if flip:
        cols = torch.where(u[:, 2:] < 0.5, w - 1 - cols, cols)
    cols = cols + shift[:, 1:2]
    inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((cols >= 0) & (cols < w))[:, None, None, :]
    rows, cols = rows.clamp(0, h - 1), cols.clamp(0, w - 1)
    image, channel = torch.arange(b, device=device).view(b, 1, 1, 1), torch.arange(c, device=device).view(1, c, 1, 1)
    return x[image, channel, rows[:, None, :, None], cols[:, None, None, :]].masked_fill(~inside, 0)


def mirrored(seed: int, sample_ids: Tensor, epoch: int = 0) -> Tensor:
    """Tell which images `crop_flip` mirrors with these arguments: bool ``[B]``."""
    return _draws(seed, sample_ids, epoch)[:, 2] < 0.5


def _draws(seed: int, sample_ids: Tensor, epoch: int) -> Tensor:
    """Uniform random numbers ``[B, 3]``: for the place of the rows, that of the columns, and the mirroring."""
    # A tensor from a list would be copied to the device, and the copy would wait for the device.
    key = torch.full((1,), seed, dtype=torch.int64, device=sample_ids.device)
    return philox(key, sample_ids, 3, stream=Stream.AUGMENTATION, first_draw=epoch)[:, 0]

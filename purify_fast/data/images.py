"""The path of images to a model: numbers in [0, 1], their statistics, and augmentation.

Augmentation acts on a batch on its device, and is a function of (seed, epoch, sample id), whatever the batch split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._validation import Range
from ..ops.philox import Stream, philox
from .streaming import StreamedImages

#: How many images are counted at a time for their statistics.
_PART = 8192


def to_float(x: Tensor) -> Tensor:
    """Images as floating-point numbers.

    Args:
        x: uint8 of any shape.

    Returns:
        float32 in [0, 1], of the same shape.

    Raises:
        ValueError: any other dtype.
    """
    if x.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {x.dtype}")
    return x.float().div_(255)


def statistics(x: Tensor | StreamedImages) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, which a network's normalization needs; exact, from histograms.

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


def crop_flip(
    x: Tensor, seed: int, sample_ids: Tensor, padding: int = 4, flip: bool = True, *, epoch: int = 0
) -> Tensor:
    """Pad each image with zeros, crop it back at a random place, and mirror it with probability 1/2.

    Args:
        x: ``[B, C, H, W]``, any dtype.
        seed: the draws are a function of it.
        sample_ids: int64 ``[B]`` on x's device, indices in the data set.
        padding: pixels on each side, 0 for none.
        flip: whether to mirror left and right.
        epoch: gives every epoch its own draws (Philox stream AUGMENTATION, draw index).

    Returns:
        A new tensor, shape and dtype of x.

    Raises:
        ValueError: a wrong shape or padding.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if sample_ids.shape != (x.shape[0],):
        raise ValueError(f"sample_ids must be [B] = [{x.shape[0]}], got {list(sample_ids.shape)}")
    Range(0).check("padding", padding)
    b, c, h, w = x.shape
    device = x.device
    u = _draws(seed, sample_ids, epoch)
    # u < 1, but its product can round up to the bound
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
    """Tell which images `crop_flip` mirrors.

    Args:
        seed: the seed of `crop_flip`.
        sample_ids: int64 ``[B]``.
        epoch: the epoch of `crop_flip`.

    Returns:
        bool ``[B]``.
    """
    return _draws(seed, sample_ids, epoch)[:, 2] < 0.5


def _draws(seed: int, sample_ids: Tensor, epoch: int) -> Tensor:
    """The numbers of an image's augmentation, uniform ``[B, 3]``: rows, columns, and whether it is mirrored."""
    # filled on the device: a tensor made of a list would be copied there, which waits for the device
    key = torch.full((1,), seed, dtype=torch.int64, device=sample_ids.device)
    return philox(key, sample_ids, 3, stream=Stream.AUGMENTATION, first_draw=epoch)[:, 0]

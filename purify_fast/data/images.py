"""Convert images and names of classes, compute statistics of images, and augment images on their device.

The augmentation of an image depends only on the seed, the epoch and the image's index in the data set.
"""

from __future__ import annotations

import unicodedata
import warnings
from typing import NamedTuple

import numpy as np
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
    # A tensor from a list would be copied to the device, and the copy would wait for the device.
    key = torch.full((1,), seed, dtype=torch.int64, device=sample_ids.device)
    # These are for the place of the rows, that of the columns, and the mirroring.
    u = philox(key, sample_ids, 3, stream=Stream.AUGMENTATION, first_draw=epoch)[:, 0]
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


# -- choose batches, or a balanced subset, from a seed, by NumPy's RandomState, whose numbers never change -------------

#: The largest number of missing classes that a warning names.
NAMED = 10


def batches(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """The indices of the images in each batch of an epoch, for this process.

    Args:
        n: number of images in the data set.
        batch_size: number of images per step in all processes together, a multiple of ``world``.
        seed: seed of the permutation, at least 0. All processes must have the same seed.
        epoch: number of the epoch, at least 0. Each epoch has another permutation.
        drop_last: whether to leave out an incomplete last batch. Otherwise some processes may get one image more of
            that batch than others.
        rank: number of this process. The process gets every ``world``-th index of a batch, beginning with index
            ``rank``.
        world: number of processes.
        device: device of the indices. None means the CPU.

    Returns:
        A tensor of indices for each step, int64 ``[batch_size / world]`` on ``device``.

    Raises:
        ValueError: a count is below 1, ``batch_size`` is not a multiple of ``world``, or ``drop_last`` leaves no batch.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        Range(least).check(name, value)
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1} for world={world} processes, got {rank}")
    if batch_size % world:
        raise ValueError(f"batch_size must be a multiple of {world}, the number of processes, got {batch_size}")
    if drop_last and n < batch_size:
        text = f"batch_size must be at most the number of images, {n}, got {batch_size}: give a smaller batch_size "
        raise ValueError(f"{text}(--batch-size)")
    state = np.random.RandomState([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch])
    order = torch.from_numpy(state.permutation(n)).to(device)
    last = n - n % batch_size if drop_last else n
    return [part[rank::world] for part in order[:last].split(batch_size)]


class Subset(NamedTuple):
    """Some images of a data set."""

    x: Tensor
    y: Tensor
    ids: Tensor


def balanced_subset(x: Tensor, y: Tensor, count: int, seed: int, *, num_classes: int | None = None) -> Subset:
    """Choose images such that the numbers of images of the classes differ by at most one.

    If a class has too few images, all of them are chosen. The first images of the result are balanced too: a class gets
    its second image only after every class has got its first. The data set itself may be sorted by class.

    Args:
        x: images ``[N, C, H, W]``, any dtype.
        y: labels from 0 to num_classes - 1, int64 ``[N]``.
        count: number of images. If the data set does not have more, all images are chosen, in another order.
        seed: seed of the choice and of the order, at least 0. The choice depends only on the seed and the labels.
        num_classes: number of classes. None means the largest label plus 1.

    Returns:
        The images, their labels and their indices, on the device of ``y``. A class without images causes a warning.

    Raises:
        ValueError: there is no image, the count is below 1, or a label is not allowed.
    """
    if len(x) != len(y) or len(y) == 0:
        raise ValueError(f"x and y must have equally many images and labels, at least 1, got {len(x)} and {len(y)}")
    Range(1).check("count", count)
    Range(0).check("seed", seed)
    labels = y.cpu().numpy()
    classes = 1 + int(labels.max()) if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"y must have labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    order = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels, minlength=classes)
    turn = np.empty_like(by_class)
    # This is the position of each image within its class.
    turn[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = order[np.argsort(turn, kind="stable")][:count]
    missing = np.flatnonzero(np.bincount(labels[chosen], minlength=classes) == 0).tolist()
    if missing:
        named = ", ".join(map(str, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
        text = f"{len(missing)} of {classes} classes have no image among the {len(chosen)} chosen images ({named})"
        warnings.warn(f"{text}: results on the chosen images say nothing about these classes", stacklevel=2)
    ids = torch.from_numpy(chosen).to(y.device)
    return Subset(x[ids], y[ids], ids)

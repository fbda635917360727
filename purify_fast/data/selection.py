"""The choice of images: the batches of an epoch, and a part of a data set in which every class has its share.

Both are functions of a seed by numpy's RandomState, which numpy promises never to change: a run can resume anywhere.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._validation import Range
from .streaming import StreamedImages

#: How many missing classes a warning names.
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
    """The batches of an epoch, as indices.

    Args:
        n: images in the data set.
        batch_size: images per step over all ranks, a multiple of ``world``.
        seed: at least 0; the permutation is a function of the seed and the epoch, the same on every rank.
        epoch: at least 0.
        drop_last: whether an incomplete last batch is left out; if not, its shares may differ by one, or be empty.
        rank: the number of this process. Its share is every world-th index of the whole batch, from the rank-th on, so
            that each part of a batch that is laid out in parts is divided alike.
        world: how many processes there are.
        device: where the indices are wanted; None for the CPU.

    Returns:
        int64 tensors ``[batch_size / world]`` on ``device``; step k's batch is element k.

    Raises:
        ValueError: a count below 1, ``n < batch_size`` with ``drop_last``, a batch that ``world`` does not divide.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        Range(least).check(name, value)
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0 .. world - 1 = {world - 1}, got {rank}")
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the {world} processes")
    if drop_last and n < batch_size:
        raise ValueError(f"batch_size {batch_size} is more than the {n} images: an epoch would have no step")
    state = np.random.RandomState([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch])
    order = torch.from_numpy(state.permutation(n)).to(device)
    last = n - n % batch_size if drop_last else n
    return [part[rank::world] for part in order[:last].split(batch_size)]


class Subset(NamedTuple):
    """Some images of a data set.

    Attributes:
        x: uint8 ``[n, C, H, W]``.
        y: int64 ``[n]``, their labels.
        ids: int64 ``[n]``, their indices in the data set.
    """

    x: Tensor
    y: Tensor
    ids: Tensor


def balanced_subset(
    x: Tensor | StreamedImages, y: Tensor, count: int, seed: int, *, num_classes: int | None = None
) -> Subset:
    """``count`` images with equally many, up to one, of every class, while a class has that many.

    Image folders are sorted by class, so that their first images are all of one class. Here every first part of the
    result is balanced as well: each class comes once before any comes twice.

    Args:
        x: ``[N, C, H, W]``, any dtype.
        y: int64 ``[N]``, labels of 0 .. num_classes - 1.
        count: how many images; all of them, in another order, where there are not more.
        seed: at least 0; the choice and its order are a function of the labels and the seed.
        num_classes: how many classes there should be; None takes the largest label plus 1.

    Returns:
        The images, their labels and their indices, on y's device.

    Raises:
        ValueError: no image, a count below 1, or labels that do not fit.

    Warns:
        UserWarning: a class has no image in the result, so that figures say nothing about it.
    """
    if len(x) != len(y) or len(y) == 0:
        raise ValueError(f"x and y must have equally many images and labels, at least 1, got {len(x)} and {len(y)}")
    Range(1).check("count", count)
    Range(0).check("seed", seed)
    labels = y.cpu().numpy()
    classes = 1 + int(labels.max()) if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"y must hold labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    order = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels, minlength=classes)
    turn = np.empty_like(by_class)
    # The rank of each image within its class.
    turn[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = order[np.argsort(turn, kind="stable")][:count]
    missing = np.flatnonzero(np.bincount(labels[chosen], minlength=classes) == 0).tolist()
    if missing:
        named = ", ".join(map(str, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
        warnings.warn(
            f"{len(missing)} of {classes} classes have no image among the {len(chosen)} chosen ones ({named}): "
            f"figures of these images say nothing about them",
            stacklevel=2,
        )
    ids = torch.from_numpy(chosen).to(y.device)
    return Subset(x[ids], y[ids], ids)

"""Read and check the batches of a DataLoader, or of any iterable of batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.attacked_model import INTO_RANGE, RANGE_SLACK

#: The attributes of a loader, and of these, that may have generators.
INSIDE = ("dataset", "datasets", "sampler", "batch_sampler")


def read_batch(batch: Any, name: str) -> tuple[Tensor, Tensor, Any]:
    """Return the images and the labels of a batch, and its third part or None, or raise TypeError."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"{name} must be (images, labels) or (images, labels, indices), got {type(batch)}")
    images, labels = (as_tensor(f"the {part} of {name}", batch[i]) for i, part in enumerate(("images", "labels")))
    return images, labels, batch[2] if len(batch) > 2 else None


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor or a NumPy array of numbers as a tensor; TypeError for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        # PyTorch refuses negative strides and foreign byte orders, and warns about read-only arrays.
        value = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array of numbers, got {type(value).__name__}")
    return value


def check_channels(name: str, images: Tensor) -> None:
    """Raise ValueError for square images ``[N, H, W, C]`` in place of ``[N, C, H, W]``."""
    # Other shapes may be signals: nine channels of a sensor are ``[N, 9, 128, 1]``.
    if images.dim() == 4 and images.shape[1] == images.shape[2] > 4 and images.shape[3] in (1, 3):
        raise ValueError(f"{name} must be [N, C, H, W], got {list(images.shape)}: give {name}.permute(0, 3, 1, 2)")


def check_range(name: str, low: float, high: float, undo: str = "") -> None:
    """Raise ValueError for images with values outside [0, 1], except by rounding; ``undo`` is advice."""
    # The condition is negated so that NaN is refused too.
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        advice = f"if they are normalized, {undo}" if undo and low < 0 else INTO_RANGE
        raise ValueError(f"{name} must be in [0, 1] and free of NaN, got values from {low:.5g} to {high:.5g}: {advice}")


def seed_generators(loader: Any, seed: int, epoch: int) -> None:
    """Seed torch's generators in a loader, its data sets, its samplers and those inside them; call ``set_epoch``."""
    waiting, seen = [loader], set[int]()
    for part in waiting:
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if callable(getattr(type(part), "set_epoch", None)):
            part.set_epoch(epoch)
        for value in getattr(part, "__dict__", {}).values():
            if isinstance(value, torch.Generator) and id(value) not in seen:
                value.manual_seed(seed)
                seen.add(id(value))
                seed = (seed + 1) % 2**32
        inside = [getattr(part, name, None) for name in INSIDE]
        waiting += [item for held in inside for item in (held if isinstance(held, (list, tuple)) else [held])]

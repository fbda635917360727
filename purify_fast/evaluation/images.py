"""The images that are attacked: collected, checked, and float32 in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def collect(x: Tensor | Iterable[Any], y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images and labels as `evaluate` needs them.

    Args:
        x: images, uint8 or float32 in [0, 1], ``[N, C, H, W]``; or, without ``y``, a DataLoader or any other iterable
            of batches (images, labels) or (images, labels, indices), which is read once. The indices are not used.
        y: labels, int64 ``[N]``.

    Returns:
        Images, float32 in [0, 1], and labels, int64.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: something else than tensors, or than batches of them.
    """
    if y is None:
        x, y = _read(x)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            hint = f": torch.as_tensor({name}) makes one of it" if isinstance(value, np.ndarray) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__name__}{hint}")
    assert isinstance(x, Tensor)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        hint = "; y.long() makes them int64" if y.shape == (len(x),) and not y.is_floating_point() else ""
        raise ValueError(f"y must be int64 [N] = [{len(x)}], got {y.dtype} {list(y.shape)}{hint}")
    if x.dtype == torch.uint8:
        return x.float() / 255, y
    if x.dtype != torch.float32:
        raise ValueError(f"x must be uint8 or float32, got {x.dtype}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        largest = float(x.nan_to_num(0).max())
        hint = "; x is in 0..255: divide by 255, or give uint8" if 1.5 < largest <= 255 else ""
        raise ValueError(f"x must be in [0, 1] and free of NaN{hint}")
    return x.detach(), y


def _read(batches: Any) -> tuple[Tensor, Tensor]:
    """All batches of an iterable as one; they may not differ in dtype or in the size of their images."""
    if isinstance(batches, (Tensor, np.ndarray)) or not isinstance(batches, Iterable):
        raise TypeError(f"without y, x must be an iterable of batches (images, labels), got {type(batches).__name__}")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batch {i} must be (images, labels) or (images, labels, indices), got {got}")
        x, y = batch[:2]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            got = f"{type(x).__name__} and {type(y).__name__}"
            raise TypeError(f"batch {i} must have tensors as images and labels, got {got}")
        if x.dim() != 4 or y.shape != (len(x),):
            raise ValueError(
                f"batch {i} must have images [B, C, H, W] and labels [B], got {list(x.shape)} and {list(y.shape)}"
            )
        if images and (x.shape[1:] != images[0].shape[1:] or x.dtype != images[0].dtype):
            raise ValueError(
                f"batch {i} has {x.dtype} images {list(x.shape[1:])}, "
                f"the first has {images[0].dtype} {list(images[0].shape[1:])}"
            )
        images.append(x)
        labels.append(y)
    if not images:
        raise ValueError("the iterable has no batch: a generator can be read only once")
    return torch.cat(images), torch.cat(labels)

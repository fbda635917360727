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
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            raise TypeError(f"{name} must be a torch.Tensor, got {kind}{_as_tensor(name, value)}")
    assert isinstance(x, Tensor)
    if x.dim() != 4 or len(x) == 0:
        hint = ": x[:, None] makes grey images [N, 1, H, W]" if x.dim() == 3 and x.shape[0] not in (1, 3) else ""
        hint = ": x[None] makes one image [1, C, H, W]" if x.dim() == 3 and x.shape[0] in (1, 3) else hint
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}{hint}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 [N] = [{len(x)}], got {y.dtype} {list(y.shape)}{_as_labels(x, y)}")
    # tensors made in inference mode take part in no gradient
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y
    if x.dtype != torch.float32:
        hint = "x.float() makes them float32" if x.is_floating_point() else "x.byte() makes them uint8, if in 0..255"
        raise ValueError(f"x must be uint8 or float32, got {x.dtype}: {hint}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must be in [0, 1] and free of NaN, got {_range(x)}")
    return x.clone() if x.is_inference() else x.detach(), y


def _as_tensor(name: str, value: Any) -> str:
    """The line that makes a tensor of what was given; empty where none does."""
    if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
        return f": torch.stack({name}) makes one of them"
    return f": torch.as_tensor({name}) makes one of it" if isinstance(value, (np.ndarray, list, tuple)) else ""


def _as_labels(x: Tensor, y: Tensor) -> str:
    """The line that makes labels of what was given; empty where none does."""
    if y.shape == (len(x),):
        return "" if y.is_floating_point() else "; y.long() makes them int64"
    if y.dim() == 2 and len(y) == len(x):
        many = "y.argmax(1) makes labels of one-hot rows" if y.shape[1] > 1 else "y[:, 0].long() takes its only column"
        return f"; {many}"
    return ""


def _range(x: Tensor) -> str:
    """What values images have that are not in [0, 1], and the line that mends it where one can be told."""
    if bool(x.isnan().any()):
        return f"{int(x.isnan().sum())} values that are NaN"
    least, most = float(x.min()), float(x.max())
    told = f"values from {least:.3g} to {most:.3g}"
    if 1.5 < most <= 255 and least >= 0:
        return f"{told}; x is in 0..255: divide by 255, or give uint8"
    if -1 <= least < 0 and most <= 1:
        return (
            f"{told}; x is in [-1, 1]: give (x + 1) / 2 as the images, and lambda x: model(2 * x - 1) as the model, so "
            "that eps is a share of the range from black to white"
        )
    if least < 0:
        return (
            f"{told}; normalized images are wanted as they were before: give x * std + mean, and let the model "
            "normalize them: lambda x: model((x - mean) / std)"
        )
    return told


def looks_channels_last(x: Tensor) -> bool:
    """Whether images ``[N, C, H, W]`` have a size that only ``[N, H, W, C]`` usually has.

    Args:
        x: images of four dimensions.
    """
    return x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)


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
            hint = _as_tensor("images", x) or _as_tensor("labels", y)
            raise TypeError(f"batch {i} must have tensors as images and labels, got {got}{hint}")
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

"""Checks and converts the inputs of an evaluation: images and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...attacks.arguments import ROUNDING, advice_for_range
from ...protocols import Classifier

#: The allowed dtypes of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def images_and_labels(x: Tensor | Iterable[Any], y: Tensor | None) -> tuple[Tensor, Tensor, list[str]]:
    """Check images and labels, and convert them.

    Args:
        x: images in a form that `collect` accepts. Or, without ``y``, a DataLoader or another iterable of batches
            (images, labels) or (images, labels, indices). The indices are not used.
        y: labels, integers ``[N]``.

    Returns:
        The results of `collect`.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: x or y is not a tensor or array, or x without y does not yield batches of tensors or arrays.
    """
    if y is not None:
        return collect(x, y)
    batches = list(_read(x))
    if not batches:
        raise ValueError(
            "x must yield at least one batch, got none: a generator can be read only once, so make a new generator"
        )
    images, labels = zip(*batches, strict=True)
    return collect(torch.cat(images), torch.cat(labels))


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor, list[str]]:
    """Check and convert images and labels.

    Args:
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array. Values that are
            outside by rounding, by at most `purify_fast.attacks.arguments.ROUNDING`, are clamped.
        y: labels, integers ``[N]``, a tensor or a NumPy array.

    Returns:
        Images, float32 in [0, 1]; labels, int64; and notes for the report, one if values were clamped.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: x or y is not a tensor or array.
    """
    x, y = _of_array(x), _of_array(y)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {kind}{_as_tensor(name, value)}")
    if x.dim() != 4 or len(x) == 0:
        hint = ": x[:, None] makes grey images [N, 1, H, W]" if x.dim() == 3 and x.shape[0] not in (1, 3) else ""
        hint = ": x[None] makes one image [1, C, H, W]" if x.dim() == 3 and x.shape[0] in (1, 3) else hint
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}{hint}")
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}{_as_labels(x, y)}")
    # Tensors made in inference mode cannot take part in gradients.
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y.to(torch.int64), []
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}: if x is in 0..255, give x.byte()")
    x = x.float()
    least, most = (float(value) for value in x.detach().aminmax())
    # The condition is negated so that NaN is refused too.
    if not (least >= -ROUNDING and most <= 1 + ROUNDING):
        values = f"values from {least:.5g} to {most:.5g}{advice_for_range(least, most)}"
        missing = int(x.isnan().sum())
        raise ValueError(
            f"x must be in [0, 1] and free of NaN, got {f'{missing} values that are NaN' if missing else values}"
        )
    x, notes = x.clone() if x.is_inference() else x.detach(), list[str]()
    if least < 0 or most > 1:
        beyond = max(-least, most - 1)
        notes.append(f"values of the images outside [0, 1] by rounding, by at most {beyond:.1g}, were clamped")
        x = x.clamp(0, 1)
    return x, y.to(torch.int64), notes


def _of_array(value: Any) -> Any:
    """Convert a NumPy array of numbers to a tensor; return anything else unchanged."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        return value
    # Copied if necessary: PyTorch refuses negative strides and foreign byte orders, and warns about read-only arrays.
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))


def _as_tensor(name: str, value: Any) -> str:
    """Return the end of an error message: code that converts the input to a tensor, or nothing if none is known."""
    if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
        return f": torch.stack({name}) makes a tensor of the list"
    return f": torch.as_tensor({name}) makes a tensor of the list" if isinstance(value, (list, tuple)) else ""


def _as_labels(x: Tensor, y: Tensor) -> str:
    """Return the end of an error message: code that converts the input to labels, or nothing if none is known."""
    if y.shape == (len(x),):
        whole = not y.is_floating_point() or bool((y == y.round()).all())
        return "; y.long() makes them int64" if whole else ""
    if y.dim() == 2 and len(y) == len(x):
        many = "y.argmax(1) makes labels of one-hot rows" if y.shape[1] > 1 else "y[:, 0].long() takes its only column"
        return f"; {many}"
    return ""


def _read(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Read and check the batches of an iterable; all batches must have the same dtype and size of images."""
    if isinstance(batches, (Tensor, np.ndarray)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"without y, x must be an iterable of batches (images, labels), got {type(batches).__name__}: give y too, "
            "or give a DataLoader as x"
        )
    first: tuple[torch.dtype, list[int]] | None = None
    for i, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batch {i} must be (images, labels) or (images, labels, indices), got {got}")
        x, y = map(_of_array, batch[:2])
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            got = f"{type(x).__name__} and {type(y).__name__}"
            hint = _as_tensor("images", x) or _as_tensor("labels", y)
            raise TypeError(f"batch {i} must have tensors or arrays as images and labels, got {got}{hint}")
        kind = x.dtype, list(x.shape[1:])
        first = first or kind
        if x.dim() != 4 or y.shape != (len(x),) or kind != first:
            raise ValueError(
                f"batch {i} must have images [B, C, H, W] with the dtype and the [C, H, W] of the first batch, "
                f"{first[0]} {first[1]}, and labels [B], got images {x.dtype} {list(x.shape)} and labels "
                f"{list(y.shape)}"
            )
        yield x, y


def as_classifier(model: Any) -> Classifier:
    """Return the model itself, after a check that it is callable.

    Args:
        model: any callable.

    Raises:
        TypeError: model is not callable, or is a class instead of an object.
    """
    if isinstance(model, type):
        raise TypeError(f"the model must be an object, got the class {model.__name__}: give {model.__name__}(...)")
    if not callable(model):
        raise TypeError(f"the model must be a callable from images to logits, got {type(model).__name__}")
    return model

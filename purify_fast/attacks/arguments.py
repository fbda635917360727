"""Checks of the arguments of attacks; every error names the argument, its value and the allowed values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._tensors import FLOATING, check_floating, check_one_device
from .._validation import Range, check_number

#: Because of rounding, a pixel may lie outside of [clip_min, clip_max] by this share of the range's width.
RANGE_SLACK = 1e-4
#: Advice for images that are not in [0, 1].
INTO_RANGE = (
    "divide images in 0..255 by 255; for normalized images give x * std + mean as the images, and lambda x: "
    "model((x - mean) / std) as the model; after a resize give x.clamp(0, 1)"
)


def check_images(
    x: Tensor, y: Tensor, clip_min: float | Tensor | None = None, clip_max: float | Tensor = 1.0, *, labels: bool = True
) -> None:
    """Refuse images or labels that are not allowed, with TypeError or ValueError.

    The values of tensors are checked only on a CPU, because on a GPU the check would have to wait for the device. They
    are not checked while a compiler or a dispatch mode is active.
    """
    # Most calls pass these tests, which take no time.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout != torch.strided:
        check_floating(x=x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}: give torch.as_tensor(y)")
    if x.device != y.device:
        check_one_device(x=x, y=y)
    if x.dim() < 2 or (x.dim() == 3 and len(x) > 1 and y.shape == (1,)):
        raise ValueError(f"x must be a batch [B, ...], got {list(x.shape)}: give x[None] if x is a single image")
    if not labels and (y.dim() == 0 or len(y) != len(x)):
        raise ValueError(f"y must have a row for each of the {len(x)} images, got {list(y.shape)}")
    if labels and (y.shape != (x.shape[0],) or y.dtype != torch.int64):
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}")
    # See `can_read`.
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return
    if labels and int(y.amin()) < 0:
        check_labels("y", y)
    if clip_min is None:
        return
    if isinstance(clip_min, Tensor) or isinstance(clip_max, Tensor):
        # Each pixel has its own range, so the images are moved and scaled into [0, 1].
        low, high = (torch.as_tensor(one, device=x.device) for one in (clip_min, clip_max))
        if not bool((high > low).all()):
            raise ValueError(f"clip_max must be above clip_min, got a smallest width of {float((high - low).min()):g}")
        x, clip_min, clip_max = (x - low) / (high - low), 0.0, 1.0
    low, high = x.detach().aminmax()
    least, most = float(low), float(high)
    slack = RANGE_SLACK * (clip_max - clip_min)
    # The condition is negated so that NaN is refused too.
    if not (least >= clip_min - slack and most <= clip_max + slack):
        allowed = f"[clip_min, clip_max] = [{clip_min:g}, {clip_max:g}]"
        raise ValueError(f"x must be in {allowed}, got values from {least:.5g} to {most:.5g}: {INTO_RANGE}")


def can_read(values: Tensor) -> bool:
    """Return True if a check may read the values of a tensor: on a CPU, outside of a compiler or a dispatch mode."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return values.device.type == "cpu" and values.numel() > 0 and not traced


def check_labels(name: str, labels: Tensor, classes: int | None = None) -> None:
    """Refuse labels ``[B]`` that no class has, where `can_read` allows it; ``classes``: how many, if known."""
    low, high = map(int, labels.aminmax()) if can_read(labels) else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        allowed = "of at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(f"{name} must have class numbers {allowed}, got {low if low < 0 else high}")


def check_tensor(name: str, values: Tensor, most: float | Tensor = math.inf) -> None:
    """Refuse a tensor with NaN, a value below 0, or a value above ``most``, as `check_eps` refuses a number."""
    if can_read(values) and not bool(((values >= 0) & (values <= torch.as_tensor(most) * (1 + 1e-6))).all()):
        low, high = (float(value) for value in values.aminmax())
        raise ValueError(f"{name} must be at least 0 and at most the range's width, got {low:g} to {high:g}")


def largest_distance(norm: str, pixels: int, width: float = 1.0) -> float:
    """The largest distance between two images of ``pixels`` values, whose range has the given width."""
    return width * {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]


def check_eps(eps: float, norm: str | None, largest: float = 1.0, *, pixels: int = 0) -> None:
    """Refuse a radius that is not allowed."""
    check_number("eps", eps)
    Range(0).check("eps", eps)
    if norm is None or (norm != "linf" and pixels == 0):
        return
    most = largest_distance(norm, pixels, largest)
    if eps > most:
        raise ValueError(f"eps must be at most {most:g} for {norm}, in image units, got {eps}: is {eps:g}/255 meant?")


# -- checks the output of a model: logits ``[B, classes]`` -------------------------------------------------------------

#: Advice for a model that returns probabilities instead of logits.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which predicts the same "
    "classes"
)
#: The problem and the advice for a model that returns one-hot vectors, in the words of errors and reports.
ONE_HOT = (
    "returns one-hot rows (each has a single 1, and otherwise zeros). They name a class and have no gradient: return "
    "the logits [B, classes] from which the class is chosen"
)


def checked_logits(logits: object, images: int) -> Tensor:
    """Return a model's output, ``[B, classes]``, if it may be logits by its type and shape, which takes no time."""
    if not isinstance(logits, Tensor):
        wanted = "the model must return a torch.Tensor of logits [B, classes]"
        raise TypeError(f"{wanted}, got {type(logits).__name__}: give a module whose forward returns the logits in it")
    good = logits.dim() == 2 and logits.shape[0] == images and logits.shape[1] > 1 and logits.is_floating_point()
    if not good:
        wanted = "floating-point logits [B, classes] of at least two classes for every batch size B"
        raise ValueError(f"the model must return {wanted}, got {logits.dtype} {list(logits.shape)} for B = {images}")
    return logits


def are_one_hot(logits: Tensor) -> bool:
    """Return True if every row is a single 1 among zeros."""
    return bool((((logits == 0) | (logits == 1)).all(1) & (logits.sum(1) == 1)).all())


def are_probabilities(logits: Tensor) -> bool:
    """Return True if every row of the output consists of probabilities: numbers in [0, 1] whose sum is 1."""
    # The tolerance is for rounding: the sum has many rounded terms, and half precision has only three or four digits.
    slack = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + slack)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= slack).all())

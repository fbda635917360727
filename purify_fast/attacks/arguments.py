"""Checks of the arguments of attacks; every error names the argument, its value and the allowed values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._tensors import check_floating, check_one_device
from .._validation import check_number

#: Because of rounding, a pixel may lie outside of [clip_min, clip_max] by this share of the range's width.
ROUNDING = 1e-4


def check_images(
    x: Tensor,
    y: Tensor,
    clip_min: float | Tensor | None = None,
    clip_max: float | Tensor = 1.0,
    *,
    labels: bool = True,
) -> None:
    """Refuse images or labels that are not allowed, with TypeError or ValueError.

    The values of tensors are checked only on a CPU, because on a GPU the check would have to wait for the device. They
    are not checked while a compiler or a dispatch mode is active.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{name} must be a torch.Tensor, got {kind}: give torch.as_tensor({name})")
    check_one_device(x=x, y=y)
    check_floating(x=x)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, ...], got {list(x.shape)}")
    if not labels and (y.dim() == 0 or len(y) != len(x)):
        raise ValueError(f"y must have a row for each of the {len(x)} images, got {list(y.shape)}")
    if labels and (y.shape != (x.shape[0],) or y.dtype != torch.int64):
        hint = ": y.long() makes it int64" if y.shape == (x.shape[0],) and not y.is_floating_point() else ""
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}{hint}")
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return
    try:
        label = int(y.min()) if labels else 0
        if isinstance(clip_min, Tensor) or isinstance(clip_max, Tensor):
            # Each pixel has its own range, so the images are moved and scaled into [0, 1].
            low, high = (torch.as_tensor(one, device=x.device) for one in (clip_min, clip_max))
            x, clip_min, clip_max = (x - low) / (high - low), 0.0, 1.0
        least, most = (0.0, 0.0) if clip_min is None else (float(value) for value in x.detach().aminmax())
    except RuntimeError:
        # Tensors inside torch.func.vmap have no values. Neither do fake tensors outside of their mode.
        return
    if label < 0:
        raise ValueError(f"y must have class numbers of at least 0, got {label}")
    if clip_min is None:
        return
    slack = ROUNDING * (clip_max - clip_min)
    # The condition is negated so that NaN is refused too.
    if not (least >= clip_min - slack and most <= clip_max + slack):
        usual = (clip_min, clip_max) == (0, 1)
        hint = advice_for_range(least, most, "clip_max=255 and an eps in the same unit") if usual else ""
        allowed = f"[clip_min, clip_max] = [{clip_min:g}, {clip_max:g}]"
        raise ValueError(f"x must be in {allowed}, got values from {least:.5g} to {most:.5g}{hint}")


def advice_for_range(least: float, most: float, or_give: str = "uint8") -> str:
    """The end of an error message about images that are not in [0, 1]: the likely reason, and the remedy."""
    if least >= 0 and 16 < most <= 255:
        return f"; x is in 0..255: divide by 255, or give {or_give}"
    wide = most - least > 1 + ROUNDING
    if (least >= -0.05 and most <= 1.05) or (wide and least >= -0.25 and most <= 1.25):
        return "; if a resize has moved values out of [0, 1], give x.clamp(0, 1)"
    if wide and least >= -1 - ROUNDING and most <= 1 + ROUNDING:
        return (
            "; x is in [-1, 1]: give (x + 1) / 2 as the images, and lambda x: model(2 * x - 1) as the model. eps is "
            "then a radius on images in [0, 1]"
        )
    if least < 0:
        return (
            "; if the images are normalized, give x * std + mean as the images, and lambda x: model((x - mean) / std) "
            "as the model"
        )
    return ""


def check_at_least_one(**counts: int | None) -> None:
    """Refuse a count below 1 with ValueError; None is allowed."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_not_negative(**sizes: float | Tensor | None) -> None:
    """Refuse a negative number or NaN, or what is not a number. None and the values of tensors are not checked."""
    for name, value in sizes.items():
        if value is None or isinstance(value, Tensor):
            continue
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def largest_distance(norm: str, pixels: int, width: float = 1.0) -> float:
    """The largest distance between two images of ``pixels`` values, whose range has the given width."""
    return width * {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]


def check_eps(
    eps: float | Tensor, norm: str | None, largest: float = 1.0, *, per_image: bool = False, pixels: int = 0
) -> None:
    """Refuse a radius that is not allowed."""
    if per_image and isinstance(eps, Tensor):
        return
    check_number("eps", eps)
    check_not_negative(eps=eps)
    if norm is None or (norm != "linf" and pixels == 0):
        return
    most = largest_distance(norm, pixels, largest)
    if eps > most:
        far = "" if norm == "linf" else ", the largest distance between two images"
        raise ValueError(
            f"eps must be at most {most:g} for {norm}, in image units{far}, got {eps}: is {eps:g}/255 meant?"
        )

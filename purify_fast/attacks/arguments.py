"""Checks of what attacks are given; every error names the argument, its value and what is allowed."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._validation import check_literal

Norm = Literal["linf", "l2", "l1"]
#: By which share of the fresh draws of a random model an image falls.
Fallen = Literal["any", "majority", "all"]
#: What gradients are computed in: `purify_fast.attacks.engine.gradient_copy`.
Precision = Literal["auto", "float32", "bfloat16"]
#: What the public functions take; AutoAttack and RobustBench write the second half.
NormName = Literal["linf", "l2", "l1", "Linf", "L2", "L1"]


def read_norm(norm: str, allowed: Any = Norm) -> Norm:
    """A norm's name as this package writes it.

    Args:
        norm: ``linf``, ``l2`` or ``l1``; ``Linf``, ``L2`` and ``L1`` mean the same.
        allowed: the ``Literal`` of the norms that the attack knows.

    Raises:
        ValueError: another name.
    """
    known = norm.lower() if isinstance(norm, str) else norm
    if known not in allowed.__args__:
        # the name is shown as it was given
        check_literal("norm", norm, allowed)
    return cast(Norm, known)


def check_images(x: Tensor, y: Tensor) -> None:
    """TypeError or ValueError unless x is floating point ``[B, ...]`` and y int64 ``[B]``."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{name} must be a torch.Tensor, got {kind}: torch.as_tensor({name}) makes one")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}: they must agree")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, ...], got {x.dtype} {list(x.shape)}")
    if y.shape != (x.shape[0],) or y.dtype != torch.int64:
        hint = ": y.long() makes it int64" if y.shape == (x.shape[0],) and not y.is_floating_point() else ""
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}{hint}")


def check_at_least_one(**counts: int | None) -> None:
    """ValueError for a count below 1; None is no count."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_not_negative(**sizes: float | Tensor | None) -> None:
    """ValueError for a negative number or NaN; a tensor's values are not read, which would wait for the device."""
    for name, value in sizes.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_seed(seed: int) -> None:
    """ValueError for a seed that is no int64."""
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")


def check_eps(eps: float | Tensor | None, norm: str | None, largest: float = 1.0) -> None:
    """ValueError for a radius that is negative, or an L-inf radius beyond ``largest``, the range of the pixels."""
    check_not_negative(eps=eps)
    if norm == "linf" and isinstance(eps, (int, float)) and eps > largest:
        raise ValueError(f"eps is in image units, at most {largest:g} for linf, got {eps}: is {eps:g}/255 meant?")

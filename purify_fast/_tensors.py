"""Helpers for tensors: checks of shapes and dtypes, memory layouts, and hashes of tensors and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape a vector with one number per image, so that it can be broadcast over the images."""
    return values.view(-1, *[1] * (like.dim() - 1))


def per_sample(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return ``value`` as a tensor [B] on x's device, float32 (float64 for float64), or raise ValueError."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(value, Tensor):
        # A negative step is a step in the other direction, but no ball has a negative radius.
        if name == "eps" and not value >= 0:
            raise ValueError(f"eps must be at least 0, got {value}")
        return torch.full((x.shape[0],), float(value), dtype=dtype, device=x.device)
    if value.shape not in ((), (x.shape[0],)):
        raise ValueError(f"{name} must be a number or a tensor [B] = [{x.shape[0]}], got {list(value.shape)}")
    value = value.to(device=x.device, dtype=dtype)
    return value.expand(x.shape[0]).contiguous()


#: The dtypes of tensors that ops compute with.
FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64
_ALLOWED = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)


def check_one_device(**tensors: Tensor) -> None:
    """Raise a ValueError if the tensors are on different devices. The keywords are the names in the message."""
    first, *others = tensors.values()
    for other in others:
        if other.device != first.device:
            places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"tensors must be on one device, got {places}")


def check_floating(**tensors: Tensor) -> None:
    """Raise an error unless all arguments are floating-point tensors on one device. The keywords are their names."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}: the allowed dtypes are {_ALLOWED}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got the layout {tensor.layout}")
    check_one_device(**tensors)


def check_form(name: str, value: Any, dtype: torch.dtype, form: str, shape: Sequence[int], **others: Tensor) -> None:
    """Raise a ValueError unless ``value`` is a tensor of this dtype and shape, on the device of the other tensors.

    ``form`` are the names of the dimensions in the message.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != tuple(shape):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a tensor {form} = {list(shape)} of {dtype}, got {got}")
    check_one_device(**others, **{name: value})


def check_alike(**tensors: Tensor) -> None:
    """Raise a ValueError if the tensors differ in shape, dtype or device. The keywords are the names in the message."""
    check_floating(**tensors)
    first, *others = tensors.values()
    if first.dim() < 2 or any([other.shape != first.shape or other.dtype != first.dtype for other in others]):
        *names, last = tensors
        got = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors.values())
        raise ValueError(f"{', '.join(names)} and {last} must have the same dtype and shape [B, ...], got {got}")


def repeat_batch(x: Tensor, times: int) -> Tensor:
    """Repeat the whole batch ``times`` times."""
    return x.repeat(times, *[1] * (x.dim() - 1))


def last_channels(x: Tensor) -> bool:
    """Return True if ``x`` is contiguous in channels_last, but not in PyTorch's default format."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's memory format channels_last if ``channels_last`` is True, and otherwise its default format."""
    return torch.channels_last if channels_last else torch.contiguous_format

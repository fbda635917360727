"""Tensors: their shapes and dtypes, and short hashes that tell whether they, models and settings are still the same."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape a number for each image so that it is broadcast over the image.

    Args:
        values: ``[B]``, any dtype.
        like: ``[B, ...]``, images or anything else with one entry per image.

    Returns:
        A view of ``values`` of shape ``[B, 1, ...]``, with as many dimensions as ``like``.
    """
    return values.view(-1, *[1] * (like.dim() - 1))


def check_one_device(**tensors: Tensor) -> None:
    """ValueError unless tensors, by their names, are on one device."""
    devices = [tensor.device for tensor in tensors.values()]
    if any(device != devices[0] for device in devices):
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device, got {places}")


def check_alike(**tensors: Tensor) -> None:
    """ValueError unless tensors, by their names, have one shape [B, ...], floating-point dtype and device."""
    *names, last = tensors
    named = f"{', '.join(names)} and {last}"
    shapes, dtypes = ([getattr(tensor, what) for tensor in tensors.values()] for what in ("shape", "dtype"))
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2:
        raise ValueError(f"{named} must have one shape [B, ...], got {', '.join(str(list(shape)) for shape in shapes)}")
    if any(dtype != dtypes[0] for dtype in dtypes) or not dtypes[0].is_floating_point:
        raise ValueError(f"{named} must have one floating-point dtype, got {', '.join(map(str, dtypes))}")
    check_one_device(**tensors)


def repeat_batch(x: Tensor, times: int) -> Tensor:
    """Repeat the whole batch ``times`` times.

    Args:
        x: ``[B, ...]``.
        times: how often, at least 1.

    Returns:
        A new tensor ``[times * B, ...]``; ``unflatten(0, (times, -1))`` parts it again.
    """
    return x.repeat(times, *[1] * (x.dim() - 1))


def in_memory_order(x: Tensor) -> Tensor:
    """A view of a tensor whose dimensions stand in the order in which they lie in memory.

    Args:
        x: any tensor.

    Returns:
        The view; it is contiguous if the numbers of ``x`` lie side by side, channels_last or in another order.
    """
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def laid_out_like(numbers: Tensor, x: Tensor) -> Tensor:
    """A view of numbers in the order of `in_memory_order`, with the shape of ``x`` and, where it can, its strides.

    Args:
        numbers: ``[N]``, contiguous, N the number of elements of ``x``.
        x: whose shape and strides it gets. The strides are others if the numbers of ``x`` do not lie side by side.
    """
    ordered = in_memory_order(x)
    if ordered.is_contiguous():
        return numbers.as_strided(x.shape, x.stride(), numbers.storage_offset())
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return numbers.view(ordered.shape).permute([order.index(i) for i in range(x.dim())])


def last_channels(x: Tensor) -> bool:
    """Tell whether ``x`` is dense in channels_last, and only there."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name of a layout: channels_last, or contiguous."""
    return torch.channels_last if channels_last else torch.contiguous_format


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which operators keep the dtypes of their inputs, also where the caller is under ``torch.autocast``.

    Args:
        device: device of the tensors. A meta tensor has no autocast, and PyTorch refuses to switch one off for it.

    Returns:
        The context to enter; it does nothing for meta tensors.
    """
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def first_tensor(module: nn.Module) -> Tensor:
    """The first floating-point parameter or buffer, which has the module's device and dtype.

    Args:
        module: any module.

    Returns:
        That tensor, or a float32 zero on the CPU for a module that has none.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of `first_tensor`, found without making a tensor, which in a compiled step would be one more graph.

    Args:
        module: any module.

    Returns:
        That dtype, float32 for a module without floating-point tensors.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


class Digested(Protocol):
    """Represents a tensor whose digest is stored with it, such as a file that is not read whole."""

    digest: str


def text_hash(text: str = "") -> hashlib.blake2b:
    """The hash of a text; more can be added to it."""
    return hashlib.blake2b(text.encode(), digest_size=16)


def content_hash(dtype: torch.dtype, shape: Sequence[int]) -> hashlib.blake2b:
    """The hash of a tensor's dtype and shape, to which its bytes are then added."""
    return text_hash(f"{dtype} {list(shape)}")


def digest(*tensors: Tensor | Digested) -> str:
    """A hash of dtypes, shapes and contents, made of each tensor's hash, so that a stored hash can replace a tensor."""
    whole = text_hash()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            content = content_hash(tensor.dtype, tensor.shape)
            content.update(_bytes(tensor))
            whole.update(content.hexdigest().encode())
        else:
            whole.update(tensor.digest.encode())
    return whole.hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """A short hash of a module's parameters and buffers: names, shapes and bytes.

    Saved models and checkpoints contain this hash. If it were computed in another way, all of them would be refused.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return content.hexdigest()[:16]


def structure_fingerprint(module: nn.Module) -> str:
    """A short hash of the names and shapes of a module's parameters and buffers; checkpoints contain it."""
    shapes = [(name, list(tensor.shape)) for name, tensor in module.state_dict().items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_stamp(tensor: Tensor) -> int:
    """A number that changes whenever the tensor is written to or replaced by another.

    Args:
        tensor: any tensor; those made in inference mode count no writes.
    """
    return hash((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))

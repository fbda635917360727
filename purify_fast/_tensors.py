"""Helpers for tensors: checks of shapes and dtypes, memory layouts, and hashes of tensors and models."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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
    return value.contiguous() if value.dim() else value.expand(x.shape[0]).contiguous()


#: The dtypes of tensors that ops compute with.
FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64
_ALLOWED = ", ".join(str(one).removeprefix("torch.") for one in FLOATING)


def check_one_device(**tensors: Tensor) -> None:
    """Raise a ValueError if the tensors are on different devices. The keywords are the names in the message."""
    first, *others = tensors.values()
    for other in others:
        if other.device != first.device:
            places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"tensors must be on one device, got {places}")


def refuse_divided(model: nn.Module) -> None:
    """Raise ValueError if the weights of a model are on several devices, or are DTensors."""
    devices = list(dict.fromkeys(str(weight.device) for weight in model.parameters()))
    if any(type(weight).__name__ == "DTensor" for weight in model.parameters()):
        raise ValueError("the model has DTensors as weights (FSDP2, tensor parallel): give each process a whole model")
    if len(devices) > 1:
        text = "the model's weights are on several devices (device_map)"
        raise ValueError(f"{text}, {', '.join(devices)}: move the model to one, and start a process for each device")


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


def check_alike(**tensors: Tensor) -> None:
    """Raise a ValueError if the tensors differ in shape, dtype or device. The keywords are the names in the message."""
    first, *others = tensors.values()
    # Every call of an op runs this loop, so it must be fast.
    shape_fits, dtype_fits = first.dim() >= 2, first.dtype in FLOATING and first.layout == torch.strided
    for other in others:
        shape_fits = shape_fits and other.shape == first.shape
        dtype_fits = dtype_fits and other.dtype == first.dtype and other.layout == first.layout
    if not (shape_fits and dtype_fits):
        check_floating(**tensors)
        *names, last = tensors
        got = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors.values())
        raise ValueError(f"{', '.join(names)} and {last} must have the same dtype and shape [B, ...], got {got}")
    check_one_device(**tensors)


def repeat_batch(x: Tensor, times: int) -> Tensor:
    """Repeat the whole batch ``times`` times."""
    return x.repeat(times, *[1] * (x.dim() - 1))


def in_memory_order(x: Tensor) -> Tensor:
    """Permute the dimensions of a tensor into their order in memory, from the largest stride to the smallest."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def laid_out_like(numbers: Tensor, x: Tensor) -> Tensor:
    """View a vector with the shape and the memory layout of ``x``."""
    ordered = in_memory_order(x)
    if ordered.is_contiguous():
        return numbers.as_strided(x.shape, x.stride(), numbers.storage_offset())
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return numbers.view(ordered.shape).permute([order.index(i) for i in range(x.dim())])


def last_channels(x: Tensor) -> bool:
    """Return True if ``x`` is contiguous in channels_last, but not in PyTorch's default format."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's memory format channels_last if ``channels_last`` is True, and otherwise its default format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch ``torch.autocast`` off within a block, so that operators keep the dtypes of their inputs."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """A block with PyTorch's own defaults: float32, tensors on the CPU, and no inference mode."""
    dtype = torch.get_default_dtype()
    with torch.inference_mode(False), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def first_tensor(module: nn.Module) -> Tensor:
    """The first floating-point parameter or buffer of a module. Callers use its device and dtype as the module's."""
    every = itertools.chain(module.parameters(), module.buffers())
    return next(filter(Tensor.is_floating_point, every), torch.zeros((), dtype=torch.float32))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of `first_tensor`."""
    return first_tensor(module).dtype


def text_hash(text: str = "") -> hashlib.blake2b:
    """The hash object of a text. Its method ``update`` can add more data."""
    return hashlib.blake2b(text.encode(), digest_size=16)


def digest(*tensors: Tensor) -> str:
    """A hash of the dtypes, shapes and contents of tensors."""
    whole = text_hash()
    for tensor in tensors:
        content = text_hash(f"{tensor.dtype} {list(tensor.shape)}")
        content.update(_bytes(tensor))
        whole.update(content.hexdigest().encode())
    return whole.hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """A short hash of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    # Saved models and checkpoints contain this hash, so its computation must not change.
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(_bytes(tensor))
        else:
            # A module's get_extra_state may return any value.
            content.update(f"{name} {tensor!r}".encode())
    return content.hexdigest()[:16]


def structure_fingerprint(module: nn.Module) -> str:
    """A short hash of the names and shapes of a module's parameters and buffers. Checkpoints contain this hash."""
    shapes = [(name, list(getattr(tensor, "shape", []))) for name, tensor in module.state_dict().items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    # NumPy gives an empty array strides that no other dtype can have.
    flat = tensor.detach().cpu().contiguous().view(-1) if tensor.numel() else torch.empty(0)
    return flat.view(torch.uint8).numpy().data

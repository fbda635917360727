"""Helpers for whole models: their dtypes and devices, PyTorch's defaults, memory layouts, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def refuse_divided(model: nn.Module) -> None:
    """Raise ValueError if the weights of a model are on several devices, or are DTensors."""
    devices = list(dict.fromkeys(str(weight.device) for weight in model.parameters()))
    if any(type(weight).__name__ == "DTensor" for weight in model.parameters()):
        raise ValueError("the model has DTensors as weights (FSDP2, tensor parallel): give each process a whole model")
    if len(devices) > 1:
        text = "the model's weights are on several devices (device_map)"
        raise ValueError(f"{text}, {', '.join(devices)}: move the model to one, and start a process for each device")


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


# -- hashes of texts, tensors and models -------------------------------------------------------------------------------


def text_hash(text: str = "") -> hashlib.blake2b:
    """The hash object of a text. Its method ``update`` can add more data."""
    return hashlib.blake2b(text.encode(), digest_size=16)


def digest(*tensors: Tensor) -> str:
    """A hash of the dtypes, shapes and contents of tensors."""
    joined = text_hash()
    for tensor in tensors:
        content = text_hash(f"{tensor.dtype} {list(tensor.shape)}")
        content.update(_bytes(tensor))
        joined.update(content.hexdigest().encode())
    return joined.hexdigest()


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

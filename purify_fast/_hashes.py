"""Hashes of texts, tensors and models."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn


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

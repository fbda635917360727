"""Short hashes that tell whether tensors, models and settings are still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Digested(Protocol):
    """Stands for a tensor whose digest is kept with it, such as a file that is not read whole."""

    digest: str


def text_hash(text: str = "") -> hashlib.blake2b:
    """The hash of a text; more can be added to it."""
    return hashlib.blake2b(text.encode(), digest_size=16)


def content_hash(dtype: torch.dtype, shape: Sequence[int]) -> hashlib.blake2b:
    """The hash of one tensor, still to be given its bytes."""
    return text_hash(f"{dtype} {list(shape)}")


def digest(*tensors: Tensor | Digested) -> str:
    """A hash of dtypes, shapes and contents; computed from each tensor's own, so that a stored one can stand for it."""
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

    Saved models and checkpoints hold it: another way of hashing would refuse all of them.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return content.hexdigest()[:16]


def structure_fingerprint(module: nn.Module) -> str:
    """A short hash of the names and shapes of a module's parameters and buffers; checkpoints hold it."""
    shapes = [(name, list(tensor.shape)) for name, tensor in module.state_dict().items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

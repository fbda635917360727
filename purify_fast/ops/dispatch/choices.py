"""The choices among backends as a whole: what may change the bits of results, and how to choose again."""

from __future__ import annotations

import json

import torch

from ..._tensors import text_hash
from .registry import REGISTRY, forced_backends, sizes_here


def kernels_now(device: torch.device) -> str:
    """Return a hash of the kernels, and the choices among them, that may change the bits of results on a device.

    Args:
        device: the device on which a run computes.
    """
    kind = device.type
    chosen = {
        name: [op.kernel(kind), op.in_graphs.get(kind), sizes_here(name, device)[0]]
        for name, op in REGISTRY.items()
        if op.kernel(kind) != "reference" and not all(example.exact for example in op.examples)
    }
    return text_hash(json.dumps([kind, list(forced_backends()), chosen], sort_keys=True)).hexdigest()


def forget_choices() -> None:
    """Choose all backends again, for example after the files on the disk have changed."""
    sizes_here.cache_clear()
    for op in REGISTRY.values():
        op.chosen.clear()

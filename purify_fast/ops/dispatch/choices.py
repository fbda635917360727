"""The choices among backends as a whole: what may change the bits of results, and how to choose again."""

from __future__ import annotations

import json

import torch

from ..._settings import text_hash
from .op import Backend, Sizes
from .registry import REGISTRY, Op, forced_backends, sizes_here


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


def in_words(op: Op, backend: Backend, sizes: Sizes) -> str:
    """Say which calls use a kernel of ``backend``, given their smallest sizes."""
    variants: dict[str, list[str]] = {}
    for variant in sorted(op.smallest["cpu"], key=lambda name: sizes.get(name) is None):
        least = sizes.get(variant)
        kernel = f"{backend} from {least:,} elements" if least else backend
        variants.setdefault("reference" if least is None else kernel, []).append(variant or "others")
    return "; ".join(f"{name} for {', '.join(own)}" if len(variants) > 1 else name for name, own in variants.items())

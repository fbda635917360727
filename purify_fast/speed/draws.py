"""The random generators that a model draws from: PyTorch's, NumPy's, Python's, and those in the model's attributes."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model_state import GENERATORS

CONTAINERS = (list, tuple, dict)


def own_generators(parts: Iterable[Any]) -> list[Any]:
    """The random generators that are attributes of objects, or lie in lists, tuples and dicts there."""
    values = [value for part in parts for value in vars(part).values()]
    inside = [value.values() if isinstance(value, dict) else value for value in values if isinstance(value, CONTAINERS)]
    return [value for value in itertools.chain(values, *inside) if isinstance(value, GENERATORS)]


@contextlib.contextmanager
def same_draws(model: nn.Module | None = None, device: torch.device | None = None) -> Iterator[Callable[..., bool]]:
    """A block after which all generators are as before, so that the next block draws the same numbers.

    They are the global ones of the host, of ``device`` and of the devices of ``model``, and the model's own.

    The block gets a function ``drew(on_host=False)`` that tells whether any numbers were drawn so far; with
    ``on_host``, only those count that a graph of the device would repeat. It waits for a GPU.
    """
    model = nn.Module() if model is None else model
    devices = {weight.device for weight in model.parameters()} | ({device} if device is not None else set())
    indices = {torch.cuda.current_device() if gpu.index is None else gpu.index for gpu in devices if gpu.type == "cuda"}
    on_devices = [torch.cuda.default_generators[index] for index in sorted(indices)]
    # The modules of NumPy and Python read and set the states of their global generators.
    generators = [torch.default_generator, *on_devices, np.random, random, *own_generators(model.modules())]
    accesses = list(map(_access, generators))
    before = [read() for read, _ in accesses]

    def drew(on_host: bool = False) -> bool:
        for source, (read, _), state in zip(generators, accesses, before, strict=True):
            # A graph draws from torch's generators itself, but a graph of a GPU does not draw from that of the host.
            by_graph = isinstance(source, torch.Generator) and not (on_devices and source is torch.default_generator)
            if not (on_host and by_graph) and not _equal(read(), state):
                return True
        return False

    try:
        yield drew
    finally:
        for (_, write), state in zip(accesses, before, strict=True):
            write(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        return all(map(_equal, a, b))
    same = a == b
    return same if isinstance(same, bool) else bool(same.all())


def _access(source: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return the functions that read and write the state of a generator."""
    if isinstance(source, np.random.Generator):
        bits: Any = source.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    if source is random or isinstance(source, random.Random):
        return source.getstate, source.setstate
    return source.get_state, source.set_state

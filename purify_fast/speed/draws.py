"""The random generators that a model draws from: PyTorch's, NumPy's, Python's, and those in the model's attributes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def own_generators(model: nn.Module) -> list[Any]:
    """The random generators that are attributes of a model or of its parts."""
    return [value for part in model.modules() for value in vars(part).values() if isinstance(value, _KINDS)]


def shared_generators(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: the copy shares the generators of the model, so both never draw the same numbers."""
    return {id(one): one for one in own_generators(model)}


@contextlib.contextmanager
def same_draws(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """A block after which all generators of a model are as before, so that the next block draws the same numbers.

    The block gets a function that tells whether any numbers were drawn so far. It waits for a GPU.
    """
    devices = sorted({one.get_device() for one in model.parameters() if one.is_cuda})
    own = own_generators(model)

    def states() -> list[Any]:
        return [
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(index) for index in devices],
            np.random.get_state(),
            random.getstate(),
            [_state(one) for one in own],
        ]

    before = states()
    try:
        yield lambda: not _equal(states(), before)
    finally:
        host, on_devices, array, python, of_own = before
        torch.set_rng_state(host)
        for index, state in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(array)
        random.setstate(python)
        for one, state in zip(own, of_own, strict=True):
            _set_state(one, state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return all(map(_equal, a, b))
    return bool(a == b)


def _state(one: Any) -> Any:
    if isinstance(one, random.Random):
        return one.getstate()
    return one.bit_generator.state if isinstance(one, np.random.Generator) else one.get_state()


def _set_state(one: Any, state: Any) -> None:
    if isinstance(one, random.Random):
        one.setstate(state)
    elif isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    else:
        one.set_state(state)

"""Copies a model with all that it holds."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model_state import GENERATORS, hidden_modules
from .snapshot import held_by, is_plain
from .weights import copy_all, tensors_of

CONTAINERS = (list, tuple, dict)


def own_generators(parts: Iterable[nn.Module]) -> list[Any]:
    """The random generators that are attributes of modules, or lie in lists, tuples and dicts there."""
    values = [value for part in parts for value in vars(part).values()]
    inside = [value.values() if isinstance(value, dict) else value for value in values if isinstance(value, CONTAINERS)]
    return [value for value in itertools.chain(values, *inside) if isinstance(value, GENERATORS)]


@contextlib.contextmanager
def same_draws(model: nn.Module | None = None, device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """A block after which all generators are as before, so that the next block draws the same numbers.

    They are the global ones of the host, of ``device`` and of the devices of ``model``, and the model's own.

    The block gets a function that tells whether any numbers were drawn so far. It waits for a GPU.
    """
    model = nn.Module() if model is None else model
    devices = {one.device for one in model.parameters()} | ({device} if device is not None else set())
    indices = {torch.cuda.current_device() if one.index is None else one.index for one in devices if one.type == "cuda"}
    on_devices = [torch.cuda.default_generators[index] for index in sorted(indices)]
    # The modules of NumPy and Python read and set the states of their global generators.
    generators = [torch.default_generator, *on_devices, np.random, random, *own_generators(model.modules())]
    accesses = list(map(_access, generators))
    before = [read() for read, _ in accesses]
    try:
        yield lambda: not _equal([read() for read, _ in accesses], before)
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


def _access(one: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return the functions that read and write the state of a generator."""
    if isinstance(one, np.random.Generator):
        bits: Any = one.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    if one is random or isinstance(one, random.Random):
        return one.getstate, one.setstate
    return one.get_state, one.set_state


def host_generators(device: torch.device) -> tuple[Any, ...]:
    """The states of the random generators on the host. A graph advances only the generator of the device."""
    array: Any = np.random.get_state()
    # On a CPU, torch's generator of the host is the generator of the device, so it is left out.
    host = None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), host, (array[0], array[1].tobytes(), *array[2:])


# -- copies a model with all that it holds -----------------------------------------------------------------------------

#: The types of tensors that this module copies itself. A tensor of another type knows how to copy itself.
PLAIN = (Tensor, nn.Parameter)


def memo_of(parts: Iterable[nn.Module]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with copies of the tensors of modules, and with their random generators themselves.

    Tensors with a history, such as the outputs of layers that hooks keep, lose it: PyTorch cannot copy them with it.
    Tensors that share memory are left to `copy.deepcopy`.
    """
    held, parts = dict[int, Tensor](), list(parts)
    memo: dict[int, Any] = {id(one): one for one in own_generators(parts)}
    for part in parts:
        for value in itertools.chain(part._parameters.values(), part._buffers.values(), vars(part).values()):
            if type(value) in PLAIN and value.layout == torch.strided:
                held[id(value)] = value
    memories = Counter(value.untyped_storage().data_ptr() for value in held.values() if value.numel())
    alone = [one for one in held.values() if not one.is_leaf or memories[one.untyped_storage().data_ptr()] == 1]
    new = [torch.empty_like(one) for one in alone]
    copy_all(zip(new, alone, strict=True))
    for old, made in zip(alone, new, strict=True):
        memo[id(old)] = nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
    return memo


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model with all that it holds, except its random generators, which the copy shares."""
    try:
        return copy.deepcopy(model, memo_of(model.modules()) if memo is None else memo)
    except (RuntimeError, TypeError) as error:
        reason = f"an object that cannot be copied: {error}"
        if "deepcopy protocol" in str(error):
            reason = "a tensor with a history in a list or an object: keep value.detach() there"
        raise TypeError(f"{type(model).__name__} holds {reason}") from error


def computes_in_modes(part: nn.Module) -> bool:
    """Return True if a module does more in ``train()`` or ``eval()`` than to set its mode and those of its parts."""
    kind = type(part)
    sets_modes_only = getattr(kind.train, "sets_modes_only", kind.train is nn.Module.train)
    return not sets_modes_only or kind.eval is not nn.Module.eval or bool({"train", "eval"} & vars(part).keys())


def only_registered(*models: nn.Module) -> bool:
    """Return True if copies of models in the same modes can differ in the values of parameters and buffers only.

    This is so if PyTorch, Python's containers and functions alone decide what a copy is.
    """
    registered = {id(tensor) for model in models for _, tensor in tensors_of(model)}
    held: list[Any] = held_by(*models)[1]
    # A copy has the present modes of the noise, which `held_by` leaves out.
    parts: list[Any] = [one for one in held if isinstance(one, nn.Module)]
    odd = any(computes_in_modes(part) or getattr(part, "noise_modes", ()) for part in parts)
    return not odd and all(
        id(one) in registered if isinstance(one, Tensor) else is_plain(one.__class__) for one in held
    )


def freeze(copied: nn.Module) -> nn.Module:
    """Put a copied model into evaluation mode, in place, without gradients of its weights; hidden networks too."""
    for whole in (copied, *(module for _, module in hidden_modules(copied))):
        whole.requires_grad_(False).eval()
    return copied

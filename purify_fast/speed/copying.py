"""Copies a model with all that it holds."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model_state import hidden_modules
from .draws import own_generators
from .snapshot import held_by, is_plain
from .watch import copy_all, tensors_of

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

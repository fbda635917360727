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
from .weights import CONVOLUTIONS, copied

#: The types of tensors that this module copies itself. A tensor of another type knows how to copy itself.
PLAIN = (Tensor, nn.Parameter)


def memo_of(parts: Iterable[nn.Module], channels_last: bool = False) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with copies of the tensors of modules, and with their random generators themselves.

    Tensors with a history, such as the outputs of layers that hooks keep, lose it: PyTorch cannot copy them with it.
    Tensors that share memory are left to `copy.deepcopy`. With ``channels_last``, the weights of convolutions are
    copied to this layout.
    """
    held, weights, parts = dict[int, Tensor](), dict[int, Tensor](), list(parts)
    memo: dict[int, Any] = {id(one): one for one in own_generators(parts)}
    for part in parts:
        for value in itertools.chain(part._parameters.values(), part._buffers.values(), vars(part).values()):
            if type(value) in PLAIN and value.layout == torch.strided:
                held[id(value)] = value
        weight = part._parameters.get("weight") if channels_last and isinstance(part, CONVOLUTIONS) else None
        if id(weight) in held:
            weights[id(weight)] = held.pop(id(weight))
    memories = Counter(value.untyped_storage().data_ptr() for value in (held | weights).values() if value.numel())
    alone = [
        {key: one for key, one in each.items() if not one.is_leaf or memories[one.untyped_storage().data_ptr()] == 1}
        for each in (held, weights)
    ]
    held, weights = alone
    new = [*copied(held.values()), *copied(weights.values(), memory_format=torch.channels_last)]
    for (key, old), made in zip((held | weights).items(), new, strict=True):
        memo[key] = nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
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


def freeze(copied: nn.Module) -> nn.Module:
    """Put a copied model into evaluation mode, in place, without gradients of its weights; hidden networks too."""
    for whole in (copied, *(module for _, module in hidden_modules(copied))):
        whole.requires_grad_(False).eval()
    return copied

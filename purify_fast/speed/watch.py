"""Copies models with all that they hold, and tells whether a model's tensors may have changed."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..model_state import hidden_modules, structure_key
from .draws import own_generators

#: A model with fewer weights in convolutions and linear layers than this is attacked itself in float32, because a copy
#: would take more time than it saves.
FEWEST_WEIGHTS = 250_000
#: The types of tensors that this module copies itself. A tensor of another type knows how to copy itself.
PLAIN = (Tensor, nn.Parameter)
#: The layers whose weights may be in channels_last.
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))


@torch.no_grad()
def copied(tensors: Iterable[Tensor], **how: Any) -> list[Tensor]:
    """Copy tensors to new memory, with other arguments of `torch.empty_like` if given; on CUDA in few launches."""
    old = list(tensors)
    new = [torch.empty_like(one, **how) for one in old]
    copy_all(new, old)
    return new


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors into others. On CUDA, all of a dtype are copied in a single launch."""
    groups = defaultdict[Any, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        into, of = groups[target.dtype, source.dtype]
        into.append(target)
        of.append(source)
    for into, of in groups.values():
        torch._foreach_copy_(into, of)


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


@dataclass
class Decisions:
    """The findings about a network that is prepared for inference. They depend on its structure alone.

    Attributes:
        pairs: the names of the layers and BatchNorms that can be folded; None: not known yet.
        unfolded: why no BatchNorm can be folded, or an empty text.
        channels_last: whether the network runs in channels_last; None: not known yet.
    """

    pairs: list[tuple[str, str]] | None = None
    unfolded: str = ""
    channels_last: bool | None = None


class Structure:
    """The structure of a model: all that it holds, without modes and the values of tensors.

    Attributes:
        decisions: the `Decisions` about parts of the model, by name. They are forgotten when the structure changes.
        number: the number of different structures so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self.decisions = defaultdict[str, Decisions](Decisions)
        self._key: Any = None

    def look(self, model: nn.Module, check: Callable[[list[Tensor]], None] | None = None) -> None:
        """Describe the model anew. A new structure is checked before it is kept; ``check`` gets all of its tensors."""
        key, objects, tensors = structure_key(model, modes=False)
        if key == self._key:
            return
        if check is not None:
            check(tensors)
        # The objects in the description are kept alive beside it.
        self._key, self._objects = key, objects
        self.forget()

    def forget(self) -> None:
        """Forget all decisions."""
        self.number += 1
        self.decisions.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not hold the objects of the description, so it describes the model anew.
        return {"decisions": self.decisions.copy(), "number": 0, "_key": None}


class Place:
    """The place of a copied network, which is made again and again.

    Captured and compiled steps read the tensors of the first network that was made. So a new network that differs in
    nothing else gives its values to these tensors. Tensors that came from elsewhere, such as images that a forward pass
    has kept in an attribute, are never written to.
    """

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self._tensors: list[Tensor] = []
        self._number = -1

    def put(self, new: nn.Module, number: int, in_place: bool = True) -> nn.Module:
        """Return the network of this place, which is ``new`` or has its values.

        ``number``: that of the original's structure, because a hook of the original is new to the copy, too.
        """
        after, _, theirs = structure_key(new, hooks=False)
        if self.network is not None and in_place and number == self._number:
            before, _, mine = structure_key(self.network, hooks=False)
            if before == after and all(map(operator.is_, mine, self._tensors)):
                copy_all(mine, theirs)
                return self.network
        self.network, self._tensors, self._number = new, theirs, number
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied network has tensors of its own.
        return Place, ()


class _Steps:
    """The number of optimizers' steps in this process since the first watch."""

    count = 0
    counted = False


def _stepped(*given: Any) -> None:
    _Steps.count += 1


class Watch:
    """Tells whether a model's tensors or parts may have changed since the last `look`. No value is read.

    It compares PyTorch's counts of writes, and which tensors and parts there are. A fused optimizer does not count its
    writes, so any step of any optimizer in the process counts as a change too.
    """

    def __init__(self, model: nn.Module):
        if not _Steps.counted:
            register_optimizer_step_post_hook(_stepped)
            _Steps.counted = True
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Remember the present tensors and parts of the model, and the counts of writes."""
        parts = list(model.modules())
        groups = [held for part in parts for held in (part._parameters, part._buffers, part._modules) if held]
        named = [(vars(part), name) for part in parts for name, one in vars(part).items() if isinstance(one, Tensor)]
        self._groups, self._named = groups, named
        #: The objects are kept alive, because a new object may get the id of one that is gone.
        self._objects = [*(one for held in groups for one in held.values()), *(held[name] for held, name in named)]
        self._tensors = [one for one in self._objects if isinstance(one, Tensor)]
        # A tensor that was made in inference mode has no count.
        self._counted = [one for one in self._tensors if not one.is_inference()]
        self.has_uncounted = len(self._counted) < len(self._tensors)
        #: The memory is kept alive too, because ``.data`` may be given other memory at the same address.
        self._memory = [one.detach() for one in self._tensors]
        self._steps, self._seen = _Steps.count, self._now()

    def changed(self) -> bool:
        """Return True if something has changed since the last `look`."""
        return self.has_uncounted or self._steps != _Steps.count or self._now() != self._seen

    def _now(self) -> list[int]:
        # Every call of a frozen copy runs this function, so it must be fast.
        now = [id(one) for held in self._groups for one in held.values()]
        now += [one._version for one in self._counted]
        now += [one.data_ptr() for one in self._tensors]
        now += [id(held.get(name)) for held, name in self._named]
        return now

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of what is watched must be watched anew, so a copy or pickle of this object is None.
        return type(None), ()

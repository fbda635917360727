"""Tells whether tensors or parts of models may have been written to or exchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_values, _version, _address = methodcaller("values"), attrgetter("_version"), methodcaller("data_ptr")


class _Steps:
    """The number of optimizers' steps in this process since the first watch."""

    count = 0
    counted = False


def _stepped(*args: Any) -> None:
    _Steps.count += 1


class Watch:
    """Tells whether the tensors or parts of modules may have changed since the last `note`. No value is read.

    It compares PyTorch's counts of writes, and which tensors and parts there are. A fused optimizer does not count its
    writes, so any step of any optimizer in the process counts as a change too.
    """

    def __init__(self, *roots: nn.Module):
        if not _Steps.counted:
            register_optimizer_step_post_hook(_stepped)
            _Steps.counted = True
        self.roots = roots
        parts = [part for root in roots for part in root.modules()]
        self._groups = [held for part in parts for held in (part._parameters, part._buffers, part._modules) if held]
        named = [(vars(part), name) for part in parts for name in vars(part)]
        self._named = [(held, name) for held, name in named if isinstance(held[name], Tensor)]
        #: The objects are kept alive, because a new object may get the id of one that is gone.
        registered = [item for held in self._groups for item in held.values()]
        self._objects = [*registered, *(held[name] for held, name in self._named)]
        self._tensors = [item for item in self._objects if isinstance(item, Tensor)]
        # A tensor that was made in inference mode has no count.
        self._counted = [item for item in self._tensors if not item.is_inference()]
        self.has_uncounted = len(self._counted) < len(self._tensors)
        #: The memory is kept alive too, because ``.data`` may be given other memory at the same address.
        self._memory = [item.detach() for item in self._tensors]
        self.note()

    def note(self) -> None:
        """Remember the present counts of writes."""
        self._steps, self._seen = _Steps.count, self._now()

    def changed(self) -> bool:
        """Return True if something may have changed since the last `note`."""
        return self.has_uncounted or self._steps != _Steps.count or self._now() != self._seen

    def swapped(self) -> bool:
        """Return True if a parameter is another one than at first, as in a call of ``torch.func.functional_call``."""
        at_first = set(map(id, self._tensors))
        return any(id(weight) not in at_first for root in self.roots for weight in root.parameters())

    def _now(self) -> list[int]:
        # Every call of a frozen copy runs this function, so its loops are those of C.
        now = list(map(id, chain.from_iterable(map(_values, self._groups))))
        now += map(_version, self._counted)
        now += map(_address, self._tensors)
        if self._named:
            now += [id(held.get(name)) for held, name in self._named]
        return now

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of what is watched must be watched anew, so a copy or pickle of this object is None.
        return type(None), ()


# -- the weights of a model: their number, and copies of their values --------------------------------------------------

#: A model with fewer weights in convolutions and linear layers than this is attacked itself in float32, because a copy
#: would take more time than it saves.
FEWEST_WEIGHTS = 250_000
#: The layers whose weights may be in channels_last.
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model.

    The attribute ``weight`` is not read, because a parametrized layer would compute it, and may count this or draw.
    """
    layers = [part for part in model.modules() if isinstance(part, (nn.modules.conv._ConvNd, nn.Linear))]
    return sum(weight.numel() for layer in layers for _, weight in tensors_of(layer) if weight.dim() > 1)


@torch.no_grad()
def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first tensor of each pair the second. On CUDA, all of a dtype and a layout take few launches.

    One tensor of another layout than its source would put all others of its group on PyTorch's slow path.
    """
    groups = defaultdict[Any, list[tuple[Tensor, Tensor]]](list)
    for target, source in pairs:
        groups[target.dtype, source.dtype, target.stride() == source.stride()].append((target, source))
    for group in groups.values():
        torch._foreach_copy_([target for target, _ in group], [source for _, source in group])

"""Tells whether a model's tensors or parts may have changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


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

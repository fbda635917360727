"""The structure of a model, what is decided by it, and the places of networks that are copied again and again."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ..model_description import structure_key
from .copying import PLAIN, only_registered
from .weights import copy_all


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
        version: the same, where other modes are another structure.
        only_registered: whether copies can differ in the values of parameters and buffers only.
    """

    def __init__(self) -> None:
        self.number = self.version = 0
        self.decisions = defaultdict[str, Decisions](Decisions)
        self.only_registered = False
        self._key: Any = None
        self._with_modes: Any = None

    def look(self, model: nn.Module, check: Callable[[list[Tensor]], None] | None = None) -> None:
        """Describe the model anew. A new structure is checked before it is kept; ``check`` gets all of its tensors."""
        with_modes, objects, values = structure_key(model)
        if with_modes == self._with_modes:
            return
        key, *_ = structure_key(model, modes=False)
        if key != self._key:
            if check is not None:
                check([value for value in values if isinstance(value, Tensor)])
            self.forget()
        # The objects in the descriptions are kept alive beside them.
        self._key, self._with_modes, self._objects = key, with_modes, objects
        self.version, self.only_registered = self.version + 1, only_registered(model, values)

    def forget(self) -> None:
        """Forget all decisions."""
        self.number, self.version = self.number + 1, self.version + 1
        self.decisions.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not hold the objects of the description, so it describes the model anew.
        return vars(Structure()) | {"decisions": self.decisions.copy()}


class Place:
    """The place of a copied network, which is made again and again.

    Captured and compiled steps read the tensors of the first network that was made. So a new network that differs in
    nothing else gives its values to these tensors. Tensors that came from elsewhere, such as images that a forward pass
    has kept in an attribute, are never written to.

    Attributes:
        network: the network; None before the first `put`.
        version: that of the original's structure if the network differs from a new one in the values of its parameters
            and buffers only; or else -1.
    """

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.version = self._number = -1
        self._seen: tuple[Any, ...] = None, [], [], []

    def put(self, new: nn.Module, number: int, in_place: bool = True) -> nn.Module:
        """Return the network of this place, which is ``new`` or has its values.

        ``number``: that of the original's structure, because a hook of the original is new to the copy, too.
        """
        key, objects, tensors = _described(new)
        if in_place and number == self._number and key == self._seen[0] and self.is_untouched():
            copy_all(self._seen[2], tensors)
            return cast(nn.Module, self.network)
        self.network, self._number = new, number
        # The objects in the description are kept alive beside it.
        self._seen = key, objects, tensors, _addresses(tensors)
        return new

    def is_untouched(self) -> bool:
        """Return True if the network holds what it held at first, apart from hooks and the values of its tensors."""
        key, _, tensors = _described(self.network)
        before, _, own, addresses = self._seen
        return key == before and all(map(operator.is_, tensors, own)) and _addresses(tensors) == addresses

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied network has tensors of its own.
        return Place, ()


def _described(network: Any) -> tuple[Any, list[Any], list[Tensor]]:
    key, objects, values = structure_key(network, hooks=False)
    return key, objects, [value for value in values if isinstance(value, Tensor)]


def _addresses(tensors: list[Tensor]) -> list[int]:
    """The addresses of tensors. The memory of a tensor is another one after a write to its ``data``."""
    return [one.data_ptr() for one in tensors if type(one) in PLAIN]

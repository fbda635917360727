"""The structure of a model, what is decided by it, and the places of networks that are copied again and again."""

from __future__ import annotations

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
        only_registered: whether copies of models with this structure can differ in the values of parameters and buffers
            only, see `purify_fast.speed.copying.only_registered`.
    """

    def __init__(self) -> None:
        self.number = 0
        self.decisions = defaultdict[str, Decisions](Decisions)
        self.only_registered = False
        self._key: Any = None

    def look(self, model: nn.Module, check: Callable[[list[Tensor]], None] | None = None) -> None:
        """Describe the model anew. A new structure is checked before it is kept; ``check`` gets all of its tensors."""
        key, objects, values = structure_key(model, modes=False)
        if key == self._key:
            return
        if check is not None:
            check([value for value in values if isinstance(value, Tensor)])
        # The objects in the description are kept alive beside it.
        self._key, self._objects, self.only_registered = key, objects, only_registered(model, values)
        self.forget()

    def forget(self) -> None:
        """Forget all decisions."""
        self.number += 1
        self.decisions.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not hold the objects of the description, so it describes the model anew.
        return vars(Structure()) | {"decisions": self.decisions.copy()}


class Place:
    """The place of a copied network, which is made again and again.

    Captured and compiled steps read the tensors of the first network that was made. So a new network that differs in
    nothing else gives its values to these tensors. Tensors that came from elsewhere, such as images that a forward pass
    has kept in an attribute, are never written to.
    """

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self._number = -1
        self._seen: tuple[Any, ...] = ()

    def put(self, new: nn.Module, number: int, in_place: bool = True) -> nn.Module:
        """Return the network of this place, which is ``new`` or has its values.

        ``number``: that of the original's structure, because a hook of the original is new to the copy, too.
        """
        seen = _described(new)
        if in_place and self.holds(number) and seen[0] == self._seen[0]:
            copy_all(zip(self._seen[2], seen[2], strict=True))
            return cast(nn.Module, self.network)
        self.network, self._number, self._seen = new, number, seen
        return new

    def holds(self, number: int) -> bool:
        """Return True if the network was made from this structure, and still holds what it held at first.

        Its hooks and the values of its tensors may be others.
        """
        return number == self._number and _described(self.network)[:2] == self._seen[:2]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied network has tensors of its own.
        return Place, ()


def _described(network: Any) -> tuple[Any, list[Any], list[Tensor], list[Any]]:
    """Return a description, the tensors with their memory, and the tensors and objects, which are to be kept alive."""
    key, objects, values = structure_key(network, hooks=False)
    tensors = [value for value in values if isinstance(value, Tensor)]
    # The memory of a tensor is another one after a write to its ``data``.
    return key, [(id(tensor), type(tensor) in PLAIN and tensor.data_ptr()) for tensor in tensors], tensors, objects

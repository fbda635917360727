"""The structure of a model, what is decided by it, and the places of networks that are copied again and again."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..model_description import structure_key
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

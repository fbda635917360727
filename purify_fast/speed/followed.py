"""Follow a model whose frozen copy reads its weights: tell whether they have changed since the last look."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from .watch import tensors_of

if TYPE_CHECKING:
    from .graphs.step_graphs import StepGraphs


def is_frozen_copy(model: object) -> bool:
    """Tell whether a model is a frozen copy itself."""
    return isinstance(getattr(model, "_followed", None), Followed)


def graphs_of(model: object) -> StepGraphs | None:
    """Return the graphs that `purify_fast.frozen_copy` has given to a copy; None for any other model."""
    return model._followed.graphs if is_frozen_copy(model) else None  # type: ignore[attr-defined]


def settings_of(model: nn.Module) -> tuple[Any, list[Any]]:
    """Describe what a copy does not follow: parts, modes, attributes, and counts of writes to tensors in attributes.

    The second result is what must stay alive as long as the description, because it contains ids and addresses.
    """
    from ..model_state import identity_key

    settings, objects, tensors = identity_key(model)
    registered = {id(one) for _, one in tensors_of(model)}
    others = [one for one in tensors if id(one) not in registered]
    return (settings, [-1 if one.is_inference() else one._version for one in others]), [*objects, *tensors]


class Followed:
    """A model that a copy follows, and what was last read of it.

    A copy of this object in memory follows the same model. One that was pickled follows nothing.

    Raises:
        ValueError: see `read`.
    """

    def __init__(self, model: nn.Module | None = None):
        #: The graphs of attacks that are called directly on the copy.
        self.graphs: StepGraphs | None = None
        self._model = None if model is None else weakref.ref(model)
        self._layout = [] if model is None else _layout(model)
        self.read()

    def read(self) -> nn.Module | None:
        """Return the model, whose tensors are read now; None if it is gone.

        Raises:
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        model = None if self._model is None else self._model()
        parts = [] if model is None else list(model.modules())
        # The dictionaries of a module stay the same, but a tensor or a part may be replaced by another one.
        self._tensors = [held for part in parts for held in (part._parameters, part._buffers) if held]
        self._parts = [part._modules for part in parts if part._modules]
        if model is not None and (now := _layout(model)) != self._layout:
            other = sorted({name for name, *_ in {*now} ^ {*self._layout}})
            raise ValueError(
                f"{type(model).__name__} has other parts, or tensors of other names, shapes or sharing, than when its "
                f"frozen copy was made ({', '.join(other[:4])}): make a new one with purify_fast.frozen_copy(model, x)"
            )
        objects: list[Any] = [one for held in (*self._tensors, *self._parts) for one in held.values()]
        # A new object may get the id and the address of one that is gone, so `_gone` gets an entry when one goes.
        self._gone: list[Any] = []
        self._refs = [weakref.ref(one, self._gone.append) for one in objects if one is not None]
        self._stamps = self._look()
        return model

    def changed(self) -> bool:
        """Tell whether PyTorch has counted a write to a tensor, or an object was replaced, since the last `read`."""
        if self._model is None or self._model() is None:
            return False
        return bool(self._gone) or self._look() != self._stamps

    def _look(self) -> list[Any]:
        """Return the ids of the model's parts and tensors, and the tensors' addresses and counts of writes."""
        parts = [id(part) for held in self._parts for part in held.values()]
        tensors = [one for held in self._tensors for one in held.values() if one is not None]
        # A tensor that was made in inference mode has no count.
        versions = [-1 if one.is_inference() else one._version for one in tensors]
        return [parts, list(map(id, tensors)), versions, [one.data_ptr() for one in tensors]]

    def __deepcopy__(self, memo: object) -> Followed:
        other = Followed()
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return Followed, ()


def _layout(model: nn.Module) -> list[tuple[str, Any, int]]:
    """The names and shapes of a model's tensors, each with the number of its first place, and the classes of parts."""
    first = dict[int, int]()
    tensors = [(name, one.shape, first.setdefault(id(one), len(first))) for name, one in tensors_of(model)]
    return [*tensors, *((name, type(part).__qualname__, 0) for name, part in model.named_modules())]


def keeps_its_mode(mode: bool, warned: bool) -> bool:
    """Warn once that ``train()`` changes nothing in a frozen copy. Return True if the warning was given."""
    if mode and not warned:
        text = "a frozen copy keeps its mode: train() changes nothing. Call train() on the model itself"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return mode or warned

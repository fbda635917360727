"""Follow a model: tell when its frozen copy must read the weights again, and whether the copy can still follow it."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model_state import hidden_modules
from ..protocols import CopiesItself, supports
from .copying import computes_in_modes
from .structure import Place, Structure
from .watch import Watch
from .weights import tensors_of

if TYPE_CHECKING:
    from .graphs.step_graphs import StepGraphs


def is_frozen_copy(model: object) -> bool:
    """Return True if a model is a frozen copy itself."""
    return isinstance(getattr(model, "_followed", None), Followed)


def graphs_of(model: object) -> StepGraphs | None:
    """Return the graphs that `purify_fast.frozen_copy` has given to a copy; None for any other model."""
    return model._followed.graphs if is_frozen_copy(model) else None  # type: ignore[attr-defined]


#: The models that copies follow now.
_LIVE = weakref.WeakSet["Followed"]()


def read_copies(*models: object) -> None:
    """Let each frozen copy read its model at its next call. Those that are parts of the given modules read now.

    Writes may not have been counted, and a copy may be hidden in functions and objects.
    """
    for followed in list(_LIVE):
        followed.is_current = False
    for model in models:
        for part in model.modules() if isinstance(model, nn.Module) else ():
            if is_frozen_copy(part):
                part.update()  # type: ignore[operator]


class Followed:
    """A model that a copy follows.

    A copy of this object in memory follows the same model. One that was pickled follows nothing.

    Attributes:
        is_current: whether the copy has been made from what was read last. The copy sets it.
        reads: the number of calls of `read`. Several copies may follow by one object.
        graphs: the graphs of attacks that are called directly on the copy.
        structure: the structure of the model, and what is known about it.
        places: the places of a defence's parts, by name.

    Raises:
        TypeError: see `read`.
    """

    def __init__(self, model: nn.Module | None = None):
        self.graphs: StepGraphs | None = None
        self.reads, self._reason, self.structure, self.is_current = 0, "", Structure(), False
        self.places = defaultdict[str, Any](Place)
        self._model = model
        self._warned = False
        self._watch: Any = None
        _LIVE.add(self)
        if model is not None:
            self._layout, self._watch = _layout(model), Watch(model)
            self.read()

    def read(self) -> nn.Module | None:
        """Return the model, whose tensors are read now; None after pickling.

        Raises:
            TypeError: the model can no longer be copied, see `check_parts`.
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        model = self._model
        if model is None:
            return None
        self.reads += 1
        # If a check or the caller fails, the next call of the copy tries again.
        self.is_current = False
        self.structure.look(model, self._check)
        self._watch.look(model)
        return model

    def _check(self, tensors: list[Tensor]) -> None:
        """Check the model, which holds these tensors, because its structure has changed."""
        model: Any = self._model
        check_parts(model)
        if not self.fits():
            other = sorted({name for name, *_ in {*_layout(model)} ^ {*self._layout}})
            raise ValueError(
                f"{type(model).__name__} has other parts, or tensors of other names, shapes or sharing, than when its "
                f"frozen copy was made ({', '.join(other[:4])}): make a new one with purify_fast.frozen_copy(model, x)"
            )
        self._reason = _uncounted(model, tensors)

    def fits(self) -> bool:
        """Return True if names, shapes and the sharing of the model's tensors are those of the copy."""
        return self._model is None or _layout(self._model) == self._layout

    @property
    def reason(self) -> str:
        """Why every call of the copy must read the model again; empty if counts of writes show a change."""
        return self._reason or (
            "a tensor was made in inference mode" if self._watch and self._watch.has_uncounted else ""
        )

    def changed(self) -> bool:
        """Return True if the model may have changed since the last `read`."""
        if self._model is None:
            return False
        return not self.is_current or self._reason != "" or self._watch.changed()

    def keep_mode(self, mode: bool) -> None:
        """Warn once that ``train()`` changes nothing in a frozen copy."""
        if mode and not self._warned:
            text = "a frozen copy keeps its mode: train() changes nothing. Call train() on the model itself"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        self._warned = self._warned or mode

    def __deepcopy__(self, memo: object) -> Followed:
        other = type(self)()
        vars(other).update(vars(self))
        other.places = defaultdict(Place)
        if self._model is not None:
            other._watch = Watch(self._model)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def check_parts(model: nn.Module) -> None:
    """Refuse a model that cannot be copied rightly by a TypeError, which names the part."""
    for at, part in model.named_modules():
        where = f"{at or 'the model itself'} ({type(part).__name__})"
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            given = f"model.{at}".rstrip(".")
            text = f"give {given}.module, and run one process per GPU"
            raise TypeError(f"model must not be or contain an nn.{type(part).__name__}: {text}")
        if part is not model and supports(part, CopiesItself):
            raise TypeError(f"model must not contain a defence, got {where}: copy the defence itself")
        if is_frozen_copy(part):
            raise TypeError(f"model must not contain a frozen copy, got {where}: keep the copy outside of the model")
        if "forward" in vars(part):
            raise TypeError(
                f"model must not have a forward that was bound to an instance, as {where} has: its copy would run the "
                "original. Define a class with this forward; for accelerate give accelerator.unwrap_model(model), for "
                "Lightning Fabric model.module"
            )
    held = [(f"{at}.{n}".lstrip("."), one) for at, part in model.named_modules() for n, one in vars(part).items()]
    for at, tensor in (*tensors_of(model), *((name, one) for name, one in held if isinstance(one, Tensor))):
        if tensor.layout != torch.strided:
            raise TypeError(f"model must have dense tensors, got {tensor.layout} in {at}: call {at}.to_dense()")


def _uncounted(model: nn.Module, tensors: list[Tensor]) -> str:
    """Say why counts of writes do not show all changes of a model; an empty text if they do.

    ``tensors``: all tensors that the model holds.
    """
    for name, part in model.named_modules():
        if computes_in_modes(part):
            return f"{type(part).__name__} ({name or 'the model'}) computes in train() or eval()"
    if hidden := hidden_modules(model):
        return f"{hidden[0][0]} is no registered part"
    known = {id(one) for _, one in tensors_of(model)}
    known |= {id(value) for part in model.modules() for value in vars(part).values()}
    if any(id(one) not in known for one in tensors):
        return "a tensor lies in a list, a dict or an object"
    return ""


def _layout(model: nn.Module) -> list[tuple[str, Any, int]]:
    """The names and shapes of a model's tensors, each with the number of its first place, and the classes of parts."""
    first = dict[int, int]()
    tensors = [(name, one.shape, first.setdefault(id(one), len(first))) for name, one in tensors_of(model)]
    return [*tensors, *((name, type(part).__qualname__, 0) for name, part in model.named_modules())]

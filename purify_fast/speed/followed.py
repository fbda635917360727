"""Follow a model: tell when its frozen copy must read the weights again, and whether the copy can still follow it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model_state import hidden_modules
from ..protocols import supports
from .copying import computes_in_modes
from .reading import NUMBERS, block
from .snapshot import Snapshot, held_by
from .watch import tensors_of

if TYPE_CHECKING:
    from .graphs.graphed_loop import StepGraphs


def is_frozen_copy(model: object) -> bool:
    """Return True if a model is a frozen copy itself."""
    return isinstance(getattr(model, "_followed", None), Followed)


class Followed:
    """A model that a copy follows.

    A copy of this object in memory follows the same model, or the copy of the model that was made together with it. It
    reads the model at its first use. One that was pickled follows nothing.

    Attributes:
        reads: the number of the last read, larger than those of all blocks of `reading` that had begun; 0 if the copy
            must read. Several copies may follow by one object.
        watch: what the model held at the last read. It is another object if the model holds others.
        reason: why every call of the copy must read the model again; empty if counts of writes show a change.
        remade: why each read makes a new network; empty if it writes into the present one.
        graphs: the graphs of attacks that are called directly on the copy.

    Raises:
        TypeError: see `read`.
    """

    def __init__(self, model: nn.Module | None = None):
        self.graphs: StepGraphs | None = None
        self.reads, self.reason, self.remade = 0, "", ""
        self.watch: Any = None
        self._given, self._warned = model, False
        #: The memo of the copying in memory that has made this object, until the model is asked for.
        self._memo: dict[int, Any] | None = None
        if model is not None:
            self._layout = _layout(model)
            self.read()

    @property
    def _model(self) -> nn.Module | None:
        if self._memo is not None:
            # What is copied together may be copied in any order, so only now is it known whether the model was.
            self._given, self._memo = self._memo.get(id(self._given), self._given), None
        return self._given

    @property
    def has_model(self) -> bool:
        """Return True if there is a model. After pickling there is none."""
        return self._model is not None

    def read(self) -> Any:
        """Check the model, and return the watch of what it holds now. The caller makes the copy, and calls `finish`.

        Raises:
            TypeError: the model can no longer be copied, see `check_parts`.
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        # If a check or the caller fails, the next call of the copy tries again.
        self.reads = 0
        model: Any = self._model
        watch = Snapshot(model) if self.watch is None else self.watch.again()
        if watch is not self.watch:
            check_parts(model)
            if not self.fits():
                other = sorted({name for name, *_ in {*_layout(model)} ^ {*self._layout}})
                raise ValueError(
                    f"{type(model).__name__} has other parts, or tensors of other names, shapes or sharing, than when "
                    f"its frozen copy was made ({', '.join(other[:4])}): make a new one with "
                    "purify_fast.frozen_copy(model, x)"
                )
            self.watch, self.reason = watch, _uncounted(model, watch)
        return watch

    @property
    def may_write(self) -> bool:
        """Return True if a read may write into present tensors. A backward pass of an earlier call may need them."""
        return not self.reason or block.get() > 0

    def finish(self, values: Any) -> None:
        """Remember that the copy has been made from what was read last. ``values``: its `Values`."""
        self.reads = next(NUMBERS)
        self.remade = "" if values.possible else self.reason or "it holds objects whose copies may differ"

    def fits(self) -> bool:
        """Return True if names, shapes and the sharing of the model's tensors are those of the copy."""
        return self._model is None or _layout(self._model) == self._layout

    def changed(self) -> bool:
        """Return True if the copy must read: once in a block of `reading`, or if the model may have changed outside."""
        if self._model is None:
            return False
        now = block.get()
        return self.reads <= now or (not now and (self.reason != "" or self.watch.changed()))

    def keep_mode(self, mode: bool) -> None:
        """Warn once that ``train()`` changes nothing in a frozen copy."""
        if mode and not self._warned:
            text = "a frozen copy keeps its mode: train() changes nothing. Call train() on the model itself"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        self._warned = self._warned or mode

    def refuse_state(self) -> None:
        """Refuse to load weights into a copy, because it would read those of its model again."""
        if self.has_model:
            raise TypeError("a frozen copy has the weights of its model: call load_state_dict of the model")

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        other = type(self)()
        vars(other).update(vars(self), reads=0, watch=None, _given=self._model, _memo=memo)
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
        if part is not model and supports(part, "make_frozen_copy"):
            raise TypeError(f"model must not contain a defence, got {where}: copy the defence itself")
        if is_frozen_copy(part):
            raise TypeError(f"model must not contain a frozen copy, got {where}: keep the copy outside of the model")
        if "forward" in vars(part):
            raise TypeError(
                f"model must not have a forward that was bound to an instance, as {where} has: its copy would run the "
                "original. Define a class with this forward; for accelerate give accelerator.unwrap_model(model), for "
                "Lightning Fabric model.module"
            )
    if any(is_frozen_copy(one) and one._followed._model is model for one in held_by(model)[1]):
        raise TypeError("model must not contain a frozen copy of itself in an attribute, list or dict: keep it outside")
    held = [(f"{at}.{n}".lstrip("."), one) for at, part in model.named_modules() for n, one in vars(part).items()]
    for at, tensor in (*tensors_of(model), *((name, one) for name, one in held if isinstance(one, Tensor))):
        if tensor.layout != torch.strided:
            raise TypeError(f"model must have dense tensors, got {tensor.layout} in {at}: call {at}.to_dense()")


def _uncounted(model: nn.Module, watch: Snapshot) -> str:
    """Say why counts of writes do not show all changes of a model; an empty text if they do."""
    if watch.has_uncounted:
        return "a tensor was made in inference mode"
    for name, part in model.named_modules():
        if computes_in_modes(part):
            return f"{type(part).__name__} ({name or 'the model'}) computes in train() or eval()"
    if hidden := hidden_modules(model):
        return f"{hidden[0][0]} is no registered part"
    known = {id(one) for _, one in tensors_of(model)}
    known |= {id(value) for part in model.modules() for value in vars(part).values()}
    if any(isinstance(one, Tensor) and id(one) not in known for one in watch.held):
        return "a tensor lies in a list, a dict or an object"
    return ""


def _layout(model: nn.Module) -> list[tuple[str, Any, int]]:
    """The names and shapes of a model's tensors, each with the number of its first place, and the classes of parts."""
    first = dict[int, int]()
    tensors = [(name, one.shape, first.setdefault(id(one), len(first))) for name, one in tensors_of(model)]
    return [*tensors, *((name, type(part).__qualname__, 0) for name, part in model.named_modules())]

"""A loop of steps, which is eager at first, and replays a graph after its step was captured.

A step is a function from named tensors to named tensors. Its results replace the tensors of the same names, which are
the state. In an eager loop (without a graph), the new tensors become the state. In a captured loop, the state is in
fixed buffers, and the step writes its results to them. Both loops call the same function, so the formula of an attack
is written only once.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..._compiler import section
from ...ops.dispatch.registry import forced_backends
from ...protocols import CountsImages, Passes
from ..precision import float32_settings

#: A step is captured after this many launches. For a PGD step of a ResNet-18 on an H200, a capture took as long as 13
#: to 15 launches in bfloat16 (50 to 59 ms), and 18 to 40 in float32 (104 to 291 ms), where cuDNN also chose algorithms.
CAPTURE_STEPS = 15

State = dict[str, Tensor]
Result = TypeVar("Result")


class StepFunction(Protocol):
    """A step. It can be hashed, and equal steps compute equal results from equal states."""

    @property
    def model(self) -> Any:
        """The model that the step uses. Only a step with a module as model can be captured."""

    def may_be_compiled(self, state: State) -> bool:
        """Return True if the whole step may be compiled for the shapes of a state."""

    def __call__(self, state: State) -> State:
        """Compute new values, with unchanged shapes and dtypes, for some tensors of the state. Do not write to it."""


@dataclass
class Launches:
    """Counts the launches of a step without a graph, at one batch size."""

    count: int = 0

    @property
    def enough(self) -> bool:
        """Return True if the step should be captured."""
        return self.count >= CAPTURE_STEPS


class CapturesSteps(Protocol):
    """Begins loops of steps, and captures steps, as `StepGraphs` does."""

    def begin(self, function: StepFunction, state: State) -> Steps:
        """Begin a loop of a step from the initial state."""

    def retry_without_graphs(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Call a function. If memory runs out and there are graphs, delete the graphs and call the function again."""

    def find(self, function: StepFunction, state: State) -> Captured | Launches | None:
        """Return the captured step, or the count of its launches, or None if launches need not be counted."""


class Steps:
    """A loop of steps. It is eager at first, and replays a graph after its step was captured.

    Args:
        function: the step.
        state: initial tensors by name, which are not written to.
        graphs: object that captures the step if this saves time. With None, the loop remains eager.

    Attributes:
        state: the current tensors, which the next step may overwrite. `values` returns tensors that are not
            overwritten.
    """

    def __init__(self, function: StepFunction, state: State, graphs: CapturesSteps | None = None):
        self.function, self.state, self.graphs = function, dict(state), graphs
        # Graphs are found by the strides of the initial tensors, because the results of a step may have other strides.
        self._first = dict(state)
        self.captured: Captured | None = None
        self.launched: Launches | None = None
        if graphs is not None:
            self._ask(graphs)

    def advance(self) -> None:
        """Do a step, eagerly or as a replay."""
        if self.graphs is not None and self.launched is not None and self.launched.enough:
            self._ask(self.graphs)
        if self.captured is not None:
            with section("replay of an attack step"):
                self.captured.replay()
            for counter, images in self.counters:
                counter.count(images)
            return
        # Every eager step runs these lines, so they must be fast.
        if torch._C._autograd._profiler_enabled():
            with section("attack step"):
                self.state |= self.function(self.state)
        else:
            self.state |= self.function(self.state)
        if self.launched is not None:
            self.launched.count += 1

    def put(self, **values: Tensor) -> None:
        """Replace tensors of the state by tensors of the same shapes and dtypes."""
        if self.captured is None:
            self.state |= values
            return
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        """The current tensors of these names, or of all names. Later steps do not overwrite them."""
        values = {name: self.state[name] for name in names or self.state}
        return values if self.captured is None else {name: value.clone() for name, value in values.items()}

    def _ask(self, graphs: CapturesSteps) -> None:
        """Use the graph of the step, if there is one or if the step can be captured now, or else set `launched`."""
        found = graphs.find(self.function, self._first)
        if not isinstance(found, Captured):
            self.launched = found
            return
        holder = None if found.loop is None else found.loop()
        if holder is not None:
            # This loop takes the buffers of an earlier loop. If the earlier loop continues, it continues eagerly with a
            # copy of its state.
            holder.state, holder.captured = holder.values(), None
        before, self.state = self.state, found.buffers
        self.captured, self.launched = found, None
        self.counters = list(zip(parts_of(self.function.model, CountsImages), found.counts, strict=True))
        found.loop = weakref.ref(self)
        self.put(**before)


@dataclass
class Captured:
    """A captured step.

    Args:
        model: the model that the step uses. The graph is deleted when the model no longer exists.
        buffers: the tensors of the state.
        replay: function that launches the captured step.
        counts: the numbers of images that a replay adds to the counters in the model, one number for each counter.
        objects: objects that the captured step uses, and that must therefore stay alive.
        loop: the `StepGraphs` loop that replayed this step last. Its state is in the buffers until another loop begins.
    """

    model: weakref.ref[nn.Module]
    buffers: State
    replay: Callable[[], None]
    counts: list[Passes]
    objects: list[Any]
    loop: weakref.ref[Steps] | None = None


def parts_of(model: nn.Module, protocol: Any) -> list[Any]:
    """The submodules of a model that have the methods of a protocol of `purify_fast.protocols`."""
    return [part for part in model.modules() if issubclass(type(part), protocol)]


def weak_key(value: Any) -> Hashable:
    """Make a key that is equal for equal values and has only weak references to modules.

    The value is a module, a value that can be hashed, or a dataclass of such values; else a TypeError is raised.
    """
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = (weak_key(getattr(value, field.name)) for field in fields(value) if field.compare)
        return (type(value), *parts)
    hash(value)
    return value


def numerics(device: torch.device) -> tuple[Any, ...]:
    """The settings of the process that affect the results of operators on a device, as a value that can be hashed."""
    older, newer = float32_settings()
    return (
        older,
        tuple(newer),
        forced_backends(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


def step_key(function: StepFunction, state: State) -> Hashable:
    """Return a key of a step, its shapes and the settings of the process, see `weak_key`."""
    device = next(iter(state.values())).device
    shapes = tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(state.items()))
    return weak_key((weak_key(function), shapes, device, numerics(device)))


#: True within `eager_steps`.
_eager = ContextVar("eager", default=False)


@contextlib.contextmanager
def eager_steps(eager: bool = True) -> Iterator[None]:
    """Within the block, steps are not compiled, because each batch has another number of images."""
    token = _eager.set(eager)
    try:
        yield
    finally:
        _eager.reset(token)


def compiler_of(function: StepFunction, state: State) -> Any:
    """Return the `CompiledSteps` of the copy that a step attacks; None if the step is not to be compiled.

    A step whose number of images changes is not compiled as a whole, and neither is a step that counts images.
    """
    # Nothing is compiled before this module is imported. Every attack runs these lines, so they must be fast.
    if "purify_fast.speed.graphs.compiled_step" not in sys.modules:
        return None
    model = function.model
    # Inside a larger graph of torch.compile, there is nothing to compile here.
    if not isinstance(model, nn.Module) or _eager.get() or torch.compiler.is_compiling():
        return None
    found = None
    for part in model.modules():
        if hasattr(type(part), "counted"):
            return None
        if found is None and hasattr(type(part), "compiled_steps"):
            found = part.compiled_steps()
    return found if found is not None and function.may_be_compiled(state) else None


def reserved(device: torch.device) -> int:
    """The bytes that this process has reserved on a GPU for tensors and graphs; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def on_usual_stream(device: torch.device) -> bool:
    """Return True if the present stream is the default one, so that all replays come one after the other."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def begin_steps(graphs: CapturesSteps | None, function: StepFunction, state: State) -> Steps:
    """Begin a loop of a step, from tensors on the same device.

    The step is compiled if the user has asked for this, or ``graphs`` may capture it. Otherwise the loop is eager.
    """
    if (compiler := compiler_of(function, state)) is not None:
        return Steps(compiler.form_of(function, state), state)
    return Steps(function, state) if graphs is None else graphs.begin(function, state)

"""A loop of steps that replays a CUDA graph after its step was captured, and the keys by which graphs are found."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._compiler import section
from ...ops.dispatch.registry import forced_backends
from ...protocols import CountsImages, Passes, supports
from ..precision import float32_settings
from .step_loop import State, StepFunction, Steps

#: A step is captured after this many launches. For a PGD step of a ResNet-18 on an H200, a capture took as long as 13
#: to 15 launches in bfloat16 (50 to 59 ms), and 18 to 40 in float32 (104 to 291 ms), where cuDNN also chose algorithms.
CAPTURE_STEPS = 15


@dataclass
class Launches:
    """Counts the launches of a step without a graph, at one batch size."""

    count: int = 0

    @property
    def enough(self) -> bool:
        """Return True if the step should be captured."""
        return self.count >= CAPTURE_STEPS


class GraphedSteps(Steps):
    """A loop that is eager at first. ``find`` returns the captured step, the count of its launches, or None."""

    def __init__(
        self, function: StepFunction, state: State, find: Callable[[StepFunction, State], Captured | Launches | None]
    ):
        super().__init__(function, state)
        # Graphs are found by the strides of the initial tensors, because the results of a step may have other strides.
        self.find, self._first = find, dict(state)
        self.captured: Captured | None = None
        self.launched: Launches | None = None
        self._ask()

    def advance(self) -> None:
        """Do a step, eagerly or as a replay."""
        if self.launched is not None and self.launched.enough:
            self._ask()
        if self.captured is not None:
            with section("replay of an attack step"):
                self.captured.replay()
            for counter, images in self.counters:
                counter.count(images)
            return
        super().advance()
        if self.launched is not None:
            self.launched.count += 1

    def put(self, **values: Tensor) -> None:
        if self.captured is None:
            super().put(**values)
            return
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        values = super().values(*names)
        return values if self.captured is None else {name: value.clone() for name, value in values.items()}

    def _ask(self) -> None:
        """Use the graph of the step, if there is one or if the step can be captured now, or else set `launched`."""
        found = self.find(self.function, self._first)
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
        loop: the loop that replayed this step last. Its state is in the buffers until another loop begins.
    """

    model: weakref.ref[nn.Module]
    buffers: State
    replay: Callable[[], None]
    counts: list[Passes]
    objects: list[Any]
    loop: weakref.ref[GraphedSteps] | None = None


def parts_of(model: nn.Module, methods: type | str) -> list[Any]:
    """The submodules of a model that have a method, or the methods of a protocol (`purify_fast.protocols.supports`)."""
    return [part for part in model.modules() if supports(part, methods)]


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


def reserved(device: torch.device) -> int:
    """The bytes that this process has reserved on a GPU for tensors and graphs; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def on_usual_stream(device: torch.device) -> bool:
    """Return True if the present stream is the default one, so that all replays come one after the other."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)

"""A loop over a step: run eagerly, or replayed from a captured step.

A step is a function from tensors to tensors, by name: what it returns takes the place of what it was given. Eagerly the
loop simply goes on with the new tensors. Captured, the state lies in buffers that stay where they are, and the step
ends by writing its results there. Both run the same function, so that there is one formula of an attack.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ...protocols import CountsImages

State = dict[str, Tensor]


class StepFunction(Protocol):
    """One step; it can be hashed, and two that are equal compute the same from the same state."""

    @property
    def model(self) -> Any:
        """What it computes with besides its state: a module, if it is to be captured."""

    def __call__(self, state: State) -> State:
        """The new values of some of the state's tensors, each of the old one's shape and dtype.

        Args:
            state: tensors by name; they are not written to.
        """


@dataclass
class Tally:
    """How many steps were launched operator by operator, in all and in each run of an attack.

    Args:
        steps: so far.
        runs: how many runs took such steps.
        run: the number of the latest of these runs; -1 before the first.
        before: how many steps the runs before it took.
    """

    steps: int = 0
    runs: int = 0
    run: int = -1
    before: int = 0

    def begin(self, run: int) -> None:
        """Count the next steps for a run; runs have different numbers."""
        if run != self.run:
            self.run, self.runs, self.before = run, self.runs + 1, self.steps

    def expected(self, left: int, to_come: float) -> float:
        """How many more steps are to be expected: for this run what earlier ones took, and as much for each later run.

        Of the first run it is expected that it goes on for as long as it went on so far.

        Args:
            left: how many steps this run has left at most.
            to_come: how many runs will follow this one.
        """
        done = self.steps - self.before
        usual = self.before / (self.runs - 1) if self.runs > 1 else done + min(done, left)
        return max(0.0, min(left, usual - done)) + to_come * usual


class Steps:
    """A loop over a step function, run eagerly.

    Args:
        function: the step.
        state: tensors by name; they are not written to.
        tally: counts the steps, if given.

    Attributes:
        state: the tensors as they are now; not for keeping, `values` gives those.
    """

    #: Whether steps are replayed.
    replays = False

    def __init__(self, function: StepFunction, state: State, tally: Tally | None = None):
        self.function, self.state, self.tally = function, dict(state), tally

    def take(self) -> None:
        """Take a step."""
        self.state |= self.function(self.state)
        if self.tally is not None:
            self.tally.steps += 1

    def put(self, **values: Tensor) -> None:
        """Give the state other values.

        Args:
            values: by name, each of the old one's shape and dtype.
        """
        self.state |= values

    def values(self, *names: str) -> State:
        """The state as it is now, in tensors that nothing writes to.

        Args:
            names: which tensors; none for all.
        """
        return {name: self.state[name] for name in names or self.state}


class Replays(Steps):
    """The same loop over a captured step.

    Args:
        function: the step.
        captured: the same, captured.
        state: tensors by name; they are not written to.
    """

    replays = True

    def __init__(self, function: StepFunction, captured: Captured, state: State):
        super().__init__(function, captured.buffers)
        self.captured = captured
        self.counters = list(zip(parts_of(function.model, CountsImages), captured.counts, strict=True))
        captured.loop = weakref.ref(self)
        self.put(**state)

    def take(self) -> None:
        self.captured.replay()
        for counter, images in self.counters:
            counter.count(images)

    def put(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        return {name: value.clone() for name, value in super().values(*names).items()}


@dataclass
class Captured:
    """A captured step.

    Args:
        model: what it computes with; the graph goes when the model does.
        buffers: where its state lies.
        replay: launches it.
        counts: how many images the parts of its model that count them count in a step.
        objects: what it depends on by identity.
        loop: the last loop over it, which has its state in the buffers until it is gone.
    """

    model: weakref.ref[nn.Module]
    buffers: State
    replay: Callable[[], None]
    counts: list[int]
    objects: list[Any]
    loop: weakref.ref[Replays] | None = None

    def is_in_use(self) -> bool:
        """Whether there still is a loop that may go on."""
        return self.loop is not None and self.loop() is not None


def parts_of(model: nn.Module, protocol: Any) -> list[Any]:
    """The modules of a model that have the methods of a protocol.

    Args:
        model: any module.
        protocol: of `purify_fast.protocols`.
    """
    return [part for part in model.modules() if _supports(cast(Hashable, type(part)), protocol)]


@functools.lru_cache(maxsize=1024)
def _supports(kind: Any, protocol: Any) -> bool:
    return issubclass(kind, protocol)


def write(values: State, buffers: State) -> None:
    """Write a step's results to the buffers that it read from; a result that is another buffer is read before that.

    Args:
        values: what the step returned.
        buffers: the state, by name.
    """
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
    ready = {}
    for name, value in values.items():
        if value is not buffers[name]:
            ready[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
    for name, value in ready.items():
        buffers[name].copy_(value)


def weak_key(value: Any) -> Hashable:
    """A key that is equal for equal values, and keeps no module alive.

    Args:
        value: a module, a dataclass of such values, or anything that can be hashed.

    Raises:
        TypeError: something in it cannot be hashed.
    """
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = (weak_key(getattr(value, field.name)) for field in fields(value) if field.compare)
        return (type(value), *parts)
    hash(value)
    return value

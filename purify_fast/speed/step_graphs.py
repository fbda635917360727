"""A step that is taken many times, captured once and replayed: a CUDA graph of an attack's step.

A step is a function from tensors to tensors, by name: what it returns takes the place of what it was given. Eagerly the
loop simply goes on with the new tensors. Captured, the state lies in buffers that stay where they are, and the step
ends by writing its results there. Both run the same function, so that there is one formula of an attack.

A graph holds a step's launches, not its Python. So a step is captured only if it asks nothing of the data, and it is
replayed only while everything that its model computes with is the same, `purify_fast.speed.dependencies`. Weights that
are written in place are the same: replays see the new ones. Draws from torch's generator of the device go on as they
would without a graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from .._validation import check_literal
from ..protocols import CountsImages, PreparesReplay
from .agreement import first_replay_agrees
from .cuda_capture import CudaCapture
from .dependencies import dependencies
from .surroundings import host_generators, no_trace, numerics
from .waits import Waits

logger = logging.getLogger("purify_fast")

CudaGraphs = Literal["auto", "always", "off"]
State = dict[str, Tensor]

#: A loop of so many steps is worth a capture, which costs about as much as four of them. A shorter one is captured when
#: it comes a second time.
WORTH = 20
#: Of the time a step takes, the share that the host must spend on launching it, for a graph to gain anything.
LEAST_SHARE = 0.7
#: How many steps are remembered that were seen once, or cannot be captured.
REMEMBERED = 64


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


class Capture(Protocol):
    """What makes graphs: `CudaCapture`, or what stands for it in a test."""

    kind: str

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """See `CudaCapture.aside`."""

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """See `CudaCapture.timed`."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """See `CudaCapture.record`."""


class Steps:
    """A loop over a step function, run eagerly.

    Args:
        function: the step.
        state: tensors by name; they are not written to.

    Attributes:
        state: the tensors as they are now; not for keeping, `values` gives those.
    """

    def __init__(self, function: StepFunction, state: State):
        self.function, self.state = function, dict(state)

    def take(self) -> None:
        """Take a step."""
        self.state |= self.function(self.state)

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


class _Replays(Steps):
    """The same loop over a captured step."""

    def __init__(self, function: StepFunction, captured: _Captured, state: State):
        super().__init__(function, captured.buffers)
        self.captured = captured
        captured.loop = weakref.ref(self)
        self.put(**state)

    def take(self) -> None:
        self.captured.replay()
        for counter, images in self.captured.counters:
            counter.count(images)

    def put(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        return {name: value.clone() for name, value in super().values(*names).items()}


@dataclass
class _Captured:
    """A captured step.

    Args:
        buffers: where its state lies.
        replay: launches it.
        counters: the parts of its model that count images, and how many they count in a step.
        objects: what it depends on by identity.
        loop: the last loop over it, which has its state in the buffers until it is gone.
    """

    buffers: State
    replay: Callable[[], None]
    counters: list[tuple[CountsImages, int]]
    objects: list[Any]
    loop: weakref.ref[_Replays] | None = None

    def is_in_use(self) -> bool:
        """Whether there still is a loop that may go on."""
        return self.loop is not None and self.loop() is not None


class StepGraphs:
    """The captured steps of one training or evaluation.

    Args:
        mode: "auto" captures steps whose launches take longer than what they compute; "always" captures whatever can
            be; "off" captures nothing.
        limit: graphs that are kept; the least recently used one goes first.
        capture: what makes graphs; None: CUDA graphs, on CUDA devices.

    Attributes:
        refusal: why the last loop that was to be captured was not and never will be; None where it was, or may yet be.

    Raises:
        ValueError: an unknown mode, or a limit below 1.

    One loop at a time: not for several threads.
    """

    def __init__(self, mode: CudaGraphs = "auto", limit: int = 8, capture: Capture | None = None):
        check_literal("mode", mode, CudaGraphs)
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.mode, self.limit = mode, limit
        self.capture: Capture = CudaCapture() if capture is None else capture
        self.refusal: str | None = None
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def __deepcopy__(self, memo: Any) -> StepGraphs:
        # a copy of what is trained or attacked captures for itself
        return StepGraphs(self.mode, self.limit, self.capture)

    def begin(self, function: StepFunction, state: State, steps: int) -> Steps:
        """Begin a loop.

        Args:
            function: the step.
            state: what it begins with, tensors by name on one device.
            steps: how many will be taken.

        Returns:
            The loop; replayed if the step is captured, or can be and is worth it.
        """
        device = next(iter(state.values())).device
        if self.mode == "off" or device.type != self.capture.kind or torch.compiler.is_compiling():
            return Steps(function, state)
        captured = self._find(function, state, steps, device)
        if captured is None or captured.is_in_use():
            return Steps(function, state)
        return _Replays(function, captured, state)

    def may_replay(self, device: torch.device) -> bool:
        """Whether loops on a device are captured, as far as is known.

        Args:
            device: where their state lies.
        """
        return self.mode != "off" and device.type == self.capture.kind and self.refusal is None

    def _find(self, function: StepFunction, state: State, steps: int, device: torch.device) -> _Captured | None:
        """The captured step, captured now if need be; None where the loop is to run eagerly."""
        model = function.model
        if not isinstance(model, nn.Module):
            return self._refuse(None, f"{_name(model)} is no torch.nn.Module: what it depends on cannot be seen")
        shapes = tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(state.items()))
        try:
            base = hash_checked((function, shapes, device, numerics(device)))
        except TypeError:
            return self._refuse(None, f"{_name(model)} cannot be hashed")
        self.refusal = self._refused.get(base)
        if self.refusal is not None:
            return None
        for part in _parts(model, PreparesReplay):
            part.prepare_replay()
        try:
            values, objects = dependencies(model)
            key = hash_checked((base, values))
        except TypeError as error:
            return self._refuse(base, f"{_name(model)}: {error}")
        if any(isinstance(one, torch.Generator) for one in objects):
            return self._refuse(base, f"{_name(model)} has a generator of its own, which graphs need not follow")
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        if steps < WORTH and not self._seen_before(key):
            return None
        made = self._make(function, state, base, objects, device)
        if made is not None:
            self._captured[key] = made
            if len(self._captured) > self.limit:
                self._captured.popitem(last=False)
        return made

    def _seen_before(self, key: Hashable) -> bool:
        seen = key in self._seen
        _remember(self._seen, key, None)
        return seen

    def _refuse(self, base: Hashable | None, reason: str) -> _Captured | None:
        """Note that a step cannot be captured, and say why in the log, once for each reason."""
        self.refusal = reason
        if base is not None:
            _remember(self._refused, base, reason)
        if reason not in self._told:
            self._told.add(reason)
            logger.info("an attack runs without a CUDA graph: %s", reason)
        return None

    def _make(
        self, function: StepFunction, state: State, base: Hashable, objects: list[Any], device: torch.device
    ) -> _Captured | None:
        """Capture a step, if it can be."""
        buffers = {name: value.detach().clone() for name, value in state.items()}

        def advance() -> None:
            _write(function(buffers), buffers)

        counters: list[CountsImages] = _parts(function.model, CountsImages)
        before = [counter.counted() for counter in counters]
        try:
            with no_trace(device):
                with self.capture.aside(device):
                    # the first call compiles, verifies kernels and chooses algorithms, which waits
                    function(buffers)
                tried = [counter.counted() for counter in counters]
                reason = self._trial(function, buffers, device)
                counts = [counter.counted() - start for counter, start in zip(counters, tried, strict=True)]
                reason = reason or self._busy(lambda: _drop(function(buffers)), device)
                if reason is not None:
                    return self._refuse(base, reason)
                # the state is written by what is launched, and by no warm-up: it is put in before each loop
                replay = self.capture.record(advance, device)
                if not first_replay_agrees(lambda: function(buffers), buffers, replay, device):
                    return self._refuse(base, "a replay does not give what the step gives")
        except RuntimeError as error:
            return self._refuse(base, f"the step cannot be captured ({str(error).strip().splitlines()[0]})")
        finally:
            # none of these steps is one of the loop
            for counter, start in zip(counters, before, strict=True):
                counter.count(start - counter.counted())
        return _Captured(buffers, replay, list(zip(counters, counts, strict=True)), objects)

    def _busy(self, run: Callable[[], None], device: torch.device) -> str | None:
        """Say so if the device is busy for so long that launching costs nothing, and that matters."""
        launching, whole = self.capture.timed(run, device)
        if self.mode == "always" or launching >= LEAST_SHARE * whole:
            return None
        return (
            f"the device computes a step for {whole * 1e3:.3g} ms, of which launching takes {launching * 1e3:.3g} ms, "
            "so that a graph would gain nothing"
        )

    def _trial(self, function: StepFunction, buffers: State, device: torch.device) -> str | None:
        """Run the step once, and say what keeps it from being captured, if anything does."""
        before = host_generators(device)
        with self.capture.aside(device), Waits() as waits:
            found = function(buffers)
        if host_generators(device) != before:
            return f"{_name(function.model)} draws from a generator of the host, which a graph would draw from once"
        # a number that is turned into a tensor waits only if it goes to the device, where the capture then fails
        blocking = [wait for wait in waits.found if wait.operator != "lift_fresh"]
        if blocking:
            operator, file, name = blocking[0]
            return f"the step waits for the device: {operator}, asked for by {name or 'a function'} ({file})"
        for name, value in found.items():
            old = buffers[name]
            if (value.shape, value.dtype, value.device) != (old.shape, old.dtype, old.device):
                return (
                    f"the step makes its {name} {value.dtype} {list(value.shape)}, it was {old.dtype} {list(old.shape)}"
                )
        return None


def _parts(model: nn.Module, protocol: Any) -> list[Any]:
    """The modules of a model that have the methods of a protocol."""
    return [part for part in model.modules() if _supports(cast(Hashable, type(part)), protocol)]


@functools.lru_cache(maxsize=1024)
def _supports(kind: Any, protocol: Any) -> bool:
    return issubclass(kind, protocol)


def hash_checked(key: Any) -> Hashable:
    """The key itself; TypeError if something in it cannot be hashed.

    Args:
        key: any value.
    """
    hash(key)
    return cast(Hashable, key)


def begin_steps(graphs: StepGraphs | None, function: StepFunction, state: State, steps: int) -> Steps:
    """Begin a loop over a step: replayed if there are graphs that take it, else eager.

    Args:
        graphs: the captured steps of the caller, or None.
        function: the step.
        state: what it begins with, tensors by name on one device.
        steps: how many will be taken.
    """
    return Steps(function, state) if graphs is None else graphs.begin(function, state, steps)


def _drop(values: State) -> None:
    """Nothing: what a warm-up computes is not used."""


def _write(values: State, buffers: State) -> None:
    """Write a step's results to the buffers it read from; a result that is another buffer is read before that."""
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
    ready = {}
    for name, value in values.items():
        if value is not buffers[name]:
            ready[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
    for name, value in ready.items():
        buffers[name].copy_(value)


def _remember(table: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > REMEMBERED:
        table.popitem(last=False)


def _name(model: Any) -> str:
    return getattr(model, "__qualname__", None) or type(model).__qualname__

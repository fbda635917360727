"""A step that is taken many times, captured once and replayed: a CUDA graph of an attack's step.

A step is a function from tensors to tensors, by name: its results replace its arguments. An eager loop continues with
the new tensors. In a captured loop the state lies in buffers that stay where they are, and the step ends by writing its
results there. Both loops run the same function, so that an attack has one formula.

A graph contains a step's launches, not its Python. So a step is captured only if its Python reads no values of tensors,
and it is replayed only while everything that its model computes with is the same
(`purify_fast.model_state.identity_key`). Weights that are written in place are the same: replays see the new ones.
Draws from torch's generator of the device go on as they would without a graph.

A capture costs as much as a dozen steps, and nobody knows how many steps will follow: batches shrink while images fall.
So a step is captured once its launches have cost as much as a capture. This is the rule of ski rental. It costs at most
twice as much as the best choice, which knows the future. Each step is counted by itself at each batch size. Where a
replay was measured to save less than a tenth, the step is not captured again; this changes nothing for other sizes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..._validation import CudaGraphs, check_literal
from ...model_state import identity_key
from ...ops.dispatch.registry import forced_backends
from ...protocols import CountsImages, PreparesReplay
from ..memory import retry_when_memory_ends, same_draws_again
from ..precision import float32_settings
from .cuda_capture import CudaCapture
from .host_syncs import HostSyncs

logger = logging.getLogger("purify_fast")

Result = TypeVar("Result")

#: The assumed cost of a capture in seconds, until one has been measured. It is an estimate: a dozen steps of 1.5 ms on
#: a ResNet-18.
CAPTURE_SECONDS = 0.02
#: The share of a step's time that a replay must save; otherwise the step is not captured again.
LEAST_SAVING = 0.1
SAVES_TOO_LITTLE = "a replay saves less than a tenth of the step"
#: How often a step is timed; the least time counts, because other work on the machine only adds to it.
TIMINGS = 3
#: A step that could not be captured is tried again after this many launched steps.
RETRIED_AFTER = 1000
#: The most graphs that are kept.
MOST_GRAPHS = 32
#: The number of steps without a graph whose launch costs are remembered.
REMEMBERED = 64
#: For the comparison of a replay with its step. ROUNDING: the allowed error as a share of the largest value.
#: OTHER_SIGNS: the share of the values that may have a larger error.
ROUNDING, OTHER_SIGNS = 1e-3, 0.05


State = dict[str, Tensor]


class StepFunction(Protocol):
    """A step; it can be hashed, and two equal steps compute the same from the same state."""

    @property
    def model(self) -> Any:
        """The model that it computes with besides its state: a module, if it is to be captured."""

    def __call__(self, state: State) -> State:
        """The new values of some of the state's tensors, each of the old one's shape and dtype.

        Args:
            state: tensors by name; they are not written to.
        """


@dataclass
class LaunchCost:
    """The cost of one step, at one batch size, that is launched operator by operator.

    Args:
        steps: the number of launches so far.
        fastest: the host's seconds for the fastest of them. Others may have compiled, or shared the machine.
        refusal: the reason why the step is not captured; "" if there is none.
        retried_after: the number of launches after which a refused step is tried again.
    """

    steps: int = 0
    fastest: float = math.inf
    refusal: str = ""
    retried_after: float = RETRIED_AFTER

    def count(self, seconds: float) -> None:
        """Count a launched step.

        Args:
            seconds: how long the host took to launch it.
        """
        self.steps += 1
        self.fastest = min(self.fastest, seconds)

    def pays(self, cost: float) -> bool:
        """Tell whether the launches have cost as much as a capture would.

        Args:
            cost: seconds of a capture.
        """
        # A single launch does not count, because it may have included a compilation.
        return not self.refusal and self.steps > 1 and self.steps * self.fastest >= cost


class Steps:
    """A loop over a step function: eager, and replayed from the moment when its step is captured.

    Args:
        function: the step.
        state: tensors by name; they are not written to.
        graphs: captures the step once that pays; None: the loop stays eager.

    Attributes:
        state: the tensors as they are now; not for keeping, `values` gives those.
    """

    def __init__(self, function: StepFunction, state: State, graphs: StepGraphs | None = None):
        self.function, self.state, self.graphs = function, dict(state), graphs
        # Graphs are looked up by the strides of the first tensors, because the step's results may have other strides.
        self._first = dict(state)
        self.captured: Captured | None = None
        self.launched: LaunchCost | None = None
        if graphs is not None:
            self._ask(graphs)

    @property
    def replays(self) -> bool:
        """True if steps are replayed."""
        return self.captured is not None

    def take(self) -> None:
        """Take a step."""
        if self.graphs is not None and self.launched is not None and self.launched.pays(self.graphs.cost):
            self._ask(self.graphs)
        if self.captured is not None:
            self.captured.replay()
            for counter, images in self.counters:
                counter.count(images)
        elif self.graphs is not None and self.launched is not None:
            begun = self.graphs.capture.clock()
            self.state |= self.function(self.state)
            self.launched.count(self.graphs.capture.clock() - begun)
        else:
            self.state |= self.function(self.state)

    def put(self, **values: Tensor) -> None:
        """Give the state other values.

        Args:
            values: by name, each of the old one's shape and dtype.
        """
        if self.captured is None:
            self.state |= values
            return
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        """The state as it is now, in tensors that nothing writes to.

        Args:
            names: which tensors; none for all.
        """
        values = {name: self.state[name] for name in names or self.state}
        return values if self.captured is None else {name: value.clone() for name, value in values.items()}

    def _ask(self, graphs: StepGraphs) -> None:
        """Replay from now on if the step is captured, or is captured now; else count its launches."""
        found = graphs.find(self.function, self._first)
        if not isinstance(found, Captured):
            self.launched = found
            return
        holder = None if found.loop is None else found.loop()
        if holder is not None:
            # The earlier loop gives its buffers up. If that loop is not over, it continues eagerly with a copy of its
            # state.
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
        model: the model that it computes with; the graph goes when the model does.
        buffers: where its state lies.
        replay: launches it.
        counts: how many images the parts of its model that count them count in a step.
        objects: the objects that it depends on by identity.
        loop: the last loop over it, which has its state in the buffers until it is gone or another loop begins.
    """

    model: weakref.ref[nn.Module]
    buffers: State
    replay: Callable[[], None]
    counts: list[int]
    objects: list[Any]
    loop: weakref.ref[Steps] | None = None


def parts_of(model: nn.Module, protocol: Any) -> list[Any]:
    """The modules of a model that have the methods of a protocol.

    Args:
        model: any module.
        protocol: a protocol of `purify_fast.protocols`.
    """
    return [part for part in model.modules() if issubclass(type(part), protocol)]


def write(values: State, buffers: State) -> None:
    """Write a step's results to the buffers that it read from; a result that is another buffer is read before that.

    Args:
        values: the step's results.
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


class StepGraphs:
    """The captured steps of one training or evaluation.

    Args:
        mode: "auto" captures a step once its launches have cost as much as a capture; "always" captures every step
            that it can, immediately; "off" captures nothing.
        capture: the maker of graphs; None: CUDA graphs, on CUDA devices.

    Attributes:
        refusal: the reason why the last loop was not captured; None if it was captured, or may yet be. It is tried
            again after `RETRIED_AFTER` steps, unless its replays saved too little.

    Raises:
        ValueError: an unknown mode.

    Graphs share one pool of memory; beyond `MOST_GRAPHS` the least recently used one goes first. A model is held
    weakly: when it goes, so do its graphs. One loop at a time: not for several threads.
    """

    def __init__(self, mode: CudaGraphs = "auto", capture: CudaCapture | None = None):
        check_literal("mode", mode, CudaGraphs)
        self.mode = mode
        self.capture = CudaCapture() if capture is None else capture
        self.refusal: str | None = None
        self._costs: list[float] = []
        self._captured: dict[Hashable, Captured] = {}
        self._launched: dict[Hashable, LaunchCost] = {}
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def cost(self) -> float:
        """Seconds of a capture: the least measured time, since other work only adds to it; at first an estimate."""
        return min(self._costs, default=CAPTURE_SECONDS)

    def __deepcopy__(self, memo: Any) -> StepGraphs:
        # A copy of the trained or attacked model needs its own captures.
        return StepGraphs(self.mode, self.capture)

    def begin(self, function: StepFunction, state: State) -> Steps:
        """Begin a loop.

        Args:
            function: the step.
            state: the first state, tensors by name on one device.

        Returns:
            The loop; replayed if the step is captured, else from the step on with which that pays.
        """
        off = self.mode == "off" or next(iter(state.values())).device.type != self.capture.kind
        nothing = any(value.numel() == 0 for value in state.values())
        return Steps(function, state, None if off or nothing or torch.compiler.is_compiling() else self)

    def may_replay(self, device: torch.device) -> bool:
        """Tell whether loops on a device are captured, as far as is known.

        Args:
            device: where their state lies.
        """
        return self.mode != "off" and device.type == self.capture.kind and self.refusal is None

    def retry_without_graphs(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Do some work. If memory runs out while graphs hold some of it, do the work once more without graphs.

        Args:
            work: may begin loops, and can be done twice; its second run draws the same random numbers.
            device: where it computes.

        Raises:
            torch.OutOfMemoryError: memory ran out without graphs.
        """
        return retry_when_memory_ends(work, device, lambda: self._give_up if self._captured else None)

    def _give_up(self) -> None:
        logger.warning("memory ran out: the CUDA graphs of attacks are dropped, and the work is done again")
        self.mode = "off"
        self._captured.clear()
        self.capture.release()

    def find(self, function: StepFunction, state: State) -> Captured | LaunchCost | None:
        """Find the captured step, or capture it now if that pays.

        Args:
            function: the step.
            state: its state, tensors by name on one device.

        Returns:
            The captured step; else the cost of its launches; None if that need not be counted.
        """
        device = next(iter(state.values())).device
        for key in [key for key, one in self._captured.items() if one.model() is None]:
            del self._captured[key]
        model = function.model
        if not isinstance(model, nn.Module):
            return self._refuse(None, f"{_name(model)} is no torch.nn.Module, so its dependencies cannot be seen")
        shapes = tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(state.items()))
        try:
            base = weak_key((weak_key(function), shapes, device, numerics(device)))
        except TypeError:
            return self._refuse(None, f"{_name(model)} cannot be hashed")
        refused = self._launched.get(base)
        if refused is not None and refused.steps < refused.retried_after:
            self.refusal = refused.refusal
            return refused
        self.refusal = None
        for part in parts_of(model, PreparesReplay):
            part.prepare_replay()
        try:
            values, objects, _ = identity_key(model)
            key = weak_key((base, values))
        except TypeError as error:
            return self._refuse(base, f"{_name(model)}: {error}")
        if any(isinstance(one, torch.Generator) for one in objects):
            return self._refuse(base, f"{_name(model)} has its own torch.Generator, which a graph may not advance")
        if key in self._captured:
            return remember(self._captured, key, self._captured[key], MOST_GRAPHS)
        launched = remember(self._launched, key, self._launched.get(key) or LaunchCost(), REMEMBERED)
        if self.mode != "always" and not launched.pays(self.cost):
            return launched
        # Forget the launches. A graph that is dropped later is captured again only when further launches have paid for
        # it.
        del self._launched[key]
        captured = self._make(function, state, base, objects, device)
        if isinstance(captured, Captured):
            remember(self._captured, key, captured, MOST_GRAPHS)
        return captured

    def _refuse(self, base: Hashable | None, reason: str, retried_after: float = RETRIED_AFTER) -> LaunchCost | None:
        """Note that a step is not captured, and say why in the log, once for each reason."""
        self.refusal = reason
        if reason not in self._told:
            self._told.add(reason)
            logger.info("an attack runs without a CUDA graph: %s", reason)
        launched = LaunchCost(refusal=reason, retried_after=retried_after)
        return None if base is None else remember(self._launched, base, launched, REMEMBERED)

    def _make(
        self, function: StepFunction, state: State, base: Hashable, objects: list[Any], device: torch.device
    ) -> Captured | LaunchCost | None:
        """Capture a step; if that fails, return the count of steps until it is tried again."""
        buffers = {name: value.detach().clone() for name, value in state.items()}

        def advance() -> None:
            write(function(buffers), buffers)

        counters: list[CountsImages] = parts_of(function.model, CountsImages)
        before = [counter.counted() for counter in counters]
        try:
            with no_trace(device):
                begun = self.capture.now(device)
                with self.capture.aside(device):
                    # The first call compiles, verifies kernels and chooses algorithms. This may wait for the device, so
                    # it comes before the trial, which refuses steps that wait.
                    function(buffers)
                tried = [counter.counted() for counter in counters]
                reason = self._trial(function, buffers, device)
                if reason is not None:
                    return self._refuse(base, reason)
                counts = [counter.counted() - start for counter, start in zip(counters, tried, strict=True)]
                eager = self._timed(lambda: function(buffers), device)
                # Only replays of the graph write to the buffers, the warm-up does not; each attack loop copies its
                # state in first.
                replay = self.capture.record(advance, device)
                if not first_replay_agrees(lambda: function(buffers), buffers, replay, device):
                    return self._refuse(base, "a replay gives another result than the step")
                replayed = self._timed(replay, device)
                self._costs.append(self.capture.now(device) - begun)
                if self.mode != "always" and eager - replayed < LEAST_SAVING * eager:
                    logger.debug("a replay takes %.3g ms, the step alone %.3g ms", replayed * 1e3, eager * 1e3)
                    return self._refuse(base, SAVES_TOO_LITTLE, retried_after=math.inf)
        except Exception as error:
            # A user's model may raise any error in a trial. The attack then runs without graphs.
            first = (str(error).strip().splitlines() or [""])[0]
            return self._refuse(base, f"the step cannot be captured ({type(error).__name__}: {first})")
        finally:
            # Take the counts back, because these steps are not steps of the loop.
            for counter, start in zip(counters, before, strict=True):
                counter.count(start - counter.counted())
        return Captured(weakref.ref(function.model), buffers, replay, counts, objects)

    def _timed(self, run: Callable[[], object], device: torch.device) -> float:
        """Seconds until the device was done with a step; the least of some tries."""
        return min(self.capture.timed(run, device)[1] for _ in range(TIMINGS))

    def _trial(self, function: StepFunction, buffers: State, device: torch.device) -> str | None:
        """Run the step once, and return the reason why it cannot be captured, if there is one."""
        before = host_generators(device)
        with self.capture.aside(device), HostSyncs() as waits:
            results = function(buffers)
        if host_generators(device) != before:
            return f"{_name(function.model)} draws random numbers on the host, which every replay would repeat"
        # `lift_fresh`, as in torch.tensor(1.0), waits only for tensors on the device, and then the capture itself
        # fails.
        blocking = [wait for wait in waits.counts if wait.operator != "lift_fresh"]
        if blocking:
            operator, file, name = blocking[0]
            return f"the step waits for the device in operator {operator}, called by {name or 'a function'} ({file})"
        for name, value in results.items():
            old = buffers[name]
            if (value.shape, value.dtype, value.device) != (old.shape, old.dtype, old.device):
                return (
                    f"the step changes {name} from {old.dtype} {list(old.shape)} to {value.dtype} {list(value.shape)}"
                )
        return None


def begin_steps(graphs: StepGraphs | None, function: StepFunction, state: State) -> Steps:
    """Begin a loop over a step, which ``graphs`` may capture.

    Args:
        graphs: the captured steps of the caller; None: the loop is eager.
        function: the step.
        state: the first state, tensors by name on one device.
    """
    return Steps(function, state) if graphs is None else graphs.begin(function, state)


def remember(table: dict[Any, Result], key: Hashable, value: Result, most: int) -> Result:
    """Make an entry the last one of a table, and return its value.

    Args:
        table: the entries in the order of their last use.
        key: the key of the entry.
        value: the value of the entry.
        most: the number of entries beyond which the first one goes.
    """
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
    return value


def _name(model: Any) -> str:
    return getattr(model, "__qualname__", None) or type(model).__qualname__


def numerics(device: torch.device) -> tuple[Any, ...]:
    """The settings of the process that decide what an operator computes on a device; they can be hashed."""
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


@contextlib.contextmanager
def no_trace(device: torch.device) -> Iterator[None]:
    """A block in which a step is tried and captured: afterwards no generator has moved, and no autocast keeps a weight.

    Autocast keeps the copies of weights that it made, until its outermost block ends. A graph would read those copies,
    which do not follow the weights.
    """
    python, array = random.getstate(), np.random.get_state()
    cached = torch.is_autocast_cache_enabled()
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.setstate(python)
        np.random.set_state(array)


def host_generators(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators that graphs do not follow; they follow the device's own."""
    array: Any = np.random.get_state()
    # On a CPU, torch's generator of the host is the generator of the device.
    host = None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), host, (array[0], array[1].tobytes(), *array[2:])


def first_replay_agrees(
    step: Callable[[], Mapping[str, Tensor]],
    buffers: Mapping[str, Tensor],
    replay: Callable[[], None],
    device: torch.device,
) -> bool:
    """Tell whether a replay gives the step's result, from the same state and the same generator; waits for the device.

    Args:
        step: computes new values of some of the buffers, and writes to none.
        buffers: the state, by name; holds what the replay gave afterwards.
        replay: launches the captured step.
        device: where the buffers are.
    """
    again = same_draws_again(device)
    # Clone the results, because the replay overwrites those that are buffers themselves.
    wanted = {name: value.clone() for name, value in step().items()}
    again()
    replay()
    return all(alike(buffers[name], value) for name, value in wanted.items() if value.is_floating_point())


def alike(got: Tensor, wanted: Tensor) -> bool:
    """Tell whether two results of a step are equal, but for sums that a library adds in another order; waits.

    If a gradient is nearly 0, another order gives another sign, and the step goes the other way.
    """
    if not wanted.numel():
        return True
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    close = (got - wanted).abs() <= ROUNDING * finite.abs().amax()
    same = (got == wanted) | (got.isnan() & wanted.isnan()) | close
    return bool(same.float().mean() >= 1 - OTHER_SIGNS)

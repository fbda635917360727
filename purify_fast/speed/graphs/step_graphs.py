"""A step that is taken many times, captured once and replayed: a CUDA graph of an attack's step.

A graph holds a step's launches, not its Python. So a step is captured only if it asks nothing of the data, and it is
replayed only while everything that its model computes with is the same (`purify_fast.contents.identity_key`). Weights
that are written in place are the same: replays see the new ones. Draws from torch's generator of the device go on as
they would without a graph.

A capture costs as much as dozens of steps; how many that are, each capture measures for the next. A training takes the
same step for as long as it lasts, so its step is captured once so many were launched that replays would have paid for a
capture. An evaluation says how many batches are to come, and an attack how many steps it has left. Its batches shrink
while images fall, so that many sizes are used a few times only. Its step is therefore captured once the steps that are
to be expected, going by the runs before, would pay for twice the capture.
"""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..._validation import CudaGraphs, check_literal
from ...contents import identity_key
from ...protocols import CountsImages, PreparesReplay
from .cuda_capture import CudaCapture
from .host_syncs import HostSyncs
from .loops import Captured, Replays, State, StepFunction, Steps, Tally, parts_of, weak_key, write
from .trial import first_replay_agrees, host_generators, no_trace, numerics, same_draws_again

logger = logging.getLogger("purify_fast")

Result = TypeVar("Result")

#: For how many steps a capture is taken to cost before the first one was measured: an estimate for a ResNet-18.
WORTH = 40
#: The least and the most steps that a measured cost may ask for. One measurement on a busy machine proves little.
LEAST_WORTH, MOST_WORTH = 10, 400
#: How many times over the expected replays must pay for a capture; an attack may end earlier than those before it.
MARGIN = 2.0
#: Of the time a step takes, the share that the host must spend on launching it, for a graph to gain anything.
LEAST_SHARE = 0.7
#: How often a step is timed; the least counts, because whatever else the machine does only adds to it.
TIMINGS = 3
#: After how many launched steps it is tried again whether a step can be captured that could not.
RETRIED_AFTER = 1000
#: How many steps are remembered that were not captured.
REMEMBERED = 64


class _Refusal(NamedTuple):
    """Why a step is not captured, and how many steps were launched since.

    Args:
        reason: for the log.
        tally: counts those steps.
    """

    reason: str
    tally: Tally


class _Ahead(NamedTuple):
    """What is known of the loop that begins; see `StepGraphs.begin`."""

    steps: int
    certain: bool
    run: int
    later: float


class StepGraphs:
    """The captured steps of one training or evaluation.

    Args:
        mode: "auto" captures steps whose launches take longer than what they compute, once that pays; "always" captures
            whatever can be, at once; "off" captures nothing.
        limit: graphs that are kept; the least recently used one goes first. All share one pool of memory.
        capture: what makes graphs; None: CUDA graphs, on CUDA devices.

    Attributes:
        refusal: why the last loop that was to be captured was not, and will not be for the next `RETRIED_AFTER` steps;
            None where it was, or may yet be.
        worth: for so many steps a capture pays, by the last one that was measured.
        to_come: how many batches of the attack are to follow the present one, 0.5 for half a batch; None: nobody knows.

    Raises:
        ValueError: an unknown mode, or a limit below 1.

    A model is held weakly: when it goes, so do its graphs. One loop at a time: not for several threads.
    """

    def __init__(self, mode: CudaGraphs = "auto", limit: int = 32, capture: CudaCapture | None = None):
        check_literal("mode", mode, CudaGraphs)
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.mode, self.limit = mode, limit
        self.capture = CudaCapture() if capture is None else capture
        self.refusal: str | None = None
        self.worth = WORTH
        self.to_come: float | None = None
        self._runs = itertools.count()
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._launched: OrderedDict[Hashable, Tally] = OrderedDict()
        self._refused: OrderedDict[Hashable, _Refusal] = OrderedDict()
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def __deepcopy__(self, memo: Any) -> StepGraphs:
        # a copy of what is trained or attacked captures for itself
        return StepGraphs(self.mode, self.limit, self.capture)

    def new_run(self) -> int:
        """A number for a run of an attack, which may begin several loops."""
        return next(self._runs)

    def begin(
        self,
        function: StepFunction,
        state: State,
        steps: int,
        *,
        certain: bool = True,
        run: int | None = None,
        later: float = 0.0,
    ) -> Steps:
        """Begin a loop.

        Args:
            function: the step.
            state: what it begins with, tensors by name on one device.
            steps: how many will be taken at most.
            certain: whether all of them will be taken.
            run: by `new_run`, the run that the loop belongs to; None: the loop is a run by itself.
            later: how many runs like it the attack has to come on the same batch.

        Returns:
            The loop; replayed if the step is captured, or can be and is worth it.
        """
        device = next(iter(state.values())).device
        nothing = any(value.numel() == 0 for value in state.values())
        off = self.mode == "off" or device.type != self.capture.kind
        if off or nothing or torch.compiler.is_compiling():
            return Steps(function, state)
        ahead = _Ahead(steps, certain, self.new_run() if run is None else run, later)
        known = self._find(function, state, device, ahead)
        if isinstance(known, Captured) and not known.is_in_use():
            return Replays(function, known, state)
        return Steps(function, state, known if isinstance(known, Tally) else None)

    def may_replay(self, device: torch.device) -> bool:
        """Whether loops on a device are captured, as far as is known.

        Args:
            device: where their state lies.
        """
        return self.mode != "off" and device.type == self.capture.kind and self.refusal is None

    def without_if_memory_ends(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Do some work. If memory runs out while graphs hold some of it, do the work once more without graphs.

        Args:
            work: may begin loops, and can be done twice; its second run draws the same random numbers.
            device: where it computes.

        Raises:
            torch.OutOfMemoryError: memory ran out without graphs.
        """
        again = same_draws_again(device)
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        # outside of the except block, whose traceback holds the tensors of the work that failed
        logger.warning("memory ran out: the CUDA graphs of attacks were given up, and the work is done again")
        self.mode = "off"
        self._captured.clear()
        self.capture.release()
        again()
        return work()

    def _find(
        self, function: StepFunction, state: State, device: torch.device, ahead: _Ahead
    ) -> Captured | Tally | None:
        """The captured step, captured now if need be; else what counts the steps that are launched, if they count."""
        for key in [key for key, one in self._captured.items() if one.model() is None]:
            del self._captured[key]
        model = function.model
        if not isinstance(model, nn.Module):
            return self._refuse(None, f"{_name(model)} is no torch.nn.Module: what it depends on cannot be seen")
        shapes = tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(state.items()))
        try:
            base = weak_key((weak_key(function), shapes, device, numerics(device)))
        except TypeError:
            return self._refuse(None, f"{_name(model)} cannot be hashed")
        refused = self._refused.get(base)
        if refused is not None and refused.tally.steps < RETRIED_AFTER:
            self.refusal = refused.reason
            return refused.tally
        self.refusal = None
        for part in parts_of(model, PreparesReplay):
            part.prepare_replay()
        try:
            values, objects, _ = identity_key(model)
            key = weak_key((base, values))
        except TypeError as error:
            return self._refuse(base, f"{_name(model)}: {error}")
        if any(isinstance(one, torch.Generator) for one in objects):
            return self._refuse(base, f"{_name(model)} has a generator of its own, which graphs need not follow")
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        launched = _remember(self._launched, key, self._launched.get(key) or Tally())
        launched.begin(ahead.run)
        if self.mode != "always" and not self._pays(launched, ahead):
            return launched
        captured = self._make(function, state, base, objects, device)
        if isinstance(captured, Captured):
            self._captured[key] = captured
            if len(self._captured) > self.limit:
                self._captured.popitem(last=False)
        return captured

    def _pays(self, launched: Tally, ahead: _Ahead) -> bool:
        """Whether a capture is worth its cost now; see the module."""
        sure = ahead.steps if ahead.certain else 0
        if self.to_come is None:
            return launched.steps + sure >= self.worth
        to_come = ahead.later + self.to_come * (1 + ahead.later)
        return sure >= self.worth or launched.expected(ahead.steps, to_come) >= MARGIN * self.worth

    def _refuse(self, base: Hashable | None, reason: str) -> Tally | None:
        """Note that a step cannot be captured, and say why in the log, once for each reason."""
        self.refusal = reason
        if reason not in self._told:
            self._told.add(reason)
            logger.info("an attack runs without a CUDA graph: %s", reason)
        return None if base is None else _remember(self._refused, base, _Refusal(reason, Tally())).tally

    def _make(
        self, function: StepFunction, state: State, base: Hashable, objects: list[Any], device: torch.device
    ) -> Captured | Tally | None:
        """Capture a step, if it can be; else what counts the steps until it is tried again."""
        buffers = {name: value.detach().clone() for name, value in state.items()}

        def advance() -> None:
            write(function(buffers), buffers)

        counters: list[CountsImages] = parts_of(function.model, CountsImages)
        before = [counter.counted() for counter in counters]
        try:
            with no_trace(device):
                with self.capture.aside(device):
                    # the first call compiles, verifies kernels and chooses algorithms, which waits
                    function(buffers)
                begun = self.capture.now(device)
                tried = [counter.counted() for counter in counters]
                reason = self._trial(function, buffers, device)
                counts = [counter.counted() - start for counter, start in zip(counters, tried, strict=True)]
                launching, whole = self._timed(lambda: _drop(function(buffers)), device)
                reason = reason or self._busy(launching, whole)
                if reason is not None:
                    return self._refuse(base, reason)
                # the state is written by what is launched, and by no warm-up: it is put in before each loop
                replay = self.capture.record(advance, device)
                if not first_replay_agrees(lambda: function(buffers), buffers, replay, device):
                    return self._refuse(base, "a replay does not give what the step gives")
                self._set_worth(self.capture.now(device) - begun, whole - self._timed(replay, device)[1])
        except Exception as error:
            # whatever a user's model raises in a trial is no reason to end an attack that runs without graphs
            first = (str(error).strip().splitlines() or [""])[0]
            return self._refuse(base, f"the step cannot be captured ({type(error).__name__}: {first})")
        finally:
            # none of these steps is one of the loop
            for counter, start in zip(counters, before, strict=True):
                counter.count(start - counter.counted())
        return Captured(weakref.ref(function.model), buffers, replay, counts, objects)

    def _timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """Seconds until the host had launched everything, and until the device was done; the least of some tries."""
        launching, whole = zip(*(self.capture.timed(run, device) for _ in range(TIMINGS)), strict=True)
        return min(launching), min(whole)

    def _set_worth(self, cost: float, saved: float) -> None:
        """Note for how many steps a capture pays.

        Args:
            cost: of the capture, in seconds.
            saved: by a replay, in seconds.
        """
        if saved > 0:
            self.worth = min(max(math.ceil(cost / saved), LEAST_WORTH), MOST_WORTH)

    def _busy(self, launching: float, whole: float) -> str | None:
        """Say so if the device is busy for so long that launching costs nothing, and that matters."""
        if self.mode == "always" or launching >= LEAST_SHARE * whole:
            return None
        return (
            f"the device computes a step for {whole * 1e3:.3g} ms, of which launching takes {launching * 1e3:.3g} ms, "
            "so that a graph would gain nothing"
        )

    def _trial(self, function: StepFunction, buffers: State, device: torch.device) -> str | None:
        """Run the step once, and say what keeps it from being captured, if anything does."""
        before = host_generators(device)
        with self.capture.aside(device), HostSyncs() as waits:
            results = function(buffers)
        if host_generators(device) != before:
            return f"{_name(function.model)} draws from a generator of the host, which a graph would draw from once"
        # a number that is turned into a tensor waits only if it goes to the device, where the capture then fails
        blocking = [wait for wait in waits.counts if wait.operator != "lift_fresh"]
        if blocking:
            operator, file, name = blocking[0]
            return f"the step waits for the device: {operator}, asked for by {name or 'a function'} ({file})"
        for name, value in results.items():
            old = buffers[name]
            if (value.shape, value.dtype, value.device) != (old.shape, old.dtype, old.device):
                return (
                    f"the step makes its {name} {value.dtype} {list(value.shape)}, it was {old.dtype} {list(old.shape)}"
                )
        return None


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


def _remember(table: OrderedDict[Hashable, Result], key: Hashable, value: Result) -> Result:
    table[key] = value
    table.move_to_end(key)
    if len(table) > REMEMBERED:
        table.popitem(last=False)
    return value


def _name(model: Any) -> str:
    return getattr(model, "__qualname__", None) or type(model).__qualname__

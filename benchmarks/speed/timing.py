"""Measure one row of ops.csv: compare the results of several implementations of an op, then time them in turn.

``eager`` is the reference in PyTorch, ``compile`` its compiled form, and ``ours`` the kernel. In the style ``graph``,
the op is compiled between a multiplication and a sum, which the compiler can fuse with the reference only.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch import records
from purify_fast.ops.dispatch.examples import tensors

from .op_cases import Case

STYLES = ("eager", "graph")
#: Two implementations are level if the slower has at least this share of the speed of the faster.
LEVEL = 0.95
CONTESTANTS = ("eager", "compile", "ours")
#: True in a process of a rehearsal, which marks its rows.
REHEARSAL = False


@dataclass(frozen=True)
class Effort:
    """The number and the length of the timed runs for one row of ops.csv.

    Attributes:
        runs: number of runs of each contestant in an attempt.
        seconds: approximate seconds of a run.
        attempts: largest number of attempts. The attempt with the least spread is used.
        steady: largest spread after which no further attempt is made. The spread of a contestant is the 80th percentile
            of its times divided by the 20th. It must be small for every contestant.
    """

    runs: int = 15
    seconds: float = 3e-3
    attempts: int = 3
    steady: float = 1.15


QUICK = Effort(runs=3, seconds=2e-4, attempts=1)


def backend_of(op: str) -> str:
    """Return the name of our kernel's backend for an op on a CPU."""
    return [name for name in REGISTRY[op].available["cpu"] if name != "reference"][-1]


def environment(device: torch.device) -> dict[str, str | int]:
    machine = records.machine(device)
    name = machine["device"] if device.type == "cuda" else f"{machine['device']} {machine['capability']}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if find_spec("triton") else "",
        "date": datetime.date.today().isoformat(),
        **({"rehearsal": "True"} if REHEARSAL else {}),
    }


def _function(case: Case, style: str) -> Callable:
    call = case.call

    def graph(first, *rest):
        return sum(out.sum() for out in tensors(call(2 * first, *rest)))

    return graph if style == "graph" else lambda *inputs: call(*inputs)


def _own_code(function: Callable, name: str) -> Callable:
    """Copy a function together with its code object, so that contestants do not share torch.compile's cache."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class Contestant:
    """A compared implementation. Its attribute ``call`` is a function without arguments."""

    def __init__(self, case: Case, style: str, direction: str, kind: str, op: str, inputs: tuple[Tensor, ...]):
        self.backend = backend_of(op) if kind == "ours" else "reference"
        self.graph = direction == "backward"
        function = _own_code(_function(case, style), kind)
        if kind == "compile" or (kind == "ours" and style == "graph"):
            function = torch.compile(function, fullgraph=True, dynamic=False)
        self.call = self._call(function, case, direction, inputs)

    def _call(self, function: Callable, case: Case, direction: str, inputs: tuple[Tensor, ...]) -> Callable:
        if direction == "forward":
            return lambda: tensors(function(*inputs))
        leaves = [inputs[i] for i in case.differentiable]
        with self.mode():
            outputs = tensors(function(*inputs))
        gradients = [torch.linspace(0.5, 1.5, o.numel()).view_as(o).to(o.dtype) for o in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    @contextlib.contextmanager
    def mode(self):
        with use_backend(self.backend), torch.set_grad_enabled(self.graph):
            yield


def agree(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, style: str, slack: float = 1.0
) -> bool:
    """Tell whether two results agree within the rounding of a dtype."""
    wide = slack * (20 if style == "graph" else 1)
    rtol = wide * (1e-5 if dtype not in (torch.float16, torch.bfloat16) else 2e-2)
    for a, b in zip(actual, expected, strict=True):
        scale = max(float(b.double().abs().max()), 1.0) if b.numel() else 1.0
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * scale):
            return False
    return True


def seconds(calls: list[Callable], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Run calls one after the other, and return the sum of their seconds."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # Name the stream. Otherwise an event would use the stream of the current device, which may be another device.
        stream = torch.cuda.current_stream(device)
        began.record(stream)
        for call in calls:
            call()
        ended.record(stream)
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3
    start = clock()
    for call in calls:
        call()
    return clock() - start


def now(device: torch.device) -> float:
    """Wait until a device has finished all work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors that a function allocates, including allocations in compiled code."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _clock(contestant: Contestant, repeats: int) -> float:
    """Make ``repeats`` calls of a contestant, and return the seconds per call."""
    with contestant.mode():
        return seconds([contestant.call] * repeats, torch.device("cpu")) / repeats


def quantile(times: list[float], fifths: int) -> float:
    return sorted(times)[fifths * (len(times) - 1) // 5]


def _steadiest(clocks: dict[str, Callable[[], float]], effort: Effort) -> dict[str, list[float]]:
    """Time the contestants in turn, in several attempts, and return the times of the attempt with the least spread."""
    spreads = {}
    for _ in range(effort.attempts):
        times: dict[str, list[float]] = {name: [] for name in clocks}
        for _ in range(effort.runs):
            for name, clock in clocks.items():
                times[name].append(clock())
        spread = max(quantile(t, 4) / quantile(t, 1) for t in times.values())
        spreads[spread] = times
        if spread <= effort.steady:
            break
    return spreads[min(spreads)]


#: Forbid donated buffers: the backward pass runs several times, so it must not overwrite its saved buffers.
@functorch_config.patch(donated_buffer=False)
def measure(op: str, case: Case, direction: str, style: str, effort: Effort) -> dict:
    """Measure one row of ops.csv. A contestant whose result differs from that of the reference gets no time."""
    torch._dynamo.reset()
    inputs = case.inputs()
    if direction == "backward":
        inputs = tuple(t.requires_grad_() if i in case.differentiable else t for i, t in enumerate(inputs))
    entries = {kind: Contestant(case, style, direction, kind, op, inputs) for kind in CONTESTANTS}
    results = {}
    for kind, entry in entries.items():
        with entry.mode():
            results[kind] = entry.call()
    right = {k: agree(r, results["eager"], case.dtype, style, case.slack) for k, r in results.items()}
    del results
    clocks = {}
    for kind, entry in entries.items():
        # After three runs whose times are not saved, everything is compiled, and the allocator has reserved memory.
        for _ in range(3):
            once = _clock(entry, 1)
        clocks[kind] = partial(_clock, entry, max(1, math.ceil(effort.seconds / once)))
    times = _steadiest(clocks, effort)
    row = {"op": op, **case.named, "direction": direction, "style": style, "backend": entries["ours"].backend}
    median = {}
    for kind in CONTESTANTS:
        median[kind] = statistics.median(times[kind]) if right[kind] else math.nan
        figures = {"us": median[kind], "p20": quantile(times[kind], 1), "p80": quantile(times[kind], 4)}
        for name, value in figures.items():
            row[f"{kind}_{name}"] = f"{1e6 * value:.2f}" if right[kind] else ""
    best = min(median[k] for k in CONTESTANTS if k != "ours" and right[k])
    row["ratio"] = f"{best / median['ours']:.3f}" if right["ours"] else ""
    row["verdict"] = verdict(row)
    moved = case.bytes(direction) / median["ours"]
    row["GB_per_s"] = f"{moved / 1e9:.2f}" if right["ours"] else ""
    return row | {"runs": effort.runs} | environment(torch.device("cpu"))


def verdict(row: dict) -> str:
    """Return the verdict on our kernel: ``best``, ``level`` (at most 5 percent slower), ``behind`` or ``wrong``."""
    if not row["ratio"]:
        return "wrong"
    ratio = float(row["ratio"])
    return "best" if ratio >= 1 else "level" if ratio >= LEVEL else "behind"

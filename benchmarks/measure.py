"""One row of the table: the contestants compared, then timed in turn, in one run.

Contestants: ``eager`` (the reference), ``compile`` (torch.compile of it), ``ours`` (the C++ or Triton op). Styles:
``eager`` calls the function from Python; ``graph`` puts it between a multiplication and a sum and compiles the whole,
where the plain reference can be fused with its neighbours and the opaque op cannot.
"""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from purify_fast.ops import REGISTRY, use_backend

from .ops import Case

STYLES = ("eager", "graph")
CONTESTANTS = ("eager", "compile", "ours")
#: Ours is served only where nothing beats it by more than 5 percent.
LEAST = 0.95


@dataclass(frozen=True)
class Effort:
    runs: int = 15
    seconds: float = 3e-3  # of one run of one contestant
    attempts: int = 3  # at a quiet moment, the steadiest counts
    steady: float = 1.15  # the largest p80 / p20 that needs no other attempt


QUICK = Effort(runs=3, seconds=2e-4, attempts=1)


def backend_of(op: str, device: torch.device) -> str:
    """Our backend for ``op`` on ``device``; RuntimeError where there is none but the reference."""
    ours = [name for name in REGISTRY[op].available[device.type] if name != "reference"]
    if not ours:
        raise RuntimeError(f"{op}: there is only the reference on {device.type}; build the extension first")
    return ours[-1]


def environment(device: torch.device) -> dict[str, str | int]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version,
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.processor() or 'cpu'} {platform.machine()}"


def tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _function(case: Case, style: str) -> Callable:
    call = case.call
    if style == "eager":
        return lambda *inputs: call(*inputs)

    def graph(first, *rest):
        return sum(out.sum() for out in tensors(call(2 * first, *rest)))

    return graph


def _own_code(function: Callable, name: str) -> Callable:
    """A copy with a code object of its own, so that contestants do not share the compiler's cache and its guards."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class Contestant:
    """A function of no arguments, the backend it runs under, and what it returns."""

    def __init__(self, case: Case, style: str, direction: str, kind: str, op: str, inputs: tuple[Tensor, ...]):
        self.backend = backend_of(op, inputs[0].device) if kind == "ours" else "reference"
        self.graph = direction == "backward"
        function = _own_code(_function(case, style), kind)
        if kind == "compile" or (kind == "ours" and style == "graph"):
            function = torch.compile(function, fullgraph=True, dynamic=False)
        self.run: Callable[[], tuple[Tensor, ...]] = lambda: tensors(function(*inputs))
        if direction == "backward":
            leaves = [inputs[i] for i in case.differentiable]
            with self.mode():
                outputs = self.run()
            gradients = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).view_as(o).to(o.dtype) for o in outputs]
            self.run = lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    @contextlib.contextmanager
    def mode(self):
        with use_backend(self.backend), torch.set_grad_enabled(self.graph):
            yield


def agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, style: str) -> bool:
    """Whether two contestants computed the same: within rounding of ``dtype``; sums over a graph a little more."""
    wide = 20 if style == "graph" else 1
    rtol = wide * (1e-5 if dtype not in (torch.float16, torch.bfloat16) else 2e-2)
    for a, b in zip(actual, expected, strict=True):
        scale = max(float(b.double().abs().max()), 1.0) if b.numel() else 1.0
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * scale):
            return False
    return len(actual) == len(expected)


def _clock(contestant: Contestant, repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    run = contestant.run
    with contestant.mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats


def _quantile(times: list[float], fifths: int) -> float:
    return sorted(times)[fifths * (len(times) - 1) // 5]


def _alternate(
    entries: dict[str, Contestant], repeats: dict[str, int], device: torch.device, effort: Effort
) -> dict[str, list[float]]:
    """Times by contestant, one run of each in turn; of several attempts, the one whose spread is least."""
    best, least = {}, math.inf
    for _ in range(effort.attempts):
        times: dict[str, list[float]] = {kind: [] for kind in entries}
        for _ in range(effort.runs):
            for kind, entry in entries.items():
                times[kind].append(_clock(entry, repeats[kind], device))
        spread = max(_quantile(t, 4) / _quantile(t, 1) for t in times.values())
        if spread < least:
            best, least = times, spread
        if spread <= effort.steady:
            break
    return best


def measure(op: str, case: Case, direction: str, style: str, device: torch.device, effort: Effort) -> dict:
    """A row of the table; a contestant whose result is wrong has no number."""
    torch._dynamo.reset()
    inputs = [tensor.to(device) for tensor in case.inputs()]
    if direction == "backward":
        inputs = [t.requires_grad_() if i in case.differentiable else t for i, t in enumerate(inputs)]
    with torch._functorch.config.patch(donated_buffer=False):  # a backward that is run again keeps its buffers
        entries = {k: Contestant(case, style, direction, k, op, tuple(inputs)) for k in CONTESTANTS}
        results = {}
        for kind, entry in entries.items():
            with entry.mode():
                results[kind] = entry.run()
        right = {k: agree(r, results["eager"], case.dtype, style) for k, r in results.items()}
        repeats = {}
        for kind, entry in entries.items():
            for _ in range(3):  # warm, compiled, and the allocator has its blocks
                once = _clock(entry, 1, device)
            repeats[kind] = max(1, math.ceil(effort.seconds / once))
        times = _alternate(entries, repeats, device, effort)
    row = {
        "op": op,
        "variant": case.variant,
        "shape": "x".join(map(str, case.shape)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "style": style,
        "backend": entries["ours"].backend,
    }
    median = {}
    for kind in CONTESTANTS:
        median[kind] = statistics.median(times[kind]) if right[kind] else math.nan
        for name, value in (
            ("us", median[kind]),
            ("p20", _quantile(times[kind], 1)),
            ("p80", _quantile(times[kind], 4)),
        ):
            row[f"{kind}_{name}"] = f"{1e6 * value:.2f}" if right[kind] else ""
    best = min(median[k] for k in ("eager", "compile") if right[k])
    row["ratio"] = f"{best / median['ours']:.3f}" if right["ours"] else ""
    row["verdict"] = verdict(row)
    row["GB_per_s"] = f"{case.bytes[direction] / median['ours'] / 1e9:.2f}" if right["ours"] else ""
    row["GFLOP_per_s"] = f"{case.flops[direction] / median['ours'] / 1e9:.2f}" if right["ours"] else ""
    return row | {"runs": effort.runs} | environment(device)


def verdict(row: dict) -> str:
    """Of one row: ours is ``best``, ``level`` (at most 5 percent behind), ``behind``, or ``wrong``."""
    if not row["ratio"]:
        return "wrong"
    ratio = float(row["ratio"])
    return "best" if ratio >= 1 else "level" if ratio >= LEAST else "behind"

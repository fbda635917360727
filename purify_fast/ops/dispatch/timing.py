"""One race: a kernel and its reference are timed in turn, at one variant, layout, dtype and size.

Eager calls are timed; on a GPU also replays of a CUDA graph, which have none of the time that the host takes to launch;
where it is asked for also both inside a graph of ``torch.compile``, with neighbors to fuse with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .examples import Example, tensors, tile, to
from .op import SIZES, Call, size_of
from .registry import REGISTRY, Op, use_backend

DTYPES = (torch.float32, torch.bfloat16)
#: What serves keeps its place where it is not further behind than this.
LEVEL = 0.95
#: Elements that stand for each size, on a CPU and on a GPU, whose caches and launches make other sizes large.
ELEMENTS = {
    "cpu": {"small": 2**13, "medium": 2**18, "large": 2**22},
    "cuda": {"small": 2**13, "medium": 2**18, "large": 2**25},
}
#: The most elements that are raced of an op whose reference takes a kilobyte for each: 2 ** 25 would take 29 GB.
MOST = {"decode_samples": 2**22}
#: How often a race is run that would change who serves: what else the machine does may have decided the first one.
ATTEMPTS = 3
#: Seconds of one timed run of one contestant at least.
RUN = 1e-3


class Launches(TorchDispatchMode):
    """Counts, within a block, the operators that a GPU would launch: all but those whose result is a view.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = (one.alias_info for one in function._schema.returns)
        views = [alias is not None and not alias.is_write for alias in returned]
        self.count += not (views and all(views))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Race:
    """One op at one variant, layout, dtype and size.

    Attributes:
        op: its name.
        example: a few samples of the shapes that users have.
        dtype: of the call.
        size: ``small``, ``medium`` or ``large``.
        times: how many times over the samples of the example are taken.
    """

    op: str
    example: Example
    dtype: torch.dtype
    size: str
    times: int

    def words(self) -> str:
        """What it is of, as the progress bar says it."""
        return f"{self.op} {self.example.name} {str(self.dtype).removeprefix('torch.')} {self.size}"

    def keys(self, styles: Iterable[str]) -> set[tuple[str, ...]]:
        """The keys of its rows of these styles."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {(self.example.name, self.example.variant, dtype, self.size, style) for style in styles}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The times of one race.

    Attributes:
        example: the shapes of a few of the samples, with their layout and settings.
        variant: the setting by which the op's server is chosen.
        dtype: without PyTorch's name.
        size: the bucket.
        elements: of the tensor that the op is weighed by.
        style: ``eager`` calls, the ``replay`` of a CUDA graph, or inside a compiled ``graph``.
        reference_us: microseconds of a call of the reference.
        kernel_us: of the kernel.
        launches: operators that the reference launches where the kernel is one or a few.
        megabytes: of the arguments and results, each read or written once.
    """

    example: str
    variant: str
    dtype: str
    size: str
    elements: int
    style: str
    reference_us: float
    kernel_us: float
    launches: int = 0
    megabytes: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from the rows of other races of its op."""
        return self.example, self.variant, self.dtype, self.size, self.style

    @property
    def ratio(self) -> float:
        """Times as fast as the reference."""
        return self.reference_us / self.kernel_us

    def call(self, device: torch.device) -> Call:
        """The calls that it tells the server of: inside graphs those of every size."""
        dtype = getattr(torch, self.dtype)
        if self.style == "graph":
            return Call(device, self.variant, dtype, 0, "graph")
        return Call(device, self.variant, dtype, SIZES[self.size] - 1)


def races_of(op: Op, device: torch.device, dtypes: Iterable[torch.dtype] = DTYPES) -> list[Race]:
    """What an op is raced at.

    Args:
        op: the op.
        device: its sizes are this device's.
        dtypes: of which those that the op has.
    """
    every = []
    for example in op.raced:
        for dtype in (one for one in dtypes if one in example.dtypes):
            _, numel = op.weigh(*example.make(dtype, 0))
            for size, wanted in ELEMENTS[device.type].items():
                times = max(1, round(min(wanted, MOST.get(op.name, wanted)) / numel))
                if size_of((times * numel).bit_length()) == size:
                    every.append(Race(op.name, example, dtype, size, times))
    return every


def _clock(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call: by the device's own events on a GPU."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # the device that is raced need not be the current one, whose stream an event stands on by default
        stream = torch.cuda.current_stream(device)
        began.record(stream)
        for _ in range(repeats):
            call()
        ended.record(stream)
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def fastest(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call: the least of a few runs, in turn, so that what else the machine does counts little.

    Args:
        calls: the contestants.
        device: where they compute.
    """
    repeats, runs = [], 5
    for call in calls:
        call()
        once = _clock(call, 1, device)
        repeats.append(max(1, math.ceil(RUN / once)))
        runs = min(runs, 5 if once < 0.02 else 3 if once < 0.1 else 2)
    times = [[_clock(call, count, device) for call, count in zip(calls, repeats, strict=True)] for _ in range(runs)]
    return [min(each) for each in zip(*times, strict=True)]


def _settled(calls: list[Callable[[], object]], device: torch.device, serves: bool) -> list[float]:
    """`fastest` of reference and kernel, raced again while it would change whether the kernel ``serves``."""
    times = fastest(calls, device)
    for _ in range(ATTEMPTS - 1):
        if level(times[0] / times[1], serves) == serves:
            break
        times = [min(pair) for pair in zip(times, fastest(calls, device), strict=True)]
    return times


def level(ratio: float, serves: bool) -> bool:
    """Whether a kernel is to serve from now on.

    Args:
        ratio: how many times as fast as its reference it is.
        serves: whether it does so far: what serves keeps its place unless it is more than five percent behind.
    """
    return ratio >= (LEVEL if serves else 1 / LEVEL)


class Capture(Protocol):
    """What captures CUDA graphs, such as `purify_fast.speed.graphs.cuda_capture.CudaCapture`."""

    def aside(self, device: torch.device) -> AbstractContextManager[None]: ...

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]: ...


def replayed(call: Callable[[], object], device: torch.device, capture: Capture) -> Callable[[], object]:
    """The replay of a CUDA graph of one call.

    Args:
        call: what is captured; it runs once before, on the stream on which it is captured.
        device: a GPU.
        capture: what captures it.

    Raises:
        RuntimeError: it cannot be captured; the device works as before.
    """

    def run() -> None:
        call()

    with capture.aside(device):
        run()
    return capture.record(run, device)


def _in_graph(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], object]:
    """A compiled call between a product and a sum, which the compiler may fuse with what it can look into."""
    first = next((i for i, one in enumerate(arguments) if isinstance(one, Tensor) and one.is_floating_point()), None)

    def surrounded(*given: Any) -> list[Tensor]:
        if first is not None:
            given = (*given[:first], given[first] * 0.99, *given[first + 1 :])
        outputs = tensors(function(*given))
        return [out * 0.5 + 1 if out.is_floating_point() else out for out in outputs]

    torch._dynamo.reset()
    compiled = torch.compile(surrounded, fullgraph=True, dynamic=False)
    return lambda: compiled(*arguments)


@torch.no_grad()
def run_race(race: Race, device: torch.device, full: bool = False, capture: Capture | None = None) -> list[Row]:
    """The rows of one race.

    Args:
        race: what is raced.
        device: where.
        capture: captures CUDA graphs; None: replays are not raced.
        full: also inside a graph of ``torch.compile``, which takes seconds to compile.
    """
    op = REGISTRY[race.op]
    arguments = to(tile(race.example.make(race.dtype, 0), race.times), device)
    elements = op.weigh(*arguments)[1]
    kernel = op.kernel(device.type)
    serves = op.wanted(Call(device, race.example.variant, race.dtype, elements.bit_length())).backend == kernel
    with use_backend("reference"), Launches() as launches:
        results = op.reference(*arguments)
    moved = sum(one.nbytes for one in tree_leaves((arguments, results)) if isinstance(one, Tensor))
    del results
    contestants: list[Callable[[], object]] = [lambda: op.reference(*arguments), lambda: op.handle(*arguments)]
    times = {"eager": _settled(contestants, device, serves)}
    if capture is not None:
        times["replay"] = _settled([replayed(call, device, capture) for call in contestants], device, serves)
    if full:
        times["graph"] = fastest([_in_graph(function, arguments) for function in (op.reference, op.handle)], device)
    return [
        Row(
            example=race.example.name,
            variant=race.example.variant,
            dtype=str(race.dtype).removeprefix("torch."),
            size=race.size,
            elements=elements,
            style=style,
            reference_us=round(1e6 * reference, 3),
            kernel_us=round(1e6 * kernels, 3),
            launches=launches.count,
            megabytes=round(moved / 1e6, 3),
        )
        for style, (reference, kernels) in times.items()
    ]

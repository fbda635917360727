"""Times kernels against their references on a device of this machine, for ``purify-fast tune``."""

from __future__ import annotations

import datetime
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.utils import benchmark
from tqdm import tqdm

from ..._validation import in_one_line
from . import records
from .choices import forget_choices
from .examples import Example, tile, to
from .registry import REGISTRY, Op
from .verify import verdict_of

#: The numbers of elements of the timed calls. On a GPU some kernels are faster only for large calls.
SIZES = {"cpu": [2**n for n in (10, 14, 18, 22)], "cuda": [2**n for n in (10, 14, 18, 22, 25)]}
#: The seconds for which each call is repeated.
SECONDS = 0.02

Call = Callable[[], object]
#: The seconds that a reference and a kernel take, by the name of the op, variant and number of elements.
Times = dict[tuple[str, str, int], tuple[float, float]]
#: How many times as fast as its reference a kernel is, by the name of the op and variant, and by number of elements.
Speedups = dict[tuple[str, str], dict[int, float]]


def largest_examples(op: Op, dtype: torch.dtype, device: torch.device) -> dict[tuple[str, int], Example]:
    """Return for each variant and size the example of an op with the most elements that is not larger."""
    sizes = {item.name: op.size(*item.make(dtype, 0)) for item in op.examples if dtype in item.dtypes}
    chosen: dict[tuple[str, int], Example] = {}
    for example in sorted((item for item in op.examples if item.name in sizes), key=lambda item: sizes[item.name]):
        chosen |= {(example.variant, size): example for size in SIZES[device.type] if size >= sizes[example.name]}
    return chosen


def seconds(call: Call) -> float:
    """Return the median duration of a call."""
    # The first call compiles a Triton kernel.
    call()
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


@torch.no_grad()
def time_kernels(
    ops: Iterable[Op],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    form: Callable[[Call], Call] = lambda call: call,
) -> tuple[Times, dict[str, str]]:
    """Verify and time kernels of a device. ``form`` may replace a call, for example by its replay.

    Return the times, and by name the calls that raised an error, with this error.
    """
    times, failed = Times(), dict[str, str]()
    work = [(op, *at, example) for op in ops for at, example in largest_examples(op, dtype, device).items()]
    for op, variant, size, example in (bar := tqdm(work, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}")):
        name = f"{op.name} {example.name} {size:,}"
        bar.set_description(name)
        try:
            verdict = verdict_of(op, device)
            if not verdict.passed:
                raise RuntimeError(f"its kernel is WRONG here: {verdict.words()}")
            arguments = example.make(dtype, 0)
            arguments = to(tile(arguments, size // op.size(*arguments)), device)
            reference, kernel = (form(partial(run, *arguments)) for run in (op.reference, op.handle))
            times[op.name, variant, size] = seconds(reference), seconds(kernel)
        except Exception as error:
            # If memory runs out, or if a kernel cannot be captured, the other calls are still timed.
            failed[name] = in_one_line(error)
    return times, failed


def with_kernel(device: torch.device, names: Iterable[str] = ()) -> list[Op]:
    """Return the ops that have a kernel for a device: the named ops, or all of them."""
    ops = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    if unknown := [name for name in names if name not in ops]:
        there = ", ".join(ops) or "none"
        raise ValueError(f"ops must name ops with a kernel for {device.type}, got {unknown[0]!r}: allowed are {there}")
    return [ops[name] for name in tuple(names) or ops]


def smallest_size(speedup: dict[int, float]) -> int | None:
    """Return the least size from which on a kernel is faster, from its speedups; 0 for the smallest timed size."""
    faster = list(itertools.takewhile(lambda size: speedup[size] >= 1, sorted(speedup, reverse=True)))
    smallest = min(faster, default=None)
    return 0 if smallest == min(speedup) else smallest


def tune(device: torch.device, names: Iterable[str] = ()) -> tuple[Speedups, dict[str, str]]:
    """Time kernels of a device, and write the smallest size at which each is used into this machine's file.

    Return the speedups, and by name the calls that raised an error, with this error.
    """
    # Write the file before any measurement, so that an unwritable folder raises an error immediately.
    records.update(device, {})
    times, failed = time_kernels(with_kernel(device, names), device)
    speedups: Speedups = defaultdict(dict)
    for (name, variant, size), (reference, kernel) in times.items():
        speedups[name, variant][size] = reference / kernel
    entries: dict[str, dict] = {}
    for (name, variant), speedup in speedups.items():
        entry = {"sources": REGISTRY[name].code_hash(device.type), "tuned": {"date": f"{datetime.date.today()}"}}
        entries.setdefault(name, entry)["tuned"].setdefault("smallest", {})[variant] = smallest_size(speedup)
    records.update(device, entries)
    forget_choices()
    return speedups, failed

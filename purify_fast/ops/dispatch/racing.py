"""Races kernels against their references on a device of this machine, for ``purify-fast tune``.

A kernel is used for eager calls of a variant, dtype and size if it is faster in every memory layout and, on a GPU, also
in a replay of a CUDA graph.
"""

from __future__ import annotations

import datetime
import math
import sys
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from . import records
from .examples import Example, tile, to
from .op import SIZES, Backend, Call, size_of
from .registry import REGISTRY, Op, forget_choices
from .verify import verdict_of

DTYPES = (torch.float32, torch.bfloat16)
#: The number of elements with which each size is raced: a GPU has other caches and a launch overhead.
ELEMENTS = {
    "cpu": {"small": 2**13, "medium": 2**18, "large": 2**22},
    "cuda": {"small": 2**13, "medium": 2**18, "large": 2**25},
}
#: The largest number of elements for this op, whose reference uses a kilobyte per element.
MOST = {"decode_samples": 2**22}
#: The shortest duration of a timed run in seconds. Shorter calls are repeated within the run.
RUN = 1e-3


@dataclass(frozen=True)
class Race:
    """The race of an op for one variant, layout, dtype and size."""

    op: str
    example: Example
    dtype: torch.dtype
    size: str
    times: int


@dataclass(frozen=True)
class Row:
    """The measured times of one race."""

    example: str
    variant: str
    dtype: str
    size: str
    style: str
    reference_us: float
    kernel_us: float

    @property
    def ratio(self) -> float:
        """The speed of the kernel relative to the reference."""
        return self.reference_us / self.kernel_us

    def call(self, device: torch.device) -> Call:
        """Return the eager calls that this race decides."""
        return Call(device, self.variant, getattr(torch, self.dtype), SIZES[self.size] - 1)


def races_of(op: Op, device: torch.device) -> list[Race]:
    """Return the races of an op on a device. Dtypes that the op does not support are left out."""
    every = []
    for example in op.raced:
        for dtype in (one for one in DTYPES if one in example.dtypes):
            _, numel = op.size_key(*example.make(dtype, 0))
            for size, wanted in ELEMENTS[device.type].items():
                times = max(1, round(min(wanted, MOST.get(op.name, wanted)) / numel))
                if size_of((times * numel).bit_length()) == size:
                    every.append(Race(op.name, example, dtype, size, times))
    return every


def _clock(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds per call. On a GPU they are measured by the events of the device."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # By default an event is recorded on the current device, but the raced device may be another device.
        stream = torch.cuda.current_stream(device)
        began.record(stream)
        for _ in range(repeats):
            call()
        ended.record(stream)
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / repeats
    return timeit.timeit(call, number=repeats) / repeats


def fastest(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the seconds of each call: the shortest of a few runs in turn, because of other work on the machine."""
    repeats, runs = [], 5
    for call in calls:
        call()
        once = _clock(call, 1, device)
        repeats.append(max(1, math.ceil(RUN / once)))
        runs = min(runs, 5 if once < 0.02 else 3 if once < 0.1 else 2)
    times = [[_clock(call, count, device) for call, count in zip(calls, repeats, strict=True)] for _ in range(runs)]
    return [min(each) for each in zip(*times, strict=True)]


@torch.no_grad()
def run_race(race: Race, device: torch.device, capture: Any = None) -> list[Row]:
    """Run a race, and return its rows: for eager calls and, with ``capture`` (a `CudaCapture`), for replays."""
    op, example = REGISTRY[race.op], race.example
    arguments = to(tile(example.make(race.dtype, 0), race.times), device)
    calls: list[Callable[[], object]] = [lambda: op.reference(*arguments), lambda: op.handle(*arguments)]
    seconds = {"eager": fastest(calls, device)}
    if capture is not None:
        for call in calls:
            with capture.aside(device):
                call()
        seconds["replay"] = fastest([capture.record(call, device) for call in calls], device)
    facts = example.name, example.variant, str(race.dtype).removeprefix("torch."), race.size
    return [Row(*facts, style, *(round(1e6 * one, 3) for one in each)) for style, each in seconds.items()]


def decide(op: Op, rows: list[Row], device: torch.device) -> dict[str, Any]:
    """Choose the backend for each call of an op on a device, from the rows of the op's races."""
    by_call: defaultdict[Call, list[Row]] = defaultdict(list)
    for row in rows:
        by_call[row.call(device)].append(row)
    cells: dict[str, dict[str, Backend]] = {}
    for call, own in by_call.items():
        winner = op.kernel(device.type) if all(row.ratio >= 1 for row in own) else "reference"
        # A call that was not raced uses the kernel only if the kernel won every race of the call's variant or, for a
        # variant that was not raced, every race of the op.
        for name in {"", call.variant, call.cell}:
            served = cells.setdefault(name, {})
            served["eager"] = "reference" if served.get("eager") == "reference" else winner
    return {
        "sources": op.code_hash(device.type),
        "cells": dict(sorted(cells.items())),
        "rows": [asdict(row) for row in rows],
    }


def tune(
    device: torch.device, *, ops: Iterable[str] = (), capture: Any = None
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Verify and race the kernels of a device, and write the results into this machine's file.

    Return the rows of each op, and what went wrong: the reasons by the names of ops or races.
    """
    with_kernel = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    for name in ops:
        if name not in with_kernel:
            there = ", ".join(with_kernel) or "none"
            raise ValueError(f"ops must name ops with a kernel for {device.type}, got {name!r}: allowed are {there}")
    chosen = {name: with_kernel[name] for name in tuple(ops) or with_kernel}
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    # Write the file before any race, so that an unwritable folder raises an error immediately.
    records.update(device, {}, **facts)
    verdicts = {name: verdict_of(op, device) for name, op in chosen.items()}
    failed = {name: f"its kernel is WRONG here: {one.words()}" for name, one in verdicts.items() if not one.passed}
    work = [race for name, op in chosen.items() if name not in failed for race in races_of(op, device)]
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for race in (bar := tqdm(work, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}")):
        name = f"{race.op} {race.example.name} {str(race.dtype).removeprefix('torch.')} {race.size}"
        bar.set_description(name)
        try:
            rows[race.op] += run_race(race, device, capture)
        except Exception as error:
            # If memory runs out, or if a kernel cannot be captured, the other races still run.
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if device.type == "cuda" and race.size == "large":
            # Free the memory of this op's reference and graphs, so that it is not added to the memory of the next ops.
            torch.cuda.empty_cache()
    raced = {name: own for name, own in rows.items() if own}
    records.update(device, {name: decide(chosen[name], own, device) for name, own in raced.items()}, **facts)
    forget_choices()
    return raced, failed

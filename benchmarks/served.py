"""Pipelines with the ops served as before and as now: what other races change for users, in turn in one process."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from purify_fast.ops import REGISTRY, pin_kernels
from purify_fast.ops.dispatch import cache, races
from purify_fast.speed import retain_freed_memory

from . import measure, pipelines, report

CPU = torch.device("cpu")
#: Each pipeline runs in turn until so many pairs are there, and longer if it is short.
PAIRS, SECONDS = 11, 20.0


def before(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What an earlier file of shipped races decides on this machine, by op.

    Args:
        path: the file, as ``git show REVISION:purify_fast/ops/races.json`` gives it.

    Raises:
        ValueError: the file holds no races of a CPU.
    """
    near = races.nearest(cache.machine(CPU), json.loads(path.read_text()))
    if near is None:
        raise ValueError(f"{path} holds no races of a CPU")
    return {name: [near["ops"][name]] if name in near["ops"] else [] for name in REGISTRY}


def now() -> dict[str, Any]:
    """What decides today, by op."""
    return {name: races.decisive(op, CPU) for name, op in REGISTRY.items()}


def _seconds(job: pipelines.Job, entries: dict[str, Any]) -> float:
    """The time of one run, served as the entries say."""
    with pin_kernels({"device": "cpu", "races": entries, "wrong": []}):
        start = time.perf_counter()
        job.run()
        return time.perf_counter() - start


def measured(name: str, label: str, entries: tuple[dict[str, Any], dict[str, Any]], quick: bool) -> dict[str, Any]:
    """The row of a pipeline: medians, and the median ratio of the pairs with its quartiles.

    Args:
        name: the pipeline.
        label: its case.
        entries: who served before, who serves now.
        quick: small, and one pair.
    """
    torch.manual_seed(0)
    job = pipelines.registry()[name](quick)[label].contestants["ours"].make(CPU, quick)
    for one in entries:
        _seconds(job, one)
    times: tuple[list[float], list[float]] = ([], [])
    began = time.monotonic()
    while not times[0] or (not quick and (len(times[0]) < PAIRS or time.monotonic() - began < SECONDS)):
        # who runs second finds the machine warmer: they take turns
        for which in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
            times[which].append(_seconds(job, entries[which]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = (ratios * 3)[:3] if len(ratios) == 1 else statistics.quantiles(ratios, n=4)
    milliseconds = {
        key: f"{1e3 * statistics.median(own):.1f}" for key, own in zip(("before", "now"), times, strict=True)
    }
    row = {"pipeline": name, "case": label, **milliseconds, "times as fast": f"{middle:.3f}"}
    row |= {"lower quartile": f"{low:.3f}", "upper quartile": f"{high:.3f}", "pairs": len(ratios)}
    return row | measure.environment(CPU)


def compare(path: Path, names: list[str], quick: bool, out: Path) -> Path:
    """Measure the pipelines that serve ops, and write ``served.csv`` and its table.

    Args:
        path: the races that shipped before.
        names: of the pipelines.
        quick: small: that it works, no numbers.
        out: the folder of the results.
    """
    retain_freed_memory()
    entries = before(path), now()
    known = [(name, label) for name in names if name != "pre_encoders" for label in pipelines.registry()[name](quick)]
    rows = []
    for name, label in tqdm(known, unit="pipeline", disable=None):
        rows.append(measured(name, label, entries, quick))
        report.write_csv(out / report.SERVED, rows)
    return report.write_served(out)

"""Pipelines with the ops served as an earlier file of races says and as today's files say, in turn in one process."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from purify_fast._files import write_text
from purify_fast.ops import REGISTRY, pin_kernels
from purify_fast.ops.dispatch import cache, races
from purify_fast.speed import retain_freed_memory

from . import measure, pipelines, report

CPU = torch.device("cpu")
FILE, TABLE = "served.csv", "served.md"
#: Each pipeline runs in turn until so many pairs are there, and longer if it is short.
PAIRS, SECONDS = 11, 20.0


def read_races(path: Path) -> dict[str, Any]:
    """What a file of shipped races decides on this machine; ``git show REVISION:purify_fast/ops/races.json`` gives one.

    Raises:
        ValueError: the file holds no races of a CPU.
    """
    near = races.nearest(cache.machine(CPU), json.loads(path.read_text()))
    if near is None:
        raise ValueError(f"--before: {path} holds no races of a CPU")
    return {name: [near["ops"][name]] if name in near["ops"] else [] for name in REGISTRY}


def _compared(name: str, case: str, served: dict[str, dict[str, Any]], quick: bool) -> dict[str, Any]:
    """The row of one case: the median time of each, and the median ratio of the pairs with its quartiles."""
    torch.manual_seed(0)
    job = pipelines.registry()[name](quick)[case].contestants["ours"].make(CPU, quick)
    times: dict[str, list[float]] = {when: [] for when in served}

    def run(when: str) -> float:
        with pin_kernels({"device": "cpu", "races": served[when], "wrong": []}):
            began = time.perf_counter()
            job.run()
            return time.perf_counter() - began

    order = list(served)
    for when in order:
        run(when)
    began = time.monotonic()
    while not times["now"] or (not quick and (len(times["now"]) < PAIRS or time.monotonic() - began < SECONDS)):
        for when in order:
            times[when].append(run(when))
        # who runs second finds the machine warmer
        order.reverse()
    ratios = [before / now for before, now in zip(times["before"], times["now"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "pipeline": name,
        "case": case,
        **{when: f"{1e3 * statistics.median(seconds):.1f}" for when, seconds in times.items()},
        "times as fast": f"{middle:.3f}",
        "lower quartile": f"{low:.3f}",
        "upper quartile": f"{high:.3f}",
        "pairs": len(ratios),
        **measure.environment(CPU),
    }


def markdown(rows: list[dict]) -> str:
    """The page ``served.md`` of the rows in ``served.csv``."""
    first = rows[0]
    body = [
        [f"{row['pipeline']}: {row['case']}", row["before"], row["now"], row["times as fast"],
         f"{row['lower quartile']} to {row['upper quartile']}", row["pairs"]]
        for row in rows
    ]  # fmt: skip
    lines = [
        "# Pipelines, with the ops served as before and as now",
        "",
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, {first['date']}. Each pipeline ran in "
        "turn in one process with the ops served as an earlier file of races says and as today's say. Medians, and the "
        "median ratio of the pairs with its quartiles. Quartiles on both sides of 1: no difference. By `python -m "
        "benchmarks pipelines --before FILE`.",
        "",
        *report.table(["pipeline", "ms before", "ms now", "times as fast", "quartiles", "pairs"], body),
    ]
    return "\n".join(lines) + "\n"


def compare(path: Path, names: list[str], quick: bool, out: Path) -> str:
    """Measure the pipelines that serve ops, write ``served.csv`` and its page, and return the page."""
    retain_freed_memory()
    served = {"before": read_races(path), "now": {name: races.decisive(op, CPU) for name, op in REGISTRY.items()}}
    cases = [(name, case) for name in names if name != "pre_encoders" for case in pipelines.registry()[name](quick)]
    rows: list[dict] = []
    for name, case in tqdm(cases, unit="pipeline", disable=None):
        rows.append(_compared(name, case, served, quick))
        report.write_csv(out / FILE, rows)
        write_text(out / TABLE, markdown(rows))
    return markdown(rows)

"""Measure rows one by one and write them at once; rows left out by a time limit are named."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from purify_fast.speed import retain_freed_memory

from .. import options
from . import limits, pipelines, race, sheets, timing
from .ops import Case, registry

#: The columns that identify a row of ops.csv.
KEY = ("op", "variant", "shape", "dtype", "direction", "style", "backend")


def device_class(device: torch.device) -> str:
    """The folder of a device's results: cpu, or the GPU's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@dataclass
class Budget:
    """The time limit of a run, and its resumption: by default an error ends it and nothing is left out.

    Attributes:
        seconds: time limit; work is not begun if it would exceed this by taking as long as the longest work before.
        resume: whether to keep earlier measurements.
        failed: tracebacks by name, if errors are to be collected.
    """

    seconds: float = math.inf
    resume: bool = False
    failed: dict[str, str] | None = None
    left_out: list[str] = field(default_factory=list)

    def go(self, work: list[tuple[str, Callable[[], None]]], unit: str) -> None:
        """Run all of ``work``, by name, within the budget."""
        start, spent, longest = time.monotonic(), 0.0, 0.0
        with tqdm(work, unit=unit, file=sys.stderr, disable=None) as progress:
            for index, (name, run) in enumerate(progress):
                before, spent = spent, time.monotonic() - start
                longest = max(longest, spent - before)
                if spent + longest > self.seconds:
                    self.left_out += [name for name, _ in work[index:]]
                    return
                progress.set_description(name, refresh=True)
                try:
                    run()
                except Exception:
                    if self.failed is None:
                        raise
                    self.failed[name] = traceback.format_exc()


def _rows(ops: dict[str, Callable[[], list[Case]]], names: list[str], quick: bool) -> list[tuple]:
    """The (rank of the case, op, case, direction, style) of every row."""
    rows = []
    for name in names:
        cases = ops[name]()
        if quick:
            # Only the first case of each variant counts.
            cases = list({case.variant: case for case in reversed(cases)}.values())
        rows += [(i, name, c, d, s) for i, c in enumerate(cases) for d in c.directions for s in timing.STYLES]
    return rows


def key(op: str, case: Case, direction: str, style: str, backend: str = "") -> tuple[str, ...]:
    return op, *case.named.values(), direction, style, backend


def run_ops(
    names: list[str],
    device: torch.device,
    quick: bool,
    out: Path,
    budget: Budget | None = None,
) -> None:
    """Measure, and write after every row; rows of other ops stay.

    Args:
        names: names of the ops.
        device: device of the ops.
        quick: whether one small case of each variant is enough.
        out: the folder of the results.
        budget: time limit; none by default.
    """
    budget = budget or Budget()
    effort = timing.QUICK if quick else timing.Effort()
    # These are the device's cases; in a quick run those of a CPU, if there are any.
    ops = registry(device.type) | (registry("cpu") if quick else {})
    path = out / sheets.ROWS
    kept = {tuple(row[k] for k in KEY): row for row in sheets.rows_of(path)}
    if not budget.resume:
        kept = {at: row for at, row in kept.items() if at[0] not in names}
    order = {key(*row[1:])[:-1]: i for i, row in enumerate(_rows(ops, list(ops), False))}
    backends = {}
    for name in names:
        try:
            backends[name] = timing.backend_of(name, device)
        except RuntimeError as error:
            # The other ops can still be measured.
            if budget.failed is None:
                raise
            budget.failed[name] = str(error)
    names = list(backends)
    bandwidth = limits.read(out).get((timing.environment(device)["device"], limits.COPY))
    work = [row for row in _rows(ops, names, quick) if key(*row[1:], backends[row[1]]) not in kept]
    if budget.seconds < math.inf:
        # The first case of every op comes first, called eagerly.
        work.sort(key=lambda row: (row[0], timing.STYLES.index(row[4]), row[3] == "backward"))

    def run(rank: int, *row) -> None:
        contestants = timing.CONTESTANTS
        if device.type == "cuda" and rank == 0:
            contestants = (*contestants[:2], timing.AUTOTUNED, *contestants[2:])
        kept[key(*row, backends[row[0]])] = timing.measure(*row, device, effort, contestants, bandwidth)
        sheets.write_csv(path, [kept[at] for at in sorted(kept, key=lambda at: order.get(at[:-1], len(order)))])

    try:
        budget.go([(" ".join(filter(None, key(*row[1:]))), lambda row=row: run(*row)) for row in work], "row")
    finally:
        if kept:
            sheets.report(out)


def run_pipelines(names: list[str], device: torch.device, quick: bool, out: Path, budget: Budget | None = None) -> None:
    """Race, and write after every case; rows of other cases stay."""
    budget = budget or Budget()
    path = out / sheets.PIPELINES
    kept = sheets.rows_of(path)
    incomplete = {(row["pipeline"], row["case"]) for row in kept if row["verdict"] == "left out"}
    done = {(row["pipeline"], row["case"]) for row in kept} - incomplete if budget.resume else set()
    known = {name: pipelines.registry()[name](quick) for name in names}
    work = [(name, label) for name, cases in known.items() for label in cases if (name, label) not in done]
    # Compilation takes most of the time: contestants that are not ready within a case's share are left out.
    share = budget.seconds / 3

    def run(name: str, label: str) -> None:
        nonlocal kept
        fresh = race.race(name, label, known[name][label], device, quick, share)
        kept = [row for row in kept if (row["pipeline"], row["case"]) != (name, label)] + fresh
        budget.left_out += [f"{name} {label}: {r['contestant']}" for r in fresh if r["verdict"] == "left out"]
        sheets.write_csv(path, kept)
        sheets.report(out)

    budget.go([(f"{name} {label}", lambda name=name, label=label: run(name, label)) for name, label in work], "case")


def arguments(parser: argparse.ArgumentParser, known: list[str]) -> None:
    """Add the options of ``python -m benchmarks`` for ops and for pipelines.

    Args:
        parser: parser of the command.
        known: names that can be measured.
    """
    which = f"which; all by default: {', '.join(known)}"
    parser.add_argument("names", nargs="*", metavar="NAME", type=options.one_of(known), help=which)
    options.add_device(parser)
    options.add_out(parser, "/<device>")


def ops_command(chosen: argparse.Namespace) -> str:
    """Measure ops; return who serves each of them, and the table's file."""
    device, out = chosen.device, options.out_of(chosen, chosen.quick, device_class(chosen.device))
    retain_freed_memory()
    run_ops(chosen.names or list(registry(device.type)), device, chosen.quick, out)
    rows = sheets.read_csv(out / sheets.ROWS)
    return "\n".join([*sheets.verdicts_table(rows), "", str(out / sheets.TABLE)])


def pipelines_command(chosen: argparse.Namespace) -> str:
    """Race pipelines; return their table."""
    out = options.out_of(chosen, chosen.quick, device_class(chosen.device))
    run_pipelines(chosen.names or list(pipelines.registry()), chosen.device, chosen.quick, out)
    return (out / sheets.PIPELINES_TABLE).read_text()

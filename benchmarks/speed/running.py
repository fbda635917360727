"""Measure ops and pipelines within a time limit.

A measurement is a row of ops.csv or pipelines.csv. Each row is written as soon as it is measured, so that an
interrupted run can be resumed. `Budget.left_out` has the names of the rows that did not fit into the time limit.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from purify_fast.speed import retain_freed_memory

from .. import options
from . import pipelines, race, sheets, timing
from .op_cases import Case, registry

#: The seconds that a case of a pipeline needs without the compiled plain forms.
LEAST_SHARE = 40.0
#: The columns that together identify a row of ops.csv.
KEY = ("op", "variant", "shape", "dtype", "direction", "style")


def device_class(device: torch.device) -> str:
    """Return the name of the folder for a device's results: "cpu", or such as "nvidia-h200" for "NVIDIA H200"."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass
class Budget:
    """The time limit of a run, and the list of work that did not fit into this limit. By default there is no limit.

    Attributes:
        seconds: time limit in seconds. No item of work is started after it.
        resume: True to keep the measurements of an earlier run. False measures them again.
        failed: dictionary that collects the traceback of each failed item, by the item's name. If it is None, an error
            ends the run.
        alike: True if an item is not started either if it would end too late, assuming that it takes as long as the
            longest earlier item. False is for items that have time limits of their own.
        left_out: names of the items that were not started, or that raised a TimeoutError.
        ends: end of the time limit on the monotonic clock. It is known once the work has begun.
    """

    seconds: float = math.inf
    resume: bool = False
    failed: dict[str, str] | None = None
    alike: bool = True
    left_out: list[str] = field(default_factory=list)
    ends: float = math.inf

    def go(self, work: list[tuple[str, Callable[[], None]]], unit: str) -> None:
        """Run items of work within the time limit. Each item of ``work`` is a pair of a name and a function."""
        start, spent, longest = time.monotonic(), 0.0, 0.0
        self.ends = start + self.seconds
        with tqdm(work, unit=unit, file=sys.stderr, disable=None) as progress:
            for index, (name, run) in enumerate(progress):
                before, spent = spent, time.monotonic() - start
                longest = max(longest, spent - before) if self.alike else 0.0
                if spent + longest > self.seconds:
                    self.left_out += [name for name, _ in work[index:]]
                    return
                progress.set_description(name, refresh=True)
                try:
                    run()
                except TimeoutError as error:
                    self.left_out.append(f"{name}: {error}")
                except Exception:
                    if self.failed is None:
                        raise
                    self.failed[name] = traceback.format_exc()


def _rows(ops: dict[str, Callable[[], list[Case]]], names: list[str], quick: bool) -> list[tuple]:
    """Return the rows to measure, as tuples: index of the case in its op, name of the op, case, direction, style."""
    rows = []
    for name in names:
        cases = ops[name]()
        if quick:
            # Keep only the first case of each variant.
            cases = list({case.variant: case for case in reversed(cases)}.values())
        rows += [(name, case, d, style) for case in cases for d in case.directions for style in timing.STYLES]
    return rows


def key(op: str, case: Case, direction: str, style: str) -> tuple[str, ...]:
    return op, *case.named.values(), direction, style


def run_ops(names: list[str], quick: bool, out: Path) -> None:
    """Measure ops, and write ops.csv after every row. Existing rows of other ops are kept."""
    effort, ops, path = timing.QUICK if quick else timing.Effort(), registry(), out / sheets.ROWS
    rows = {tuple(row[k] for k in KEY): row for row in sheets.rows_of(path) if row["op"] not in names}
    order = {key(*row): i for i, row in enumerate(_rows(ops, list(ops), False))}
    for row in tqdm(_rows(ops, names, quick), unit=" rows", disable=None):
        rows[key(*row)] = timing.measure(*row, effort)
        sheets.write_csv(path, [rows[at] for at in sorted(rows, key=lambda at: order.get(at, len(order)))])
    sheets.report(out)


def run_pipelines(names: list[str], device: torch.device, quick: bool, out: Path, budget: Budget) -> None:
    """Measure pipelines, and write pipelines.csv after every case. Existing rows of other cases are kept.

    Most of the time goes into the compilation of the plain forms, which a run with a time limit leaves out.
    """
    path = out / sheets.PIPELINES
    kept = sheets.rows_of(path)
    threads = str(torch.get_num_threads()) if device.type == "cpu" else None

    def same(row: dict, *case: str) -> bool:
        """Tell whether a row is about this case, in as many threads on a CPU."""
        return (row["pipeline"], row["case"]) == case and threads in (None, str(row["threads"]))

    work: list[tuple[str, str, pipelines.Case]] = []
    limited = budget.seconds < math.inf
    for name in names:
        for label, case in pipelines.registry()[name](quick).items():
            chosen = {who: it for who, it in case.contestants.items() if not (limited and "torch.compile" in who)}
            old = [row for row in kept if budget.resume and same(row, name, label) and row["verdict"] != "left out"]
            if not chosen.keys() <= {row["contestant"] for row in old}:
                work.append((name, label, replace(case, contestants=chosen)))

    def run(index: int) -> None:
        nonlocal kept
        name, label, case = work[index]
        left = budget.ends - time.monotonic()
        limit = min(left, max(LEAST_SHARE, left / (len(work) - index)))
        fresh = race.race(name, label, case, device, quick, limit)
        budget.left_out += [f"{name} {label}: {r['contestant']}" for r in fresh if r["verdict"] == "left out"]
        old = [row for row in kept if same(row, name, label)]
        if budget.resume and _right(row for row in old if row["contestant"] in case.contestants) > _right(fresh):
            # A short race must not replace a longer one.
            return
        kept = [row for row in kept if row not in old] + fresh
        sheets.write_csv(path, kept)
        sheets.report(out)

    budget.go([(f"{name} {label}", partial(run, index)) for index, (name, label, _) in enumerate(work)], "case")


def _right(rows: Iterable[dict]) -> int:
    return sum(row["verdict"] == "right" for row in rows)


def ops_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks ops``."""
    options.add_names(parser, registry(), what="what is measured")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="cpu; for a GPU, there is the command kernels")
    options.add_out(parser, "/cpu")


def pipelines_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks pipelines``."""
    options.add_names(parser, pipelines.registry(), what="what is measured")
    options.add_device(parser)
    options.add_out(parser, "/<device>")
    parser.add_argument("--resume", action="store_true", help="keep the cases that have a row for each implementation")


def ops_command(chosen: argparse.Namespace) -> str:
    """Measure ops. Return the table of the implementations that the package uses, and the path of the full page."""
    out = options.out_of(chosen, chosen.quick, "cpu")
    retain_freed_memory()
    run_ops(chosen.names, chosen.quick, out)
    rows = sheets.read_csv(out / sheets.ROWS)
    return "\n".join([*sheets.verdicts_table(rows), "", str(out / sheets.TABLE)])


def pipelines_command(chosen: argparse.Namespace) -> str:
    """Measure pipelines, and return the page of the results."""
    out = options.out_of(chosen, chosen.quick, device_class(chosen.device))
    run_pipelines(chosen.names, chosen.device, chosen.quick, out, Budget(resume=chosen.resume))
    return (out / sheets.PIPELINES_TABLE).read_text()


#: The commands, whose functions have the names that all commands have.
OPS = SimpleNamespace(main=ops_command, arguments=ops_arguments)
PIPELINES = SimpleNamespace(main=pipelines_command, arguments=pipelines_arguments)

"""Kernels are raced against their references on the device at hand: what ``purify-fast tune`` does.

Each op is raced by variant, memory layout, dtype and size, forward and backward on its own. Eager calls are timed; on a
GPU also replays of a CUDA graph, which have none of the time that the host takes to launch. Where ``torch.compile`` is
asked for, both are put into a compiled graph with neighbours to fuse with.

A kernel serves eager calls of a variant, dtype and size where it is ahead in every layout and, on a GPU, in the replay
too. What serves already keeps its place unless it is more than five percent behind: two races of the same machine then
end alike. Inside a compiled graph, where a kernel keeps its neighbours from being fused, it must be twice as fast, and
the reference must be one that compilers do not fuse as well.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._files import write_text
from . import _races
from ._op import REGISTRY, Op, Style, forget
from ._races import SIZES, cell
from ._racing import Capture, Race, Row, level, races, run_race
from ._verdicts import Verdict
from ._verify import verdict_of

#: Times as fast as what ``torch.compile`` makes, for a kernel to serve inside graphs: it is a wall there, whose inputs
#: and outputs are written and read once more than if they were fused with neighbours that the race does not have.
IN_GRAPHS = 2.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """A call that another backend serves than before the race.

    Attributes:
        op: its name.
        calls: its variant, dtype and size.
        style: ``eager`` or ``graph``.
        before: who served.
        after: who serves.
        gain: how many times as fast the kernel is.
    """

    op: str
    calls: str
    style: str
    before: str
    after: str
    gain: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tune` did.

    Attributes:
        path: the file it wrote.
        seconds: that it took.
        rows: what it found by op.
        changes: what another backend serves now.
        known: how many races were known already, and not run again.
        left_out: the races that the time did not suffice for, in words.
        failed: what raised an error, with the error.
        wrong: kernels that are wrong on this machine, with what is wrong; they were not raced.
    """

    path: Path
    seconds: float
    rows: dict[str, list[Row]]
    changes: list[Change]
    known: int
    left_out: list[str]
    failed: dict[str, str]
    wrong: dict[str, str]


def _ahead(rows: list[Row], serves: bool) -> bool:
    """Whether a kernel is to serve eager calls by all of these rows; ``serves`` is whether it does so far."""
    return all(level(row.ratio, serves) for row in rows)


def _gain(rows: list[Row]) -> str:
    """How many times as fast the kernel is, in words; empty without rows."""
    if not rows:
        return ""
    ratios = sorted(row.ratio for row in rows)
    least, most = (f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}" for ratio in (ratios[0], ratios[-1]))
    return f"{statistics.geometric_mean(ratios):.1f} times as fast ({least} to {most})"


def decide(op: Op, rows: list[Row], device: torch.device) -> dict[str, Any]:
    """What a file says of an op: who serves which of its calls, by the rows of all its races.

    Args:
        op: the op.
        rows: all of its rows on a device.
        device: that device; what serves on it so far keeps its place where it is level.
    """
    kernel = op.kernel(device.type)
    eager = [row for row in rows if row.style != "graph"]
    graph = [row for row in rows if row.style == "graph"]
    cells: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys((row.variant, row.dtype, row.size) for row in eager):
        variant, dtype, size = key
        own = [row for row in eager if (row.variant, row.dtype, row.size) == key]
        before = op.wanted("eager", device, variant, getattr(torch, dtype), SIZES[size] - 1).backend
        name = cell(variant, getattr(torch, dtype), size)
        cells.setdefault(name, {})["eager"] = kernel if _ahead(own, before == kernel) else "reference"
    for variant, dtype in dict.fromkeys((row.variant, row.dtype) for row in graph):
        own = [row for row in graph if (row.variant, row.dtype) == (variant, dtype)]
        won = variant in op.serves_unraced("graph") and all(row.ratio >= IN_GRAPHS for row in own)
        cells.setdefault(cell(variant, getattr(torch, dtype), ""), {})["graph"] = kernel if won else "reference"

    def together(style: str, variant: str | None) -> dict[str, str]:
        """Who serves what was not raced on its own: the kernel where it won all that was."""
        own = [row for row in (graph if style == "graph" else eager) if variant in (None, row.variant)]
        sizes = [row.size if style == "eager" else "" for row in own]
        found = {
            cells[cell(row.variant, getattr(torch, row.dtype), size)][style]
            for row, size in zip(own, sizes, strict=True)
        }
        return {style: kernel if found == {kernel} else "reference"} if found else {}

    variants = {name: {**together("eager", name), **together("graph", name)} for name in {row.variant for row in rows}}
    gains = {"eager": _gain(eager), "graph": _gain(graph)}
    return {
        "sources": op.sources_digest(device.type),
        **together("eager", None),
        **together("graph", None),
        "variants": {name: variants[name] for name in sorted(variants) if name},
        "cells": dict(sorted(cells.items())),
        "gain": {style: words for style, words in gains.items() if words},
        "rows": [asdict(row) for row in rows],
    }


def known_rows(op: Op, device: torch.device) -> list[Row]:
    """The rows that the user's file has of the op's kernel as it is now."""
    entry = _races.read(device).get("ops", {}).get(op.name, {})
    mine = entry.get("sources") == op.sources_digest(device.type)
    try:
        return [Row(**row) for row in entry.get("rows", [])] if mine else []
    except TypeError:  # written by a version whose rows say something else
        return []


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """All rows, the new ones in place of the old ones of the same races."""
    return list({row.key: row for row in (*old, *new)}.values())


class Journal:
    """The rows of a run that has not ended, beside the user's file: what is killed goes on where it was.

    Args:
        device: where the races are run.
        again: forget the rows of a run that was killed.
    """

    def __init__(self, device: torch.device, again: bool):
        self.path, self.kind = _races.file_of(device).with_suffix(".rows"), device.type
        if again:
            self.path.unlink(missing_ok=True)

    def add(self, op: Op, rows: list[Row]) -> None:
        """Append the rows of one race."""
        with self.path.open("a", encoding="utf-8") as file:
            line = {"op": op.name, "sources": op.sources_digest(self.kind), "rows": [asdict(row) for row in rows]}
            # on a line of its own also where the one before was cut short
            file.write("\n" + json.dumps(line))

    def _lines(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            # the last line of a run that was killed may have no end
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def read(self, op: Op) -> list[Row]:
        """The rows of the op's kernel as it is now."""
        own = [one for one in self._lines() if (one["op"], one["sources"]) == (op.name, op.sources_digest(self.kind))]
        return [Row(**row) for one in own for row in one["rows"]]

    def end(self, ops: set[str]) -> None:
        """Forget the rows of these ops, which are in the user's file now."""
        left = [json.dumps(one) for one in self._lines() if one["op"] not in ops]
        if left:
            write_text(self.path, "\n".join(left))
        else:
            self.path.unlink(missing_ok=True)


def changes(op: Op, entry: dict[str, Any], device: torch.device) -> list[Change]:
    """What an entry changes, against who serves now.

    Args:
        op: the op.
        entry: what `decide` gave.
        device: its device.
    """
    found, rows = [], [Row(**row) for row in entry["rows"]]
    keys = dict.fromkeys((row.variant, row.dtype, row.size if row.style != "graph" else "") for row in rows)
    for variant, dtype, size in keys:
        style: Style = "eager" if size else "graph"
        name = cell(variant, getattr(torch, dtype), size)
        bits = SIZES[size] - 1 if size else 0
        before = op.wanted(style, device, variant, getattr(torch, dtype), bits).backend
        after = entry["cells"][name][style]
        if before != after:
            same = {"eager": ("eager", "replay"), "graph": ("graph",)}[style]
            own = [
                row.ratio for row in rows
                if (row.variant, row.dtype) == (variant, dtype) and size in ("", row.size) and row.style in same
            ]  # fmt: skip
            gain = statistics.geometric_mean(own)
            found.append(Change(op=op.name, calls=name, style=style, before=before, after=after, gain=gain))
    return found


def _verified(verdict: Verdict) -> dict[str, Any]:
    return {"error": verdict.error, "budget": verdict.budget, "case": verdict.case, "date": verdict.date}


def _ordered(chosen: list[Op], device: torch.device, full: bool) -> list[tuple[Race, bool]]:
    """All races, those first that must not be left out for want of time; with whether to compile."""
    everything = [(race, i) for op in chosen for i, race in enumerate(races(op, device))]
    order = {"medium": 0, "large": 1, "small": 2}
    everything.sort(key=lambda one: order[one[0].size])
    plain = [(race, False) for race, _ in everything]
    if not full:
        return plain
    # Compiling takes seconds: one example of each variant and dtype, of one size, stands for graphs of every size.
    first: dict[tuple[str, str, torch.dtype], Race] = {}
    for race, _ in everything:
        first.setdefault((race.op, race.example.variant, race.dtype), race)
    return plain + [(race, True) for race in first.values()]


# long because the steps follow each other, and each is a few lines
def tune(
    device: torch.device,
    *,
    seconds: float = 270.0,
    full: bool = False,
    ops: Iterable[str] = (),
    again: bool = False,
    capture: Capture | None = None,
    tell: Callable[[float, str], None] = lambda share, what: None,
) -> Tuned:
    """Verify the kernels of a device, race them, and keep who won in the user's file.

    Args:
        device: where.
        seconds: no race is begun after so long; what is left out keeps what it had.
        full: also inside graphs of ``torch.compile``.
        ops: names; empty for all that have a kernel for the device.
        again: also the races that are known of this device and these versions of the package, torch and Triton.
        capture: captures CUDA graphs, so that replays are raced too; None for a device that has none.
        tell: is told the share that is done, and what is done next.

    Returns:
        What was found. The winners serve from now on, in this process too.

    Raises:
        ValueError: an op that there is not, or that has no kernel for the device.
        OSError: the folder of verdicts cannot be written.
    """
    began = time.perf_counter()
    having = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    for name in ops:
        if name not in having:
            raise ValueError(f"op {name!r} has no kernel for {device.type}; there are {', '.join(having) or 'none'}")
    chosen = [op for name, op in having.items() if name in (tuple(ops) or having)]
    facts = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    _races.write(device, {}, {**_dated(device), **({} if _dated(device) else facts)})
    verdicts: dict[str, Verdict] = {}
    for index, op in enumerate(chosen):
        tell(0.1 * index / len(chosen), f"verifying {op.name}")
        verdicts[op.name] = verdict_of(op, device)
    wrong = {name: found.words() for name, found in verdicts.items() if not found.passed}
    work = _ordered([op for op in chosen if op.name not in wrong], device, full)
    journal = Journal(device, again)
    rows = {op.name: found for op in chosen if (found := journal.read(op))}
    keys = {op.name: {row.key for row in (*([] if again else known_rows(op, device)), *rows.get(op.name, []))}
            for op in chosen}  # fmt: skip
    styles = {False: ("eager",) if capture is None else ("eager", "replay"), True: ("graph",)}
    new = [(race, compiled) for race, compiled in work if not race.keys(styles[compiled]) <= keys[race.op]]
    failed: dict[str, str] = {}
    left_out: list[str] = []
    for index, (race, compiled) in enumerate(new):
        if time.perf_counter() - began > seconds:
            left_out = [one.words() for one, _ in new[index:]]
            break
        tell(0.1 + 0.9 * index / len(new), race.words() + (" compiled" if compiled else ""))
        try:
            found = run_race(race, device, compiled, capture)
        except Exception as error:  # a lack of memory, or a kernel that cannot be captured, ends no other race
            failed[race.words()] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        journal.add(REGISTRY[race.op], found)
        rows[race.op] = merged(rows.get(race.op, []), found)
        if device.type == "cuda" and race.size == "large":
            # what its reference and its graphs took would add up with those of other ops
            torch.cuda.empty_cache()
    made, changed = {}, []
    for name, found in rows.items():
        op = REGISTRY[name]
        made[name] = decide(op, merged(known_rows(op, device), found), device)
        changed += changes(op, made[name], device)
        made[name]["verified"] = _verified(verdicts[name])
    path = _races.write(device, made, facts)
    journal.end({op.name for op in chosen})
    forget()
    return Tuned(
        path=path,
        seconds=time.perf_counter() - began,
        rows=rows,
        changes=changed,
        known=len(work) - len(new),
        left_out=left_out,
        failed=failed,
        wrong=wrong,
    )


def _dated(device: torch.device) -> dict[str, Any]:
    """What the user's file says beside its entries; empty where there is none."""
    return {key: value for key, value in _races.read(device).items() if key not in ("machine", "ops")}

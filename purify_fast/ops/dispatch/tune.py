"""Kernels are raced against their references on the device at hand: what ``purify-fast tune`` does.

Each op is raced by variant, memory layout, dtype and size, forward and backward on its own. Eager calls are timed; on a
GPU also replays of a CUDA graph, which have none of the time that the host takes to launch. Where ``torch.compile`` is
asked for, both are put into a compiled graph with neighbors to fuse with.

A kernel serves eager calls of a variant, dtype and size where it is ahead in every layout and, on a GPU, in the replay
too. What serves already keeps its place unless it is more than five percent behind: two races of the same machine then
end alike. Inside a compiled graph, where a kernel keeps its neighbors from being fused, it must be twice as fast, and
the reference must be one that compilers do not fuse as well.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import races
from .op import Backend, Call
from .registry import REGISTRY, Op, forget
from .timing import Capture, Race, Row, level, races_of, run_race
from .verify import Verdict, verdict_of

#: Times as fast as what ``torch.compile`` makes, for a kernel to serve inside graphs: it is a wall there, whose inputs
#: and outputs are written and read once more than if they were fused with neighbors that the race does not have.
IN_GRAPHS = 2.0
#: Seconds after which rows are written at the latest: a killed run goes on with them.
PAUSE = 5.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """Calls that another backend serves than before the race.

    Attributes:
        op: its name.
        call: the variant, dtype, size and style.
        before: who served.
        after: who serves.
        gain: how many times as fast the kernel is.
    """

    op: str
    call: Call
    before: Backend
    after: Backend
    gain: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tune` did.

    Attributes:
        path: the file it wrote.
        seconds: that it took.
        rows: the times of the races that were run, by op.
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


def _gain(rows: list[Row]) -> str:
    """How many times as fast the kernel is, in words."""
    ratios = sorted(row.ratio for row in rows)
    least, most = (f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}" for ratio in (ratios[0], ratios[-1]))
    return f"{statistics.geometric_mean(ratios):.1f} times as fast ({least} to {most})"


def _wins(op: Op, call: Call, rows: list[Row]) -> bool:
    """Whether the kernel is to serve a call by all of its rows."""
    if call.style == "graph":
        return call.variant in op.serves_unraced("graph") and all(row.ratio >= IN_GRAPHS for row in rows)
    serves = op.wanted(call).backend == op.kernel(call.device.type)
    return all(level(row.ratio, serves) for row in rows)


def decide(op: Op, rows: list[Row], device: torch.device) -> tuple[dict[str, Any], list[Change]]:
    """What a file tells of an op by the rows of all its races: who serves which of its calls; and what that changes.

    Args:
        op: the op.
        rows: all of its rows on a device.
        device: that device; what serves on it so far keeps its place where it is level.
    """
    kernel, by_call = op.kernel(device.type), dict[Call, list[Row]]()
    for row in rows:
        by_call.setdefault(row.call(device), []).append(row)
    winners: dict[Call, Backend] = {
        call: kernel if _wins(op, call, own) else "reference" for call, own in by_call.items()
    }

    def together(calls: Iterable[Call]) -> dict[str, str]:
        """Who serves, by style, what was not raced on its own: the kernel where it won all that was."""
        won: dict[str, bool] = {}
        for call in calls:
            won[call.style] = won.get(call.style, True) and winners[call] == kernel
        return {style: kernel if won[style] else "reference" for style in sorted(won)}

    cells: dict[str, dict[str, str]] = {}
    for call, backend in winners.items():
        cells.setdefault(call.cell, {})[call.style] = backend
    variants = sorted({call.variant for call in winners} - {""})
    by_style = {style: [row for call in by_call if call.style == style for row in by_call[call]]
                for style in ("eager", "graph")}  # fmt: skip
    entry = {
        "sources": op.sources_digest(device.type),
        **together(winners),
        "variants": {name: together(call for call in winners if call.variant == name) for name in variants},
        "cells": dict(sorted(cells.items())),
        "gain": {style: _gain(own) for style, own in by_style.items() if own},
        "rows": [asdict(row) for row in rows],
    }
    befores = {call: op.wanted(call).backend for call in winners}
    changes = [
        Change(op=op.name, call=call, before=befores[call], after=after,
               gain=statistics.geometric_mean([row.ratio for row in by_call[call]]))
        for call, after in winners.items() if befores[call] != after
    ]  # fmt: skip
    return entry, changes


def known_rows(op: Op, device: torch.device) -> list[Row]:
    """The rows that the user's file has of the op's kernel as it is now."""
    entry = races.read(device).get("ops", {}).get(op.name, {})
    mine = entry.get("sources") == op.sources_digest(device.type)
    try:
        return [Row(**row) for row in entry.get("rows", [])] if mine else []
    except TypeError:  # written by a version whose rows have other fields
        return []


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """All rows, the new ones in place of the old ones of the same races."""
    return list({row.key: row for row in (*old, *new)}.values())


def _ordered(chosen: list[Op], device: torch.device, full: bool) -> list[tuple[Race, bool]]:
    """All races, those first that must not be left out for want of time; with whether to compile."""
    order = {"medium": 0, "large": 1, "small": 2}
    every = sorted((race for op in chosen for race in races_of(op, device)), key=lambda race: order[race.size])
    # Compiling takes seconds: one example of each variant and dtype, of one size, stands for graphs of every size.
    first: dict[tuple[str, str, torch.dtype], Race] = {}
    for race in every if full else ():
        first.setdefault((race.op, race.example.variant, race.dtype), race)
    return [(race, False) for race in every] + [(race, True) for race in first.values()]


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
        What was measured. The winners serve from now on, in this process too.

    Raises:
        ValueError: an op that there is not, or that has no kernel for the device.
        OSError: the folder of verdicts cannot be written.
    """
    began = time.perf_counter()
    with_kernel = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    for name in ops:
        if name not in with_kernel:
            there = ", ".join(with_kernel) or "none"
            raise ValueError(f"op {name!r} has no kernel for {device.type}; there are {there}")
    chosen = {name: op for name, op in with_kernel.items() if name in (tuple(ops) or with_kernel)}
    facts = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    # a folder that cannot be written is refused before any race
    races.write(device, {}, facts)
    verdicts: dict[str, Verdict] = {}
    for index, (name, op) in enumerate(chosen.items()):
        tell(0.1 * index / len(chosen), f"verifying {name}")
        verdicts[name] = verdict_of(op, Call(device))
    wrong = {name: verdict.words() for name, verdict in verdicts.items() if not verdict.passed}
    known = {name: [] if again else known_rows(op, device) for name, op in chosen.items()}
    keys = {name: {row.key for row in rows} for name, rows in known.items()}
    styles = {False: ("eager",) if capture is None else ("eager", "replay"), True: ("graph",)}
    work = _ordered([op for name, op in chosen.items() if name not in wrong], device, full)
    new = [(race, compiled) for race, compiled in work if not race.keys(styles[compiled]) <= keys[race.op]]
    rows: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    left_out: list[str] = []
    written = time.perf_counter()
    try:
        for index, (race, compiled) in enumerate(new):
            if time.perf_counter() - began > seconds:
                left_out = [one.words() for one, _ in new[index:]]
                break
            tell(0.1 + 0.9 * index / len(new), race.words() + (" compiled" if compiled else ""))
            try:
                timed = run_race(race, device, compiled, capture)
            except Exception as error:  # a lack of memory, or a kernel that cannot be captured, ends no other race
                failed[race.words()] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            rows[race.op] = merged(rows.get(race.op, []), timed)
            if device.type == "cuda" and race.size == "large":
                # what its reference and its graphs took would add up with those of other ops
                torch.cuda.empty_cache()
            if time.perf_counter() - written > PAUSE:
                _keep_rows(rows, device, facts)
                written = time.perf_counter()
    finally:
        _keep_rows(rows, device, facts)
    decided = {
        name: decide(op, all_rows, device) for name, op in chosen.items() if (all_rows := known_rows(op, device))
    }
    path = races.write(device, {name: entry for name, (entry, _) in decided.items()}, facts)
    forget()
    return Tuned(
        path=path,
        seconds=time.perf_counter() - began,
        rows=rows,
        changes=[change for _, changes in decided.values() for change in changes],
        known=len(work) - len(new),
        left_out=left_out,
        failed=failed,
        wrong=wrong,
    )


def _keep_rows(rows: dict[str, list[Row]], device: torch.device, facts: dict[str, Any]) -> None:
    """Put rows into the user's file. They decide nothing until all races are run, and a run that is killed goes on."""
    entries = {}
    for name, new in rows.items():
        digest, entry = REGISTRY[name].sources_digest(device.type), races.read(device).get("ops", {}).get(name, {})
        own = entry if entry.get("sources") == digest else {}
        every = merged(known_rows(REGISTRY[name], device), new)
        entries[name] = {**own, "sources": digest, "rows": [asdict(row) for row in every]}
    races.write(device, entries, facts)

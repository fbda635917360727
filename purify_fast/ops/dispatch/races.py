"""The results of races: which backend was measured to be faster, for eager calls and inside compiled graphs.

They are in two kinds of files with the same form: the user's file for this machine (`records`), which `racing.tune`
writes and which has priority, and the package's ``races.json``, for machines that were measured with the benchmarks.
Entries of the user's file for other sources of the ops are ignored. In ``races.json`` the results of a machine with the
same device are used, or else with the same instruction set. If there is none, a GPU uses no results, and a CPU uses the
results of the first CPU, because a kernel that was faster on one CPU is faster on most.

The ``cells`` of an op's entry give the fastest backend for eager calls and for calls inside graphs: for each measured
combination of variant, dtype and size; for each variant; and, under an empty name, for the whole op. A call uses the
most specific cell that matches it.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import records
from .op import Backend, Call, Definition, Style, call_of

logger = logging.getLogger("purify_fast")

SHIPPED = Path(__file__).parents[1] / "races.json"


class Winner(NamedTuple):
    """The backend that should compute a call: the winner of a race or, without a race, the choice of a rule."""

    backend: Backend
    why: str
    gain: str = ""


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """Return the content of ``races.json``: the results of the machines that were measured with the benchmarks."""
    return tuple(json.loads(SHIPPED.read_text(encoding="utf-8")))


@functools.cache
def _read(path: Path, device: torch.device) -> dict[str, Any]:
    return records.read("raced", device)


def read(device: torch.device) -> dict[str, Any]:
    """Return the user's file for a device; empty if there is none."""
    return _read(records.file_of("raced", device), device)


# The warning is shown once per process, because after an upgrade it applies to most ops.
@functools.cache
def _warn_stale(path: Path) -> None:
    logger.warning(
        "%s was made with other versions of some ops and is not used for these: run `purify-fast tune` again. "
        "`purify-fast info --all` names these ops",
        path,
    )


def forget_files() -> None:
    """Make the next access read the files again."""
    _read.cache_clear()
    _warn_stale.cache_clear()


def nearest(facts: dict[str, str]) -> dict[str, Any] | None:
    """Return the machine in ``races.json`` that is most similar to this machine, or None if no machine is similar."""
    same = [one for one in shipped() if one["machine"]["kind"] == facts["kind"]]
    for what in ("device", "capability"):
        for one in same:
            if one["machine"].get(what) == facts[what]:
                return one
    return same[0] if same and facts["kind"] == "cpu" else None


def own_entry(op: Definition, device: torch.device) -> dict[str, Any]:
    """Return the entry of an op in the user's file; empty if the file has no entry for the op's current kernel."""
    entry: dict[str, Any] = read(device).get("ops", {}).get(op.name, {})
    return entry if entry.get("sources") == op.code_hash(device.type) else {}


def entries_of(op: Definition, device: torch.device) -> list[tuple[dict[str, Any], str]]:
    """Return the entries of an op, the user's entry before the shipped entry, and where and when each was raced."""
    entries, near = [], nearest(records.machine(device))
    if own := own_entry(op, device):
        entries.append((own, f"raced on this machine, {read(device).get('date')}"))
    elif op.name in read(device).get("ops", {}):
        _warn_stale(records.file_of("raced", device))
    if near is not None and op.name in near["ops"]:
        entries.append((near["ops"][op.name], f"raced on {near['machine']['device']}, {near['date']}"))
    return entries


def winner(op: Definition, call: Call) -> Winner | None:
    """Return the winner of the race of an op on a device of this machine, or None if there was no race."""
    for entry, why in entries_of(op, call.device):
        for name in (call.cell, call.variant, ""):
            backend = entry.get("cells", {}).get(name, {}).get(call.style)
            if backend:
                return Winner(backend, why, entry.get("gain", {}).get(call.style, ""))
    return None


def calls(op: Definition, device: torch.device, style: Style) -> list[Call]:
    """Return the calls of an op that were raced separately, from the first entry that names such calls."""
    for entry, _ in entries_of(op, device):
        cells = entry.get("cells", {})
        raced = [call_of(name, device, style) for name in cells if name and style in cells[name]]
        if raced:
            # The entries for all sizes repeat the entries by size, so they are omitted for ops that are raced by size.
            return [call for call in raced if call.bits] or raced
    return []


def write(device: torch.device, ops: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write entries into the user's file for a device, and keep the entries of other ops."""
    path = records.file_of("raced", device)
    try:
        records.update("raced", device, ops, facts)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): set PURIFY_FAST_CACHE to a writable folder") from error
    forget_files()
    return path

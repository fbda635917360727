"""The races: which backend was measured to be faster, for eager calls and inside compiled graphs.

Two kinds of files hold the results, in one form: the user's own for this machine (`records`), and ``races.json`` of the
package, for machines that were measured with the benchmarks. The user's file comes first. It has hashes of the ops'
sources, and entries for other sources are not used. Among the machines of the package, one with the same device
decides, otherwise one with the same instruction set. For a CPU, the first machine decides if there is neither, because
a kernel that was faster on one CPU is faster on most.

A file has an entry for each op. Its ``cells`` name the winners of eager calls and inside graphs: for each variant,
dtype and size that was raced, for each variant, and under an empty name for the op as a whole. The narrowest entry that
covers a call decides. `tune` writes such a file.
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
#: While a run is on, these races replace those of the files; `run_kernels.keep_kernels` sets them.
of_run: dict[str, Any] = {}


class Winner(NamedTuple):
    """The winner of a race.

    Attributes:
        backend: the fastest backend that is right, in all that was measured.
        why: where and when it was measured, in words.
        gain: how many times as fast the kernel was as its reference, in words; empty where that is not known.
    """

    backend: Backend
    why: str
    gain: str = ""


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """The machines that were measured with the benchmarks."""
    return tuple(json.loads(SHIPPED.read_text(encoding="utf-8")))


@functools.cache
def _read(path: Path, device: torch.device) -> dict[str, Any]:
    return records.read("raced", device)


def read(device: torch.device) -> dict[str, Any]:
    """The user's file for a device; empty if there is none."""
    return _read(records.file_of("raced", device), device)


@functools.cache  # warn once per process: after an upgrade this is true of most ops
def _warn_stale(path: Path) -> None:
    logger.warning(
        "%s was made with other versions of some ops and is not used for these: run `purify-fast tune` again. "
        "`purify-fast info --all` names these ops",
        path,
    )


def forget_files() -> None:
    """Read the files again when they are next needed."""
    _read.cache_clear()
    _warn_stale.cache_clear()


def nearest(facts: dict[str, str]) -> dict[str, Any] | None:
    """The measured machine, among those that ship, that is most like this one; None if none is like it."""
    same = [one for one in shipped() if one["machine"]["kind"] == facts["kind"]]
    for what in ("device", "capability"):
        for one in same:
            if one["machine"].get(what) == facts[what]:
                return one
    return same[0] if same and facts["kind"] == "cpu" else None


def entries_of(op: Definition, device: torch.device) -> list[tuple[dict[str, Any], str]]:
    """The user's and the shipped entry of an op on a device that is here, with where and when it was raced."""
    if device.type == of_run.get("device") and op.name in of_run["ops"]:
        return [({"cells": cells}, "as the run began") for cells in of_run["ops"][op.name]["races"]]
    entries, own, near = [], read(device), nearest(records.machine(device))
    if op.name in own.get("ops", {}):
        if own["ops"][op.name].get("sources") == op.code_hash(device.type):
            entries.append((own["ops"][op.name], f"raced on this machine, {own.get('date')}"))
        else:
            _warn_stale(records.file_of("raced", device))
    if near is not None and op.name in near["ops"]:
        entries.append((near["ops"][op.name], f"raced on {near['machine']['device']}, {near['date']}"))
    return entries


def winners(op: Definition, device: torch.device) -> list[dict[str, Any]]:
    """The cells of an op's entries, of which the first that knows a call decides."""
    return [entry.get("cells", {}) for entry, _ in entries_of(op, device)]


def winner(op: Definition, call: Call) -> Winner | None:
    """The winner of the race of an op on a device of this machine; None if there was no race."""
    for entry, why in entries_of(op, call.device):
        for name in (call.cell, call.variant, ""):
            backend = entry.get("cells", {}).get(name, {}).get(call.style)
            if backend:
                return Winner(backend, why, entry.get("gain", {}).get(call.style, ""))
    return None


def calls(op: Definition, device: torch.device, style: Style) -> list[Call]:
    """The calls of an op that were raced on their own: those that the first entry that decides knows by name."""
    for entry, _ in entries_of(op, device):
        cells = entry.get("cells", {})
        raced = [call_of(name, device, style) for name in cells if name and style in cells[name]]
        if raced:
            # The entries for all sizes repeat those by size, so they are left out for ops that are raced by size.
            return [call for call in raced if call.bits] or raced
    return []


def write(device: torch.device, ops: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Put entries into the user's file for a device; those of other ops in it stay.

    Raises:
        OSError: the folder cannot be written; the message says how to name another.
    """
    path = records.file_of("raced", device)
    with records.locked("raced", device):
        try:
            records.update("raced", device, ops, facts)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error}): set PURIFY_FAST_CACHE to a writable folder") from error
    forget_files()
    return path

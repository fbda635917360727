"""The results of races: which backend was measured to be faster, for eager calls and inside compiled graphs.

This machine's file (`records`) has priority over ``races.json``, where a machine with the same device or instruction
set counts, or the first CPU. A call uses the most specific cell: variant, dtype and size; variant; or whole op.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import records
from .op import Backend, Call, Definition

SHIPPED = Path(__file__).parents[1] / "races.json"


class Winner(NamedTuple):
    """The backend that should compute a call: the winner of a race or, without a race, the choice of a rule."""

    backend: Backend
    why: str


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """Return the content of ``races.json``: the results of the machines that were measured with the benchmarks."""
    return tuple(json.loads(SHIPPED.read_text(encoding="utf-8")))


def nearest(facts: dict[str, str]) -> dict[str, Any] | None:
    """Return the machine in ``races.json`` that is most similar to this machine, or None if no machine is similar."""
    same = [one for one in shipped() if one["machine"]["kind"] == facts["kind"]]
    for what in ("device", "capability"):
        for one in same:
            if one["machine"].get(what) == facts[what]:
                return one
    return same[0] if same and facts["kind"] == "cpu" else None


def entries_of(op: Definition, device: torch.device) -> list[tuple[dict[str, Any], str]]:
    """Return the entries of an op, the user's entry before the shipped entry, and where and when each was raced."""
    own, near = records.entry_of(op.name, op.code_hash(device.type), device), nearest(records.machine(device))
    entries = [(own, f"raced on this machine, {records.read(device)['date']}")] if "cells" in own else []
    if near is not None and op.name in near["ops"]:
        entries.append((near["ops"][op.name], f"raced on {near['machine']['device']}, {near['date']}"))
    return entries


def winner(op: Definition, call: Call) -> Winner | None:
    """Return the winner of the race of an op on a device of this machine, or None if there was no race."""
    for entry, why in entries_of(op, call.device):
        for name in (call.cell, call.variant, ""):
            backend = entry.get("cells", {}).get(name, {}).get(call.style)
            if backend:
                return Winner(backend, why)
    return None

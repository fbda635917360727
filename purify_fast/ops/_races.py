"""Which backend was measured ahead, for eager calls and inside compiled graphs.

Two kinds of files say so, in one form: the user's own for this machine, in the folder of `_verdicts`, and
``races.json`` beside this module for machines that were measured with the benchmarks. The user's comes first. It also
holds hashes of the ops' sources, and what it says of other sources is not used. Of those that ship, the one of the same
device counts, else of the same instruction set, and for a CPU else the first: a kernel that was ahead on one CPU is
ahead on most.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _verdicts

logger = logging.getLogger("purify_fast")

SHIPPED = Path(__file__).with_name("races.json")


@dataclass(frozen=True)
class Winner:
    """Who won a race.

    Attributes:
        backend: the fastest that is right, in all that was measured.
        why: where and when it was measured, in words.
    """

    backend: str
    why: str


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """The machines that were measured with the benchmarks."""
    return tuple(json.loads(SHIPPED.read_text(encoding="utf-8")))


def file_of(device: torch.device) -> Path:
    """The user's own file for a device."""
    path = _verdicts.file_of(device)
    return path.with_name(path.name.replace("verified-", "raced-"))


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s) and is not used", path, error)
        return {}


@functools.cache  # once per process and op
def _say_stale(path: Path, op: str) -> None:
    logger.warning("%s is of other sources of %s, or of another machine, and is not used", path, op)


def forget() -> None:
    """Read the files again when they are next needed."""
    _read.cache_clear()
    _say_stale.cache_clear()


def _nearest(facts: dict[str, str]) -> dict[str, Any] | None:
    """The machine that ships and is most like this one; None if none is like it."""
    same = [one for one in shipped() if one["machine"]["kind"] == facts["kind"]]
    for what in ("device", "capability"):
        for one in same:
            if one["machine"].get(what) == facts[what]:
                return one
    return same[0] if same and facts["kind"] == "cpu" else None


def _reported(race: dict[str, Any], op: str, style: str, variant: str) -> str | None:
    """The backend that a file names for an op."""
    entry = race.get("ops", {}).get(op)
    if entry is None:
        return None
    return entry.get("variants", {}).get(variant, entry)[style]


def winner(op: str, sources: str, style: str, device: torch.device, variant: str) -> Winner | None:
    """Who won the race of an op on a device; None where there was none.

    Args:
        op: its name.
        sources: the hash of its kernel's sources as they are now.
        style: ``eager`` or ``graph``.
        device: one that is here.
        variant: a setting of the op that was raced on its own, or the empty string.
    """
    facts = _verdicts.machine(device)
    path = file_of(device)
    own = _read(path)
    if op in own.get("ops", {}):
        if own.get("machine") == facts and own["ops"][op].get("sources") == sources:
            return Winner(str(_reported(own, op, style, variant)), f"raced on this machine, {own.get('date')}")
        _say_stale(path, op)
    near = _nearest(facts)
    backend = _reported(near, op, style, variant) if near is not None else None
    if near is None or backend is None:
        return None
    return Winner(backend, f"raced on {near['machine']['device']}, {near['date']}")

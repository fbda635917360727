"""Who serves which op on the machines that the package ships verdicts for: ``purify_fast/ops/races.json``.

A folder of results says it in two ways. ``raced.json`` is the file that ``purify-fast tune`` wrote on that device: the
winners by variant, dtype and size. ``ops.csv`` has the rows of ``python -m benchmarks ops``, which decide what the
former does not: calls inside compiled graphs, if the races left these out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from purify_fast._files import write_text
from purify_fast.ops.dispatch import cache, races

from . import report

FILE = "raced.json"
#: What a user's entry says of that machine alone, and decides nothing.
PRIVATE = ("rows", "sources", "verified")


def read(folder: Path) -> dict[str, Any]:
    """The races of a folder of results; empty where there are none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two entries of an op: what the first leaves open is the second's."""
    ours, theirs = first.get("cells", {}), second.get("cells", {})
    cells = {name: theirs.get(name, {}) | ours.get(name, {}) for name in sorted({*ours, *theirs})}
    return {**second, **first, "cells": cells}


def shipped(folder: Path) -> dict[str, Any]:
    """What the package ships of a folder of results."""
    raced, path = read(folder), folder / report.ROWS
    base = report.races(report.read_csv(path)) if path.exists() else {}
    if not raced:
        return base
    kept = {
        op: {key: value for key, value in entry.items() if key not in PRIVATE} for op, entry in raced["ops"].items()
    }
    ops = {
        op: _merged(kept.get(op, {}), base.get("ops", {}).get(op, {})) for op in sorted({*kept, *base.get("ops", {})})
    }
    return {"machine": {**raced["machine"], "threads": str(raced.get("threads"))}, "date": raced["date"], "ops": ops}


def write_races(results: Path) -> Path:
    """Write what ships of every folder of results."""
    folders = sorted({path.parent for name in (report.ROWS, FILE) for path in results.glob(f"*/{name}")})
    write_text(races.SHIPPED, json.dumps([shipped(folder) for folder in folders], indent=1) + "\n")
    return races.SHIPPED


def take(device: torch.device, folder: Path) -> Path:
    """Copy what `purify-fast tune` found on a device that is here into a folder of results.

    Raises:
        FileNotFoundError: there is no such file, or it is of other sources or versions.
    """
    raced = races.read(device)
    if not raced.get("ops"):
        raise FileNotFoundError(
            f"{cache.file_of('raced', device)} holds no races of this machine: run `purify-fast tune` first"
        )
    write_text(folder / FILE, json.dumps(raced, indent=1) + "\n")
    return folder / FILE

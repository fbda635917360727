"""The serving kernels on machines for which the package ships verdicts: ``purify_fast/ops/races.json``.

They come from two files of a folder of results. ``raced.json`` is the file that ``purify-fast tune`` wrote on that
device: the winners by variant, dtype and size. ``ops.csv`` has the rows of ``python -m benchmarks ops``, which decide
the rest: calls inside compiled graphs, if the races left these out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from purify_fast._files import write_text
from purify_fast.ops.dispatch import races, records

from . import sheets

FILE = "raced.json"
#: Keys of a user's entry that concern only that machine, and decide nothing.
PRIVATE = ("rows", "sources", "verified")


def read(folder: Path) -> dict[str, Any]:
    """The races of a folder of results; empty if there are none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two entries of an op: the second fills the gaps of the first."""
    ours, theirs = first.get("cells", {}), second.get("cells", {})
    cells = {name: theirs.get(name, {}) | ours.get(name, {}) for name in sorted({*ours, *theirs})}
    return {**second, **first, "cells": cells}


def shipped(folder: Path) -> dict[str, Any]:
    """The races of a folder of results that ship with the package."""
    raced, path = read(folder), folder / sheets.ROWS
    base = sheets.races(sheets.read_csv(path)) if path.exists() else {}
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
    """Write the shipped races of all folders of results."""
    folders = sorted({path.parent for name in (sheets.ROWS, FILE) for path in results.glob(f"*/{name}")})
    write_text(races.SHIPPED, json.dumps([shipped(folder) for folder in folders], indent=1) + "\n")
    return races.SHIPPED


def take(device: torch.device, folder: Path) -> Path:
    """Copy the results of `purify-fast tune` on a device of this machine into a folder of results.

    Raises:
        FileNotFoundError: there is no such file, or its sources or versions differ.
    """
    raced = races.read(device)
    if not raced.get("ops"):
        raise FileNotFoundError(
            f"{records.file_of('raced', device)} holds no races of this machine: run `purify-fast tune` first"
        )
    write_text(folder / FILE, json.dumps(raced, indent=1) + "\n")
    return folder / FILE

"""Write ``purify_fast/ops/races.json``, the choices between kernel and reference that are part of the package.

The choices for a device come from two files in its folder of results. ``raced.json`` was written by
``purify-fast tune`` on that device. It has the faster implementation for each variant, dtype and size. ``ops.csv`` was
written by ``python -m benchmarks ops``. It decides where raced.json has no choice, such as inside compiled graphs.
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


def read(folder: Path) -> dict[str, Any]:
    """Return the contents of raced.json in a folder of results, or an empty dictionary if there is no such file."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two entries of an op. If both entries have a value, the first entry's value is used."""
    ours, theirs = first.get("cells", {}), second.get("cells", {})
    cells = {name: theirs.get(name, {}) | ours.get(name, {}) for name in sorted({*ours, *theirs})}
    return {**second, **first, "cells": cells}


def shipped(folder: Path) -> dict[str, Any]:
    """Return the choices from a folder of results, in the form of an entry of races.json."""
    raced, path = read(folder), folder / sheets.ROWS
    base = sheets.races(sheets.read_csv(path)) if path.exists() else {}
    if not raced:
        return base
    kept = {op: {"cells": entry["cells"]} for op, entry in raced["ops"].items()}
    ops = {
        op: _merged(kept.get(op, {}), base.get("ops", {}).get(op, {})) for op in sorted({*kept, *base.get("ops", {})})
    }
    return {"machine": {**raced["machine"], "threads": str(raced.get("threads"))}, "date": raced["date"], "ops": ops}


def write_races(results: Path) -> Path:
    """Write the choices from all folders of results into races.json, and return the path of this file."""
    folders = sorted({path.parent for name in (sheets.ROWS, FILE) for path in results.glob(f"*/{name}")})
    write_text(races.SHIPPED, json.dumps([shipped(folder) for folder in folders], indent=1) + "\n")
    return races.SHIPPED


def take(device: torch.device, folder: Path) -> Path:
    """Copy the results of `purify-fast tune` on a device of this machine into a folder of results."""
    known = records.read(device)
    raced = {**known, "ops": {op: entry for op, entry in known["ops"].items() if "cells" in entry}}
    if not raced["ops"]:
        raise FileNotFoundError(f"{records.file_of(device)} has no results: run `purify-fast tune` first")
    write_text(folder / FILE, json.dumps(raced, indent=1) + "\n")
    return folder / FILE

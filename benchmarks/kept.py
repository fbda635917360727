"""Read and write the rows of a results file in JSON. A row is a dictionary, such as the result of a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from purify_fast._files import write_text

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a file, or an empty list if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


def put(path: Path, row: Row, key: Callable[[Row], Any], keep: Callable[[Row], bool] = lambda row: True) -> None:
    """Write a row into a file, in place of a row with the same key. Another process may have added rows to the file."""
    others = [one for one in rows_of(path) if key(one) != key(row) and keep(one)]
    write_text(path, json.dumps(sorted([*others, row], key=key), indent=1) + "\n")


def bits(values: Iterable[Any]) -> str:
    """Return a text with a 1 for each true value, and a 0 for each other value."""
    return "".join("01"[bool(value)] for value in values)


def machines(rows: Iterable[Row]) -> str:
    """Return a text that names the machines on which rows were measured."""
    each = (f"{row['device']}, {row['threads']} thread{'s' if str(row['threads']) != '1' else ''}" for row in rows)
    return "; ".join(dict.fromkeys(each))


def outdated(file: str, words: str, command: str) -> str:
    """Return a message about an outdated row. The attacks or the model have changed since the row was made."""
    made = "was made by other attacks or models than the package has"
    return f"{file}: {words} {made}; run `python -m benchmarks {command}`"

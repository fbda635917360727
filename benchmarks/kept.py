"""Rows of results in a JSON file, each of which is written as soon as it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from purify_fast._files import write_text

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """The rows of a file; none without the file.

    Args:
        path: the file.
    """
    return json.loads(path.read_text()) if path.is_file() else []


def put(path: Path, row: Row, key: Callable[[Row], Any], keep: Callable[[Row], bool] = lambda row: True) -> None:
    """Write a row in the place of the one with its key.

    The file is read again first, because another process may have written other rows meanwhile.

    Args:
        path: the file, whose rows are in the order of their keys.
        row: the row.
        key: tells rows apart.
        keep: tells which other rows stay.
    """
    others = [one for one in rows_of(path) if key(one) != key(row) and keep(one)]
    write_text(path, json.dumps(sorted([*others, row], key=key), indent=1) + "\n")


def machines(rows: Iterable[Row]) -> str:
    """The machines on which some rows were made.

    Args:
        rows: rows with a ``device`` and its ``threads``.
    """
    each = (f"{row['device']}, {row['threads']} thread{'s' if row['threads'] != 1 else ''}" for row in rows)
    return "; ".join(dict.fromkeys(each))


def outdated(file: str, words: str, command: str) -> str:
    """The remark on a row that the package would not make again.

    Args:
        file: name of the results file.
        words: names of the row.
        command: the command, with its options, that makes the row again.
    """
    made = "was made by other attacks or models than the package has"
    return f"{file}: {words} {made}; run `python -m benchmarks {command}`"

"""Read and write rows of results in a JSON file. A row is a dictionary, such as one result of a benchmark.

Commands write each row at once, so that an interrupted command can continue.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from purify_fast._files import write_text

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a file, or an empty list if there is no file.

    Args:
        path: path of the JSON file.
    """
    return json.loads(path.read_text()) if path.is_file() else []


def put(path: Path, row: Row, key: Callable[[Row], Any], keep: Callable[[Row], bool] = lambda row: True) -> None:
    """Write a row into a file, where it replaces the row with the same key.

    The file is read again first, because another process may have written rows since then.

    Args:
        path: path of the JSON file, whose rows are sorted by their keys.
        row: the new row.
        key: function that returns the key of a row, which no other row has.
        keep: function that returns True for each other row that remains in the file.
    """
    others = [one for one in rows_of(path) if key(one) != key(row) and keep(one)]
    write_text(path, json.dumps(sorted([*others, row], key=key), indent=1) + "\n")


def machines(rows: Iterable[Row]) -> str:
    """Return a text with the machines on which rows were measured.

    Args:
        rows: rows with the columns ``device`` and ``threads``.
    """
    each = (f"{row['device']}, {row['threads']} thread{'s' if row['threads'] != 1 else ''}" for row in rows)
    return "; ".join(dict.fromkeys(each))


def outdated(file: str, words: str, command: str) -> str:
    """Return a message about a row that was made by an earlier state of attacks or models.

    Args:
        file: name of the results file.
        words: description of the row.
        command: command of ``python -m benchmarks``, with its options, that makes the row again.
    """
    made = "was made by other attacks or models than the package has"
    return f"{file}: {words} {made}; run `python -m benchmarks {command}`"

"""The rows of several models: their table, and their JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purify_fast._files import write_text
from purify_fast.evaluation import Report, Row
from purify_fast.judge.show.report import FORMAT
from purify_fast.judge.show.text import markdown_table, warning

#: The file of the rows of a study's models.
FILE = "report.json"


def percent(row: Row) -> str:
    """A row's accuracy and its standard error, if it has one, in percent."""
    error = "" if row.images_share_draws else f" ± {100 * row.standard_error:.1f}"
    return f"{100 * row.accuracy:.1f}{error}"


def comparison(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table with a line for each attack and a column for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells = {(row.attack, row.model): f"{percent(row)} {warning(row)}".strip() for row in rows}
    body = [[attack, *(cells.get((attack, model), "-") for model in models)] for attack in Report([*rows]).attacks]
    return markdown_table(["attack", *models], body)


def save_rows(path: Path, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Write the rows of several models, and the notes of their reports, to a JSON file."""
    content: dict[str, Any] = {"format": FORMAT, "notes": notes, "rows": [row.to_dict() for row in rows]}
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file that `save_rows` wrote."""
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {content['format']}: run the study again")
    return [Row.from_dict(values) for values in content["rows"]]

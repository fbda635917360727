"""The JSON file with the rows of several models."""

from __future__ import annotations

import json
from pathlib import Path

from purify_fast.evaluation import Row
from purify_fast.judge.show.report import FORMAT

#: The file of the rows of a study's models.
FILE = "report.json"


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file."""
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {content['format']}")
    return [Row.from_dict(values) for values in content["rows"]]

"""The rows of several models, for the tables and the JSON of a study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from purify_fast._files import write_text
from purify_fast.evaluation import Report, Row
from purify_fast.judge.show.report import FORMAT
from purify_fast.judge.show.text import markdown_table, percent, warning

#: The file of the rows of a study's models.
FILE = "report.json"


@dataclass
class Merged:
    """The rows of several models.

    Args:
        rows: the rows of all models.
        notes: the notes of the reports.
        about: the facts that are the same in all reports, as in `Report`.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The names of the models, in order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def row(self, attack: str, model: str) -> Row:
        """Return the row of an attack on a model."""
        (found,) = [row for row in self.rows if (row.attack, row.model) == (attack, model)]
        return found

    def comparison(self) -> list[str]:
        """Return the lines of a Markdown table with a line for each attack and a column for each model."""
        cells = {(row.attack, row.model): replace(warning(row), text=percent(row)) for row in self.rows}
        body = [
            [attack, *(cells.get((attack, model), "-") for model in self.models)]
            for attack in Report(self.rows).attacks
        ]
        return markdown_table(["attack", *self.models], body)

    def save(self, path: Path) -> None:
        """Write the rows, the notes and the facts to a JSON file."""
        content: dict[str, Any] = {"format": FORMAT, "about": self.about, "notes": self.notes}
        content["rows"] = [row.to_dict() for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file that `Merged.save` wrote."""
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {content['format']}: run the study again")
    return [Row.from_dict(values) for values in content["rows"]]


def merge(reports: Iterable[Report]) -> Merged:
    """Merge the reports of several models.

    Raises:
        ValueError: threat models, prediction rules or precisions differ, or two rows have the same model and attack.
    """
    together = list(reports)
    # A report without a threat model has that of the other reports, and without a precision float32.
    facts = {what: {report.about.get(what) for report in together} for what in ("threat", "precision")}
    facts["threat"].discard(None)
    # Every rule of prediction gives the same numbers of a deterministic model.
    random = [report for report in together if not all(row.deterministic for row in report.rows)]
    facts["predict"] = {report.about.get("predict") for report in random}
    if differing := [what for what, values in facts.items() if len(values) > 1]:
        raise ValueError(f"merged reports must have the same {' and '.join(differing)}, got different ones")
    rows = [row for report in together for row in report.rows]
    counts = Counter((row.model, row.attack) for row in rows)
    if double := [f"{model}: {attack}" for (model, attack), count in counts.items() if count > 1]:
        raise ValueError(f"merged rows must differ in model or attack, got {', '.join(double)}: give each a name")
    notes = list(dict.fromkeys(note for report in together for note in report.notes))
    # The merged rows have no command, because several commands may have made the reports.
    shared = {key: value for key, value in together[0].about.items() if key != "command"} if together else {}
    about = {key: value for key, value in shared.items() if all(each.about.get(key) == value for each in together)}
    # A protocol that some of the reports changed is not the same.
    if len({report.about.get("changed") for report in together}) > 1:
        about.pop("protocol", None)
    about |= {what: value for what in ("threat", "predict") for value in facts[what] if value}
    return Merged(rows, notes, about)

"""What the attack jobs of a study leave, joined into one report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from purify_fast._files import write_text
from purify_fast.evaluation import Report
from purify_fast.evaluation.protocol import worst

_NAME = "attacked.json"


def keep(report: Report, folder: Path) -> dict[str, float]:
    """Write one job's rows to its folder; returns the accuracies."""
    write_text(folder / _NAME, report.to_json())
    return {row.attack: row.accuracy for row in report.rows}


def joined(folders: Iterable[Path]) -> Report:
    """The rows of one model's jobs, and the worst over all of them.

    Each group was attacked apart: in one go, a classifier, which has one variant, would lose to APGD what the PGD
    before it had taken, and the defences would not.
    """
    parts = [Report.from_json((folder / _NAME).read_text()) for folder in folders]
    rows = {row.attack: row for part in parts for row in part.rows if row.kind != "worst"}  # clean is in each
    notes = [note for part in parts for note in part.notes]
    return Report([*rows.values(), *worst(list(rows.values()))], list(dict.fromkeys(notes)))

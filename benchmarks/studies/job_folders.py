"""What the jobs of a study leave in their folders: defences, and rows that are joined into one report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from purify_fast._files import atomic, write_text
from purify_fast.evaluation import Examples, Report
from purify_fast.evaluation.rows import worst_rows
from purify_fast.evaluation.show.tables import draws, markdown_table, percent, single_predictions
from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.training import save_classifier

_NAME, _EXAMPLES = "attacked.json", "examples.npz"


def save_report(report: Report, folder: Path) -> dict[str, float]:
    """Write one job's rows to its folder, and the images of the first that has some; returns the accuracies."""
    write_text(folder / _NAME, report.to_json())
    for row in report.rows:
        if row.examples is not None:
            with atomic(folder / _EXAMPLES) as temporary:
                np.savez(temporary, attack=row.attack, **vars(row.examples))
            break
    return {row.attack: row.accuracy for row in report.rows}


def _read_report(folder: Path) -> Report:
    report = Report.from_json((folder / _NAME).read_text())
    if (folder / _EXAMPLES).is_file():
        with np.load(folder / _EXAMPLES) as file:
            arrays = {name: file[name] for name in file.files if name != "attack"}
            report.row(str(file["attack"])).examples = Examples(**arrays)
    return report


def joined(folders: Iterable[Path]) -> Report:
    """The rows of one model's jobs, and the worst over all of them.

    Each group was attacked apart: in one go, a classifier, which has one variant, would lose to APGD what the PGD
    before it had taken, and the defences would not.
    """
    parts = [_read_report(folder) for folder in folders]
    rows = {row.attack: row for part in parts for row in part.rows if row.kind != "worst"}  # clean is in each
    notes = [note for part in parts for note in part.notes]
    return Report([*rows.values(), *worst_rows(list(rows.values()))], list(dict.fromkeys(notes)))


def counts(report: Report) -> list[str]:
    """Lines of a Markdown table: every row with its images, draws and the health of its gradients."""
    head = ["model", "attack", "EOT", "robust images", "accuracy", "one prediction"]
    body = []
    for row in report.rows:
        health = row.describe_health() + ("" if row.reliable else ", unreliable")
        cells = [row.model, row.attack, draws(row), f"{int(row.robust.sum())}/{row.n}"]
        body.append([*cells, percent(row), single_predictions(row), health])
    return markdown_table([*head, "gradients non-finite / zero / unmoved"], body)


def save_whole(defence: Carso | Atop, folder: Path) -> None:
    """Write a defence and its classifier.

    Args:
        defence: on one of this package's classifiers.
        folder: where to; the classifier goes into ``classifier`` inside.
    """
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")

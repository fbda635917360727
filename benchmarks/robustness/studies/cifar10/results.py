"""Collect the numbers of the study on CIFAR-10 from the folders of its jobs, and save them with the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast._files import write_text
from purify_fast.evaluation import Report, merge

from .. import folder_of, result_of
from . import study
from .study import Budget, Judging

#: The name of the results. The file STEM.json has the numbers, and the folder STEM has reports and pictures.
STEM = "cifar10"


@dataclass(frozen=True)
class SeedFolders:
    """The folders with the results of the jobs of a seed.

    Attributes:
        root: folder of the study.
        seed: seed of the trainings.
    """

    root: Path
    seed: int

    def result(self, name: str) -> dict[str, Any]:
        """Return the result of a job."""
        return result_of(self.root, name, self.seed)

    def judged(self, name: str, protocol: str) -> Report:
        """Return the report of the evaluation of a row's model by a protocol."""
        folder = folder_of(self.root, study.judged_name(name, protocol), self.seed)
        return Report.from_json((folder / "report.json").read_text())


@dataclass(frozen=True)
class Results:
    """The numbers of the study.

    Attributes:
        lines: lines by the row's name and seed. There are further lines for the candidates on held-out images, and for
            the rows of `AS_AUTHORS`. Pages quote single numbers of all these lines.
        reports: reports of the main protocol, by the row's name and seed.
    """

    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    reports: dict[tuple[str, int], Report] = field(default_factory=dict)

    def judged(self, names: Sequence[str], seed: int) -> list[str]:
        """Return those of the given rows that have a line. The committed results lack a few rows."""
        return [name for name in names if (name, seed) in self.lines]

    def save(self, folder: Path) -> None:
        """Write the numbers, and the report on all models.

        Args:
            folder: folder of the results.
        """
        for seed in sorted({seed for _, seed in self.reports}):
            merged = merge(report for (_, of), report in self.reports.items() if of == seed)
            if seed == 0:
                # Git keeps the report of an earlier run. Without this line, `save` would move it into a subfolder.
                (folder / STEM / "report.json").unlink(missing_ok=True)
                merged.save(folder / STEM)
            else:
                # Save other seeds only as JSON, because pages show the report of the first seed.
                write_text(folder / STEM / f"report-{seed}.json", merged.to_json())
        write_text(folder / f"{STEM}.json", json.dumps(list(self.lines.values()), indent=1) + "\n")


def collect(root: Path, budget: Budget) -> Results:
    """Collect the results in the folders of the jobs.

    Args:
        root: folder of the study.
        budget: amounts of the study.
    """
    results = Results()
    for seed in range(budget.seeds):
        folders = SeedFolders(root, seed)
        for name in (*study.rows(budget), study.BEST):
            if seed == 0 or name in study.COMPARED:
                results.lines[name, seed] = _row_line(folders, name, budget)
                results.reports[name, seed] = folders.judged(name, budget.judging.main)
        if seed == 0:
            for line in [*_candidate_lines(folders), *_authors_lines(folders, budget.judging)]:
                results.lines[line["name"], 0] = line
    return results


def _row_line(folders: SeedFolders, name: str, budget: Budget) -> dict[str, Any]:
    """Return a row's line, with the accuracies and costs of its model."""
    counts = budget.judging
    judged = folders.result(study.judged_name(name, counts.main))
    facts = folders.result(study.trained_as(judged["model"], folders.seed))
    protocols = counts.protocols(folders.seed)
    rows = {protocol: folders.judged(name, protocol).headlines[judged["model"]] for protocol in protocols}
    line = {"name": name, "seed": folders.seed, "model": judged["model"], "clean": judged["clean"]}
    line |= {protocol: row.accuracy for protocol, row in rows.items()}
    if unreliable := [protocol for protocol, row in rows.items() if not row.reliable]:
        line["unreliable"] = unreliable
    line |= {key: facts[key] for key in ("parameters", "inference_gflop", "training_gflop")}
    if name == study.ARREST_EMA:
        line |= {key: facts[key] for key in ("weight", "angle")}
    return line


def _candidate_lines(folders: SeedFolders) -> list[dict[str, Any]]:
    """Return the lines of the candidates that were evaluated on held-out training images."""
    tried = {name: folders.result(study.tried_name(name)) for name in study.TRIED}
    return [
        {"name": study.tried_name(name), "seed": 0, "clean": result["clean"], "tried": result["tried"]["share"]}
        | ({} if result["tried"]["reliable"] else {"unreliable": ["tried"]})
        for name, result in tried.items()
    ]


def _authors_lines(folders: SeedFolders, counts: Judging) -> list[dict[str, Any]]:
    """Compare the attacks of the authors with the main protocol, on the same images.

    Args:
        folders: folders of the jobs.
        counts: number of images of each protocol.

    Returns:
        A line for each row of `AS_AUTHORS`. The line has the accuracies under the authors' attacks and under
        the main protocol, and their paired difference (main protocol minus authors' attacks) with its standard error.
    """
    lines: list[dict[str, Any]] = []
    for name in study.AS_AUTHORS:
        models = study.TRAINED_AS[name], study.BEHIND[study.TRAINED_AS[name]]
        whole, classifier = (first(folders.judged(it, counts.main), counts.authors).astype(float) for it in models)
        judged = folders.result(study.judged_name(name, study.AUTHORS))
        gained = whole - first(folders.judged(name, study.AUTHORS), counts.authors)
        lines.append(
            {
                "name": name,
                "seed": folders.seed,
                "clean": judged["clean"],
                "authors": judged[study.AUTHORS]["share"],
                "whole": whole.mean(),
                "classifier": classifier.mean(),
                "reliable": judged[study.AUTHORS]["reliable"],
                "gained": gained.mean(),
                "gained_error": gained.std() / len(gained) ** 0.5,
            }
        )
    return lines


def first(report: Report, count: int) -> np.ndarray:
    """Return, for each of the first images, whether it is classified correctly after all attacks, bool ``[count]``.

    Args:
        report: report on one model.
        count: number of images.
    """
    worst = next(row for row in report.rows if row.kind == study.WORST)
    return worst.robust[:count]

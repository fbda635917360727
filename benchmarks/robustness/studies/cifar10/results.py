"""Collect the numbers of the study on CIFAR-10 from the folders of its jobs, and save them with the results.

The folders of the jobs are large, because they contain models. When a table is written, some folders may no longer
exist, or may be on another machine. So the numbers are also saved in a results file. A table takes a number from a
folder, or else from the results file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast._files import write_text
from purify_fast.evaluation import Report, merge

from .. import ASKED, RESULT, folder_of, result_of
from . import study
from .study import Budget, Judging

#: The names of the results. The file STEM.json has the numbers, and the folder STEM has reports and pictures. GIVEN is
#: the name of the results on a given base.
STEM, GIVEN = "cifar10", "cifar10_given"
#: The file with the amounts of training and evaluation, in the folder of the reports.
BUDGET = "budget.json"


class OtherBudget(ValueError):
    """Raised if existing runs or results have another budget than the requested one. A table shows only one budget."""


@dataclass(frozen=True)
class SeedFolders:
    """The folders with the results of the finished jobs of a seed.

    Attributes:
        root: folder of the study.
        seed: seed of the trainings.
    """

    root: Path
    seed: int = 0

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the result of a job, or None if the job is not finished."""
        return self.needed(name) if (folder_of(self.root, name, self.seed) / RESULT).is_file() else None

    def needed(self, name: str) -> dict[str, Any]:
        """Return the result of a job, or raise FileNotFoundError if the job is not finished."""
        return result_of(self.root, name, self.seed)

    def judged(self, name: str, protocol: str) -> Report | None:
        """Return the report of a protocol on a row's model, or None if the job is not finished."""
        folder = folder_of(self.root, study.judged_name(name, protocol), self.seed)
        return Report.from_json((folder / "report.json").read_text()) if (folder / RESULT).is_file() else None

    def log(self, model: str) -> list[dict[str, Any]]:
        """Return the log of the training of a row's model, with a dictionary for each epoch.

        The log is empty for a classifier that was not trained in this study.
        """
        path = folder_of(self.root, study.trained_as(model, self.seed), self.seed) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def hours(self, model: str, batch_size: int) -> float:
        """Return the hours of a model's training, computed from the speeds in its log.

        The wall time of a process would be wrong, because an interrupted training ran in several processes. The hours
        of the mixture are the sum of those of the two classifiers.

        Args:
            model: name of the model's row.
            batch_size: number of images in a step.
        """
        seconds = 0.0
        for name in (study.STANDARD, study.BASE) if model == study.MIXED else (model,):
            before = 0
            for epoch in self.log(name):
                seconds += (epoch["step"] - before) * batch_size / epoch["images_per_second"]
                before = epoch["step"]
        return seconds / 3600


@dataclass(frozen=True)
class Results:
    """The numbers of the study so far.

    A line is a dictionary with the numbers of one row of the table.

    Attributes:
        lines: lines by the row's name and seed. There are further lines for the candidates on held-out images, and for
            the rows of `AS_AUTHORS`. Pages quote single numbers of all these lines.
        reports: reports of the main protocol, by the row's name and seed.
    """

    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    reports: dict[tuple[str, int], Report] = field(default_factory=dict)

    def line(self, name: str, seed: int = 0) -> dict[str, Any] | None:
        """Return a line, or None if it has no numbers yet."""
        return self.lines.get((name, seed))

    def known(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the existing lines of the given rows with the first seed."""
        return [self.lines[name, 0] for name in names if (name, 0) in self.lines]

    def judged(self, names: Sequence[str], seed: int = 0) -> list[str]:
        """Return those of the given rows that have a line."""
        return [name for name in names if (name, seed) in self.lines]

    def over(self, earlier: Results) -> Results:
        """Return these results, completed by lines and reports of earlier results.

        If both results have a line for a row, the line of these results is used as a whole. A message on stderr names
        the models that were trained again. The user must then remove the lines of models whose training started from
        one of these models.

        Args:
            earlier: earlier results of the same budget.
        """
        for name, seed in sorted(self.lines.keys() & earlier.lines.keys()):
            # The hours come from the log of the training, so other hours mean that the model was trained again.
            if self.lines[name, seed].get("hours") != earlier.lines[name, seed].get("hours"):
                print(f"{name}, seed {seed}: trained again; remove results that began with it", file=sys.stderr)
        return Results(earlier.lines | self.lines, earlier.reports | self.reports)

    def save(self, folder: Path, budget: Budget, stem: str = STEM) -> None:
        """Write the numbers, and the report on all models.

        Args:
            folder: folder of the results.
            budget: amounts of the study.
            stem: name of the results.
        """
        order = [*study.rows(budget), study.BEST, *map(study.tried_name, study.TRIED), *study.AS_AUTHORS]
        # Put other rows last, such as bases that were trained at other shares of eps.
        order += sorted({name for name, _ in self.lines} - set(order))
        lines = sorted(self.lines.values(), key=lambda line: (line["seed"], order.index(line["name"])))
        for seed in sorted({seed for _, seed in self.reports}):
            merged = merge(self.reports[name, seed] for name in order if (name, seed) in self.reports)
            if seed == 0:
                # Remove the report of an earlier run. Otherwise `save` would move this report into a subfolder,
                # although Git keeps it.
                (folder / stem / "report.json").unlink(missing_ok=True)
                merged.save(folder / stem)
            else:
                # Save other seeds only as JSON, because pages show the report of the first seed.
                write_text(folder / stem / _report_file(seed), merged.to_json())
        write_text(folder / f"{stem}.json", json.dumps(lines, indent=1) + "\n")
        write_text(folder / stem / BUDGET, json.dumps(_amounts(budget), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, budget: Budget, stem: str = STEM) -> Results:
        """Read the files that `save` has written. The results are empty if there are no files.

        Args:
            folder: folder of the results.
            budget: requested amounts of the study.
            stem: name of the results.

        Raises:
            OtherBudget: the files have another budget.
        """
        check_budget(folder, budget, stem)
        numbers = folder / f"{stem}.json"
        if not numbers.is_file():
            return cls()
        lines = {(line["name"], line["seed"]): line for line in json.loads(numbers.read_text())}
        reports = {}
        for seed in {seed for _, seed in lines}:
            path = folder / stem / _report_file(seed)
            if not path.is_file():
                continue
            merged = Report.from_json(path.read_text())
            models = {name: line["model"] for (name, of), line in lines.items() if of == seed and "model" in line}
            reports |= {(name, seed): _only(merged, model) for name, model in models.items() if model in merged.models}
        return cls(lines, reports)


def check_budget(folder: Path, budget: Budget, stem: str = STEM) -> None:
    """Check that results of a budget can be written into a folder.

    Args:
        folder: folder of the results.
        budget: requested amounts of the study.
        stem: name of the results.

    Raises:
        OtherBudget: the folder has results of another budget.
    """
    amounts = folder / stem / BUDGET
    there = json.loads(amounts.read_text()) if amounts.is_file() else None
    if (folder / f"{stem}.json").is_file() and there != _amounts(budget):
        raise OtherBudget(
            f"the folder {folder} has results of another budget (--full, --quick, --width), which would be lost: "
            "move these results away first"
        )


def _report_file(seed: int) -> str:
    """Return the file name of the report on all models of a seed."""
    return f"report-{seed}.json" if seed > 0 else "report.json"


def _amounts(budget: Budget) -> dict[str, Any]:
    """Return the amounts that must be equal for all results in a table. The numbers of seeds and shares may differ."""
    plain = {"training": vars(budget.training), "judging": asdict(budget.judging)}
    return json.loads(json.dumps(plain))


def _only(merged: Report, model: str) -> Report:
    """Return the part of a report on several models that concerns one model."""
    return Report(
        [row for row in merged.rows if row.model == model],
        about=merged.about,
        findings=[finding for finding in merged.findings if finding.model == model],
        curves={name: curves for name, curves in merged.curves.items() if name == model},
    )


def collect(root: Path, budget: Budget, names: Sequence[str]) -> Results:
    """Collect the results in the folders of the jobs.

    Args:
        root: folder of the study.
        budget: requested amounts of the study.
        names: names of the rows.

    Raises:
        OtherBudget: a job had another budget.
    """
    amounts = _amounts(budget)
    wanted = {"budget": amounts["training"], "judging": amounts["judging"]}
    for path in sorted(root.glob(f"*/{ASKED}")):
        asked = json.loads(path.read_text())
        if any(asked.get(key, amount) != amount for key, amount in wanted.items()):
            raise OtherBudget(
                f"the folder {path.parent} has another budget: give --full, --quick and --width as in the earlier run"
            )
    results, main = Results(), budget.judging.main
    for seed in range(budget.seeds):
        folders = SeedFolders(root, seed)
        for name in names:
            if (report := folders.judged(name, main)) is not None:
                results.lines[name, seed] = _row_line(folders, name, budget)
                results.reports[name, seed] = report
    for line in [*_candidate_lines(SeedFolders(root)), *_authors_lines(SeedFolders(root), budget.judging)]:
        results.lines[line["name"], 0] = line
    return results


def _row_line(folders: SeedFolders, name: str, budget: Budget) -> dict[str, Any]:
    """Return a row's line, with the accuracies and costs of its model."""
    counts = budget.judging
    judged = folders.needed(study.judged_name(name, counts.main))
    facts = folders.needed(study.trained_as(judged["model"], folders.seed))
    found = {protocol: folders.judged(name, protocol) for protocol in counts.protocols()}
    reports = {protocol: report for protocol, report in found.items() if report is not None}
    rows = {protocol: report.headlines[judged["model"]] for protocol, report in reports.items()}
    line = {"name": name, "seed": folders.seed, "model": judged["model"], "clean": judged["clean"]}
    line |= {protocol: row.accuracy for protocol, row in rows.items()}
    if unreliable := [protocol for protocol, row in rows.items() if not row.reliable]:
        line["unreliable"] = unreliable
    if "strong" in reports and counts.main != "strong":
        right = [first(reports[protocol], counts.strong).sum() for protocol in ("strong", counts.main)]
        line["strong_more"] = int(right[0] - right[1])
    if (official := folders.result(study.judged_name(name, "official"))) is not None:
        line["official"] = official["official"]["share"]
        line["beside_official"] = {
            protocol: float(first(reports[protocol], counts.official).mean())
            for protocol in counts.beside_official()
            if protocol in reports
        }
    line |= {key: facts[key] for key in ("parameters", "inference_gflop", "training_gflop")}
    line["hours"] = round(folders.hours(judged["model"], budget.training.batch_size), 3)
    if acts := (folders.log(judged["model"]) or [{}])[-1].get("acts_from_step"):
        line["acts_from_step"] = acts
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
        if result is not None
    ]


def _authors_lines(folders: SeedFolders, counts: Judging) -> list[dict[str, Any]]:
    """Compare the attacks of the authors with the main protocol, on the same images.

    Args:
        folders: folders of the jobs.
        counts: number of images of each protocol.

    Returns:
        A line for each evaluated row of `AS_AUTHORS`. The line has the accuracies under the authors' attacks and under
        the main protocol, and their paired difference (main protocol minus authors' attacks) with its standard error.
    """
    lines: list[dict[str, Any]] = []
    for name in study.AS_AUTHORS:
        models = study.TRAINED_AS[name], study.BEHIND[study.TRAINED_AS[name]]
        report, *others = folders.judged(name, study.AUTHORS), *(folders.judged(it, counts.main) for it in models)
        if report is None or None in others:
            continue
        judged = folders.needed(study.judged_name(name, study.AUTHORS))
        whole, classifier = (first(other, counts.authors).astype(float) for other in others if other is not None)
        gained = whole - first(report, counts.authors)
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

"""The demonstration: train defences on digits and attack them with adaptive attacks, in minutes on a CPU.

- CARSO in front of an adversarially trained classifier, and AToP in front of a standard classifier. Both are trained
  with the objective of their paper, and also through the whole pipeline, which the papers do not do.
- ARREST, which finetunes the standard classifier, and CARSO in front of ARREST's result.

A defence is compared with its base (the classifier without the defence) under the same attacks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from purify_fast.evaluation import Report, Row, merge
from purify_fast.speed import retain_freed_memory

from . import methods
from .methods import ARREST_MODELS, ATOP_MODELS, AUTOATTACK, CARSO_MODELS, METHODS, STANDARD, attack, model, train
from .setting import EPS, QUICK, Budget, Workspace, digits
from .workers import end_with_parent, end_workers, worker_pool

#: With fewer images than this, the standard error of an accuracy may be above five percentage points.
FEW = 100
__all__ = ["EPS", "QUICK", "Budget", "Workspace", "run"]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
)


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> dict[str, Report]:
    """Train and attack all models, and write ``report.md`` and a folder with an HTML page and JSON for each method.

    Parts that an earlier run has finished are not computed again.

    Args:
        out: folder of the results. A quick run writes to ``out`` with ``-quick`` appended.
        quick: whether to use tiny budgets. The numbers then mean nothing.
        seed: seed of all random draws.

    Returns:
        The report of each method, by the method's name.
    """
    workspace = Workspace(out.with_name(out.name + "-quick") if quick else out, QUICK if quick else Budget(), seed)
    budget, images = workspace.budget, digits()
    if quick:
        print("QUICK RUN: the models are hardly trained and hardly attacked. These numbers mean nothing.")
    print(f"digits: {len(images.x_train)} training images, {budget.images} attacked held-out images, L-inf eps {EPS}")
    _train_and_attack(workspace)
    reports: dict[str, Report] = {}
    # For each model: its clean accuracy, its lowest accuracy under attack, and the reasons to doubt the latter.
    summary: dict[str, tuple[Row, Row, str]] = {}
    sections = []
    for title in METHODS:
        reports[title], section = _report(workspace, title)
        sections.append(section)
        for name, lowest in reports[title].headlines.items():
            clean = next(row for row in reports[title].rows if (row.model, row.kind) == (name, "clean"))
            summary.setdefault(name, (clean, lowest, signs(reports[title], name)))
    values = {"quick": quick, "out": workspace.out.as_posix(), "summary": summary, "sections": sections}
    page = _TEMPLATES.get_template("report.md.jinja").render(percent=percent, **values)
    (workspace.out / "report.md").write_text(page)
    folders = " and ".join(map(_folder, METHODS))
    print(f"written: {workspace.out}/report.md; the folders {folders} beside it contain report.html and report.json")
    return reports


def _train_and_attack(workspace: Workspace) -> None:
    """Train and attack all models in two processes. The first trains CARSO's models, the second all other models."""
    quiet = replace(workspace, progress=False)
    others = (STANDARD, *ATOP_MODELS, *ARREST_MODELS)
    with worker_pool(2, _prepare) as pool:
        try:
            carso = [name for name in CARSO_MODELS if name != STANDARD]
            trained = {pool.submit(_train_all, workspace, carso): carso, pool.submit(_train_all, quiet, others): others}
            attacked = []
            for training in as_completed(trained):
                training.result()
                attacked += [pool.submit(attack, quiet, name) for name in trained[training]]
            for number, attacking in enumerate(as_completed(attacked), 1):
                attacking.result()
                print(f"attacked {number} of {len(attacked)} models", flush=True)
        except BaseException:
            # Do not wait for the current jobs of the workers, which may take minutes. The next run continues them.
            end_workers()
            raise


def _prepare() -> None:
    end_with_parent()
    # For batches of small images, a second thread would make the computation slower.
    torch.set_num_threads(1)
    retain_freed_memory()


def _train_all(workspace: Workspace, names: Sequence[str]) -> None:
    for name in names:
        train(workspace, name)


def _report(workspace: Workspace, title: str) -> tuple[Report, tuple[Any, ...]]:
    """Print and save the report of a method, and return the report and the method's section of ``report.md``."""
    models, beside = METHODS[title]
    # All results exist already, so the call of `attack` only reads them.
    read = replace(workspace, progress=False)
    reports = {name: attack(read, name, constant_step=not beside) for name in (*beside, *models)}
    report, place = merge(reports.values()), workspace.out / _folder(title)
    conclusions = sentences(title, reports, workspace.budget)
    print(f"\n{report.to_text()}\n\n{conclusions}")
    report.save(place, {name: model(workspace, name) for name in models})
    # Lower the level of the report's headings by two, below the heading of the method.
    tables = re.sub(r"^#+", lambda heading: f"##{heading[0]}", (place / "report.md").read_text(), flags=re.MULTILINE)
    return report, (title, place.name, conclusions, tables, sorted(path.name for path in place.glob("*.png")))


def signs(report: Report, name: str) -> str:
    """A text that names the signs of failed attacks on a model, or says that there are none.

    Args:
        report: report that contains the model's results and findings.
        name: name of the model.
    """
    lowest = report.headlines[name]
    if not lowest.reliable:
        return "**ALARM**: the attack lacked gradients"
    found = [finding for finding in report.findings if finding.model == name and finding.beside_headline]
    doubts = [finding.alarm for finding in found if finding.verdict == "unreliable"]
    if doubts:
        return f"**ALARM**: {', '.join(doubts)}"
    words = ["none"] if lowest.n >= FEW else [f"none on {lowest.n} images, which are few"]
    return "; ".join([*words, *(f"fails *{finding.alarm}*" for finding in found)])


def _folder(title: str) -> str:
    return f"report_{title.lower()}"


def sentences(title: str, reports: dict[str, Report], budget: Budget) -> str:
    """Sentences about the results of a method. ``reports`` are the reports of its models by their names."""
    functions = {"share": _share, "against": _against, "tradeoff": _tradeoff}
    template = _TEMPLATES.get_template("sentences.md.jinja")
    return template.render(title=title, reports=reports, budget=budget, m=methods, **functions)


def percent(row: Row) -> str:
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"


def _share(report: Report, row: str) -> str:
    return f"{percent(_row(report, row))} %"


def _row(report: Report, attack: str) -> Row:
    """The row of an attack on the report's first model, or else on the same model at z = 0."""
    return next(row for row in report.rows if row.attack == attack)


def _against(report: Report, other: Report, row: str, what: str) -> str:
    """Describe the difference of two models on the same images. It is significant above two standard errors."""
    paired = Report([_row(report, row)]).paired(Report([_row(other, row)]), row)
    points = f"{100 * paired.difference:+.1f} ± {100 * paired.standard_error:.1f} points"
    verdict = "significantly better" if paired.difference > 0 else "significantly worse"
    if abs(paired.difference) <= 2 * paired.standard_error:
        verdict = "not significant"
    return f"{points} against {what} (n = {paired.n}, paired), {verdict}"


def _tradeoff(report: Report) -> dict[str, float]:
    """The sum and the harmonic mean (NRR) of clean accuracy and accuracy under AutoAttack, on the same images."""
    auto = _row(report, AUTOATTACK)
    clean, robust = 100 * float(_row(report, "clean").robust[: auto.n].mean()), 100 * auto.accuracy
    return {"sum": clean + robust, "nrr": 2 * clean * robust / (clean + robust) if clean + robust else 0.0}

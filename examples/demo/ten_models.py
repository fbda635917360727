"""Ten models of CARSO, AToP and ARREST, trained in full on digits, and attacked with adaptive attacks.

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
from typing import Any

from purify_fast.evaluation import Report, Row, merge

from . import methods
from .methods import ARREST_MODELS, ATOP_MODELS, AUTOATTACK, CARSO_MODELS, METHODS, STANDARD, attack, model, train
from .setting import EPS, Budget, Workspace, digits
from .summary import percent, signs, template
from .workers import two_workers


def run(workspace: Workspace) -> dict[str, Report]:
    """Train and attack all models, and write ``report.md`` and a folder with an HTML page and JSON for each method.

    Args:
        workspace: folder and settings. Parts that an earlier run has finished are not computed again.

    Returns:
        The report of each method, by the method's name.
    """
    budget, images = workspace.budget, digits()
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
    values = {"out": workspace.out.as_posix(), "summary": summary, "sections": sections}
    page = template("ten_models.md.jinja").render(percent=percent, **values)
    (workspace.out / "report.md").write_text(page)
    folders = " and ".join(map(_folder, METHODS))
    print(f"written: {workspace.out}/report.md; the folders {folders} beside it contain report.html and report.json")
    return reports


def _train_and_attack(workspace: Workspace) -> None:
    """Train and attack all models in two processes. The first trains CARSO's models, the second all other models."""
    quiet = replace(workspace, progress=False)
    others = (STANDARD, *ATOP_MODELS, *ARREST_MODELS)
    with two_workers() as pool:
        carso = [name for name in CARSO_MODELS if name != STANDARD]
        trained = {pool.submit(_train_all, workspace, carso): carso, pool.submit(_train_all, quiet, others): others}
        attacked = []
        for training in as_completed(trained):
            training.result()
            attacked += [pool.submit(attack, quiet, name) for name in trained[training]]
        for number, attacking in enumerate(as_completed(attacked), 1):
            attacking.result()
            print(f"attacked {number} of {len(attacked)} models", flush=True)


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
    return report, (title, conclusions, tables)


def _folder(title: str) -> str:
    return f"report_{title.lower()}"


def sentences(title: str, reports: dict[str, Report], budget: Budget) -> str:
    """Sentences about the results of a method. ``reports`` are the reports of its models by their names."""
    functions = {"share": _share, "against": _against, "tradeoff": _tradeoff}
    page = template("sentences.md.jinja")
    return page.render(title=title, reports=reports, budget=budget, m=methods, **functions)


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

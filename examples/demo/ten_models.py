"""Ten models of CARSO, AToP and ARREST, trained in full on digits, and attacked with adaptive attacks.

- CARSO in front of an adversarially trained classifier, and AToP in front of a standard classifier. Both are trained
  with the objective of their paper, and also through the whole pipeline, which the papers do not do.
- ARREST, which finetunes the standard classifier, and CARSO in front of ARREST's result.

A defence is compared with its base (the classifier without the defence) under the same attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace

from purify_fast.evaluation import Report, Row

from . import methods
from .methods import (
    ARREST_MODELS,
    ATOP_MODELS,
    AUTOATTACK,
    CARSO_MODELS,
    FOLDERS,
    METHODS,
    STANDARD,
    attack,
    model,
    train,
)
from .setting import EPS, Budget, Workspace, digits
from .summary import percent, side_by_side, signs, template
from .workers import two_workers


def run(workspace: Workspace) -> dict[str, list[Report]]:
    """Train and attack all models, and write ``report.md``, and for each model a page and JSON in its folder.

    Args:
        workspace: folder and settings. Parts that an earlier run has finished are not computed again.

    Returns:
        The reports on the models of each method, by the method's name.
    """
    budget, images = workspace.budget, digits()
    print(f"digits: {len(images.x_train)} training images, {budget.images} attacked held-out images, L-inf eps {EPS}")
    _train_and_attack(workspace)
    reports: dict[str, list[Report]] = {}
    # For each model: its clean accuracy, its lowest accuracy under attack, and the reasons to doubt the latter.
    summary: dict[str, tuple[Row, Row, str]] = {}
    sections = []
    for title in METHODS:
        reports[title], section = _report(workspace, title)
        sections.append(section)
        for report in reports[title]:
            summary.setdefault(report.model, (report.row("clean"), report.headline, signs(report)))
    values = {"out": workspace.out.as_posix(), "summary": summary, "sections": sections}
    page = template("ten_models.md.jinja").render(percent=percent, **values)
    (workspace.out / "report.md").write_text(page)
    print(f"written: {workspace.out}/report.md; the folders beside it contain report/report.html for each model")
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


def _report(workspace: Workspace, title: str) -> tuple[list[Report], tuple[str, str, str]]:
    """Print and save the reports of a method, and return them and the method's section of ``report.md``."""
    models, beside = METHODS[title]
    # All results exist already, so the call of `attack` only reads them.
    read = replace(workspace, progress=False)
    reports = {name: attack(read, name, constant_step=not beside) for name in (*beside, *models)}
    for name in models:
        whole, *zero = reports[name]
        whole.save(workspace.out / FOLDERS[name] / "report", model(workspace, name))
        for report in zero:
            report.save(workspace.out / FOLDERS[name] / "report_zero")
    together = [report for each in reports.values() for report in each]
    conclusions, table = sentences(title, reports, workspace.budget), side_by_side(together)
    print(f"\n{table}\n\n{conclusions}")
    return together, (title, conclusions, table)


def sentences(title: str, reports: dict[str, list[Report]], budget: Budget) -> str:
    """Sentences about the results of a method. ``reports`` are the reports on its models by the models' names."""
    functions = {"row": _row, "share": _share, "against": _against, "tradeoff": _tradeoff}
    page = template("sentences.md.jinja")
    return page.render(title=title, reports=reports, budget=budget, m=methods, **functions)


def _share(reports: list[Report], row: str) -> str:
    return f"{percent(_row(reports, row))} %"


def _row(reports: list[Report], attack: str) -> Row:
    """The row of an attack on a model, or else on the same model at z = 0, which has the second report."""
    return next(row for report in reports for row in report.rows if row.attack == attack)


def _against(reports: list[Report], others: list[Report], row: str, what: str) -> str:
    """Describe the difference of two models on the same images. It is significant above two standard errors."""
    paired = Report([_row(reports, row)]).paired(Report([_row(others, row)]), row)
    points = f"{100 * paired.difference:+.1f} ± {100 * paired.standard_error:.1f} points"
    verdict = "significantly better" if paired.difference > 0 else "significantly worse"
    if abs(paired.difference) <= 2 * paired.standard_error:
        verdict = "not significant"
    return f"{points} against {what} (n = {paired.n}, paired), {verdict}"


def _tradeoff(reports: list[Report]) -> dict[str, float]:
    """The sum and the harmonic mean (NRR) of clean accuracy and accuracy under AutoAttack, on the same images."""
    auto = _row(reports, AUTOATTACK)
    clean, robust = 100 * float(_row(reports, "clean").robust[: auto.n].mean()), 100 * auto.accuracy
    return {"sum": clean + robust, "nrr": 2 * clean * robust / (clean + robust) if clean + robust else 0.0}

"""Make the tables and pictures of the study on CIFAR-10.

A row of a table is a model, and a line is the dictionary with the numbers of a row. Models are compared by the main
protocol, which is `Judging.main`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...tradeoff import Tradeoff, plot_tradeoff
from .. import write_page
from . import study
from .results import STEM, Results, collect
from .study import Budget, Judging


def _error(share: float, images: int) -> float:
    """Return the binomial standard error of a share, in percentage points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def percent(share: float, images: int) -> str:
    """Return a share in percent, with its binomial standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


def differences(results: Results, counts: Judging, seed: int) -> list[str]:
    """Return a list item for each pair in `PAIRS`, with the paired difference of the models under the main protocol.

    Args:
        results: results of the study.
        counts: number of images of each protocol.
        seed: seed of the trainings.
    """
    reports = {name: report for (name, of), report in results.reports.items() if of == seed}
    return [
        f"- `{name}` minus `{other}`, under `{counts.main}`: {reports[name].paired(reports[other])}."
        for name, other in study.PAIRS
        if name in reports and other in reports
    ]


def write(root: Path, folder: Path, budget: Budget) -> Path:
    """Write the page of the study, its numbers, reports and pictures into ``folder``.

    Args:
        root: folder of the study.
        folder: folder of the results.
        budget: amounts of the study.
    """
    results = collect(root, budget)
    results.save(folder)
    names = (*study.rows(budget), study.BEST)
    plot({name: results.lines[name, 0] for name in names}, budget, folder / STEM / "tradeoff.png")
    return write_table(folder, results, budget)


def write_table(folder: Path, results: Results, budget: Budget) -> Path:
    """Write the page of the study.

    Args:
        folder: folder of the page.
        results: results of the study.
        budget: amounts of the study.
    """
    given = {"results": results, "study": study, "training": budget.training, "counts": budget.judging}
    return write_page(folder, STEM, (percent, differences, Tradeoff), budget=budget, **given)


def plot(lines: dict[str, dict[str, Any]], budget: Budget, path: Path) -> None:
    """Draw robust accuracy against clean accuracy, with a curve of the bases that were trained at shares of eps.

    Args:
        lines: numbers of each model, by the name of its row.
        budget: amounts of the study.
        path: path of the PNG file.
    """
    counts = budget.judging
    points = {}
    for name, line in lines.items():
        clean, robust = line["clean"], line[counts.main]
        errors = _error(clean, counts.clean), _error(robust, getattr(counts, counts.main))
        points[name] = (100 * clean, 100 * robust, *errors)
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names):
        # A curve can have only one point at each clean accuracy. Use the point with the highest robust accuracy.
        curve[clean] = max(robust, curve.get(clean, 0.0))
    # The generator is only a stage of other models; the base without moving average would cover that of the base.
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    line, title = sorted(curve.items()), "CIFAR-10, L-inf 8/255"
    plot_tradeoff(path, shown, line, reference_name="trained at shares of eps", title=title)

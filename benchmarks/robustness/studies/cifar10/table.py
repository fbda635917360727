"""Make the tables and pictures of the study on CIFAR-10, with all models that have been evaluated so far.

A row of a table is a model, and a line is the dictionary with the numbers of a row. Models are compared by the main
protocol, which is `Judging.main`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purify_fast.evaluation import Tradeoff, plot_tradeoff

from .. import write_page
from . import study
from .results import GIVEN, STEM, Results, collect
from .study import Budget, Judging


class NothingJudged(ValueError):
    """Raised if a table is requested, but no model has been evaluated yet."""


def _error(share: float, images: int) -> float:
    """Return the binomial standard error of a share, in percentage points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def percent(share: float, images: int) -> str:
    """Return a share in percent, with its binomial standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


def protocols_of(results: Results, names: Sequence[str], seed: int, counts: Judging) -> dict[str, int]:
    """Return the protocols that have evaluated at least one of the rows, with their numbers of images."""
    lines = [results.lines[name, seed] for name in names]
    return {name: count for name, count in counts.protocols().items() if any(name in line for line in lines)}


def differences(
    results: Results,
    counts: Judging,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] = study.PAIRS,
    shared: Sequence[str] = (),
) -> list[str]:
    """Return a list item for each pair of evaluated models, with their paired difference under the main protocol.

    Args:
        results: results of the study.
        counts: number of images of each protocol.
        seed: seed of the trainings.
        pairs: pairs of names of rows.
        shared: names of the rows that the other seeds share with the first seed.
    """
    reports = {
        name: report for (name, of), report in results.reports.items() if of == seed or (of == 0 and name in shared)
    }
    return [
        f"- {name} minus {other}, `{counts.main}`: {reports[name].paired(reports[other])}."
        for name, other in pairs
        if name in reports and other in reports
    ]


def strong_beside_main(results: Results, names: Sequence[str], counts: Judging) -> str:
    """Return sentences that compare the protocol ``strong`` with the main protocol on the same images.

    The result is "" if ``strong`` has not evaluated any of the rows.

    Args:
        results: results of the study.
        names: names of rows with a line.
        counts: number of images of each protocol.
    """
    lines = {name: results.lines[name, 0] for name in names}
    more = {name: line["strong_more"] for name, line in lines.items() if "strong_more" in line}
    if not more:
        return ""
    others = [f"{change:+d} in the row `{name}`" for name, change in more.items() if change]
    text = f"`strong` attacks the first {counts.strong:,} test images. In {len(more) - len(others)} of {len(more)} "
    text += f"rows, `strong` and `{counts.main}` leave equally many of these {counts.strong:,} images correctly "
    text += "classified."
    rest = f" In the other rows, `strong` leaves more (+) or fewer (-) of them: {'; '.join(others)}."
    return text + (rest if others else "")


def not_judged(results: Results, budget: Budget, elsewhere: Sequence[str]) -> list[str]:
    """Return a sentence for each seed whose models are not all evaluated.

    Args:
        results: results of the study.
        budget: amounts of the study.
        elsewhere: rows that another page shows. Such rows are not called missing here.
    """
    sentences = []
    for seed in range(budget.seeds):
        wanted = study.COMPARED if seed else [*study.rows(budget), study.BEST]
        missing = [name for name in wanted if (name, seed) not in results.lines and name not in elsewhere]
        if missing:
            sentences.append(f"Not judged yet, seed {seed}: {'; '.join(missing)}.")
    return sentences


def write(root: Path, folder: Path, budget: Budget, base: str | None = None) -> Path:
    """Write the page of the study, its numbers, reports and pictures into ``folder``, for all evaluated models.

    Earlier results of the same budget in ``folder`` are kept, except for rows that ``root`` has too. So parts of a
    study can run on several machines.

    Args:
        root: folder of the study.
        folder: folder of the results.
        budget: amounts of the study.
        base: name of a given base in the zoo. The rows on this base have a separate page. None writes the page of the
            whole study.

    Raises:
        NothingJudged: ``root`` has no evaluated model, or no row of the first seed has been evaluated.
        OtherBudget: ``root`` or ``folder`` has another budget.
    """
    stem, rows = (STEM, [*study.rows(budget), study.BEST]) if base is None else (GIVEN, study.ON_GIVEN)
    new = collect(root, budget, rows)
    results = new.over(Results.read(folder, budget, stem))
    names = results.judged(rows)
    if not new.lines or not names:
        raise NothingJudged(
            f"the folder {root} has no evaluated model: write the table after the first model has been evaluated"
        )
    results.save(folder, budget, stem)
    if base is not None:
        return write_tables(folder, stem, results, budget, base=base)
    plot({name: results.lines[name, 0] for name in names}, budget, folder / stem / "tradeoff.png")
    given = {name for name, _ in Results.read(folder, budget, GIVEN).lines}
    return write_tables(folder, stem, results, budget, given=given)


def write_tables(folder: Path, name: str, results: Results, budget: Budget, **more: Any) -> Path:
    """Write the page of the study, or the page of the rows whose base is a given model of the zoo.

    Args:
        folder: folder of the page.
        name: name of the page.
        results: results of the study.
        budget: amounts of the study.
        more: further variables of the template: ``given``, the names of the rows with a separate table, or ``base``,
            the name of the given base.
    """
    functions = (percent, protocols_of, differences, strong_beside_main, not_judged, Tradeoff)
    given = {"results": results, "study": study, "training": budget.training, "counts": budget.judging}
    return write_page(folder, name, functions, budget=budget, **given, **more)


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
        errors = _error(clean, counts.clean), _error(robust, counts.protocols()[counts.main])
        points[name] = (100 * clean, 100 * robust, *errors)
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names if name in points):
        # A curve can have only one point at a clean accuracy. Use the point with the highest robust accuracy.
        curve[clean] = max(robust, curve.get(clean, 0.0))
    line = sorted(curve.items()) if len(curve) > 1 else None
    # Leave out the generator, because it is only a stage of other models. Leave out the base without moving average,
    # because its point would cover that of the base.
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    plot_tradeoff(path, shown, line, reference_name="trained at shares of eps", title="CIFAR-10, L-inf 8/255")

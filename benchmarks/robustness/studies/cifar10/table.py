"""The tables and pictures of the study on CIFAR-10, with all models judged so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purify_fast.evaluation import Tradeoff, plot_tradeoff

from .... import style
from ....options import Unfit
from .. import write_page
from . import study
from .results import GIVEN, STEM, Results, collect
from .study import Budget, Judging


class NothingJudged(Unfit):
    """A table was requested, and it has no row yet."""


def _error(share: float, images: int) -> float:
    """The binomial standard error of a share, in percent points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def percent(share: float, images: int) -> str:
    """A share in percent, with its standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


def protocols_of(results: Results, names: Sequence[str], seed: int, counts: Judging) -> dict[str, int]:
    """The protocols that have judged any of the rows, with their numbers of images."""
    lines = [results.lines[name, seed] for name in names]
    return {name: count for name, count in counts.protocols().items() if any(name in line for line in lines)}


def differences(
    results: Results,
    counts: Judging,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] = study.PAIRS,
    shared: Sequence[str] = (),
) -> list[str]:
    """A line for each pair of judged models: their difference, image by image.

    Args:
        results: results of the study.
        counts: number of images of each protocol.
        seed: seed of the trainings.
        pairs: names of rows.
        shared: rows of the first seed that models of all seeds share.
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
    """The rows in which ``strong`` leaves another number than the main protocol of its images; "" if none.

    Args:
        results: results of the study.
        names: names of rows whose models are judged.
        counts: number of images of each protocol.
    """
    lines = {name: results.lines[name, 0] for name in names}
    more = {name: line["strong_more"] for name, line in lines.items() if "strong_more" in line}
    if not more:
        return ""
    others = [f"{name} {change:+d}" for name, change in more.items() if change]
    text = f"On the same {counts.strong:,} images, as many are right after `strong` as after `{counts.main}` in "
    text += f"{len(more) - len(others)} of {len(more)} rows."
    return text + (f" The differences in the other rows: {'; '.join(others)}." if others else "")


def not_judged(results: Results, budget: Budget, elsewhere: Sequence[str]) -> list[str]:
    """A sentence for each unfinished part of the study.

    Args:
        results: results of the study.
        budget: amounts of everything.
        elsewhere: rows in the table of a given base, which do not count as missing here.
    """
    counts = budget.judging
    wanted = [name for name in (*study.rows(budget), study.BEST) if name not in elsewhere]
    official = [name for name in study.OFFICIAL if counts.official > 0 and "official" not in (results.line(name) or {})]
    judged = results.judged(wanted)
    strong = [name for name in judged if counts.strong > 0 and "strong" not in results.lines[name, 0]]
    missing = {
        "Not judged yet": [name for name in wanted if name not in judged],
        "Not attacked by `strong` yet": strong,
        "Candidates that are not judged yet": [
            name for name in study.TRIED if results.line(study.tried_name(name)) is None
        ],
        "Not attacked by the official AutoAttack yet": official,
    }
    for seed in range(1, budget.seeds):
        there = results.judged(study.COMPARED, seed)
        missing[f"With seed {seed} not judged yet"] = [
            name for name in study.COMPARED if name not in there and name not in elsewhere
        ]
    return [f"{what}: {'; '.join(names)}." for what, names in missing.items() if names]


def reached_by(line: dict[str, Any], counts: Judging) -> Point:
    """The place of a model in the pictures.

    Args:
        line: line of the model.
        counts: number of images of each protocol.
    """
    clean, robust = line["clean"], line[counts.main]
    return 100 * clean, 100 * robust, _error(clean, counts.clean), _error(robust, counts.protocols()[counts.main])


def write(root: Path, folder: Path, budget: Budget, base: str | None = None) -> Path:
    """Write ``cifar10.md``, its numbers, reports and pictures in ``folder``, for all judged models.

    Earlier results of the same budget in ``folder`` stay unless ``root`` replaces them: a study can be done in parts,
    on several machines.

    Args:
        root: folder of the study.
        folder: folder of the results.
        budget: amounts of everything.
        base: name in the zoo of a given base, whose rows have a page of their own; None for the whole study.

    Raises:
        NothingJudged: ``root`` holds no judged model, or there is no row of the first seed.
        OtherBudget: ``root`` or ``folder`` has another budget.
    """
    stem, rows = (STEM, [*study.rows(budget), study.BEST]) if base is None else (GIVEN, study.ON_GIVEN)
    new = collect(root, budget, rows)
    results = new.over(Results.read(folder, budget, stem))
    names = results.judged(rows)
    if not new.lines or not names:
        raise NothingJudged(f"{root} holds no model that is judged yet: write the table after the first judged model")
    results.save(folder, budget, stem)
    if base is not None:
        return write_tables(folder, stem, results, budget, base=base)
    reached = {name: reached_by(results.lines[name, 0], budget.judging) for name in names}
    plot(reached, budget, folder / stem / "tradeoff.png")
    picture(reached, folder / stem / "photos.png")
    given = {name for name, _ in Results.read(folder, budget, GIVEN).lines}
    return write_tables(folder, stem, results, budget, given=given)


def write_tables(folder: Path, name: str, results: Results, budget: Budget, **more: Any) -> Path:
    """Write the page of the study, or of its rows on a given base, from its numbers.

    Args:
        folder: folder of the page.
        name: name of the page.
        results: results of the study.
        budget: amounts of everything.
        more: ``given``, the names of the rows with a separate table, or ``base``, the name of the given base.
    """
    functions = (percent, protocols_of, differences, strong_beside_main, not_judged, Tradeoff)
    given = {"results": results, "study": study, "training": budget.training, "counts": budget.judging}
    return write_page(folder, name, functions, budget=budget, **given, **more)


#: Clean and robust accuracy in percent, and the standard error of each.
Point = tuple[float, float, float, float]


def plot(points: dict[str, Point], budget: Budget, path: Path) -> None:
    """Draw clean against robust accuracy, with the curve of bases trained at shares of eps.

    Args:
        points: place of each model, by row.
        budget: amounts of everything.
        path: file of the picture.
    """
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names if name in points):
        # A curve has one value at each clean accuracy, so keep the highest robust accuracy there.
        curve[clean] = max(robust, curve.get(clean, 0.0))
    line = sorted(curve.items()) if len(curve) > 1 else None
    # Leave out the generator, which is only a stage of other models, and the base without moving average, which would
    # lie on the base.
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    plot_tradeoff(path, shown, line, reference_name="trained at shares of eps", title="CIFAR-10, L-inf 8/255")


#: The bars of the picture for readers who skip tables: the label and the row of each bar.
BARS = (
    ("A: a network trained on clean photos", study.STANDARD),
    ("B: the same, trained on attacked photos", study.BASE),
    ("ARREST, from A", study.ARREST_EMA),
    ("CARSO before B, paper's objective", study.CARSO),
    ("CARSO before B, trained through the pipeline", study.CARSO_PIPELINE),
    ("AToP before B, trained through the pipeline", study.ATOP_PIPELINE),
)


def picture(points: dict[str, Point], path: Path) -> bool:
    """Draw how many of a hundred photos each model still recognizes; False without matplotlib.

    Args:
        points: place of each model, by row.
        path: file of the picture.
    """
    bars = [(title, name) for title, name in BARS if name in points]
    figure = style.new_figure(figsize=(9, 1 + 0.52 * len(bars)))
    if figure is None:
        return False
    axis = figure.add_subplot()
    for line, (title, name) in enumerate(bars):
        clean, robust = points[name][:2]
        axis.barh(line, clean, height=0.62, color="#e3e6ea")
        axis.barh(line, robust, height=0.62, color=style.OURS)
        axis.text(101, line, f"{robust:.0f} of {clean:.0f}", va="center", color=style.INK)
        axis.text(-1, line, title, va="center", ha="right", color=style.INK, fontsize=9.5)
    if study.BASE in points:
        # Draw a line at the base, which every defence has to beat.
        axis.axvline(points[study.BASE][1], color=style.INK, linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), yticks=[], xticks=range(0, 101, 20))
    text = "of 100 photos (CIFAR-10, L-inf 8/255): gray, recognized; green, still recognized when attacked"
    axis.set_xlabel(text, fontsize=9.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    style.save(figure, path)
    return True

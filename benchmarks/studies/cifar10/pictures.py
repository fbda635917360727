"""The pictures of the study on CIFAR-10: a plot of all models, and bars for those who do not read tables."""

from __future__ import annotations

from pathlib import Path

from purify_fast.evaluation import plot_tradeoff

from ... import style
from . import study
from .budget import Budget

#: Clean and robust accuracy in percent, and the standard error of each.
Point = tuple[float, float, float, float]


def plot(points: dict[str, Point], budget: Budget, path: Path) -> None:
    """Clean against robust accuracy, with the curve of bases that were trained at shares of eps.

    Args:
        points: of the models, by row.
        budget: how much of everything there is.
        path: of the picture.
    """
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names if name in points):
        # a curve has one value at each place: the higher one counts
        curve[clean] = max(robust, curve.get(clean, 0.0))
    line = sorted(curve.items()) if len(curve) > 1 else None
    # the first is a stage of others, the second stands where the base does
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    plot_tradeoff(path, shown, line, reference_name="trained at shares of eps", title="CIFAR-10, L-inf 8/255")


#: Bars of the picture for those who do not read tables: what each is, and its row.
BARS = (
    ("A: a network trained on clean photos", study.STANDARD),
    ("B: the same, trained on attacked photos", study.BASE),
    ("ARREST, from A", study.ARREST_EMA),
    ("CARSO before B, paper's objective", study.CARSO),
    ("CARSO before B, trained through the pipeline", study.CARSO_PIPELINE),
    ("AToP before B, trained through the pipeline", study.ATOP_PIPELINE),
)


def picture(points: dict[str, Point], path: Path) -> bool:
    """How many of a hundred photos each model still recognizes; False without matplotlib.

    Args:
        points: of the models, by row.
        path: of the picture.
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
        # what every defence has to beat
        axis.axvline(points[study.BASE][1], color=style.INK, linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), yticks=[], xticks=range(0, 101, 20))
    text = "of 100 photos (CIFAR-10, L-inf 8/255): gray, recognized; green, still recognized when attacked"
    axis.set_xlabel(text, fontsize=9.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    style.save(figure, path)
    return True

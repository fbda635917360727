"""The trade-off between standard and robust accuracy of models as a picture, by matplotlib and adjustText."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast._files import atomic

_COLORS = ["#1f4e79", "#2e86ab", "#f2a541", "#6a994e", "#8d6a9f", "#7f7f7f"]
_GRAY = "#8a8a8a"
#: The largest number of iterations that move the names in a picture away from each other. All iterations are made if a
#: name finds no free place; for twenty models this takes two seconds.
ROUNDS = 300


def plot_tradeoff(
    path: Path,
    points: Mapping[str, tuple[float, float, float, float]],
    reference: Sequence[tuple[float, float]],
    *,
    reference_name: str,
    title: str,
) -> None:
    """Draw robust over standard accuracy: named models, lines of equal SUM, and a reference curve.

    Args:
        path: path of the PNG, which is written atomically.
        points: for each model the standard accuracy, the robust accuracy, and the standard errors of both, in percent.
        reference: points (standard %, robust %), sorted, which are drawn with straight lines between them.
        reference_name: the curve's name in the legend.
        title: title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = np.array(reference).reshape(-1, 2).T
    # The picture is larger if there are many names.
    side = max(1.0, len(points) / 8) ** 0.5
    # The figure is made without pyplot, so that the user's backend and open figures do not change.
    figure: Any = Figure(figsize=(7.2 * side, 5.0 * side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at = np.array([values[:2] for values in points.values()])
    errors = np.array([values[2:] for values in points.values()])
    everything = np.concatenate([at - errors, at + errors, np.stack([x, y], 1)])
    low, high = everything.min(0), everything.max(0)
    room = np.maximum(0.14 * (high - low), 2.0)
    # The axes extend beyond 0 and 100 only by the size of the marks.
    low, high = np.maximum(low - room, -0.4 * room), np.minimum(high + room, 100 + 0.4 * room)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    across, up = np.linspace(low, high, 100).T
    equal_sums = axes.contour(across, up, across + up[:, None], colors="#e4e4e4", linewidths=0.8, zorder=1)
    axes.clabel(equal_sums, fmt="SUM %g", fontsize=7, colors="#9a9a9a")
    _draw_reference(axes, x, y, reference_name)
    axes.set_xlabel("standard accuracy, %")
    axes.set_ylabel("robust accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=9)
    axes.set_title(title, fontsize=11, pad=18)
    _draw_points(axes, points)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw_reference(axes: Any, x: np.ndarray, y: np.ndarray, name: str) -> None:
    """Draw the reference curve with its points."""
    axes.plot(x, y, color=_GRAY, lw=1.6, zorder=2, label=name)
    axes.plot(x, y, "o", ms=4.5, color="white", mec=_GRAY, mew=1.4, zorder=2.5)
    axes.legend(loc="lower left", frameon=False, fontsize=8)


def _draw_points(axes: Any, points: Mapping[str, tuple[float, float, float, float]]) -> None:
    """Draw each model's point and error bars, and write its name near the point, without overlap with other names."""
    from adjustText import adjust_text

    texts = []
    for (name, (x, y, x_error, y_error)), color in zip(points.items(), itertools.cycle(_COLORS), strict=False):
        style = {"ms": 7.5, "mec": "white", "mew": 0.9, "elinewidth": 1.1}
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=color, zorder=4, **style)
        texts.append(axes.text(x, y, name, fontsize=8.5, color=color, zorder=5, in_layout=False))
    # The figure is drawn once, so that the position of every point in pixels is known.
    axes.figure.canvas.draw()
    # A fixed number of iterations, unlike a time limit, always gives the same picture.
    adjust_text(
        texts,
        ax=axes,
        objects=[axes.get_legend()],
        iter_lim=ROUNDS,
        expand=(1.15, 1.35),
        force_text=(0.8, 1.0),
        force_explode=(0.2, 0.8),
        arrowprops={"arrowstyle": "-", "color": _GRAY, "lw": 0.6, "zorder": 2.8},
    )

"""The trade-off between standard and robust accuracy of models, as numbers and as a picture.

Pictures need matplotlib and adjustText, from the extra ``demo``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast._files import atomic

_COLORS = ["#1f4e79", "#2e86ab", "#f2a541", "#6a994e", "#8d6a9f", "#7f7f7f"]
_GRAY = "#8a8a8a"
#: The largest number of iterations that move the names in a picture away from each other. All iterations are made if a
#: name finds no free place; for twenty models this takes two seconds.
ROUNDS = 300


@dataclass(frozen=True)
class Tradeoff:
    """A model's accuracies on clean and on attacked images, in percent.

    An object unpacks into both numbers, so it can be a point for `plot_tradeoff`.

    Args:
        standard: accuracy on clean images, 0 to 100.
        robust: accuracy on attacked images, 0 to 100.

    Raises:
        ValueError: an accuracy is not within 0 to 100, or is not finite.
    """

    standard: float
    robust: float

    def __post_init__(self) -> None:
        _check_percent("standard", self.standard)
        _check_percent("robust", self.robust)

    def __iter__(self) -> Iterator[float]:
        return iter((self.standard, self.robust))

    @property
    def sum(self) -> float:
        """The sum of standard and robust accuracy, called SUM, in points, 0 to 200."""
        return self.standard + self.robust

    @property
    def mean(self) -> float:
        """The mean of standard and robust accuracy, in percent."""
        return self.sum / 2

    @property
    def nrr(self) -> float:
        """The natural-robust ratio in percent, which is the harmonic mean 2 s r / (s + r); 0 if both are 0."""
        return 2 * self.standard * self.robust / self.sum if self.sum > 0 else 0.0


def _check_percent(name: str, value: float) -> float:
    # The comparison is negated so that NaN is refused too.
    if not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentage from 0 to 100, got {value!r}")
    return float(value)


def check_pair(name: str, values: Iterable[float]) -> tuple[float, float]:
    """Return the pair (standard, robust) as floats; a ValueError with ``name`` refuses other values."""
    try:
        standard, robust = values
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (standard %, robust %), got {values!r}") from None
    return _check_percent(f"{name}: standard accuracy", standard), _check_percent(f"{name}: robust accuracy", robust)


def check_curve(name: str, points: Iterable[Iterable[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard and robust accuracies of a curve, sorted by standard accuracy; errors begin with ``name``."""
    pairs = sorted(check_pair(f"{name}[{i}]", point) for i, point in enumerate(points))
    if len(pairs) < 2:
        raise ValueError(f"{name} must have at least 2 points (standard %, robust %), got {pairs!r}")
    x, y = np.array(pairs).T
    repeated = x[1:][np.diff(x) == 0]
    if len(repeated):
        raise ValueError(f"{name} must have distinct standard accuracies, got {repeated[0]} more than once")
    return x, y


def plot_tradeoff(
    path: str | Path,
    points: Mapping[str, Iterable[float]],
    reference: Iterable[Iterable[float]] | None = None,
    *,
    reference_name: str = "reference",
    title: str = "",
) -> bool:
    """Draw robust over standard accuracy: named models, lines of equal SUM, and a reference curve.

    Args:
        path: path of the PNG, which is written atomically.
        points: a mapping from names to (standard %, robust %), or to (standard %, robust %, standard error, standard
            error). Both standard errors are in points, and are drawn as error bars.
        reference: at least two pairs (standard %, robust %) in any order, with different standard accuracies. They are
            drawn with straight lines between them. None: no curve.
        reference_name: the curve's name in the legend.
        title: title of the picture.

    Returns:
        True if the picture was written; False, without a file, if matplotlib or adjustText is missing.

    Raises:
        ValueError: there are neither points nor a reference, accuracies are not within 0 to 100, standard errors are
            negative or infinite, or the reference is not allowed.
    """
    shown = {name: _with_errors(name, values) for name, values in points.items()}
    x, y = (np.empty(0), np.empty(0)) if reference is None else check_curve("reference", reference)
    if not shown and not len(x):
        raise ValueError(f"points must name at least one model if there is no reference, got {points!r}")
    try:
        import adjustText  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # The picture is larger if there are many names.
    side = max(1.0, len(shown) / 8) ** 0.5
    # The figure is made without pyplot, so that the user's backend and open figures do not change.
    figure: Any = Figure(figsize=(7.2 * side, 5.0 * side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at = np.array([values[:2] for values in shown.values()]).reshape(-1, 2)
    errors = np.array([values[2:] for values in shown.values()]).reshape(-1, 2)
    everything = np.concatenate([at - errors, at + errors, np.stack([x, y], 1)])
    low, high = everything.min(0), everything.max(0)
    room = np.maximum(0.14 * (high - low), 2.0)
    # The axes extend beyond 0 and 100 only by the size of the marks.
    low, high = np.maximum(low - room, -0.4 * room), np.minimum(high + room, 100 + 0.4 * room)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    across, up = np.linspace(low, high, 100).T
    equal_sums = axes.contour(across, up, across + up[:, None], colors="#e4e4e4", linewidths=0.8, zorder=1)
    axes.clabel(equal_sums, fmt="SUM %g", fontsize=7, colors="#9a9a9a")
    if len(x):
        _draw_reference(axes, x, y, reference_name)
    axes.set_xlabel("standard accuracy, %")
    axes.set_ylabel("robust accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=9)
    if title:
        axes.set_title(title, fontsize=11, pad=18)
    _draw_points(axes, shown)
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)
    return True


def _with_errors(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """The values (standard, robust, standard error, standard error); errors that are not given are 0."""
    what, given = f"points[{name!r}]", tuple(values)
    if len(given) not in (2, 4):
        raise ValueError(
            f"{what} must be (standard %, robust %), or (standard %, robust %, standard error, standard error), "
            f"got {given!r}"
        )
    errors = given[2:] or (0.0, 0.0)
    if not all(0 <= error < math.inf for error in errors):
        raise ValueError(f"{what}: standard errors must be finite and not negative, got {errors!r}")
    return *check_pair(what, given[:2]), *(float(error) for error in errors)


def _draw_reference(axes: Any, x: np.ndarray, y: np.ndarray, name: str) -> None:
    """Draw the reference curve with its points."""
    axes.plot(x, y, color=_GRAY, lw=1.6, zorder=2, label=name)
    axes.plot(x, y, "o", ms=4.5, color="white", mec=_GRAY, mew=1.4, zorder=2.5)
    axes.legend(loc="lower left", frameon=False, fontsize=8)


def _draw_points(axes: Any, shown: Mapping[str, tuple[float, ...]]) -> None:
    """Draw each model's point and error bars, and write its name near the point, without overlap with other names."""
    from adjustText import adjust_text

    if not shown:
        return
    texts = []
    for (name, (x, y, x_error, y_error)), color in zip(shown.items(), itertools.cycle(_COLORS), strict=False):
        style = {"ms": 7.5, "mec": "white", "mew": 0.9, "elinewidth": 1.1}
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=color, zorder=4, **style)
        texts.append(axes.text(x, y, name, fontsize=8.5, color=color, zorder=5, in_layout=False))
    # The figure is drawn once, so that the position of every point in pixels is known.
    axes.figure.canvas.draw()
    # A fixed number of iterations, unlike a time limit, always gives the same picture.
    legend = axes.get_legend()
    adjust_text(
        texts,
        ax=axes,
        objects=None if legend is None else [legend],
        iter_lim=ROUNDS,
        expand=(1.15, 1.35),
        force_text=(0.8, 1.0),
        force_explode=(0.2, 0.8),
        arrowprops={"arrowstyle": "-", "color": _GRAY, "lw": 0.6, "zorder": 2.8},
    )

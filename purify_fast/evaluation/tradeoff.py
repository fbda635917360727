"""Standard against robust accuracy as one number, of a single model or of curves, and as a picture.

`ar_bd` and `ar_point_dist` are this package's own. Like the "Accuracy Robustness Distance" (ARDist) of ARREST (Suzuki
et al., arXiv 2308.16454) they are inspired by the Bjontegaard delta of video coding, but they are not that measure: its
definition was not found, and numbers of the two must not be compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .plots import _COLORS, _save, pyplot


@dataclass(frozen=True)
class Tradeoff:
    """A model's accuracies in percent: ``standard`` on clean images, ``robust`` on attacked ones.

    Unpacks into the two, so that it can stand for a point of `ar_bd`, `ar_point_dist` and `plot_tradeoff`.

    Raises:
        ValueError: not within 0 to 100, or not finite.
    """

    standard: float
    robust: float

    def __post_init__(self) -> None:
        _percent("standard", self.standard)
        _percent("robust", self.robust)

    def __iter__(self) -> Iterator[float]:
        return iter((self.standard, self.robust))

    @property
    def sum(self) -> float:
        """SUM: standard + robust, in points, 0 to 200."""
        return self.standard + self.robust

    @property
    def mean(self) -> float:
        """SUM / 2, in percent."""
        return self.sum / 2

    @property
    def nrr(self) -> float:
        """Natural-robust ratio in percent: the harmonic mean 2 s r / (s + r); 0 where both are 0."""
        return 2 * self.standard * self.robust / self.sum if self.sum > 0 else 0.0


def ar_bd(reference: Iterable[Iterable[float]], test: Iterable[Iterable[float]]) -> float:
    """How much more robust a curve of models is than another at equal standard accuracy, on average.

    The Bjontegaard delta with linear axes: both curves, robust over standard accuracy, are interpolated by monotone
    cubics (pchip); the difference of their integrals over the standard accuracies both cover is divided by that
    interval's length. Ours; not the ARDist of ARREST, see this module.

    Args:
        reference, test: pairs (standard %, robust %) in any order, two at least, with distinct standard accuracies;
            models along one curve differ in a weight or a schedule. The number depends on the reference: state it.

    Returns:
        Points of robust accuracy, positive where ``test`` is better. NaN, with a warning, where no interval of
        standard accuracies is covered by both; a warning where less than 75 % of what either covers is.

    Raises:
        ValueError: too few points, repeated standard accuracies, or accuracies not within 0 to 100.
        ModuleNotFoundError: scipy is missing.

    Source: G. Bjontegaard, VCEG-M33 (2001); conventions of the Python package bjontegaard.
    """
    return _linear_delta(*_curve("reference", reference), *_curve("test", test))


def ar_point_dist(reference: Iterable[Iterable[float]], point: Iterable[float]) -> float:
    """Signed distance of one model from a reference curve of models.

    Euclidean, to the nearest point of the curve that interpolates the reference by monotone cubics (pchip), which ends
    at its first and last point: there is no extrapolation. Ours; not the ARDist of ARREST, see this module.

    Args:
        reference: pairs (standard %, robust %) as of `ar_bd`. The number depends on it: state it.
        point: (standard %, robust %).

    Returns:
        Points. Positive where the model is above the curve at its standard accuracy, negative where below. Outside
        the curve's standard accuracies it is positive unless the end on that side is at least as good in both: past
        the upper end always, below the lower end where the model is more robust than that end.

    Raises:
        ValueError: as for `ar_bd`, or ``point`` is not a pair within 0 to 100.
        ModuleNotFoundError: scipy is missing.
    """
    x, y = _curve("reference", reference)
    standard, robust = _pair("point", point)
    curve = _pchip(x, y)
    foot = _foot(curve, standard, robust)
    distance = math.hypot(standard - foot[0], robust - foot[1])
    if standard > x[-1]:
        better = True
    elif standard < x[0]:
        better = robust > y[0]
    else:
        better = robust >= float(curve(standard))
    return distance if better or distance == 0 else -distance


def plot_tradeoff(
    path: str | Path,
    points: Mapping[str, Iterable[float]],
    reference: Iterable[Iterable[float]] | None = None,
    *,
    reference_name: str = "reference",
    title: str = "",
) -> bool:
    """A picture of robust over standard accuracy: named models, lines of equal SUM, and the reference curve.

    Args:
        path: the PNG, which appears whole or not at all.
        points: from names to (standard %, robust %) or to (standard %, robust %, their two standard errors in points),
            which become error bars.
        reference: pairs (standard %, robust %) as of `ar_bd`, drawn with the curve of `ar_point_dist`.
        reference_name: the curve's, in the legend. title: above everything.

    Returns:
        False, without a file, if matplotlib is missing.

    Raises:
        ValueError: nothing to show, accuracies not within 0 to 100, negative or infinite standard errors, or a
            reference that `ar_bd` refuses.
        ModuleNotFoundError: there is a reference, and scipy is missing.
    """
    shown = {name: _with_errors(name, values) for name, values in points.items()}
    x, y = (np.empty(0), np.empty(0)) if reference is None else _curve("reference", reference)
    if not shown and not len(x):
        raise ValueError(f"points must name at least one model where there is no reference, got {points!r}")
    try:
        make = pyplot()
    except ModuleNotFoundError:
        return False
    figure = make(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    at = np.array([values[:2] for values in shown.values()]).reshape(-1, 2)
    bars = np.array([values[2:] for values in shown.values()]).reshape(-1, 2)
    everything = np.concatenate([at - bars, at + bars, np.stack([x, y], 1)])
    low, high = everything.min(0), everything.max(0)
    room = np.maximum(0.14 * (high - low), 2.0)
    # beyond 0 and 100 only what the marks need
    low, high = np.maximum(low - room, -0.4 * room), np.minimum(high + room, 100 + 0.4 * room)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _iso_sums(axes, low, high)
    traced = np.empty((0, 2))
    if len(x):
        along = np.linspace(x[0], x[-1], 400)
        traced = np.stack([along, _pchip(x, y)(along)], 1)
        axes.plot(*traced.T, color="#8a8a8a", lw=1.6, zorder=2)
        axes.plot(x, y, "o", ms=4.5, color="white", mec="#8a8a8a", mew=1.4, zorder=2.5)
        axes.plot([], [], "o-", color="#8a8a8a", lw=1.6, ms=4.5, mfc="white", mew=1.4, label=reference_name)
        axes.legend(loc="lower left", frameon=False, fontsize=8)
    for i, (center, error) in enumerate(zip(at, bars, strict=True)):
        color = _COLORS[i % len(_COLORS)]
        if error.any():
            xerr, yerr = (value or None for value in error)  # a bar of length 0 would still have caps
            axes.errorbar(*center, xerr=xerr, yerr=yerr, color=color, capsize=2.5, lw=1.1, zorder=3)
        axes.plot(*center, "o", ms=7.5, color=color, mec="white", mew=0.9, zorder=4)
    axes.set_xlabel("standard accuracy, %")
    axes.set_ylabel("robust accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=9)
    if title:
        axes.set_title(title, fontsize=11, pad=18)
    _name_points(figure, axes, list(shown), at, bars, traced)
    _save(figure, path)
    return True


def _percent(name: str, value: float) -> float:
    if not 0 <= value <= 100:  # NaN is neither
        raise ValueError(f"{name} must be a percentage from 0 to 100, got {value!r}")
    return float(value)


def _pair(name: str, values: Iterable[float]) -> tuple[float, float]:
    try:
        standard, robust = values
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (standard %, robust %), got {values!r}") from None
    return _percent(f"{name}: standard accuracy", standard), _percent(f"{name}: robust accuracy", robust)


def _with_errors(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """(standard, robust, standard error, standard error), the errors 0 where none are given."""
    what, given = f"points[{name!r}]", tuple(values)
    if len(given) not in (2, 4):
        raise ValueError(f"{what} must be (standard %, robust %) or these and two standard errors, got {given!r}")
    errors = given[2:] or (0.0, 0.0)
    if not all(0 <= error < math.inf for error in errors):
        raise ValueError(f"{what}: standard errors must be finite and not negative, got {errors!r}")
    return *_pair(what, given[:2]), *(float(error) for error in errors)


def _curve(name: str, points: Iterable[Iterable[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Standard and robust accuracies, by rising standard accuracy."""
    pairs = sorted(_pair(f"{name}[{i}]", point) for i, point in enumerate(points))
    if len(pairs) < 2:
        raise ValueError(f"{name} must have at least 2 points (standard %, robust %), got {pairs!r}")
    x, y = np.array(pairs).T
    repeated = x[1:][np.diff(x) == 0]
    if len(repeated):
        raise ValueError(f"{name} must have distinct standard accuracies, got {repeated[0]} more than once")
    return x, y


def _pchip(x: np.ndarray, y: np.ndarray) -> Any:
    try:
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise ModuleNotFoundError(
            "trade-off curves need scipy, which is not installed: pip install 'purify-fast[eval]'"
        ) from error
    return PchipInterpolator(x, y)


def _linear_delta(
    reference_x: np.ndarray, reference_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, stacklevel: int = 3
) -> float:
    """Mean over the common interval of x of the test's y minus the reference's; x must rise strictly."""
    low, high = max(reference_x[0], test_x[0]), min(reference_x[-1], test_x[-1])
    ranges = f"reference {reference_x[0]:g} to {reference_x[-1]:g}, test {test_x[0]:g} to {test_x[-1]:g}"
    if low >= high:
        warnings.warn(f"the curves have no interval in common ({ranges}): the result is NaN", stacklevel=stacklevel)
        return math.nan
    share = (high - low) / (max(reference_x[-1], test_x[-1]) - min(reference_x[0], test_x[0]))
    if share < 0.75:
        warnings.warn(f"the curves share only {100 * share:.0f} % of their range ({ranges})", stacklevel=stacklevel)
    reference, test = _pchip(reference_x, reference_y), _pchip(test_x, test_y)
    return float(test.integrate(low, high) - reference.integrate(low, high)) / float(high - low)


def _foot(curve: Any, x: float, y: float) -> tuple[float, float]:
    """The point of a piecewise cubic nearest to (x, y).

    On each piece, as a function of u in [0, 1], the squared distance has its minima at the ends or at roots of its
    derivative, a quintic.
    """
    us = [np.array([0.0, 1.0])] * (len(curve.x) - 1)
    for i, width in enumerate(np.diff(curve.x)):
        cubic = np.poly1d(curve.c[:, i] * width ** np.arange(3, -1, -1.0))
        slope = np.poly1d([width**2, width * (curve.x[i] - x)]) + (cubic - y) * cubic.deriv()
        # rounding leaves leading coefficients where there are none, and roots far away that spoil the others
        kept = np.flatnonzero(abs(slope.c) > 1e-15 * abs(slope.c).max())
        roots = np.roots(slope.c[kept[0] :])
        # real parts of all: a double root may come out as a complex pair, and any point of the piece may be tried
        us[i] = np.concatenate([us[i], np.clip(roots.real, 0, 1)])
    s = np.concatenate([curve.x[i] + u * (curve.x[i + 1] - curve.x[i]) for i, u in enumerate(us)])
    r = curve(s)
    best = int(np.argmin(np.hypot(s - x, r - y)))
    return float(s[best]), float(r[best])


def _iso_sums(axes: Any, low: np.ndarray, high: np.ndarray) -> None:
    """Lines of equal SUM, with the value where they leave through the right or the upper edge."""
    from matplotlib.ticker import MaxNLocator

    for total in MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(low.sum(), high.sum()):
        axes.plot([low[0], high[0]], [total - low[0], total - high[0]], color="#e4e4e4", lw=0.8, zorder=1)
        right, top = total - high[0], total - high[1]
        style = {"fontsize": 7, "color": "#9a9a9a", "annotation_clip": False, "textcoords": "offset points"}
        if low[1] <= right < high[1]:
            axes.annotate(f"SUM {total:g}", (high[0], right), (3, 0), va="center", **style)
        elif low[0] <= top < high[0]:
            axes.annotate(f"SUM {total:g}", (top, high[1]), (0, 3), ha="center", **style)


_AROUND = [(1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)]


def _name_points(
    figure: Any, axes: Any, names: Sequence[str], at: np.ndarray, bars: np.ndarray, traced: np.ndarray
) -> None:
    """Write each name beside its point, where it covers least of the points, bars, curve and other names."""
    if not len(names):
        return
    figure.canvas.draw()  # the layout, and with it pixels, are known from here on
    pixel = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents)
    dots = axes.transData.transform(at)

    def boxes(lower: np.ndarray, upper: np.ndarray, margin: float) -> np.ndarray:
        corners = [axes.transData.transform(values) for values in (lower, upper)]
        return np.concatenate([corners[0] - margin * pixel, corners[1] + margin * pixel], 1)

    horizontal, vertical = bars * [1, 0], bars * [0, 1]
    taken = [boxes(at, at, 5), boxes(at - horizontal, at + horizontal, 2), boxes(at - vertical, at + vertical, 2)]
    if len(traced):
        taken.append(boxes(traced, traced, 1.5))
    if axes.get_legend() is not None:
        taken.append(np.array([axes.get_legend().get_window_extent().extents]))
    full = np.concatenate(taken)
    for i, name in enumerate(names):
        color = _COLORS[i % len(_COLORS)]
        style = {"textcoords": "offset points", "fontsize": 8.5, "color": color, "va": "bottom", "zorder": 5}
        text = axes.annotate(name, at[i], (0, 0), **style)
        text.set_in_layout(False)
        size = np.array([text.get_window_extent().width, text.get_window_extent().height])
        found: list[tuple] = []
        for far in (9, 16, 26, 40):
            for side in np.array(_AROUND):
                away = pixel * far * side / (1.25 if side.all() else 1)
                lower = dots[i] + away + (side - 1) / 2 * size
                box = np.concatenate([lower, lower + size])
                cost = _covered(box, full).sum() + 10 * (size.prod() - _covered(box, frame[None])[0])
                gaps = np.hypot(*(dots.clip(box[:2], box[2:]) - dots).T)
                cost += pixel**2 * (far / 4 + 30 * (gaps.min() < gaps[i] - pixel))  # not nearer to another point
                found.append((cost, len(found), far, away, box, lower))
        _, _, far, away, box, lower = min(found)  # ties go to the nearest and first
        text.set_position((lower - dots[i]) / pixel)
        if far > 9:
            style = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", at[i], away / pixel, textcoords="offset points", arrowprops=style, zorder=2.8)
        full = np.concatenate([full, box[None]])


def _covered(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that a box (x0, y0, x1, y1) shares with each of the others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return sides.clip(0).prod(1)

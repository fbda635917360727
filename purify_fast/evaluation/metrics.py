"""Standard against robust accuracy as one number, of a single model or of curves of models.

`ar_bd` and `ar_point_dist` are this package's own. Like the "Accuracy Robustness Distance" (ARDist) of ARREST (Suzuki
et al., arXiv 2308.16454) they are inspired by the Bjontegaard delta of video coding, but they are not that measure: its
definition was not found, and numbers of the two must not be compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tradeoff:
    """A model's accuracies in percent: ``standard`` on clean images, ``robust`` on attacked ones.

    Unpacks into the two, so that it can stand for a point of `ar_bd`, `ar_point_dist` and `plot_tradeoff`.

    Args:
        standard: accuracy on clean images, 0 to 100.
        robust: accuracy on attacked images, 0 to 100.

    Raises:
        ValueError: not within 0 to 100, or not finite.
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
    interval's length. It is not the ARDist of ARREST: see this module.

    Args:
        reference: pairs (standard %, robust %) in any order, two at least, with distinct standard accuracies; models
            along one curve differ in a weight or a schedule. The number depends on the reference: state it.
        test: the curve that is compared with it, of the same form.

    Returns:
        Points of robust accuracy, positive where ``test`` is better. NaN, with a warning, where no interval of
        standard accuracies is covered by both; a warning where less than 75 % of what either covers is.

    Raises:
        ValueError: too few points, repeated standard accuracies, or accuracies not within 0 to 100.
        ModuleNotFoundError: scipy is missing.

    Source: G. Bjontegaard, VCEG-M33 (2001); conventions of the Python package bjontegaard.
    """
    return linear_delta(*check_curve("reference", reference), *check_curve("test", test))


def ar_point_dist(reference: Iterable[Iterable[float]], point: Iterable[float]) -> float:
    """Signed distance of one model from a reference curve of models.

    Euclidean, to the nearest point of the curve that interpolates the reference by monotone cubics (pchip), which ends
    at its first and last point: there is no extrapolation. It is not the ARDist of ARREST: see this module.

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
    x, y = check_curve("reference", reference)
    standard, robust = check_pair("point", point)
    curve = interpolate(x, y)
    foot = nearest_point(curve, standard, robust)
    distance = math.hypot(standard - foot[0], robust - foot[1])
    if standard > x[-1]:
        better = True
    elif standard < x[0]:
        better = robust > y[0]
    else:
        better = robust >= float(curve(standard))
    return distance if better or distance == 0 else -distance


def _check_percent(name: str, value: float) -> float:
    # written so that NaN is refused too
    if not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentage from 0 to 100, got {value!r}")
    return float(value)


def check_pair(name: str, values: Iterable[float]) -> tuple[float, float]:
    """(standard, robust) as floats; ValueError, which calls them ``name``, if they are not two percentages."""
    try:
        standard, robust = values
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (standard %, robust %), got {values!r}") from None
    return _check_percent(f"{name}: standard accuracy", standard), _check_percent(f"{name}: robust accuracy", robust)


def check_curve(name: str, points: Iterable[Iterable[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Standard and robust accuracies, by rising standard accuracy; ValueError, which calls them ``name``."""
    pairs = sorted(check_pair(f"{name}[{i}]", point) for i, point in enumerate(points))
    if len(pairs) < 2:
        raise ValueError(f"{name} must have at least 2 points (standard %, robust %), got {pairs!r}")
    x, y = np.array(pairs).T
    repeated = x[1:][np.diff(x) == 0]
    if len(repeated):
        raise ValueError(f"{name} must have distinct standard accuracies, got {repeated[0]} more than once")
    return x, y


def interpolate(x: np.ndarray, y: np.ndarray) -> Any:
    """The monotone cubic through the points; ModuleNotFoundError without scipy, which is optional."""
    try:
        # scipy is optional: the extras eval and demo have it
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise ModuleNotFoundError(
            "trade-off curves need scipy, which is not installed: pip install 'purify-fast[eval]'"
        ) from error
    return PchipInterpolator(x, y)


def linear_delta(
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
    reference, test = interpolate(reference_x, reference_y), interpolate(test_x, test_y)
    return float(test.integrate(low, high) - reference.integrate(low, high)) / float(high - low)


def nearest_point(curve: Any, x: float, y: float) -> tuple[float, float]:
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

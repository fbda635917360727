import functools
import importlib.util
import itertools
import math
import os
import sys
import warnings

import numpy as np
import pytest

from purify_fast.evaluation import Tradeoff, ar_bd, ar_point_dist, plot_tradeoff
from purify_fast.evaluation.show.tradeoff import interpolate, linear_delta, nearest_point

# scipy comes with the extras eval and demo
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs scipy")

LINE = [(80, 60), (84, 56), (88, 52), (92, 48)]
BENT = [(80, 55), (84, 54), (86, 53), (88, 51), (90, 46)]
OTHER = [(82, 55), (86, 54), (88, 52.5), (91, 47)]


def flipped(points):
    return [(robust, standard) for standard, robust in points]


def foot(reference, point):
    return nearest_point(interpolate(*np.array(reference, dtype=float).T), *point)


@pytest.mark.parametrize(
    ("standard", "robust", "total", "mean", "nrr"),
    [
        (90.24, 50.20, 140.44, 70.22, 64.5122),
        (86.63, 46.14, 132.77, 66.385, 60.2110),
        (73.05, 24.32, 97.37, 48.685, 36.4912),
        (0, 0, 0, 0, 0),
        (95, 0, 95, 47.5, 0),
        (100, 100, 200, 100, 100),
    ],
)
def test_sum_mean_and_nrr(standard, robust, total, mean, nrr):
    """The first three as ARREST published them: its specification's fact 11."""
    found = Tradeoff(standard, robust)
    assert (found.sum, found.mean) == pytest.approx((total, mean), abs=1e-12)
    assert found.nrr == pytest.approx(nrr, abs=5e-5)
    assert tuple(found) == (standard, robust)


@pytest.mark.parametrize("bad", [-0.1, 100.1, math.nan, math.inf])
def test_accuracies_are_percentages(bad):
    with pytest.raises(ValueError, match=f"^robust must be a percentage from 0 to 100, got {bad}"):
        Tradeoff(90, bad)
    with pytest.raises(ValueError, match=r"^standard must be a percentage"):
        Tradeoff(bad, 50)
    with pytest.raises(ValueError, match=rf"^test\[1\]: robust accuracy must be .*, got {bad}"):
        ar_bd(LINE, [(90, 50), (80, bad)])
    with pytest.raises(ValueError, match=rf"^point: standard accuracy must be .*, got {bad}"):
        ar_point_dist(LINE, (bad, 45))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"must have at least 2 points \(standard %, robust %\), got \[\]"),
        ([(84, 50)], r"must have at least 2 points .*, got \[\(84.0, 50.0\)\]"),
        ([(84, 50), (80, 60), (84, 51)], r"must have distinct standard accuracies, got 84.0 more than once"),
        ([(84, 50), (80, 60, 1)], r"\[1\] must be a pair \(standard %, robust %\), got \(80, 60, 1\)"),
        ([84, 50], r"\[0\] must be a pair .*, got 84"),
    ],
)
def test_errors_name_the_curve(points, message):
    with pytest.raises(ValueError, match=f"^test ?{message}"):
        ar_bd(LINE, points)
    for call in (lambda: ar_bd(points, LINE), lambda: ar_point_dist(points, (84, 50))):
        with pytest.raises(ValueError, match=f"^reference ?{message}"):
            call()
    with pytest.raises(ValueError, match=r"^point must be a pair"):
        ar_point_dist(LINE, (84, 50, 1))


@needs_scipy
def test_a_shift_is_the_delta():
    test = [(s, r + 1.5) for s, r in LINE]
    assert ar_bd(LINE, test) == pytest.approx(1.5, abs=1e-12)
    assert ar_bd(test, LINE) == pytest.approx(-1.5, abs=1e-12)
    assert ar_bd(LINE, LINE) == 0


@needs_scipy
def test_curves_that_overlap_in_part():
    with pytest.warns(UserWarning, match=r"share only 73 % .*reference 80 to 90, test 82 to 91") as caught:
        assert ar_bd(BENT, OTHER) == pytest.approx(1.2213475994, abs=5e-11)
    assert caught[0].filename == __file__  # the caller's line, not the package's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ar_bd(flipped(BENT), flipped(OTHER)) == pytest.approx(1.4356833042, abs=5e-11)
    with pytest.warns(UserWarning, match="share only"):
        again = ar_bd(np.array(BENT)[::-1], [Tradeoff(*point) for point in OTHER[::-1]])
    assert again == pytest.approx(1.2213475994, abs=5e-11)


@needs_scipy
@pytest.mark.parametrize("start", [92, 93])
def test_nothing_in_common_is_nan(start):
    """Nor is a single common point an interval."""
    with pytest.warns(UserWarning, match="no interval in common .*: the result is NaN"):
        assert math.isnan(ar_bd(LINE, [(start, 40), (start + 2, 39)]))


@needs_scipy
def test_the_published_bjontegaard_example():
    """The README of the package bjontegaard, of rates in kbit/s and PSNR in dB, by its own logarithmic forms."""
    rate = np.log10([[9487.76, 4593.60, 2486.44, 1358.24], [9787.80, 4469.00, 2451.52, 1356.24]])[:, ::-1]
    psnr = np.array([[40.037, 38.615, 36.845, 34.851], [40.121, 38.651, 36.970, 34.987]])[:, ::-1]
    assert linear_delta(rate[0], psnr[0], rate[1], psnr[1]) == pytest.approx(0.119692785, abs=5e-10)
    delta = linear_delta(psnr[0], rate[0], psnr[1], rate[1])
    assert 100 * (10**delta - 1) == pytest.approx(-4.417485351, abs=5e-10)


@needs_scipy
def test_point_beside_a_bent_curve():
    assert ar_point_dist(BENT, (88, 52.5)) == pytest.approx(0.93512, abs=5e-6)
    assert foot(BENT, (88, 52.5)) == pytest.approx((87.307984, 51.871062), abs=5e-7)
    assert ar_point_dist(BENT[::-1], Tradeoff(88, 52.5)) == ar_point_dist(np.array(BENT), (88, 52.5))


@needs_scipy
@pytest.mark.parametrize(
    ("point", "distance"),
    [
        ((95, 52), 7 / math.sqrt(2)),  # past the upper end: more accurate than it
        ((95, 44), 5),
        ((93, 0), math.hypot(1, 48)),
        ((77, 60), -3),  # below the lower end: the end is as robust and more accurate
        ((77, 56), -7 / math.sqrt(2)),
        ((77, 64), 5),
        ((80, 61), 1),  # at the ends the curve's own value decides
        ((80, 59), -1 / math.sqrt(2)),
        ((92, 49), 1 / math.sqrt(2)),
        ((92, 47), -1),
        ((80, 60), 0),
        ((92, 48), 0),
        ((84, 56), 0),
    ],
)
def test_sign_of_the_distance(point, distance):
    """The reference is robust = 140 - standard, from 80 to 92."""
    assert ar_point_dist(LINE, point) == pytest.approx(distance, abs=1e-12)


@needs_scipy
@pytest.mark.parametrize("seed", range(6))
def test_foot_is_the_nearest_of_all(seed):
    """Steep, flat and crooked curves, some with points almost above each other, against a fine search."""
    random = np.random.default_rng(seed)
    x = np.sort(random.uniform(60, 95, random.integers(2, 9)))
    if seed % 3 == 0:
        x[1] = x[0] + 10.0 ** -random.integers(1, 9)
    y = random.uniform(20, 60, len(x)) if seed % 2 else np.sort(random.integers(20, 40, len(x)))[::-1].astype(float)
    curve = interpolate(x, y)
    dense = np.concatenate([np.linspace(*ends, 20_001) for ends in itertools.pairwise(x)])
    values = curve(dense)
    for point in random.uniform([55, 15], [100, 65], (30, 2)):
        near = nearest_point(curve, *point)
        assert near[1] == pytest.approx(float(curve(near[0])), abs=1e-9) and x[0] <= near[0] <= x[-1] + 1e-12
        best = np.hypot(dense - point[0], values - point[1]).min()
        assert best - 2e-3 <= math.dist(near, point) <= best + 1e-9


PUBLISHED = {
    "AT": (87.14, 44.04),
    "AWP": (85.57, 54.04),
    "LAS-AT": (86.23, 53.58),
    "S2O": (85.67, 54.10),
    "LBGAT": (88.22, 52.18),
    "ARREST": (90.24, 50.20, 0.3, 0.5),
}


@needs_scipy
def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "tradeoff.png"
    reference = [PUBLISHED["AWP"], PUBLISHED["LAS-AT"], PUBLISHED["LBGAT"]]
    assert plot_tradeoff(path, PUBLISHED, reference, reference_name="baselines", title="CIFAR-10") is True
    assert path.read_bytes()[:4] == b"\x89PNG" and os.listdir(path.parent) == ["tradeoff.png"]
    assert plot_tradeoff(path, {}, LINE) and plot_tradeoff(path, {"only": Tradeoff(90, 0)})
    assert plot_tradeoff(path, {"one": (90, 50, 0, 1), "same": (90, 50), "third": (90, 50)})


def test_names_do_not_cover_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    random = np.random.default_rng(0)
    points = {f"model {i}": tuple(random.uniform([85, 45], [86, 46])) for i in range(12)}
    assert plot_tradeoff(tmp_path / "a.png", points | PUBLISHED)
    (figure,) = kept
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text() in points | PUBLISHED]
    boxes = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 18 and all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert all(frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "points must name at least one model"),
        ({"a": (90,)}, r"points\['a'\] must be .* or \(.*standard error\), got \(90,\)"),
        ({"a": (90, 50, 1)}, r"points\['a'\] must be"),
        ({"a": (90, 101)}, r"points\['a'\]: robust accuracy must be .*, got 101"),
        ({"a": (90, 50, 1, -1)}, r"points\['a'\]: standard errors must be finite and not negative, got \(1, -1\)"),
        ({"a": (90, 50, math.nan, 1)}, r"points\['a'\]: standard errors must be"),
    ],
)
def test_errors_of_the_picture(tmp_path, points, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        plot_tradeoff(tmp_path / "a.png", points)
    with pytest.raises(ValueError, match=r"^reference must have at least 2 points"):
        plot_tradeoff(tmp_path / "a.png", {"a": (90, 50)}, [(90, 50)])
    assert os.listdir(tmp_path) == []


def test_without_the_optional_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.interpolate", None)
    path = tmp_path / "a.png"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert plot_tradeoff(path, {"a": (90, 50)}, LINE) is False
    pytest.importorskip("matplotlib")
    draw = functools.partial(plot_tradeoff, path, {"a": (90, 50)}, LINE)
    for call in (draw, lambda: ar_bd(LINE, BENT), lambda: ar_point_dist(LINE, (85, 50))):
        with pytest.raises(ModuleNotFoundError, match=r"need scipy, .*pip install 'purify-fast\[eval\]'"):
            call()
    assert os.listdir(tmp_path) == [] and plot_tradeoff(path, {"a": (90, 50)})

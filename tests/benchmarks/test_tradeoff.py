import math
import os
import sys

import numpy as np
import pytest

from benchmarks.robustness.tradeoff import Tradeoff, plot_tradeoff

LINE = [(80, 60), (84, 56), (88, 52), (92, 48)]


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
def test_accuracies_are_percentages(bad, tmp_path):
    with pytest.raises(ValueError, match=f"^robust must be a percentage from 0 to 100, got {bad}"):
        Tradeoff(90, bad)
    with pytest.raises(ValueError, match=r"^standard must be a percentage"):
        Tradeoff(bad, 50)
    with pytest.raises(ValueError, match=rf"^reference\[1\]: robust accuracy must be .*, got {bad}"):
        plot_tradeoff(tmp_path / "a.png", {}, [(90, 50), (80, bad)])


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
def test_errors_name_the_curve(points, message, tmp_path):
    with pytest.raises(ValueError, match=f"^reference ?{message}"):
        plot_tradeoff(tmp_path / "a.png", {"a": (90, 50)}, points)


PUBLISHED = {
    "AT": (87.14, 44.04),
    "AWP": (85.57, 54.04),
    "LAS-AT": (86.23, 53.58),
    "S2O": (85.67, 54.10),
    "LBGAT": (88.22, 52.18),
    "ARREST": (90.24, 50.20, 0.3, 0.5),
}


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
    assert os.listdir(tmp_path) == []


def test_without_the_optional_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_tradeoff(tmp_path / "a.png", {"a": (90, 50)}, LINE) is False
    assert os.listdir(tmp_path) == []

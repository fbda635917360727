import os
import sys

import numpy as np
import pytest

from benchmarks.robustness.tradeoff import Tradeoff, plot_tradeoff

LINE = [(80, 60), (84, 56), (88, 52), (92, 48)]
NAMES = {"reference_name": "baselines", "title": "CIFAR-10"}


@pytest.mark.parametrize(
    ("standard", "robust", "total", "nrr"),
    [(90.24, 50.20, 140.44, 64.5122), (73.05, 24.32, 97.37, 36.4912), (0, 0, 0, 0), (95, 0, 95, 0)],
)
def test_sum_and_nrr(standard, robust, total, nrr):
    """The first two as ARREST published them: its specification's fact 11."""
    found = Tradeoff(standard, robust)
    assert found.sum == pytest.approx(total, abs=1e-12) and found.nrr == pytest.approx(nrr, abs=5e-5)


PUBLISHED = {"AT": (87.14, 44.04, 0, 0), "AWP": (85.57, 54.04, 0, 0), "ARREST": (90.24, 50.20, 0.3, 0.5)}


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "tradeoff.png"
    assert plot_tradeoff(path, PUBLISHED, LINE, **NAMES) is True
    assert path.read_bytes()[:4] == b"\x89PNG" and os.listdir(path.parent) == ["tradeoff.png"]


def test_names_do_not_cover_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    random = np.random.default_rng(0)
    points = {f"model {i}": (*random.uniform([85, 45], [86, 46]), 0, 0) for i in range(12)}
    assert plot_tradeoff(tmp_path / "a.png", points | PUBLISHED, LINE, **NAMES)
    (figure,) = kept
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text() in points | PUBLISHED]
    boxes = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 15 and all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert all(frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_the_optional_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_tradeoff(tmp_path / "a.png", PUBLISHED, LINE, **NAMES) is False
    assert os.listdir(tmp_path) == []

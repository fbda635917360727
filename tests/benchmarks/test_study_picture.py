import numpy as np
import pytest

from benchmarks.robustness.studies import cifar10
from benchmarks.robustness.studies.cifar10.picture import plot_tradeoff


@pytest.mark.parametrize(
    ("clean", "robust", "total", "nrr"),
    [(90.24, 50.20, "140.4", "64.5"), (73.05, 24.32, "97.4", "36.5"), (0, 0, "0.0", "0.0"), (95, 0, "95.0", "0.0")],
)
def test_sum_and_nrr(clean, robust, total, nrr):
    """The first two as ARREST published them: its specification's fact 11."""
    assert cifar10.tradeoff(clean / 100, robust / 100) == f"{total} | {nrr}"


def test_names_do_not_cover_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    random = np.random.default_rng(0)
    points = {f"model {i}": (*random.uniform([85, 45], [86, 46]), 0, 0) for i in range(12)}
    points |= {"AT": (87.14, 44.04, 0, 0), "AWP": (85.57, 54.04, 0, 0), "ARREST": (90.24, 50.20, 0.3, 0.5)}
    line = [(80, 60), (84, 56), (88, 52), (92, 48)]
    plot_tradeoff(tmp_path / "a.png", points, line, reference_name="baselines", title="CIFAR-10")
    (figure,) = kept
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text() in points]
    boxes = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 15 and all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert all(frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

"""What an evaluation captures, counted on a small model, and the model of a step's time."""

from pathlib import Path

import pytest
import torch

from benchmarks import captures, report, roofline
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.graphs.step_graphs import WORTH

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.slow
def test_what_is_counted_anew_on_a_small_model(one_thread):
    """Over two batches each batch size is captured once, and only once that pays."""
    torch.manual_seed(0)
    model, x = SmallCNN(1, 5, (8, 8), 4).eval(), torch.rand(500, 1, 8, 8)
    y = model(x).argmax(1)
    counts = captures.captured(model, x, y, 0.004)
    assert set(captures.ATTACKS) == {name for each in counts for name in captures.ATTACKS if each.startswith(name)}
    assert max(counts["APGD-10 margin"].sizes) == captures.BATCH
    for found in counts.values():
        assert len(found.replays) <= 6 and min(found.replays, default=WORTH) >= WORTH
    assert any(found.replays for found in counts.values())


#: Operators that one step launches besides the model's gradient, or its forward pass, at most.
MOST = {
    "APGD-10 margin": 40, "APGD-100 ce": 40, "APGD-T 100": 45, "APGD-T 100 margin": 40, "FAB-T 100": 40, "Square": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", captures.ATTACKS)
def test_a_step_launches_few_operators_of_its_own(name, one_thread):
    torch.manual_seed(0)
    model, x = SmallCNN(1, 5, (8, 8), 4).eval(), torch.rand(captures.COUNTED_IMAGES, 1, 8, 8)
    with captures.kernels_serve():
        of_the_model = captures.of_model(name, model, x)[0]
        launched, waits = captures.per_step(model, x, captures.ATTACKS[name], False)
    own = launched - of_the_model
    assert 0 < own <= MOST[name] and waits <= 1


def test_the_model_of_a_step_takes_the_longest_of_three():
    count = roofline.Count(launches=200, beside=50, bytes=3e9, flop=1e12)
    row = roofline.row_of("a step", count, 16, roofline.H100.bfloat16)
    assert (row["launches_ms"], row["bytes_ms"], row["products_ms"]) == ("1.8", "1", "2.11")
    assert (row["eager_ms"], row["eager_bound"], row["launches_captured_ms"]) == ("2.11", "products", "0.45")
    small = roofline.row_of("a step", count._replace(flop=1.0, bytes=1.0), 16, roofline.H100.bfloat16)
    assert (small["eager_bound"], small["captured_ms"]) == ("launches", "0.45")
    line = roofline.continued((count._replace(bytes=4.0, flop=8.0), count._replace(bytes=8.0, flop=9.0)), 16)
    assert (line.bytes, line.flop, line.launches) == (16.0, 11.0, 200)


def test_the_committed_model_has_every_step_and_batch():
    rows = report.read_csv(RESULTS / roofline.FILE)
    steps = [*roofline.STEPS, *roofline.TRAININGS]
    assert [(row["step"], int(row["images"])) for row in rows] == [
        (step, size) for step in steps for size in roofline.BATCHES
    ]
    for row in rows:
        assert float(row["captured_ms"]) <= float(row["eager_ms"])
        assert int(row["launches_captured"]) <= int(row["launches"])


def test_images_that_fall_by_chance_are_not_counted():
    """A model that misclassifies half of the images in a third of its draws: the steps of the others are counted."""

    def model(x):
        sign = torch.where((torch.rand(len(x)) < 0.3) & (x[:, 0] < 0.5), -1.0, 1.0)
        return torch.stack([sign, -sign], 1) * (1 + x[:, :1])

    torch.manual_seed(0)
    x = torch.rand(300, 1)
    far = captures.far_from_falling(model, x)
    steady = x[: captures.CANDIDATES].sort(0, descending=True).values[: captures.COUNTED_IMAGES]
    assert torch.equal(far.sort(0, descending=True).values, steady)

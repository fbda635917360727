"""The operators of a step, counted on a small model, and the model of a step's time."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import roofline
from benchmarks.speed import sheets
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.counting import Cost

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


#: Operators that one step launches besides the model's gradient, or its forward pass, at most.
MOST = {
    "APGD-100 ce": 40,
    "APGD-T 100": 45,
    "FAB-T 100": 40,
    "Square": 12,
}


@pytest.mark.parametrize("name", roofline.ATTACKS)
def test_a_step_launches_few_operators_of_its_own(name, one_thread):
    torch.manual_seed(0)
    model, x = SmallCNN(1, 5, (8, 8), 4).eval(), torch.rand(16, 1, 8, 8)
    with roofline.kernels_serve():
        of_the_model = roofline.of_model(name, model, x)[0]
        launched, waits = roofline.per_step(model, x, roofline.ATTACKS[name], False)
    own = launched - of_the_model
    assert 0 < own <= MOST[name] and waits <= 1


def test_the_model_of_a_step_takes_the_longest_of_three():
    cost = Cost(launches=200, bytes=3e9, flop=1e12)
    row = roofline.row_of("a step", cost, 50, 16)
    assert (row["launches_ms"], row["bytes_ms"], row["products_ms"]) == ("1.8", "1", "2.11")
    assert (row["eager_ms"], row["eager_bound"], row["launches_captured_ms"]) == ("2.11", "products", "0.45")
    small = roofline.row_of("a step", cost._replace(flop=1.0, bytes=1.0), 50, 16)
    assert (small["eager_bound"], small["captured_ms"]) == ("launches", "0.45")


def test_the_committed_model_has_every_step_and_batch():
    rows = sheets.read_csv(RESULTS / roofline.FILE)
    assert [(row["step"], int(row["images"])) for row in rows] == [
        (step, size) for step in roofline.ATTACKS for size in roofline.BATCHES
    ]
    for row in rows:
        assert float(row["captured_ms"]) <= float(row["eager_ms"])
        assert int(row["launches_captured"]) <= int(row["launches"])

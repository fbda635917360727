"""What an evaluation captures, by the committed table and counted anew on a small model; the model of a step's time."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import captures, report, roofline  # noqa: E402
from purify_fast.models.classifiers import SmallCNN  # noqa: E402
from purify_fast.speed.step_graphs import WORTH  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = report.read_csv(RESULTS / captures.FILE)


def test_the_table_has_every_evaluation_and_graphs_pay_in_each():
    assert {(row["model"], row["eps"]) for row in COMMITTED} == {(run.model, f"{run.eps:.4g}") for run in captures.RUNS}
    for model, eps in {(row["model"], row["eps"]) for row in COMMITTED}:
        own = [row for row in COMMITTED if (row["model"], row["eps"]) == (model, eps)]
        assert {row["attack"] for row in own} >= set(captures.ATTACKS)
        made = [row for row in own if int(row["captures"])]
        assert all(int(row["captures"]) <= 6 for row in own)
        assert all(int(row["least_replays"]) >= WORTH for row in made), "a capture was used less than it costs"
        replays, count = (sum(int(row[name]) for row in made) for name in ("replays", "captures"))
        assert replays >= 100 * count


def test_what_is_counted_anew_on_a_small_model(one_thread):
    """Over two batches and four attacks each batch size is captured once, and only once that pays."""
    torch.manual_seed(0)
    model, x = SmallCNN(1, 5, (8, 8), 4).eval(), torch.rand(300, 1, 8, 8)
    y = model(x).argmax(1)
    counts = captures.captured(model, x, y, 0.004)
    assert set(captures.ATTACKS) <= set(counts)
    for attack in ("APGD-100 ce", "APGD-T 100"):
        found = counts[attack]
        assert 1 <= len(found.replays) <= 6 and min(found.replays) >= WORTH and max(found.sizes) == captures.BATCH


def test_the_operators_of_a_step_are_as_committed(one_thread):
    """The attack's own, which are the same whatever the model: launched ones, and those beside a graph."""
    torch.manual_seed(0)
    model, x = SmallCNN(1, 5, (8, 8), 4).eval(), torch.rand(captures.COUNTED_IMAGES, 1, 8, 8)
    with captures.served("by rule"):
        both, forward = captures.of_the_model(model, x)
        for name, attack in captures.ATTACKS.items():
            row = next(row for row in COMMITTED if row["attack"] == name and row["model"].startswith("cifar10"))
            own = captures.per_step(model, x, attack, False)[0] - (forward if name.startswith("Square") else both)
            committed = float(row["launches_eager"]) - int(row["model_launches"])
            assert own == pytest.approx(committed, abs=3), name


def test_a_fab_step_and_a_query_of_square_launch_few_operators():
    for row in COMMITTED:
        most = {"FAB-T 100": 40, "Square-5000": 12}.get(row["attack"])
        if most is not None and row["model"].startswith("cifar10"):
            assert float(row["launches_eager"]) - int(row["model_launches"]) <= most


def test_the_model_of_a_step_takes_the_longest_of_three():
    count = roofline.Count(launches=200, beside=50, bytes=3e9, flop=1e12)
    row = roofline.row_of("a step", count, 16, roofline.BFLOAT16)
    assert (row["launches_ms"], row["bytes_ms"], row["products_ms"]) == ("1.8", "1", "2.11")
    assert (row["eager_ms"], row["eager_bound"], row["launches_captured_ms"]) == ("2.11", "products", "0.45")
    small = roofline.row_of("a step", count._replace(flop=1.0, bytes=1.0), 16, roofline.BFLOAT16)
    assert (small["eager_bound"], small["captured_ms"]) == ("launches", "0.45")
    line = roofline.continued((count._replace(bytes=4.0, flop=8.0), count._replace(bytes=8.0, flop=9.0)), 16)
    assert (line.bytes, line.flop, line.launches) == (16.0, 11.0, 200)


def test_the_committed_model_has_every_step_and_batch():
    rows = report.read_csv(RESULTS / roofline.FILE)
    steps = [*captures.ATTACKS, *roofline.TRAININGS]
    assert [(row["step"], int(row["images"])) for row in rows] == [
        (step, size) for step in steps for size in roofline.BATCHES
    ]
    for row in rows:
        assert float(row["captured_ms"]) <= float(row["eager_ms"])
        assert int(row["launches_captured"]) <= int(row["launches"])

"""What a training step launches: counted, at least halved by the kernels, and as the committed table says."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import launches
from benchmarks.speed import sheets
from purify_fast import _library

ROOT = Path(__file__).parents[2]

COMMITTED = {row["training"]: row for row in sheets.read_csv(ROOT / "benchmarks" / "results" / launches.FILE)}
#: Where most of a step is the classifier's ten passes forward and backward, which no kernel replaces.
MOSTLY_NETWORKS = {"ARREST, PGD-10", "CARSO, paper's objective, PGD-10"}
COUNTED = ("references", "by rule", "by rule, captured")


def test_views_launch_nothing():
    x = torch.ones(4, 4)
    with launches.Launches() as counted:
        x.t().view(2, 2, 4)[0]
        x.add_(1)
        x + 1
    assert counted.count == 2


def test_every_training_is_in_the_table():
    assert list(COMMITTED) == list(launches.TRAININGS)


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels stand for the GPU's")
@pytest.mark.parametrize("training", [name for name in launches.TRAININGS if name != "AToP, pipeline, PGD-10"])
def test_kernels_halve_the_launches(training, one_thread):
    """By the rule that holds on a GPU where nothing was raced; with the attack's step captured, three times as few."""
    plain, rule, captured = (launches.count(launches.TRAININGS[training], by) for by in COUNTED)
    assert plain >= (1.6 if training in MOSTLY_NETWORKS else 2.0) * rule
    assert plain >= 3 * captured
    for by, counted in zip(COUNTED, (plain, rule, captured), strict=True):
        committed = int(COMMITTED[training][by])
        assert abs(counted - committed) <= 0.05 * committed, "run `python -m benchmarks report --count`"

"""Rows of large images, with small stand-ins for the networks."""

import pytest
import torch
from torch import nn

from benchmarks import RESULTS, kept
from benchmarks.robustness import large_images
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.training import TrainingAttack


def small_network(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(large_images, "classifier", lambda name, classes: small_network(classes))
    monkeypatch.setattr(large_images, "SIDE", 32)

    def atop(name):
        defence = Atop(small_network(1000), SmallGenerator(3, 4), (3, 64, 64))
        attack = TrainingAttack(eps=0.01, steps=1)
        return AtopTask(defence, AtopConfig(attack=attack, attack_method="pgd", cls_delay=0))

    monkeypatch.setattr(large_images, "TRAININGS", {"a step of AToP": atop})


def test_an_evaluation_and_a_step_are_measured(small, one_thread):
    row = large_images.measured("ResNet-18 of torchvision", "the protocol `fast`", quick=True)
    assert row["images"] == 2 and row["result"].endswith("of 2 images withstand") and row["seconds"] > 0
    # The step takes images of the defence's size.
    row = large_images.measured("ResNet-18 of torchvision", "a step of AToP", quick=True)
    assert row["images"] == large_images.BATCH and row["result"].startswith("loss ") and 50 < row["MB"] < 10_000


def test_the_committed_rows_fit_this_purpose():
    """Every row is there, attacks found something to do, and no row takes 24 GB."""
    rows = kept.rows_of(RESULTS / "cpu" / large_images.FILE)
    assert [(row["network"], row["what"]) for row in rows] == large_images.ROWS
    assert all(row["MB"] < 24_000 and "nan" not in row["result"] for row in rows)

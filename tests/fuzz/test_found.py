"""Faults that fuzzing found, pinned."""

import math

import pytest
import torch

from purify_fast import attacks
from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import ClassifierConfig, FitConfig, TrainingAttack


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_that_is_no_int64(seed):
    """It ended in an OverflowError."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.arange(2)
    with pytest.raises(ValueError, match="seed must be in"):
        attacks.pgd(model, x, y, eps=0.1, alpha=0.1, steps=1, seed=seed)


def test_numbers_that_are_none_in_configurations():
    for make in (
        lambda: FitConfig(1, checkpoint_seconds=math.nan),
        lambda: ClassifierConfig(weight_decay=math.nan),
        lambda: ClassifierConfig(learning_rate=math.inf),
        # of an attack on clean images it was accepted
        lambda: TrainingAttack(eps=0.0, steps=2, alpha=math.nan),
        lambda: CarsoConfig(lookahead_alpha=math.nan),
    ):
        with pytest.raises(ValueError, match=r"(seconds|decay|rate|alpha) must be"):
            make()


def test_labels_on_another_device():
    """The model was run first, and PyTorch's message named no argument."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="must be on one device, got x on cpu, y on meta"):
        attacks.pgd(model, torch.rand(2, 1, 2, 2), torch.arange(2, device="meta"), eps=0.1, alpha=0.1, steps=1)

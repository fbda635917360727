"""What fuzzing found, pinned."""

import math

import pytest
import torch

from purify_fast import attacks, ops
from purify_fast.methods.arrest import AblationConfig
from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import ClassifierConfig, FitConfig

STREAM = {"seed": torch.tensor([1]), "sample_ids": torch.arange(2)}


@pytest.mark.parametrize("count", [10**30, 2**63])
def test_counts_beyond_int64(count):
    """They ended in an error of PyTorch's dispatcher, which spoke of C++ types."""
    for name in ("numel", "draws", "first_draw"):
        with pytest.raises(ValueError, match=rf"{name} must be below 2\^63"):
            ops.philox(**{**STREAM, "numel": 1, "stream": ops.Stream.LATENT, name: count})
    with pytest.raises(ValueError, match=r"samples must be at least 1 and below 2\^63"):
        ops.random_transform(torch.rand(2, 1, 4, 4), **STREAM, block=2, samples=count)


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (0.0, math.nan), (1.0, 0.0)])
def test_a_box_that_is_none(bounds):
    """NaN passed as a bound, and the backends differed in what they made of it."""
    x, (lo, hi) = torch.rand(2, 3), bounds
    with pytest.raises(ValueError, match="lo"):
        ops.pgd_step(x, x, x, 0.1, 0.1, lo=lo, hi=hi)
    with pytest.raises(ValueError, match="lo"):
        ops.apgd_step(x, x, x, x, 0.1, 0.1, lo=lo, hi=hi)
    with pytest.raises(ValueError, match="lo"):
        ops.noisy_replay(x, x, torch.rand(2), 0.5, 0.1, **STREAM, lo=lo, hi=hi)


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
        lambda: CarsoConfig(lookahead_alpha=math.nan),
    ):
        with pytest.raises(ValueError, match=r"(seconds|decay|rate|alpha) must be"):
            make()


def test_labels_on_another_device():
    """The model was run first, and PyTorch's message named no argument."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="x is on cpu, y on meta: they must agree"):
        attacks.pgd(model, torch.rand(2, 1, 2, 2), torch.arange(2, device="meta"), eps=0.1, alpha=0.1, steps=1)


@pytest.mark.parametrize("name", ["standard_learning_rate", "scratch_learning_rate"])
@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_the_rates_of_an_ablation(name, rate):
    """They were accepted, and the training diverged."""
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite"):
        AblationConfig(**{name: rate})

"""The attacks as functions: their options and their defaults."""

import pytest
import torch

from purify_fast import attacks
from purify_fast.attacks.base import run_alone


@pytest.mark.parametrize(
    "option, advice",
    [("sed", "is 'seed' meant"), ("norms", "is 'norm' meant"), ("zzz", "there are batch_size, clip_max, clip_min")],
)
def test_an_unknown_option_is_refused_with_the_nearest(model, option, advice):
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    for attack in (attacks.square, attacks.pgd, attacks.PGD()):
        with pytest.raises(TypeError, match=f"^(Square|PGD) has no option '{option}': "):
            attack(model, x, y, eps=0.1, **{option: 1})
    with pytest.raises(TypeError, match=advice):
        attacks.PGD()(model, x, y, eps=0.1, **{option: 1})
    with pytest.raises(TypeError, match="PGD has no option 'step': is 'steps' meant"):
        attacks.pgd(model, x, y, 0.1, step=1)
    with pytest.raises(TypeError, match="PGD has no option 'targetted': is 'targeted' meant"):
        attacks.pgd(model, x, y, 0.1, targetted=y)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "apgd", "fab_t", "square"])
def test_a_radius_is_needed(model, name):
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="needs a radius in image units"):
        getattr(attacks, name)(model, x, y)


def test_a_function_runs_its_class_with_its_defaults(model):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    found = attacks.pgd(model, x, y, eps=0.1, seed=3, alpha=0.02, sample_ids=torch.tensor([4, 1, 9]))
    options = {"eps": 0.1, "seed": 3, "alpha": 0.02, "sample_ids": torch.tensor([4, 1, 9])}
    assert torch.equal(found, run_alone(attacks.PGD, model, x, y, steps=40, keep_best=False, **options))
    assert not torch.equal(found, attacks.pgd(model, x, y, **options, steps=1))

"""The attacks as functions: their options and their defaults."""

import pytest
import torch

from purify_fast import attacks
from purify_fast.attacks.base import run_alone


@pytest.mark.parametrize("option", ["epsilon", "targetted"])
def test_an_unknown_option_is_refused(model, option):
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    for attack in (attacks.pgd, attacks.stadv, attacks.PGD()):
        with pytest.raises(TypeError, match=f"unexpected keyword argument .{option}"):
            attack(model, x, y, eps=0.1, **{option: 1})


@pytest.mark.parametrize("name", ["pgd", "fgsm", "apgd", "fab_t", "square", "branch_and_bound"])
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

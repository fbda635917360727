"""The attack of every training: eps, step and warm-up mean the same in all of them."""

import dataclasses

import pytest
import torch

from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import AtopConfig
from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import ClassifierConfig, TrainingAttack
from purify_fast.training.task import settings

CONFIGS = (ClassifierConfig(), CarsoConfig(), AtopConfig(), ArrestConfig())


def test_a_step_follows_from_eps_unless_it_is_given():
    attack = TrainingAttack(eps=0.2, steps=10)
    assert attack.step_size(0.2) == pytest.approx(0.05) and attack.step_size(0.1) == pytest.approx(0.025)
    torch.testing.assert_close(attack.step_size(torch.tensor([0.1, 0.2])), torch.tensor([0.025, 0.05]))
    assert dataclasses.replace(attack, relative_alpha=2.0).step_size(0.2) == pytest.approx(0.04)
    # a given one is a constant, whatever the radius, as the published weak attacks have it
    assert dataclasses.replace(attack, alpha=0.03).step_size(0.1) == 0.03


@pytest.mark.parametrize("alpha", [None, 0.06])
def test_eps_and_step_rise_together(alpha):
    attack = TrainingAttack(eps=0.2, steps=10, alpha=alpha, eps_warmup=0.5)
    now = [attack.at_epoch(epoch, 8) for epoch in range(8)]
    assert [a.eps for a in now] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])
    whole = attack.step_size(0.2)
    assert [a.step_size(a.eps) for a in now] == pytest.approx([whole * a.eps / 0.2 for a in now])
    assert all(a.eps_warmup == 0 and a.at_epoch(0, 8) == a for a in now)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
        ({"eps": 8.0}, r"at most 1 for linf, in image units, got 8.0: is 8/255 meant\?"),
        ({"norm": "l3"}, "norm must be one of linf, l2, l1, got 'l3'"),
        ({"alpha": 0.0}, "alpha must be above 0 and finite, got 0.0"),
        ({"alpha": 0.03}, "alpha must be at least eps / steps = 0.03333, got 0.03"),
        ({"relative_alpha": 0.9}, "alpha must be at least eps / steps = 0.03333, got 0.03"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingAttack(**{"eps": 0.1, "steps": 3, **wrong})
    assert TrainingAttack(eps=3.0, steps=3, norm="l2")


def test_a_norm_is_read_as_others_write_it():
    attack = TrainingAttack(eps=0.1, steps=3, norm="L-inf")
    assert attack == TrainingAttack(eps=0.1, steps=3) and attack.norm == "linf"
    assert TrainingAttack(eps=3.0, steps=3, norm="L2").at_epoch(0, 2).norm == "l2"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_training_has_one_and_its_settings_are_a_flat_table(config):
    assert isinstance(config.attack, TrainingAttack)
    flat, names = settings(config), {field.name for field in dataclasses.fields(config)}
    attack = {field.name for field in dataclasses.fields(TrainingAttack)}
    assert not names & attack and flat.keys() == names - {"attack"} | attack
    assert flat["eps"] == config.attack.eps

"""The lists of attacks: the transfers that masked gradients add, and the steps that a user chooses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

from purify_fast.attacks import APGD, Square
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import AttackSpec
from purify_fast.judge.request.attack_lists import protocol_attacks, without_early_stops

BALL = ThreatModel("linf", 0.1)


def of(random: bool) -> SimpleNamespace:
    surrogates = [(name, nn.Identity()) for name in "abc"]
    model = nn.Identity()
    return SimpleNamespace(is_random=random, base_model=model, votes=1, surrogates=lambda ball: (surrogates, {}))


def transfers(random: bool, quick: bool) -> list[tuple]:
    """Return the label, the steps and the number of target classes of every transfer, in the order that was asked."""
    found = without_early_stops([], of(random), BALL, ["c", "a"], quick)
    assert all(spec.survivors_only and spec.through is not None for spec in found)
    return [(spec.label, spec.attack.steps, spec.attack.n_target_classes) for spec in found]


def test_the_steps_of_a_transfer():
    """A random model gets short attacks first; with `quick`, the long ones are shorter and two."""
    usual = [(f"APGD-T by the gradients of {name}", None, 9) for name in "cab"]
    short = [(f"APGD-20 by the gradients of {name}", 20, 9) for name in "cab"]
    long = [(f"APGD-T by the gradients of {name}", 50, 4) for name in "ca"]
    assert transfers(random=False, quick=False) == transfers(random=False, quick=True) == usual
    assert transfers(random=True, quick=False) == short + usual
    assert transfers(random=True, quick=True) == short + long


def test_a_transfer_is_made_once_and_stands_before_the_searches_without_gradients():
    """Without early stops: each of the protocol's own attacks gets all remaining images, and all of its steps."""
    first, square = APGD(loss="margin", give_up=True), Square(give_up=True)
    before = AttackSpec(APGD(), label="APGD-T by the gradients of b")
    given = [AttackSpec(first, until=0.1), before, AttackSpec(square, nearest=10)]
    found = without_early_stops(given, of(False), BALL, ["a"])
    assert [spec.label for spec in found] == [None, *(f"APGD-T by the gradients of {name}" for name in "abc"), None]
    for spec, attack in ((found[0], first), (found[-1], square)):
        assert spec == AttackSpec(replace(attack, give_up=False))


@pytest.mark.parametrize(
    ("asked", "steps"), [(None, [10, 60, None, 30]), (30, [10, 30, None, 30]), (5, [10, 5, None, 5])]
)
def test_asked_steps_shorten_the_long_attacks_alone(asked, steps):
    """The first attack of a protocol keeps its ten steps, and an attack without a number takes the evaluation's."""
    listed = protocol_attacks("fast", of(False), BALL, steps=asked)
    assert [spec.attack.steps for spec in listed[:4]] == steps


def test_a_base_is_transferred_from_by_every_protocol():
    base = nn.Identity()
    specs = protocol_attacks("rand", of(True), BALL, base=base)
    assert [(spec.label, spec.through) for spec in specs[-1:]] == [("transfer from the base", base)]
    assert [spec.attack.eot_iter for spec in specs[:-1]] == [20, 20]

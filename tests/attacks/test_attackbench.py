"""AttackBench runs this package's attacks."""

import sys
from unittest import mock

import pytest
import torch
from small_models import labelled
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.attacks import APGD, FABT, PGD, Square, for_attackbench

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain():
    return labelled(12, classes=5)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.4), ("l1", 2.0)])
def test_attackbench_runs_attacks_in_turn_within_its_budget(plain, norm, eps, monkeypatch):
    # it would read and write results of others there, which needs an account
    monkeypatch.setitem(sys.modules, "wandb", mock.MagicMock())
    attackbench = pytest.importorskip("attackbench")
    model, x, y = plain
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    attack = for_attackbench(APGD(steps=10), FABT(steps=5), Square(n_queries=20), eps=0.5)
    options = {"device": torch.device("cpu"), "epsilon": eps, "debug": True}
    long, short = (
        attackbench.run_attack(model, loader, attack, norm, query_budget=most, **options) for most in (2000, 8)
    )
    queries = torch.tensor(short["num_forwards"]) + torch.tensor(short["num_backwards"])
    assert queries.min() > 0 and queries.max() <= 9 and sum(short["num_backwards"]) > 0
    fell = torch.tensor(long["adv_success"])
    assert fell.any() and fell.sum() >= sum(short["adv_success"]) and not any(long["box_failures"])
    assert torch.tensor(long["distances"][norm])[fell].max() <= eps * (1 + 1e-4)
    assert long["metadata"]["attack_name"] == "apgd-fab-square"


def test_it_is_called_as_attackbench_calls_it_and_refuses_the_rest(plain):
    model, x, y = plain
    attack = for_attackbench(PGD(steps=3), eps=0.1)
    moved = (attack(model=model, inputs=x, labels=y, targeted=False, targets=None, threat_model="linf") - x).abs().max()
    assert 0.05 < moved <= 0.1 + 1e-6
    for refused in ({"targeted": True}, {"targets": y}, {"threat_model": "l0"}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match=r"targeted|norm|eps"):
            attack(model, x, y, **refused)
    for wrong, message in (((), "at least one attack"), ((APGD(eps=0.1),), "got eps in apgd")):
        with pytest.raises(ValueError, match=message):
            for_attackbench(*wrong, eps=0.1)

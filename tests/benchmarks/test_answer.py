"""The command answer adds up the parts of AutoAttack, and takes our protocols as they ran."""

import pytest
import torch
from torch import nn

from benchmarks.robustness import answer
from benchmarks.robustness.contests import FAST, Amount, Subject


@pytest.mark.parametrize("fast", [True, False])
def test_an_experts_images_are_judged_by_the_network_itself(monkeypatch, fast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    x = torch.rand(6, 1, 8, 8)
    attacked, dtypes = [], []
    model[0].register_forward_hook(lambda layer, given, out: dtypes.append(out.dtype))

    def found(subject, amount):
        attacked.append(subject.model)
        assert subject.model(x).dtype == torch.float32
        return x

    monkeypatch.setattr(answer, "found_by_autoattack", found)
    monkeypatch.setattr(answer, "fast_bfloat16", lambda device: fast)
    with torch.no_grad():
        y = model(x).argmax(1)
        wrong = answer.expert(Subject(model, x, torch.where(torch.arange(6) < 2, y, (y + 1) % 10), 0.1), Amount())
    assert wrong.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    (copy,) = attacked
    assert copy is not model and not any(weight.requires_grad for weight in copy.parameters())
    assert next(copy.parameters()).dtype == (torch.bfloat16 if fast else torch.float32)
    assert next(model.parameters()).dtype == torch.float32 and model[0].weight.requires_grad
    assert (torch.bfloat16 in dtypes) == fast


def test_a_random_defence_is_judged_by_fresh_draws(monkeypatch):
    torch.manual_seed(0)
    model = answer.Smoothed(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.05).eval()
    x, asked = torch.rand(4, 1, 8, 8), []

    def found(subject, amount, version):
        asked.append(any(weight.requires_grad for weight in subject.model.parameters()))
        return subject.model(x) is not None and x

    monkeypatch.setattr(answer, "found_by_autoattack", found)
    with torch.no_grad():
        y = model.network(x).argmax(1)
    subject = Subject(model, x, y, 0.1)
    frozen, plain = (answer.measured_random(subject, who, Amount(steps=2)) for who in (answer.FROZEN_RAND, answer.RAND))
    assert asked == [False, True] and frozen["forwards"] == plain["forwards"] == 4
    assert 0 <= frozen["left"] <= 4 and 0 <= frozen["one_draw"] <= 1
    ours = answer.measured_random(subject, FAST, Amount(steps=2))
    assert ours["forwards"] > ours["gradients"] > 0

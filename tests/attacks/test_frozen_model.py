"""Modules that PyTorch does not know of are frozen, and restored, as the registered ones are."""

import copy

import pytest
import torch
from torch import nn

from purify_fast.attacks import apgd, frozen, pgd
from purify_fast.model_state import hidden_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


class Holder(nn.Module):
    """A module that registers nothing of what it is given."""

    def __init__(self, call, **held):
        super().__init__()
        vars(self).update(held)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


WAYS = {
    "nets[0]": lambda made: Holder(lambda self, x: self.nets[0](x), nets=[made]),
    "nets['a']": lambda made: Holder(lambda self, x: self.nets["a"](x), nets={"a": made}),
    "plain": lambda made: Holder(lambda self, x: self.plain(x), plain=made),
    "0.nets[0]": lambda made: nn.Sequential(Holder(lambda self, x: self.nets[0](x), nets=[made])),
}


@pytest.mark.parametrize("where", WAYS)
def test_hidden_modules_are_frozen_and_restored(where):
    inner = net().train()
    inner[3].requires_grad_(False)
    model = WAYS[where](inner)
    places = [place for place, found in hidden_modules(model) if found is inner]
    assert places == [where]
    before = copy.deepcopy(inner.state_dict())
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    with frozen(model):
        assert not any(part.training for part in inner.modules())
        assert not any(parameter.requires_grad for parameter in inner.parameters())
    for attack in (pgd, apgd):
        attack(model, x, y, eps=0.1, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
    assert all(part.training for part in inner.modules())
    assert [parameter.requires_grad for parameter in inner.parameters()] == [True] * 4 + [False] * 2


def test_registered_modules_are_not_hidden_wherever_else_they_are():
    model = Holder(lambda self, x: self.part(x))
    model.part = net()
    model.again, model.methods = [model.part, model], {"forward": model.part.forward, "own": model.forward}
    model.register_forward_hook(model.part.forward)
    assert hidden_modules(model) == []

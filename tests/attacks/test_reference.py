"""The fast steps of PGD are those of its definition in plain PyTorch."""

import importlib

import pytest
import torch

from purify_fast.attacks import frozen, pgd

EPS = 0.1


@pytest.fixture
def reference():
    # The package's attribute is the function.
    return importlib.import_module("purify_fast.attacks.pgd").reference


@pytest.mark.parametrize("alpha", [EPS, EPS / 4])
def test_a_step_has_the_bits_of_the_definition(digits, reference, alpha):
    net, x, y = digits
    # A step of length 0 only draws the random start.
    start = pgd(net, x, y, EPS, steps=1, alpha=0.0, seed=2)
    assert not torch.equal(start, x)
    with frozen(net):
        wanted = reference(net, x, y, start, eps=EPS, alpha=alpha, steps=1)
        from_image = reference(net, x, y, x, eps=EPS, alpha=alpha, steps=1)
    assert torch.equal(pgd(net, x, y, EPS, steps=1, alpha=alpha, seed=2), wanted)
    assert torch.equal(pgd(net, x, y, EPS, steps=1, alpha=alpha, random_start=False), from_image)

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from purify_fast.kernels import pgd_step as kernel

op = import_module("purify_fast.ops.pgd_step")


def forward(*arguments, density: float = 0.05):
    return kernel.forward(*arguments, density)


def inputs(*shape: int, dtype=torch.float32, norm: int = 0) -> tuple:
    size = math.prod(shape[1:]) / 6 if norm == 2 else 1  # some l1 radii cut, others do not
    generator = torch.Generator().manual_seed(0)
    nat = torch.rand(shape, generator=generator, dtype=torch.float64)
    x = (nat + 0.2 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return (
        x.to(dtype),
        grad.to(dtype),
        nat.to(dtype),
        torch.linspace(0.01, 0.4, shape[0]) * size,
        torch.linspace(0.02, 1, shape[0]) * size,
    )


@pytest.mark.parametrize("size", [30, 9000])
@pytest.mark.parametrize("density", [1e-6, 0.05, 0.25, 1.0])
def test_l1_moves_the_largest_gradients(size, density):
    """As many as the reference moves, ties with the last too, but for those that the box stops: to the bit."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randint(-size // 8, size // 8, (2, size), generator=generator).float()
    x = torch.randint(0, 5, (2, size), generator=generator) / 4
    arguments = x, grad, x, torch.full((2,), 0.3), torch.full((2,), 1e6), 2, 0.0, 1.0
    got = forward(*arguments, density=density)
    assert torch.equal(got, op.reference(*arguments, density)) and not torch.equal(got, x)


def test_l1_of_a_nan_is_not_shrunk():
    """In a sample with a NaN the sum that decides is NaN, in one pass over it and in many."""
    for size in (40, 9000):
        x, grad, nat, alpha, _ = inputs(2, size, norm=2)
        x[0, 3] = torch.nan
        arguments = x, grad, nat, alpha, torch.zeros(2), 2, 0.0, 1.0
        torch.testing.assert_close(forward(*arguments), op.reference(*arguments), equal_nan=True)

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from purify_fast.kernels import pgd_step as kernel

op = import_module("purify_fast.ops.pgd_step")
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (2, 5001), (2, 17001))  # the last in several trips of a loop


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_values(within_budget, poisoned, norm, shape, dtype):
    arguments = inputs(*shape, dtype=dtype, norm=norm)
    got, same = forward(*arguments, norm, 0.1, 0.9), op.reference(*arguments, norm, 0.1, 0.9)
    assert got.is_contiguous()
    if norm == 0 and dtype != torch.bfloat16:
        assert torch.equal(got, same)
    within_budget(got, op.reference(*(a.double() for a in arguments), norm, 0.1, 0.9), same)


@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_gradients_without_a_direction_move_nothing(norm):
    nat = torch.full((6, 4), 0.5)
    grad = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0])[:, None].repeat(1, 4)
    grad[2:5, 1:] = 1.0
    arguments = nat, grad, nat, torch.full((6,), 0.01), torch.full((6,), 0.1), norm, 0.0, 1.0
    got = forward(*arguments)
    assert torch.equal(got[:2], nat[:2]) and not torch.equal(got[5], nat[5])
    torch.testing.assert_close(got, op.reference(*arguments))
    if norm > 0:
        assert torch.equal(got[2:5], nat[2:5])


@pytest.mark.parametrize("norm", [1, 2], ids=op.NORMS[1:])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e37])
def test_gradients_of_any_size_have_a_direction(scale, norm):
    nat, grad = torch.full((2, 12), 0.5), torch.zeros(2, 12)
    grad[0, 0], grad[1] = 3, -1
    step = forward(nat, grad * scale, nat, torch.full((2,), 0.1), torch.ones(2), norm, 0.0, 1.0) - nat
    torch.testing.assert_close(step.norm(p=3 - norm, dim=1), torch.full((2,), 0.1), rtol=1e-5, atol=0)


def test_constants_are_the_reference_s():
    assert kernel.HALVINGS.value == op.HALVINGS[torch.float32]


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


@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_nan_layouts_splits_and_empty(norm):
    x, grad, nat, alpha, eps = inputs(5, 4, 9, 7, norm=norm)
    whole = forward(x, grad, nat, alpha, eps, norm, 0.0, 1.0)
    parts = [forward(*(t[i] for t in (x, grad, nat, alpha, eps)), norm, 0.0, 1.0) for i in (slice(0, 2), slice(2, 5))]
    assert torch.equal(torch.cat(parts), whole)
    last = [t.to(memory_format=torch.channels_last) for t in (x, grad, nat)]
    strided = alpha.repeat_interleave(2)[::2], eps.repeat_interleave(2)[::2]
    assert torch.equal(forward(*last, *strided, norm, 0.0, 1.0), whole)
    x[1, 0, 0, 0], nat[2, 0, 0, 1] = torch.nan, torch.nan
    out = forward(x, grad, nat, alpha, eps, norm, 0.0, 1.0)
    assert out[1, 0, 0, 0].isnan() and out[2, 0, 0, 1].isnan() and out.isnan().sum() == 2
    empty = (x[:0], grad[:0], nat[:0], alpha[:0], eps[:0], norm, 0.0, 1.0)
    assert forward(*empty).shape == (0, 4, 9, 7)

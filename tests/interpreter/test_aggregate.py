from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import aggregate as kernel

op = import_module("purify_fast.ops.aggregate")
METHODS = range(len(op.METHODS))
SHAPES = ((1, 1, 2), (3, 8, 10), (2, 5, 101), (3, 64, 7), (2, 3, 1500), (1, 100, 130))


def random(*shape: int, scale: float = 3.0, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def test_the_constants_are_the_ops():
    names = (kernel.LSE, kernel.PEEL, kernel.MEAN, kernel.MEAN_SIGMOID, kernel.VOTE)
    assert [n.value for n in names] == [op.METHODS.index(n) for n in ("lse", "peel", "mean", "mean_sigmoid", "vote")]
    assert kernel.TANGENT.value == op.TANGENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_values_and_gradients(within_budget, poisoned, method, shape, dtype):
    logits, grad = random(*shape, dtype=dtype), random(shape[0], shape[2], scale=1.0, seed=1)
    within_budget(kernel.forward(logits, method), op.reference(logits.double(), method), op.reference(logits, method))
    golden = op.reference_backward(grad.double(), logits.double(), method)
    within_budget(kernel.backward(grad, logits, method), golden, op.reference_backward(grad, logits, method))


@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_more_samples_than_a_tile_holds(method):
    logits, grad = random(1, 5000, 3), random(1, 3, scale=1.0, seed=1)
    torch.testing.assert_close(kernel.forward(logits, method), op.reference(logits, method))
    got, expected = kernel.backward(grad, logits, method), op.reference_backward(grad, logits, method)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_saturated_logits(within_budget, method):
    """Margins far beyond where exp and log(sigmoid) end; peel on its tangent."""
    for scale in (30.0, 300.0):
        logits, grad = random(4, 8, 10, scale=scale), random(4, 10, scale=1.0, seed=1)
        out, gradient = kernel.forward(logits, method), kernel.backward(grad, logits, method)
        assert out.isfinite().all() and gradient.isfinite().all()
        same = op.reference(logits, method)
        assert torch.equal(out.argmax(1), same.argmax(1))
        within_budget(out, op.reference(logits.double(), method), same)
        golden = op.reference_backward(grad.double(), logits.double(), method)
        within_budget(gradient, golden, op.reference_backward(grad, logits, method))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_non_finite_logits_are_not_hidden(method, value):
    logits, grad = random(3, 4, 5), random(3, 5, scale=1.0, seed=1)
    logits[1, 2, 3] = value
    logits[2, :, 1] = value
    for got, expected in (
        (kernel.forward(logits, method), op.reference(logits, method)),
        (kernel.backward(grad, logits, method), op.reference_backward(grad, logits, method)),
    ):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_vote_breaks_ties_as_argmax():
    logits = torch.randint(0, 3, (20, 9, 6), generator=torch.Generator().manual_seed(0)).float() - 1
    logits[0, 0, 4], logits[1, 2] = torch.nan, -torch.inf
    assert torch.equal(kernel.forward(logits, 4), op.reference(logits, 4))


@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_any_layout_and_any_split(method):
    logits = random(5, 10, 8).transpose(1, 2)
    whole = kernel.forward(logits, method)
    assert torch.equal(whole, kernel.forward(logits.contiguous(), method))
    assert torch.equal(torch.cat([kernel.forward(x, method) for x in logits.split(2)]), whole)
    one = torch.ones(()).expand(5, 10)  # as the gradient of a sum comes
    assert torch.equal(kernel.backward(one, logits, method), kernel.backward(one.contiguous(), logits, method))
    assert kernel.forward(logits[:0], method).shape == (0, 10)
    assert kernel.backward(one[:0], logits[:0], method).shape == (0, 8, 10)

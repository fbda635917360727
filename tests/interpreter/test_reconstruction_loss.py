from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from purify_fast.kernels import reconstruction_loss as kernel

op = import_module("purify_fast.ops.reconstruction_loss")
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (2, 3, 64, 64), (2, 8193))


def inputs(*shape: int, dtype=torch.float32, scale: float = 4.0) -> tuple:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, poisoned, shape, dtype):
    for scale in (1.0, 30.0):
        logits, target = inputs(*shape, dtype=dtype, scale=scale)
        grad = torch.linspace(-1, 2, shape[0])
        within_budget(
            kernel.forward(logits, target),
            op.reference(logits.double(), target.double()),
            op.reference(logits, target),
        )
        golden = op.reference_backward(grad.double(), logits.double(), target.double())
        within_budget(kernel.backward(grad, logits, target), golden, op.reference_backward(grad, logits, target))


def test_saturated_logits_are_exact():
    logits, wrong = torch.tensor([[200.0, -200.0], [1e4, -1e4]]), torch.tensor([[0.0, 1.0]] * 2)
    torch.testing.assert_close(kernel.forward(logits, wrong), torch.tensor([400.0, 2e4]))
    tiny = kernel.forward(torch.tensor([[30.0, 30.0], [200.0, 200.0]]), torch.ones(2, 2))
    torch.testing.assert_close(tiny, torch.tensor([2 * math.exp(-30.0), 0.0]), rtol=1e-5, atol=0)


def test_mixed_dtypes_layouts_splits_and_nan():
    logits, target = inputs(5, 4, 9, 7)
    whole = kernel.forward(logits, target)
    assert torch.equal(
        torch.cat([kernel.forward(*p) for p in zip(logits.split(2), target.split(2), strict=True)]), whole
    )
    padded = torch.full((7, 6, 11, 12), torch.nan)
    padded[1:6, 1:5, 2:11, 3:10] = logits
    grad = torch.ones(()).expand(5)
    for x, t in (
        (padded[1:6, 1:5, 2:11, 3:10], target),
        (logits.to(memory_format=torch.channels_last), target.to(memory_format=torch.channels_last)),
    ):
        assert torch.equal(kernel.forward(x, t), whole)
        got = kernel.backward(grad, x, t)
        assert got.is_contiguous() and torch.equal(got, kernel.backward(grad.contiguous(), logits, target))
    half = logits.half(), target.bfloat16()
    torch.testing.assert_close(kernel.forward(*half), op.reference(*half))
    logits[1, 0, 0, 0], target[2, 0, 0, 0] = torch.nan, torch.nan
    assert kernel.forward(logits, target).isnan().tolist() == [False, True, True, False, False]
    assert kernel.forward(logits[:0], target[:0]).shape == (0,)
    assert kernel.backward(grad[:0], logits[:0], target[:0]).shape == (0, 4, 9, 7)
    assert torch.equal(kernel.forward(torch.zeros(3, 0), torch.zeros(3, 0)), torch.zeros(3))

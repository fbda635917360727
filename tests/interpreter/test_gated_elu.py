from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import gated_elu as kernel

op = import_module("purify_fast.ops.gated_elu")
# dim 1 of contiguous features; dim 3 of channels_last ones: rows of 1, 12 and 40 numbers
SHAPES = (
    ((1, 2), 1),
    ((2, 6, 33, 31), 1),
    ((2, 4, 30, 30), 1),
    ((2, 5, 7, 24), 3),
    ((3, 9, 11, 2), 3),
    ((1, 3, 4, 80), 3),
)


def inputs(*shape: int, dtype=torch.float32, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values_and_gradients(within_budget, poisoned, shape, dim, dtype):
    for scale in (0.1, 3.0, 40.0):
        features = inputs(*shape, dtype=dtype, scale=scale)
        same = op.reference(features, dim)
        within_budget(kernel.forward(features, dim), op.reference(features.double(), dim), same)
        grad = inputs(*same.shape, dtype=dtype, seed=1)
        golden = op.reference_backward(grad.double(), features.double(), dim)
        within_budget(kernel.backward(grad, features, dim), golden, op.reference_backward(grad, features, dim))


def test_layouts_splits_nan_and_nothing():
    features = inputs(5, 6, 9, 7)
    whole = kernel.forward(features, 1)
    assert whole.is_contiguous() and torch.equal(torch.cat([kernel.forward(x, 1) for x in features.split(2)]), whole)
    last = features.permute(0, 2, 3, 1)
    assert torch.equal(kernel.forward(last, 3).permute(0, 3, 1, 2), whole)
    one = torch.ones(()).expand(whole.shape)  # as the gradient of a sum comes
    assert torch.equal(kernel.backward(one, features, 1), kernel.backward(one.contiguous(), features, 1))
    features[1, 0, 2, 3], features[2, 4, 0, 0] = torch.nan, torch.nan
    out, slopes = kernel.forward(features, 1), kernel.backward(one, features, 1)
    assert out[1, 0, 2, 3].isnan() and out[2, 1, 0, 0].isnan() and out.isnan().sum() == 2 and slopes.isnan().sum() == 4
    assert kernel.forward(features[:0], 1).shape == (0, 3, 9, 7)
    assert kernel.backward(one[:0], features[:0], 1).shape == (0, 6, 9, 7)


def test_far_out_nothing_is_lost():
    features = torch.tensor([[1e4, 200.0], [-1e4, 200.0], [2.0, -200.0], [-1e-6, 0.0]])
    torch.testing.assert_close(
        kernel.forward(features, 1), torch.tensor([[1e4], [-1.0], [0.0], [-5e-7]]), rtol=2e-6, atol=0
    )
    slopes = kernel.backward(torch.ones(4, 1), features, 1)
    wanted = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, -2.5e-7]])
    torch.testing.assert_close(slopes, wanted, rtol=3e-6, atol=0)

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import hyperplane_projection as kernel

op = import_module("purify_fast.ops.hyperplane_projection")
SHAPES = ((1, 1), (4, 1, 16, 16), (4, 3, 33, 31), (4, 5001))  # the last ones in several trips of a loop


def inputs(*shape: int, dtype=torch.float32) -> tuple:
    """Planes nearby, on either side, and out of reach."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w[torch.rand(shape, generator=generator) < 0.1] = 0
    w = w.to(dtype)
    flat = w.double().flatten(1)
    far = torch.tensor([0.02, -0.2, 0.4, -2.0])[: shape[0]] * flat.abs().sum(1)
    return x, w, ((flat * x.double().flatten(1)).sum(1) + far).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_values(poisoned, norm, shape, dtype):
    x, w, b = inputs(*shape, dtype=dtype)
    got = kernel.forward(x, w, b, norm, 0.0, 1.0)
    golden = op.reference(x.double(), w.double(), b.double(), norm, 0.0, 1.0)
    assert got.is_contiguous() and got.dtype == dtype
    # The interpreter truncates to bfloat16. In l1 one coordinate takes the rounding of the sum over all.
    torch.testing.assert_close(got.double(), golden, rtol=2 * torch.finfo(dtype).eps, atol=1e-3 if norm == 2 else 1e-4)
    if dtype == torch.float32:
        reached, wanted = ((w.double() * (x + d)).flatten(1).sum(1) for d in (got, golden))
        assert ((reached - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()


@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_degenerate_rows(norm):
    """No gradient, tiny and huge ones, what is no number, ties, a plane through the point, and x on the border."""
    x = torch.full((9, 4), 0.5)
    w, b = torch.ones(9, 4), torch.full((9,), 3.0)
    w[0], w[1], b[1], w[2], b[2] = 0.0, 1e-40, 3e-40, 1e38, 3e38
    w[3, 1], w[4, 2], b[5], b[6], x[7, 0] = torch.nan, -torch.inf, torch.nan, 2.0, torch.nan
    x[8, :2] = 1.0
    got = kernel.forward(x, w, b, norm, 0.0, 1.0)
    torch.testing.assert_close(got, op.reference(x, w, b, norm, 0.0, 1.0))
    assert (got[[0, 5, 6, 7]] == 0).all()
    torch.testing.assert_close(got[[1, 2]], torch.full((2, 4), 0.25))


@pytest.mark.parametrize("norm", [0, 1, 2], ids=op.NORMS)
def test_layouts_splits_and_empty(norm):
    x, w, b = inputs(4, 4, 9, 7)
    whole = kernel.forward(x, w, b, norm, 0.0, 1.0)
    parts = [kernel.forward(x[i], w[i], b[i], norm, 0.0, 1.0) for i in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat(parts), whole)
    last = [t.to(memory_format=torch.channels_last) for t in (x, w)]
    assert torch.equal(kernel.forward(*last, b.repeat_interleave(2)[::2], norm, 0.0, 1.0), whole)
    assert kernel.forward(x[:0], w[:0], b[:0], norm, 0.0, 1.0).shape == (0, 4, 9, 7)

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import hyperplane_projection as kernel

op = import_module("purify_fast.ops.hyperplane_projection")


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

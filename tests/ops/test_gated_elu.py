import math

import pytest
import torch

from purify_fast.ops import gated_elu

pytestmark = pytest.mark.interpreter


def test_published_values(backend):
    features = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(gated_elu(features), torch.tensor([[0.7310586], [-0.3160603]]), rtol=0, atol=1e-7)


def test_far_out_nothing_is_lost(backend):
    """Where exp(a), 1 - s(b) or exp(-b) would overflow, or lose all their digits."""
    features = torch.tensor([[1e4, 200.0], [-1e4, 200.0], [2.0, -200.0], [2.0, -30.0], [-1e-6, 0.0]])
    leaf = features.requires_grad_()
    out = gated_elu(leaf)
    wanted = torch.tensor([[1e4], [-1.0], [0.0], [2 * math.exp(-30.0)], [-5e-7]])
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=1e-30)
    (got,) = torch.autograd.grad(out.sum(), leaf)
    tail = math.exp(-30.0)
    slopes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [tail, 2 * tail], [0.5, -2.5e-7]])
    torch.testing.assert_close(got, slopes, rtol=3e-6, atol=1e-30)
    if backend == "reference":  # autograd's own slope forms 1 - s(b)
        return
    leaf = torch.tensor([[1.0, 30.0]], requires_grad=True)
    (got,) = torch.autograd.grad(gated_elu(leaf).sum(), leaf)
    torch.testing.assert_close(got, torch.tensor([[1.0, tail]]), rtol=1e-6, atol=0)

import math
from importlib import import_module

import pytest
import torch
from op_cases import normal

from purify_fast.ops import gated_elu

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.gated_elu")


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


def test_no_copy_of_the_features_in_either_layout(monkeypatch):
    """Backward saves the features' own storage, and nothing else."""
    monkeypatch.setitem(op.OP.chosen, (torch.device("cpu"), ""), 0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = normal(2, 6, 5, 7, dtype=torch.float32).to(memory_format=memory_format).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            gated_elu(leaf)
        assert [x.untyped_storage().data_ptr() for x in saved] == [leaf.untyped_storage().data_ptr()]

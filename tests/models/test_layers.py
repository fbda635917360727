"""The literal layers are torch's, and what they are there for: a dynamic compile that does not start over."""

import pytest
import torch
from fake_cuda import MODE
from torch import nn

from purify_fast.models import layers
from purify_fast.models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU


@pytest.mark.parametrize("training", [False, True])
def test_they_compute_what_torchs_do(training):
    pairs = (BatchNorm2d(4), nn.BatchNorm2d(4)), (BatchNorm1d(4), nn.BatchNorm1d(4))
    for (literal, plain), shape in zip(pairs, ((5, 4, 3, 2), (5, 4)), strict=True):
        x = torch.randn(shape)
        out = [layer.train(training)(x) for layer in (literal, plain)]
        assert torch.equal(*out)
        assert literal.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(literal.state_dict()[name], value) for name, value in plain.state_dict().items())
    x = torch.randn(7)
    assert torch.equal(LeakyReLU()(x), nn.LeakyReLU(0.2)(x))


def test_on_cuda_the_statistics_of_all_processes_are_those_of_torchs_function(monkeypatch):
    """The function has a kernel on CUDA only."""
    layer, seen = BatchNorm2d(4).train(), []
    with MODE:
        x = torch.empty(2, 4, 3, 3, device="cuda")
    apply = staticmethod(lambda *given: seen.extend(given) or given[0])
    monkeypatch.setattr(layers, "SyncBatchNorm", type("SyncBatchNorm", (), {"apply": apply}))
    monkeypatch.setattr(layers, "processes", lambda: (0, 2))
    assert layer(x) is x and layer.num_batches_tracked == 1
    wanted = x, layer.weight, layer.bias, layer.running_mean, layer.running_var
    assert all(one is other for one, other in zip(seen[:5], wanted, strict=True))
    assert seen[5:] == [layer.eps, layer.momentum, torch.distributed.group.WORLD, 2]

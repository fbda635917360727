"""The literal layers are torch's, and what they are there for: a dynamic compile that does not start over."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import get_compilation_metrics

from purify_fast.models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU


@pytest.mark.parametrize("training", [False, True])
def test_they_compute_what_torchs_do(training):
    for literal, plain, shape in (
        (BatchNorm2d(4), nn.BatchNorm2d(4), (5, 4, 3, 2)),
        (BatchNorm1d(4), nn.BatchNorm1d(4), (5, 4)),
    ):
        x = torch.randn(shape)
        out = [layer.train(training)(x) for layer in (literal, plain)]
        assert torch.equal(*out)
        assert literal.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(literal.state_dict()[name], value) for name, value in plain.state_dict().items())
    x = torch.randn(7)
    assert torch.equal(LeakyReLU()(x), nn.LeakyReLU(0.2)(x))


@pytest.mark.slow
def test_a_dynamic_compile_does_not_start_over():
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BatchNorm2d(4), LeakyReLU())
    compiled = torch.compile(network, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, 3, 8, 8))
    assert not any("Tensorify" in reason for reason in get_compilation_metrics()[-1].restart_reasons)

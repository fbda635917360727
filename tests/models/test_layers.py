"""The literal layers are torch's, and what they are there for: a dynamic compile that does not start over."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import get_compilation_metrics

from purify_fast.models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU


def network(norm, activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, activation)


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


@pytest.mark.parametrize(
    ("norm", "activation", "restarts"),
    [
        pytest.param(lambda: BatchNorm2d(4), LeakyReLU, False, id="literal"),
        pytest.param(lambda: nn.BatchNorm2d(4), LeakyReLU, True, id="torch's BatchNorm"),
        pytest.param(lambda: BatchNorm2d(4), lambda: nn.LeakyReLU(0.2), True, id="torch's LeakyReLU"),
    ],
)
def test_a_dynamic_compile_starts_over_for_torchs_numbers_only(norm, activation, restarts):
    # when this fails for torch's own layers, the literal ones are no longer needed
    torch._dynamo.reset()
    compiled = torch.compile(network(norm(), activation()), dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, 3, 8, 8))
    restarted = get_compilation_metrics()[-1].restart_reasons
    assert any("Tensorify" in reason for reason in restarted) == restarts

"""Optimizers that take their step in one kernel, and convolutions whose algorithms are raced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from purify_fast.speed.precision import raced_convolutions
from purify_fast.training import Lookahead
from purify_fast.training.step import fuse

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.01, foreach=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, foreach=True),
}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, OPTIMIZERS[name](model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer_computes_the_same_and_resumes_either_way(name):
    plain, fused = made(name), made(name)
    assert fuse(fused[1], True) and fused[1].param_groups[0]["fused"] and not fused[1].param_groups[0]["foreach"]
    stepped(*plain, 3)
    stepped(*fused, 3)
    torch.testing.assert_close(plain[0].state_dict(), fused[0].state_dict(), rtol=1e-5, atol=1e-6)
    for source, then in ((fused, False), (plain, True)):
        model, optimizer = made(name)
        model.load_state_dict(source[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(source[1].state_dict()))
        assert fuse(optimizer, then) == then
        group = optimizer.param_groups[0]
        assert (group["fused"], group["foreach"]) == ((True, False) if then else (None, True)) or name == "SGD"
        other = copy.deepcopy(source)
        stepped(model, optimizer, 2)
        stepped(*other, 2)
        torch.testing.assert_close(model.state_dict(), other[0].state_dict(), rtol=1e-5, atol=1e-6)


def test_what_has_no_fused_kernel_stays_as_it_is():
    weights = [nn.Parameter(torch.ones(2))]
    for optimizer in (
        Lookahead(torch.optim.RAdam(weights, foreach=True), 2, 0.5),
        torch.optim.AdamW(weights, capturable=True),
        torch.optim.Adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
    ):
        before = copy.deepcopy(optimizer.param_groups[0]["foreach"])
        assert not fuse(optimizer, True) and optimizer.param_groups[0]["foreach"] == before


def test_convolutions_are_raced_only_where_it_is_asked_for():
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda")
    assert not cudnn.benchmark
    for mode, device, raced in (("auto", gpu, True), ("off", gpu, False), ("on", torch.device("cpu"), False)):
        with raced_convolutions(mode, device):
            assert cudnn.benchmark == raced
        assert not cudnn.benchmark
    cudnn.deterministic = True
    try:
        for mode, raced in (("auto", False), ("on", True)):
            with raced_convolutions(mode, gpu):
                assert cudnn.benchmark == raced
    finally:
        cudnn.deterministic = False
    with (
        pytest.raises(ValueError, match="mode must be one of auto, on, off, got 'yes'"),
        raced_convolutions("yes", gpu),
    ):
        pass

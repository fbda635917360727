"""Optimizers: Lookahead and its exact resumption, one kernel for all weights, and convolutions that are raced."""

import copy

import pytest
import torch
from cuda_launches import CudaLaunches
from torch import nn

from purify_fast.speed.precision import raced_convolutions
from purify_fast.training import Lookahead
from purify_fast.training.optimizers import fuse, load_state


def problem(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 3), torch.randn(32, 6), torch.randn(32, 3)


def radam(model, lr=0.05):
    return torch.optim.RAdam(model.parameters(), lr=lr, foreach=True)


def steps(optimizer, model, x, y, count):
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()


def test_fact_13_after_the_sixth_step_the_weights_are_mixed():
    fast, x, y = problem()
    model, *_ = problem()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer, alone = Lookahead(radam(model)), radam(fast)
    for step in range(1, 6):
        steps(optimizer, model, x, y, 1)
        steps(alone, fast, x, y, 1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fast.parameters(), strict=True)), step
    steps(optimizer, model, x, y, 1)
    steps(alone, fast, x, y, 1)
    for mixed, ahead, begin in zip(model.parameters(), fast.parameters(), start, strict=True):
        torch.testing.assert_close(mixed, 0.8 * ahead + 0.2 * begin)
        assert not torch.equal(mixed, ahead)


def test_a_slow_step_on_cuda_is_two_launches_whatever_the_number_of_weights():
    weights = [nn.Parameter(torch.randn(n, 3)) for n in range(1, 21)]
    optimizer = Lookahead(torch.optim.SGD(weights, lr=0.0), k=1)
    with CudaLaunches() as counted:
        optimizer.step()
    assert counted.by_name == {"_foreach_lerp_": 1, "_foreach_copy_": 1}


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_without_a_fused_kernel_is_not_changed(fused):
    optimizer = torch.optim.Adadelta(problem()[0].parameters())
    before = copy.deepcopy(optimizer.state_dict())
    fuse(optimizer, fused)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("wrong", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        Lookahead(radam(nn.Linear(1, 1)), **wrong)


OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.01, foreach=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, foreach=True),
    "Lookahead": lambda weights: Lookahead(torch.optim.Adam(weights, lr=0.01, foreach=True), k=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer_computes_the_same_and_resumes_either_way(name):
    """Also from the contiguous tensors of a checkpoint, where the weights lie in channels_last."""

    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 3, 3), nn.Flatten()).to(memory_format=torch.channels_last)
        return OPTIMIZERS[name](model.parameters()), model, torch.rand(4, 16, 4, 4) / 10, torch.randn(4, 12)

    plain, fused = started(), started()
    fuse(fused[0], True)
    assert fused[0].param_groups[0]["fused"] and not fused[0].param_groups[0]["foreach"]
    steps(*plain, 3)
    steps(*fused, 3)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(plain[1].state_dict(), fused[1].state_dict(), **close)
    for source, then in ((fused, False), (plain, True)):
        resumed = started()
        resumed[1].load_state_dict(source[1].state_dict())
        state = copy.deepcopy(source[0].state_dict())
        for own in state.get("inner", state)["state"].values():
            own |= {key: value.contiguous() for key, value in own.items() if isinstance(value, torch.Tensor)}
        load_state(resumed[0], state)
        fuse(resumed[0], then)
        group = resumed[0].param_groups[0]
        assert (group["fused"], group["foreach"]) == ((True, False) if then else (None, True)) or name == "SGD"
        other = copy.deepcopy(source)
        steps(*resumed, 2)
        steps(*other, 2)
        torch.testing.assert_close(resumed[1].state_dict(), other[1].state_dict(), **close)


def test_convolutions_are_raced_only_where_it_is_asked_for(monkeypatch):
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda")
    for deterministic, mode, device, raced in (
        (False, "auto", gpu, True),
        (False, "off", gpu, False),
        (False, "on", torch.device("cpu"), False),
        (True, "auto", gpu, False),
        (True, "on", gpu, True),
    ):
        monkeypatch.setattr(cudnn, "deterministic", deterministic)
        with raced_convolutions(mode, device):
            assert cudnn.benchmark == raced
        assert not cudnn.benchmark

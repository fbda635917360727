"""Lookahead around RAdam, as the official code runs it, and its exact resumption."""

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_launches import CudaLaunches

from purify_fast import data
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, Lookahead, fit
from purify_fast.training.attack import TrainingAttack
from purify_fast.training.checkpoint import read_tree, write_tree


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


def radam_by_hand(start, gradient, lr, count, betas=(0.9, 0.999), eps=1e-8):
    """Liu et al. 2020 in the official code's variant: momentum steps until the rectified average is 5 long. float64."""
    w, m, v, rectified = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    longest = 2 / (1 - betas[1]) - 1
    for t in range(1, count + 1):
        g = gradient(w)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        length = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        if length >= 5:
            rectified.append(t)
            factor = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
            step = math.sqrt((1 - betas[1] ** t) * factor) / (1 - betas[0] ** t)
            w = w - lr * step * m / (v.sqrt() + eps)
        else:
            w = w - lr * m / (1 - betas[0] ** t)
    return w, rectified


@pytest.mark.parametrize("count", [1, 5, 6, 7, 40])
def test_fact_13_torchs_radam_is_the_official_variant(count):
    torch.manual_seed(0)
    a, b = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    matrix = a @ a.T / 5 + torch.eye(5, dtype=torch.float64)
    start = torch.randn(5, dtype=torch.float64)
    want, rectified = radam_by_hand(start, lambda w: matrix @ w - b, 0.01, count)
    assert rectified == list(range(6, count + 1))
    w = start.clone().requires_grad_()
    optimizer = torch.optim.RAdam([w], lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        (0.5 * w @ matrix @ w - b @ w).backward()
        optimizer.step()
    torch.testing.assert_close(w.detach(), want, rtol=1e-10, atol=1e-12)


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


def test_the_slow_weights_are_those_of_the_last_slow_step():
    model, x, y = problem()
    optimizer = Lookahead(radam(model), k=3)
    steps(optimizer, model, x, y, 3)
    slow = [p.detach().clone() for p in model.parameters()]
    steps(optimizer, model, x, y, 2)
    assert not torch.equal(model.weight, slow[0])
    optimizer.load_slow()
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), slow, strict=True))


def test_the_learning_rate_of_its_groups_is_the_inner_optimisers():
    model, x, y = problem()
    optimizer = Lookahead(radam(model))
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.weight.detach().clone()
    steps(optimizer, model, x, y, 2)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("at", [3, 6, 8])
def test_resumed_from_a_file_it_goes_on_to_the_bit(tmp_path, at):
    model, x, y = problem()
    optimizer = Lookahead(radam(model))
    steps(optimizer, model, x, y, at)
    write_tree(tmp_path / "state", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(optimizer, model, x, y, 20 - at)
    other, *_ = problem(1)
    resumed = Lookahead(radam(other))
    saved = read_tree(tmp_path / "state")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, other, x, y, 20 - at)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    optimizer.load_slow()
    resumed.load_slow()
    assert torch.equal(other.weight, model.weight) and resumed.param_groups is resumed.inner.param_groups


def test_fit_leaves_the_slow_weights_in_the_model():
    class Task(ClassifierTask):
        def __init__(self, model):
            super().__init__(model, ClassifierConfig())
            self.optimizer = Lookahead(torch.optim.RAdam(model.parameters()), k=4)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    task = Task(model)
    x = torch.randint(0, 256, (48, 1, 4, 4), dtype=torch.uint8)
    fit(task, x, torch.arange(48) % 2, FitConfig(2, 16))
    assert task.optimizer.steps == 6  # two fast steps since the last slow one
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), task.optimizer._slow, strict=True))


class Interrupted(RuntimeError):
    pass


def carso_run(folder, stop=None):
    """Training as published, on few images; raises before step ``stop``."""
    torch.manual_seed(0)
    made = Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)
    config = CarsoConfig(
        attack=TrainingAttack(eps=0.2, steps=1), reduction="sum", optimizer="radam_lookahead", schedule="published"
    )
    task, done = CarsoTask(made, config), []
    step = task.training_step

    def stopping(batch):
        if len(done) == stop:
            raise Interrupted
        done.append(batch.epoch)
        return step(batch)

    task.training_step = stopping
    digits = data.load_dataset("digits")
    fit(task, digits.x_train[:128], digits.y_train[:128], FitConfig(5, 32, checkpoint_seconds=0), folder)
    return made


def test_an_interrupted_published_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    whole = carso_run(tmp_path / "whole")
    for stop in (5, 3, 7):  # within an epoch; before and after slow steps
        with pytest.raises(Interrupted):
            carso_run(tmp_path / "parts", stop)
    resumed = carso_run(tmp_path / "parts")
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("wrong", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="need k >= 1 and 0 < alpha <= 1"):
        Lookahead(radam(nn.Linear(1, 1)), **wrong)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(twin):
    model, x, y = problem()
    optimizer = Lookahead(radam(model), 3)
    steps(optimizer, model, x, y, 4)
    other, copied = twin((model, optimizer))
    assert copied.param_groups is copied.inner.param_groups
    steps(optimizer, model, x, y, 5)
    assert not torch.equal(other.weight, model.weight)
    steps(copied, other, x, y, 5)
    assert torch.equal(other.weight, model.weight)

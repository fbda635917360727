"""A loop that is computed again step by step: its gradients, its draws, its memory."""

import itertools
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from purify_fast.attacks import checkpointed_steps
from purify_fast.speed import memory

MODULE = sys.modules["purify_fast.attacks.checkpointed_steps"]


def plain(step, x, n):
    for i in range(n):
        x = step(x, i)
    return x


def network(channels=2, width=4, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("keep", [0, 2, 9, "auto"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_gradients_are_those_of_plain_autograd(n, keep):
    net = network()

    def step(x, i):
        return x + 0.3 * net(x) * (i + 1) - 0.1 * x.sin()

    results = []
    for run in (plain, checkpointed_steps):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=generator).requires_grad_()
        weights = list(net.parameters())
        options = {} if run is plain else {"parameters": weights, "keep": keep}
        out = run(step, x, n, **options)
        results.append([out, *torch.autograd.grad(out.cos().sum(), [x, *weights], allow_unused=True)])
    for want, got in zip(*results, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_steps_that_draw_draw_the_same_again():
    """Dropout, and the generators are afterwards where the plain loop leaves them."""
    dropped = nn.Dropout(0.5)
    results = []
    for run in (plain, checkpointed_steps, *(partial(checkpointed_steps, keep=keep) for keep in (2, "auto"))):
        torch.manual_seed(3)
        x = torch.ones(4, 6, requires_grad=True)
        out = run(lambda x, i: dropped(x) + 0.1 * torch.randn_like(x), x, 4)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), x), torch.rand(3)))
    for again in results[1:]:
        for want, got in zip(results[0], again, strict=True):
            assert torch.equal(want, got)
    # without the states the noise is another when it is drawn again, and so would be the gradient
    out = checkpointed_steps(lambda x, i: dropped(x), x, 4, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=r"step must return the same result .*, but step 3 does not"):
        out.sum().backward()


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("source", ["generator", "numpy", "count"])
def test_a_step_that_draws_other_numbers_again_is_refused(source, size, keep):
    def gradient(run, **options):
        own, count = torch.Generator().manual_seed(1), itertools.count()
        numbers = np.random.default_rng(1)

        def step(x, i):
            if source == "generator":
                noise = torch.randn(x.shape, dtype=x.dtype, generator=own)
            else:
                noise = torch.from_numpy(numbers.normal(size=x.shape)) if source == "numpy" else 0.1 * next(count)
            return torch.sin(x + size * noise) + 0.1 * x

        x = torch.linspace(0, 1, 30, dtype=torch.float64).view(2, 15).requires_grad_()
        return torch.autograd.grad(run(step, x, 6, **options).sum(), x)[0]

    wanted = gradient(plain)
    with pytest.raises(RuntimeError, match=r"from a generator of its own.*keep=n computes no step again"):
        gradient(checkpointed_steps, keep=keep)
    assert torch.equal(gradient(checkpointed_steps, keep=6), wanted)


def test_autocast_is_the_same_when_a_step_is_computed_again():
    net = network(dtype=torch.float32)
    gradients = []
    for run, options in ((plain, {}), (checkpointed_steps, {"parameters": list(net.parameters())})):
        x = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(lambda x, i: x + net(x).float(), x, 3, **options)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *net.parameters()]))
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
        assert got.norm() > 0


def test_what_is_wanted_of_a_step_is_checked():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        checkpointed_steps(lambda x, i: x, x, -1)
    for keep in (-1, True, 1.5, "all"):
        with pytest.raises(ValueError, match='keep must be "auto" or a number of steps, at least 0, got'):
            checkpointed_steps(lambda x, i: x, x, 2, keep=keep)
    for keep in (0, 2, "auto"):
        with pytest.raises(RuntimeError, match="step must not write into its x, but step 0 did"):
            checkpointed_steps(lambda x, i: x.mul_(2), x.clone(), 2, keep=keep)
    out = checkpointed_steps(lambda x, i: x.detach() * 2, x, 2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


def test_nothing_is_kept_where_no_gradient_is_wanted():
    out = checkpointed_steps(lambda x, i: 2 * x, torch.ones(2), 3)
    assert torch.equal(out, torch.full((2,), 8.0)) and out.grad_fn is None
    with torch.no_grad():
        assert checkpointed_steps(lambda x, i: 2 * x, torch.ones(2, requires_grad=True), 3).grad_fn is None


def steps_computed_again(n, keep, free, monkeypatch):
    """How often a loop's steps are called in all, beside the n that each prediction takes."""
    net, calls = network(3, 32, torch.float32), []
    monkeypatch.setattr(MODULE, "free_memory", lambda device: free)

    def step(x, i):
        calls.append(i)
        # a first step that does less than the others
        return x - 0.01 * net(x) if i else 0.9 * x

    x = torch.rand(2, 3, 16, 16).requires_grad_()
    torch.autograd.grad(checkpointed_steps(step, x, n, keep=keep).sum(), x)
    return len(calls) - n


def test_as_many_steps_are_kept_as_fit_into_a_quarter_of_the_free_memory(monkeypatch):
    measured = partial(steps_computed_again, 20, monkeypatch=monkeypatch)
    assert [measured(keep, 0) for keep in (0, 7, 30)] == [20, 13, 0]
    # where there is no room, those remain by which it is measured
    assert [measured("auto", free) for free in (0, 10**12)] == [17, 0]
    # what enters each of the three layers of a step
    one = 2 * (3 + 32 + 32) * 16 * 16 * 4
    assert [measured("auto", int(4 * (room + 0.5) * one)) for room in (5, 11)] == [12, 6]


def test_a_capture_asks_the_device_for_its_memory_before_it_begins(monkeypatch):
    cuda, tensors, capturing = torch.device("cuda"), [20], [False]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {False: (100, 1000)}[capturing[0]])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: tensors[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert memory.free_memory(cuda) == 130
    with memory.memory_of_capture(cuda):
        capturing[0] = True
        assert memory.free_memory(cuda) == 130
        # What the loop has kept is no longer free.
        tensors[0] = 60
        assert memory.free_memory(cuda) == 90
    # The memory was not measured before a capture of the user.
    assert memory.free_memory(cuda) == 0

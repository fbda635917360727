from importlib import import_module

import pytest
import torch

from purify_fast.kernels import apgd_step, pgd_step as kernel

op = import_module("purify_fast.ops.pgd_step")


@pytest.mark.parametrize("size", [30, 9000])
@pytest.mark.parametrize("density", [1e-6, 0.05, 0.25, 1.0])
def test_l1_moves_the_largest_gradients(size, density):
    """As many as the reference moves, ties with the last too, but for those that the box stops: to the bit."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randint(-size // 8, size // 8, (2, size), generator=generator).float()
    x = torch.randint(0, 5, (2, size), generator=generator) / 4
    arguments = x, grad, x, torch.full((2,), 0.3), torch.full((2,), 1e6), 2, 0.0, 1.0, density
    got = kernel.forward(*arguments)
    assert torch.equal(got, op.reference(*arguments)) and not torch.equal(got, x)


@pytest.mark.parametrize("size", [40, 9000])
def test_l1_of_a_nan_is_not_shrunk(size):
    """In a sample with a NaN the sum that decides is NaN, in one pass over it and in many."""
    x, grad, nat = torch.rand(3, 2, size, generator=torch.Generator().manual_seed(0))
    x[0, 3] = torch.nan
    arguments = x, grad - 0.5, nat, torch.tensor([0.01, 0.4]) * size / 6, torch.zeros(2), 2, 0.0, 1.0, 0.05
    torch.testing.assert_close(kernel.forward(*arguments), op.reference(*arguments), equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 3, 9, 15), (1, 4, 8, 8), (3, 1, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linf_reads_a_gradient_in_channels_last_without_a_copy(monkeypatch, shape, dtype):
    """As a frozen copy in channels_last returns it."""
    x, grad, nat, previous = (torch.rand(shape, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(4))
    grad, sizes = grad - 0.5, [torch.full(shape[:1], size) for size in (0.1, 0.05)]
    last = grad.contiguous(memory_format=torch.channels_last)
    launch = {
        "pgd": lambda grad: kernel.forward(x, grad, nat, *sizes, 0, 0.0, 1.0, 0.05),
        "apgd": lambda grad: apgd_step.forward(x, grad, nat, previous, *sizes, 0.75, 0, 0.0, 1.0),
    }
    launched, real = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *given, **options: (launched.append(given), real(*given, **options)))
    for step in launch.values():
        wanted, found = step(grad), step(last)
        assert torch.equal(found, wanted) and not torch.equal(wanted, x)
        assert launched[-1][3] is last

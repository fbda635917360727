from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import apgd_step as kernel

op = import_module("purify_fast.ops.apgd_step")
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (2, 5001))


def inputs(*shape: int, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def uniform():
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    nat = uniform()
    x, previous = ((nat + 0.2 * (uniform() - 0.5)).clamp(0, 1) for _ in range(2))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    images = (t.to(dtype) for t in (x, grad, nat, previous))
    return *images, torch.linspace(0.01, 0.4, shape[0]), torch.linspace(0.02, 1, shape[0])


@pytest.mark.parametrize("momentum", [0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [0, 1], ids=op.NORMS)
def test_values(within_budget, poisoned, norm, shape, dtype, momentum):
    """A box without 0: the masked lanes, loaded as 0, must not count in the radius."""
    arguments, rest = inputs(*shape, dtype=dtype), (momentum, norm, 0.1, 0.9)
    got, same = kernel.forward(*arguments, *rest), op.reference(*arguments, *rest)
    assert got.is_contiguous()
    if norm == 0 and dtype != torch.bfloat16:
        assert torch.equal(got, same)
    within_budget(got, op.reference(*(a.double() for a in arguments), *rest), same)


@pytest.mark.parametrize("norm", [0, 1], ids=op.NORMS)
def test_gradients_without_a_direction_move_nothing(norm):
    nat = torch.full((6, 4), 0.5)
    grad = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0])[:, None].repeat(1, 4)
    grad[2:5, 1:] = 1.0
    arguments = nat, grad, nat, nat, torch.full((6,), 0.01), torch.full((6,), 0.1), 0.75, norm, 0.0, 1.0
    got = kernel.forward(*arguments)
    assert torch.equal(got[:2], nat[:2]) and not torch.equal(got[5], nat[5])
    torch.testing.assert_close(got, op.reference(*arguments))
    if norm == 1:
        assert torch.equal(got[2:5], nat[2:5])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e37])
def test_gradients_of_any_size_have_a_direction(scale):
    nat, grad = torch.full((2, 12), 0.5), torch.zeros(2, 12)
    grad[0, 0], grad[1] = 3, -1
    radii = torch.full((2,), 0.1), torch.ones(2)
    step = kernel.forward(nat, grad * scale, nat, nat, *radii, 1.0, 1, 0.0, 1.0) - nat
    torch.testing.assert_close(step.norm(dim=1), radii[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [0, 1], ids=op.NORMS)
def test_nan_layouts_splits_and_empty(norm):
    arguments, rest = inputs(5, 4, 9, 7), (0.75, norm, 0.0, 1.0)
    whole = kernel.forward(*arguments, *rest)
    parts = [kernel.forward(*(t[i] for t in arguments), *rest) for i in (slice(0, 2), slice(2, 5))]
    assert torch.equal(torch.cat(parts), whole)
    last = [t.to(memory_format=torch.channels_last) for t in arguments[:4]]
    strided = [t.repeat_interleave(2)[::2] for t in arguments[4:]]
    assert torch.equal(kernel.forward(*last, *strided, *rest), whole)
    for row, image in enumerate((arguments[0], arguments[2], arguments[3])):
        image[row, 0, 0, 1] = torch.nan
    out = kernel.forward(*arguments, *rest)
    assert out[:3, 0, 0, 1].isnan().all() and out.isnan().sum() == 3
    assert kernel.forward(*(t[:0] for t in arguments), *rest).shape == (0, 4, 9, 7)

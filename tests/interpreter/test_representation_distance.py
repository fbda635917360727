from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import representation_distance as kernel

op = import_module("purify_fast.ops.representation_distance")
KINDS = op.KINDS


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple:
    made = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0].to(dtype), made[1].to(dtype)


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_layers_dtypes_layouts_splits_and_empty(poisoned, kind):
    pairs = [inputs(5, 4, 9, 7), inputs(5, 300, dtype=torch.bfloat16, seed=1)]
    pairs[1] = (pairs[1][0], pairs[1][1].float())
    student, teacher = map(list, zip(*pairs, strict=True))
    whole, slopes = kernel.forward(student, teacher, kind)
    torch.testing.assert_close(whole, op.reference(student, teacher, kind)[0], rtol=1e-5, atol=1e-6)
    for cut in (slice(0, 2), slice(2, 5)):
        part, _ = kernel.forward([x[cut] for x in student], [x[cut] for x in teacher], kind)
        assert torch.equal(part, whole[cut])
    padded = torch.full((7, 6, 11, 12), torch.nan)
    padded[1:6, 1:5, 2:11, 3:10] = student[0]
    grad = torch.ones(()).expand(5, 2)
    wanted = kernel.backward(grad.contiguous(), student, teacher, slopes)
    for x in (padded[1:6, 1:5, 2:11, 3:10], student[0].to(memory_format=torch.channels_last)):
        assert torch.equal(kernel.forward([x, student[1]], teacher, kind)[0], whole)
        got = kernel.backward(grad, [x, student[1]], teacher, slopes)
        assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    nothing = [x[:0] for x in student]
    out, own = kernel.forward(nothing, nothing, kind)
    assert out.shape == (0, 2) and own.shape == (0, 2, 2)
    assert [x.shape for x in kernel.backward(grad[:0], nothing, nothing, own)] == [x.shape for x in nothing]
    empty = [torch.zeros(3, 0)]
    out, own = kernel.forward(empty, empty, kind)
    torch.testing.assert_close(out, op.reference(empty, empty, kind)[0])
    assert kernel.backward(torch.ones(3, 1), empty, empty, own)[0].shape == (3, 0)


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_more_layers_than_a_launch_takes_are_as_each_alone(poisoned, kind):
    kinds = ((5, torch.float32), (8193, torch.bfloat16), (0, torch.float32), (64, torch.float16))
    pairs = [inputs(2, size, dtype=dtype, seed=i) for i in range(5) for size, dtype in kinds]
    student, teacher = map(list, zip(*pairs, strict=True))
    grad = torch.linspace(-1, 2, 2 * len(pairs)).view(2, -1)
    whole, slopes = kernel.forward(student, teacher, kind)
    got = kernel.backward(grad, student, teacher, slopes)
    assert len(pairs) > kernel.LAYERS
    for layer, (u, v) in enumerate(pairs):
        alone, own = kernel.forward([u], [v], kind)
        assert torch.equal(alone[:, 0], whole[:, layer]) and torch.equal(own[:, 0], slopes[:, layer])
        assert torch.equal(kernel.backward(grad[:, layer : layer + 1], [u], [v], own)[0], got[layer])


def test_arccos():
    """Of numbers, to a few 1e-7, and exactly at the ends."""
    import triton
    import triton.language as tl

    @triton.jit
    def arccos(x_ptr, out_ptr, WIDTH: tl.constexpr):
        at = tl.arange(0, WIDTH)
        tl.store(out_ptr + at, kernel._arccos(tl.load(x_ptr + at)))

    x = torch.linspace(-1, 1, 4096)
    out = torch.empty_like(x)
    arccos[(1,)](x, out, WIDTH=4096)
    assert out[-1] == 0 and (out - torch.arccos(x.double())).abs().max() < 4e-7

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import representation_distance as kernel

op = import_module("purify_fast.ops.representation_distance")
KINDS = op.KINDS
SHAPES = ((1, 7), (3, 512), (2, 3, 33, 31), (2, 8193), (2, 3, 64, 64))


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple:
    made = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0].to(dtype), made[1].to(dtype)


def test_the_constants_are_the_ops():
    assert [KINDS[kernel.ABS_COSINE.value], KINDS[kernel.COSINE.value], KINDS[kernel.L2]] == [
        "abs_cosine",
        "cosine",
        "l2",
    ]
    assert len(KINDS) == 4  # beside them the angle, which the kernel computes for any other
    assert kernel.LEAST_NORMS.value == op.LEAST_NORMS and kernel.LEAST_SQUARE_SINE.value == op.LEAST_SQUARE_SINE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_values_and_gradients(within_budget, poisoned, kind, shape, dtype):
    u, v = inputs(*shape, dtype=dtype)
    grad = torch.linspace(-1, 2, shape[0])[:, None]
    out, slopes = kernel.forward([u], [v], kind)
    golden, exact_slopes = op.reference([u.double()], [v.double()], kind)
    same, same_slopes = op.reference([u], [v], kind)
    within_budget(out, golden, same)
    (got,) = kernel.backward(grad, [u], [v], slopes)
    (golden,) = op.reference_backward(grad.double(), [u.double()], [v.double()], exact_slopes)
    (same,) = op.reference_backward(grad, [u], [v], same_slopes)
    within_budget(got, golden, same)


def test_published_values():
    u = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [3, 4, 0], [1, 2, 3], [2, 0, 0]])
    v = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 1, 0], [4, 3, 0], [4, 5, 6], [1, 1, 1]])
    for kind, wanted in (
        (0, [0, 1, 0, 0.2928932188, 0.04, 0.0253681538, 0.4226497308]),
        (2, [0, 0.5, 1, 0.25, 0.0903344706, 0.0718508583, 0.3040867240]),
    ):
        out, slopes = kernel.forward([u], [v], kind)
        torch.testing.assert_close(out[:, 0], torch.tensor(wanted), rtol=0, atol=4e-7)
        (got,) = kernel.backward(torch.ones(7, 1), [u], [v], slopes)
        assert (got[[0, 2]] == 0).all()
        if kind == 0:
            torch.testing.assert_close(got[4], torch.tensor([-0.0448, 0.0336, 0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_where_the_student_is_the_teacher(kind):
    for shape in ((2, 64, 7, 7), (1, 8200)):
        _, v = inputs(*shape)
        out, slopes = kernel.forward([v], [v], kind)
        (got,) = kernel.backward(torch.ones(shape[0], 1), [v], [v], slopes)
        assert (out == 0).all() and (got == 0).all()


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


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_zero_vectors_and_non_finite_features(kind):
    u, v = inputs(8, 100)
    u[0, 99], v[1, 3], u[2, 5] = torch.nan, torch.nan, torch.inf
    u[3], v[4] = 0, 0
    u[5], v[5] = 0, 0
    out, slopes = kernel.forward([u], [v], kind)
    (got,) = kernel.backward(torch.ones(8, 1), [u], [v], slopes)
    assert out[:2].isnan().all() and not out[2].isfinite() and out[3:].isfinite().all()
    assert got[:2].isnan().all() and got[3:].isfinite().all()
    torch.testing.assert_close(out[3:], op.reference([u], [v], kind)[0][3:], rtol=1e-5, atol=1e-6)
    if kind < 3:
        assert (got[3:6] == 0).all()
        assert kernel.forward([1e25 * u], [v], kind)[0].isnan()[[0, 1, 2, 4, 6, 7]].all()


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

import math
from importlib import import_module

import pytest
import torch
from op_cases import DTYPES

from purify_fast.ops import representation_distance

op = import_module("purify_fast.ops.representation_distance")
KINDS = op.KINDS


def inputs(*shape: int, dtype=torch.float32, seed: int = 0, near: float | None = None) -> tuple:
    """Features of a student and a teacher; near: how far the student is from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    if near is not None:
        student = teacher + near * student
    return student.to(dtype), teacher.to(dtype)


def with_gradient(u: torch.Tensor, v: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The distances, and the gradient of their sum to the student's features."""
    leaf = u.clone().requires_grad_()
    distances = representation_distance(leaf, v, kind)
    return distances.detach(), torch.autograd.grad(distances.sum(), leaf)[0]


def rows(*pairs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))


PAIRS = (
    (((1, 0), (1, 0)), 0, 0),
    (((1, 0), (0, 1)), 1, 0.5),
    (((1, 0), (-1, 0)), 0, 1),
    (((1, 0), (1, 1)), 0.2928932188, 0.25),
    (((3, 4), (4, 3)), 0.04, 0.0903344706),
    (((1, 2, 3), (4, 5, 6)), 0.0253681538, 0.0718508583),
    (((2, 0, 0), (1, 1, 1)), 0.4226497308, 0.3040867240),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [1.0, 1e-3, 512.0])
@pytest.mark.parametrize(("pair", "wanted", "half_turns"), PAIRS, ids=lambda value: str(value)[:24])
def test_published_values(backend, pair, wanted, half_turns, scale):
    u, v = rows(pair)
    cosine = 1 - math.cos(math.pi * half_turns)
    for kind, value in (("abs_cosine", wanted), ("angular", half_turns), ("cosine", cosine)):
        assert representation_distance(scale * u, v, kind).item() == pytest.approx(value, abs=1e-9)
        single = representation_distance((scale * u).float(), v.float(), kind)
        # the angle of a cosine that is rounded next to 1
        slack = 1.2e-4 if kind == "angular" and value in (0, 1) else 5e-7 if backend == "triton" else 2e-7
        assert single.dtype == torch.float32 and single.item() == pytest.approx(value, abs=slack)
    assert representation_distance(u, v, "l2").item() == pytest.approx(math.dist(*pair), abs=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_where_the_student_is_the_teacher(backend, kind, dtype):
    """0, exactly, and without a gradient: where fine-tuning starts. So too for its opposite."""
    for shape in ((4, 512), (3, 64, 7, 7), (2, 20001), (3, 1)):
        _, v = inputs(*shape, dtype=dtype, seed=3)
        for u in (v, 4 * v, -v) if kind == "abs_cosine" else (v,):
            d, grad = with_gradient(u, v, kind)
            assert torch.equal(d, torch.zeros_like(d)) and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative_near_the_teacher(backend, kind):
    for near in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        u, v = inputs(64, 300, near=near)
        d = representation_distance(u, v, kind)
        assert (d >= 0).all() and d.isfinite().all()
        exact = representation_distance(u.double(), v.double(), kind)
        assert (d - exact).abs().max() < (2e-4 if kind == "angular" else 2e-7)


@pytest.mark.interpreter
def test_layers_are_as_one_by_one(backend):
    """With the last kind, the layers need several launches of the Triton kernel, and some launches fill no chunk."""
    for kind in KINDS:
        pairs = [inputs(4, 64, 8, 8), *(inputs(4, 3 * i, seed=i) for i in range(2, 18 if kind == KINDS[-1] else 4))]
        student, teacher = zip(*pairs, strict=True)
        leaves = [x.clone().requires_grad_() for x in student]
        together = representation_distance(leaves, list(teacher), kind)
        weight = torch.linspace(0.5, 2, 4 * len(pairs)).view(4, -1)
        grads = torch.autograd.grad((together * weight).sum(), leaves)
        assert together.shape == (4, len(pairs)) and together.is_contiguous()
        for layer, (u, v) in enumerate(pairs):
            leaf = u.clone().requires_grad_()
            alone = representation_distance(leaf, v, kind)
            assert torch.equal(alone, together[:, layer])
            # alone, the slope is rounded before the upstream gradient scales it
            own = torch.autograd.grad((alone * weight[:, layer]).sum(), leaf)[0]
            torch.testing.assert_close(own, grads[layer], rtol=4e-7, atol=1e-9)
    assert torch.equal(representation_distance(student[:1], teacher[:1])[:, 0], representation_distance(*pairs[0]))


@pytest.mark.interpreter
def test_layers_of_several_precisions(backend):
    student = inputs(3, 20)[0], inputs(3, 30, dtype=torch.float64)[0], inputs(3, 40, dtype=torch.bfloat16)[0]
    teacher = [inputs(*x.shape, seed=4)[1] for x in student]
    leaves = [x.clone().requires_grad_() for x in student]
    got = representation_distance(leaves, teacher)
    assert got.dtype == torch.float64
    for layer, (u, v) in enumerate(zip(student, teacher, strict=True)):
        torch.testing.assert_close(got[:, layer], representation_distance(u, v).double(), rtol=1e-6, atol=1e-7)
    assert [g.dtype for g in torch.autograd.grad(got.sum(), leaves)] == [x.dtype for x in student]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_angular_gradient_is_bounded(backend, dtype):
    """Of length 1 / (pi |u|) at any angle but the smallest ones, where it falls to 0 with the sine."""
    v = torch.tensor([[3.0, 0]], dtype=dtype)
    for sine in (1.0, 0.5, 0.1, 0.02, 0.005, 1e-3, 1e-6, 0.0):
        for turned in (1, -1):
            u = torch.tensor([[turned * 2 * math.sqrt(1 - sine * sine), 2 * sine]], dtype=dtype, requires_grad=True)
            (grad,) = torch.autograd.grad(representation_distance(u, v, "angular").sum(), u)
            wanted = min(sine / 0.01, 1) / (2 * math.pi)
            assert grad.norm().item() == pytest.approx(wanted, rel=2e-3 if dtype == torch.float32 else 1e-9, abs=1e-9)


def test_the_teacher_gets_no_gradient(backend):
    u, v = inputs(3, 4, 5)
    v.requires_grad_()
    assert not representation_distance(u, v).requires_grad
    leaf = u.clone().requires_grad_()
    representation_distance([leaf, leaf], [v, 2 * v]).sum().backward()
    assert v.grad is None and leaf.grad is not None


@pytest.mark.interpreter
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_of_any_dtype(backend, dtype, teacher_dtype):
    u, v = inputs(3, 4, 5, dtype=dtype)
    v = v.to(teacher_dtype)
    leaf = u.clone().requires_grad_()
    out = representation_distance(leaf, v)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), representation_distance(u.double(), v.double()), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(out.sum(), leaf)[0].dtype == dtype


def assert_orthogonal(distance, kind, backend):
    """Three distances are those of orthogonal vectors, exactly; Triton's arc cosine of 0 is half of pi but rounded."""
    right = torch.full((3,), 0.5 if kind == "angular" else 1.0)
    torch.testing.assert_close(distance, right, rtol=0, atol=1e-7 if backend == "triton" else 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS[:3])
def test_zero_vectors(backend, kind):
    u, v = inputs(4, 6)
    u[0], v[1], u[2], v[2] = 0, 0, 0, 0
    d, grad = with_gradient(u, v, kind)
    assert_orthogonal(d[:3], kind, backend)
    assert d[3].isfinite() and (grad[:3] == 0).all() and (grad[3] != 0).any()
    d, grad = with_gradient(torch.zeros(3, 0), torch.zeros(3, 0), kind)
    assert_orthogonal(d, kind, backend)
    assert grad.shape == (3, 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_features_are_not_hidden(backend, kind):
    u, v = inputs(8, 100)
    u[0, 99], v[1, 3], u[2, 5], v[3, 7] = torch.nan, torch.nan, torch.inf, -torch.inf
    u[4], v[5] = 0, 0
    v[4, 8], u[5, 9] = torch.nan, torch.inf
    d, grad = with_gradient(u, v, kind)
    assert d[[0, 1, 4]].isnan().all() and not d[[2, 3, 5]].isfinite().any() and d[6:].isfinite().all()
    assert grad[[0, 1, 4]].isnan().all() and grad[6:].isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS[:3])
def test_from_the_smallest_to_the_largest_norms(backend, kind):
    u, v = inputs(3, 50)
    wanted = representation_distance(u, v, kind)
    for a, b in ((1e-15, 1e-13), (1e-10, 1e10), (1e17, 1e17), (1e-13, 1)):
        d, grad = with_gradient(a * u, b * v, kind)
        torch.testing.assert_close(d, wanted, rtol=1e-4, atol=1e-6)
        assert grad.isfinite().all()
    assert representation_distance(1e25 * u, v, kind).isnan().all()  # not orthogonal: squares overflowed
    assert_orthogonal(representation_distance(1e-35 * u, v, kind), kind, backend)

import math
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings, strategies as st
from op_cases import DTYPES, points

from purify_fast import _library
from purify_fast.ops import apgd_step, pgd_step, use_backend

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.pgd_step")


#: The steps of both ops in every norm. That of APGD moves three quarters of the way where nothing moved before it.
STEPS = {f"pgd {norm}": partial(pgd_step, norm=norm) for norm in op.NORMS} | {
    f"apgd {norm}": lambda x, grad, nat, alpha, eps, norm=norm: apgd_step(x, grad, nat, x, alpha, eps, 0.75, norm)
    for norm in ("linf", "l2")
}


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple:
    return points(*shape, dtype=dtype, seed=seed)[:3]


def projection_gap(z: torch.Tensor, y: torch.Tensor, nat: torch.Tensor, eps: float, lo: float, hi: float) -> float:
    """max over w of (y - z) . (w - z), w in ball and box: 0 where z projects y on them, above 0 elsewhere."""
    slope = y - z
    order = slope.abs().argsort(descending=True)
    room = torch.where(slope > 0, hi - nat, nat - lo)[order]
    spent = (eps - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    return float((slope * nat).sum() + (slope.abs()[order] * spent).sum() - (slope * z).sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 60),
    eps=st.floats(0, 20),
    box=st.tuples(st.floats(-1, 1), st.floats(0, 1)),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    levels=st.sampled_from([0, 2, 5]),
)
def test_l1_projects_on_ball_and_box_at_once(seed, size, eps, box, spread, levels):
    """Against the condition that only the projection meets, on points that tie, too, and on points outside the box."""
    generator = torch.Generator().manual_seed(seed)
    lo, hi = box[0], box[0] + box[1]
    nat = lo + (hi - lo) * torch.rand(1, size, generator=generator, dtype=torch.float64)
    offset = torch.randn(1, size, generator=generator, dtype=torch.float64)
    if levels:
        nat, offset = lo + ((nat - lo) * levels).round() / levels, (offset * levels).round() / levels
    nat = nat.clamp(lo, hi)
    y = nat + spread * offset
    for name in ("reference", "cpp") if _library.loaded() else ("reference",):
        with use_backend(name):
            z = pgd_step(y, torch.zeros_like(y), nat, 0.0, eps, "l1", lo, hi)
            near = pgd_step(y.float(), torch.zeros_like(y).float(), nat.float(), 0.0, eps, "l1", lo, hi)
        assert (z - nat).abs().sum() <= eps + 1e-12 and (z >= lo).all() and (z <= hi).all()
        assert projection_gap(z[0], y[0], nat[0], eps, lo, hi) <= 1e-11 * (1 + spread * size)
        # and what it takes to write the image, the point and the result, which may lie far from 0, in float32
        assert (near - z).abs().max() <= 4e-7 * spread * (1 + offset.abs().max()) + 2**-22 * max(abs(lo), abs(hi))


def test_l1_moves_the_largest_gradients(backend):
    nat = torch.full((1, 10), 0.5)

    def moved(grad, density=0.3, x=nat):
        return (pgd_step(x, torch.tensor([grad]), nat, 0.12, 9.0, "l1", density=density) - x)[0]

    def step(*where):
        return torch.tensor([0.12 / len(where) * (i in where) for i in range(10)])

    grad = [1.0, -9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 0.0, 5.0, 6.0]
    torch.testing.assert_close(moved(grad), step(1, 3, 5) * torch.tensor(grad).sign())
    torch.testing.assert_close(moved(grad, 0.01), step(1) * -1)  # one at least
    torch.testing.assert_close(moved(grad, 0.25), moved(grad))  # 2.5 of them, rounded
    torch.testing.assert_close(moved(grad, 1.0), 0.12 / 9 * torch.tensor(grad).sign())  # 0 has no sign
    torch.testing.assert_close(moved([5.0] * 4 + [7.0] + [1.0] * 5), step(0, 1, 2, 3, 4))  # ties with the third
    torch.testing.assert_close(moved([0.0] * 8 + [2e-42, 1e-30]), step(8, 9))
    x = torch.tensor([[0.5, 0.0, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.2]])  # 1, 3 and 9 would leave the box
    change = moved(grad, x=x)
    torch.testing.assert_close(change[:9], step(5, 6, 8)[:9])
    assert change[9] < -0.19  # it comes back into the box


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 70),
    alpha=st.floats(0, 2, width=32),
    eps=st.floats(0, 1, width=32),
    box=st.tuples(st.floats(-1, 1, width=32), st.floats(0, 1, width=32)),
    norm=st.sampled_from(op.NORMS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_step_stays_in_ball_and_box(seed, size, alpha, eps, box, norm, dtype):
    x, grad, nat = inputs(3, size, dtype=dtype, seed=seed)
    lo, hi = box[0], box[0] + box[1]
    nat = nat.clamp(lo, hi)
    outputs = []
    for name in ("reference", "cpp") if _library.loaded() else ("reference",):
        with use_backend(name):
            outputs.append(pgd_step(x, grad, nat, alpha, eps, norm, lo, hi))
    slack = 2 * torch.finfo(dtype).eps
    for out in outputs:
        wide = out.double()
        assert (wide >= lo - slack).all() and (wide <= hi + slack).all()
        moved = (wide - nat.double()).flatten(1)
        order, terms = {"linf": (math.inf, 1), "l2": (2, size**0.5), "l1": (1, size)}[norm]
        assert (moved.norm(p=order, dim=1) <= eps + slack * terms * 2).all()
    if norm == "linf":
        assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-3, 1e10, 1e37])
def test_gradients_of_any_size_have_a_direction(backend, scale, norm):
    nat = torch.full((2, 3, 4), 0.5)
    grad = torch.zeros(2, 3, 4)
    grad[0, 0, 0], grad[1] = 3, -1
    step = pgd_step(nat, grad * scale, nat, 0.1, 1.0, f"l{norm}") - nat
    torch.testing.assert_close(step.flatten(1).norm(p=norm, dim=1), torch.full((2,), 0.1), rtol=1e-5, atol=0)
    assert step[0, 0, 0] > 0 and (step[1] < 0).all()


@pytest.mark.parametrize("name", STEPS)
def test_gradients_without_a_direction_move_nothing(backend, name):
    _, _, nat = (t[:, :4].clamp(0.2, 0.8) for t in inputs(5, 8))
    grad = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])[:, None].repeat(1, 4)
    grad[:, 3] = 1.0
    out = STEPS[name](nat, grad, nat, 0.01, 0.1)
    if name.endswith("linf"):
        assert torch.equal(out[:, :3], nat[:, :3]) and (out[:, 3] > nat[:, 3]).all()
    else:
        # the direction of the sample is unknown
        assert torch.equal(out[2:], nat[2:]) and not torch.equal(out[:2], nat[:2])
    assert torch.equal(STEPS[name](nat, torch.zeros_like(nat), nat, 0.01, 0.1), nat)


@pytest.mark.parametrize("name", STEPS)
def test_nan_in_the_image_propagates(backend, name):
    x, grad, nat = inputs(4, 6)
    x[1, 2], nat[2, 3] = torch.nan, torch.nan
    out = STEPS[name](x, grad, nat, 0.01, 0.1)
    assert out[1, 2].isnan() and out[2, 3].isnan() and out.isnan().sum() == 2


@pytest.mark.parametrize("name", STEPS)
def test_special_radii(backend, name):
    step, (x, grad, nat) = STEPS[name], inputs(3, 10)
    torch.testing.assert_close(step(x, grad, nat, 0.3, 0.0), nat)
    torch.testing.assert_close(step(nat, grad, nat, 0.0, 0.3), nat)
    per_sample = step(x, grad, nat, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.25))
    for i, alpha in enumerate((0.1, 0.2, 0.3)):
        alone = step(x[i : i + 1], grad[i : i + 1], nat[i : i + 1], alpha, 0.25)
        assert torch.equal(alone, per_sample[i : i + 1])


def test_l1_moves_no_more_where_denormals_are_flushed(backend):
    x, grad = torch.full((1, 100), 0.5), torch.zeros(1, 100)
    grad[0, :2] = 1.0
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        moved = pgd_step(x, grad, x, 0.1, 1.0, "l1", density=0.05)
    finally:
        torch.set_flush_denormal(False)
    assert (moved != x).sum() == 2

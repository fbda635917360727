from importlib import import_module

import pytest
import torch
from op_cases import cases, radii
from op_cases import points as inputs

from purify_fast.ops import apgd_step, pgd_step

op = import_module("purify_fast.ops.apgd_step")
NORMS = op.NORMS
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (4, 5001), (0, 3, 4, 4))


def by_reference(images, alpha, eps, momentum, norm, lo=0.0, hi=1.0):
    wide = torch.promote_types(images[0].dtype, torch.float32)
    return op.reference(*images, alpha.to(wide), eps.to(wide), momentum, norm, lo, hi)


@pytest.mark.parametrize("momentum", [0.75, 1.0, 0.3])
@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES, (2, 3, 33, 31), (4, 5001)), ids=str)
def test_linf_is_bit_exact(backend, poisoned, shape, dtype, momentum):
    images = inputs(*shape, dtype=dtype)
    alpha, eps = radii(shape[0])
    got = apgd_step(*images, alpha, eps, momentum)
    assert torch.equal(got, by_reference(images, alpha, eps, momentum, 0))
    assert got.dtype == dtype and got.is_contiguous()
    distance = (got.double() - images[2].double()).flatten(1).abs().amax(1)
    assert (distance <= eps + 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES, (2, 3, 33, 31), (4, 5001)), ids=str)
def test_l2(backend, within_budget, poisoned, shape, dtype):
    images = inputs(*shape, dtype=dtype)
    alpha, eps = radii(shape[0])
    alpha, eps = 20 * alpha, 10 * eps
    got = apgd_step(*images, alpha, eps, 0.75, "l2")
    golden = by_reference([t.double() for t in images], alpha.double(), eps.double(), 0.75, 1)
    within_budget(got, golden, by_reference(images, alpha, eps, 0.75, 1))
    if got.numel() and dtype in (torch.float32, torch.float64):
        assert ((got - images[2]).flatten(1).norm(dim=1) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_formula_by_hand(backend, norm):
    """The step without momentum is `pgd_step`'s; then a part of it and of the last move, projected by a step of 0."""
    x, grad, nat, previous = inputs(3, 20, dtype=torch.float64)
    alpha, eps = (0.05, 0.08) if norm == "linf" else (0.3, 0.35)
    z = pgd_step(x, grad, nat, alpha, eps, norm)
    for a in (0.75, 0.2):
        moved = x + a * (z - x) + (1 - a) * (x - previous)
        wanted = pgd_step(moved, torch.zeros_like(x), nat, 0.0, eps, norm)
        torch.testing.assert_close(apgd_step(x, grad, nat, previous, alpha, eps, a, norm), wanted)
        assert not torch.allclose(wanted, z, atol=1e-3)
    torch.testing.assert_close(apgd_step(x, grad, nat, previous, alpha, eps, 1.0, norm), z)  # the first step


def test_gradients_without_a_direction_move_nothing(backend):
    _, _, nat, _ = (t[:, :4] for t in inputs(5, 8))
    nat = nat.clamp(0.2, 0.8)
    grad = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])[:, None].repeat(1, 4)
    grad[:, 3] = 1.0
    linf = apgd_step(nat, grad, nat, nat, 0.01, 0.1)
    assert torch.equal(linf[:, :3], nat[:, :3])  # elementwise: the others move
    torch.testing.assert_close(linf[:, 3], nat[:, 3] + 0.0075)
    l2 = apgd_step(nat, grad, nat, nat, 0.01, 0.1, 0.75, "l2")
    assert torch.equal(l2[2:], nat[2:])  # the sample: its direction is unknown
    assert not torch.equal(l2[:2], nat[:2])
    still = apgd_step(nat, torch.zeros_like(nat), nat, nat, 0.01, 0.1, 0.75, "l2")
    assert torch.equal(still, nat)
    rolled = apgd_step(nat, torch.zeros_like(nat), nat, nat - 0.04, 0.01, 0.1)  # the momentum alone
    torch.testing.assert_close(rolled, nat + 0.01)


@pytest.mark.parametrize("momentum", [0.75, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_in_the_images_propagates(backend, norm, momentum):
    x, grad, nat, previous = inputs(5, 6)
    x[1, 2], nat[2, 3], previous[3, 4] = torch.nan, torch.nan, torch.nan
    out = apgd_step(x, grad, nat, previous, 0.01, 0.1, momentum, norm)
    assert out[1, 2].isnan() and out[2, 3].isnan() and out[3, 4].isnan() and out.isnan().sum() == 3


@pytest.mark.parametrize("norm", NORMS)
def test_special_radii(backend, norm):
    x, grad, nat, previous = inputs(3, 10)
    torch.testing.assert_close(apgd_step(x, grad, nat, previous, 0.3, 0.0, 0.75, norm), nat)
    per_sample = apgd_step(x, grad, nat, previous, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.25), 0.75, norm)
    for i, alpha in enumerate((0.1, 0.2, 0.3)):
        alone = apgd_step(*(t[i : i + 1] for t in (x, grad, nat, previous)), alpha, 0.25, 0.75, norm)
        assert torch.equal(alone, per_sample[i : i + 1])  # the batch changes nothing

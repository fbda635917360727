from importlib import import_module

import pytest
import torch
from op_cases import points as inputs

from purify_fast.ops import apgd_step, pgd_step

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.apgd_step")
NORMS = op.NORMS


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


@pytest.mark.parametrize("norm", NORMS)
def test_the_point_before_counts(backend, norm):
    """Without a gradient the momentum alone moves, also from a point that is NaN."""
    _, _, nat, _ = inputs(5, 6)
    nat = nat.clamp(0.2, 0.8)
    rolled = apgd_step(nat, torch.zeros_like(nat), nat, nat - 0.04, 0.01, 0.1, 0.75, norm)
    torch.testing.assert_close(rolled, nat + 0.01)
    previous = nat.clone()
    previous[3, 4] = torch.nan
    for momentum in (0.75, 1.0):
        out = apgd_step(nat, torch.zeros_like(nat), nat, previous, 0.01, 0.1, momentum, norm)
        assert out[3, 4].isnan() and out.isnan().sum() == 1

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
        wanted = pgd_step(x + a * (z - x) + (1 - a) * (x - previous), torch.zeros_like(x), nat, 0.0, eps, norm)
        torch.testing.assert_close(apgd_step(x, grad, nat, previous, alpha, eps, a, norm), wanted)
        assert not torch.allclose(wanted, z, atol=1e-3)
    torch.testing.assert_close(apgd_step(x, grad, nat, previous, alpha, eps, 1.0, norm), z)  # the first step

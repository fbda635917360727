import math
from importlib import import_module

import pytest
import torch
from op_cases import DTYPES

from purify_fast.ops import reconstruction_loss

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.reconstruction_loss")


def inputs(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 4.0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_published_values(backend):
    p, x = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 0.0]])
    assert reconstruction_loss(p.logit(), x).item() == pytest.approx(0.980829, abs=1e-6)
    for size, expected in ((3072, 2129.348), (12288, 8517.393)):
        loss = reconstruction_loss(torch.zeros(2, size), torch.rand(2, size))
        torch.testing.assert_close(loss, torch.full((2,), expected), rtol=0, atol=4e-3)
        assert expected == pytest.approx(size * math.log(2), abs=1e-3)


def test_saturated_logits_are_exact(backend):
    """Far beyond where log(sigmoid) is infinite, and where the right answer is tiny."""
    logits = torch.tensor([[200.0, -200.0], [1e4, -1e4], [30.0, -30.0]])
    wrong = torch.tensor([[0.0, 1.0]] * 3)
    torch.testing.assert_close(reconstruction_loss(logits, wrong), torch.tensor([400.0, 2e4, 60.0]))
    tiny = reconstruction_loss(logits.abs(), torch.ones(3, 2))
    torch.testing.assert_close(tiny, torch.tensor([0.0, 0.0, 2 * math.exp(-30.0)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_target_of_any_dtype_without_a_gradient(backend, target_dtype):
    logits, target = inputs(3, 4, 5)
    target = target.to(target_dtype).requires_grad_()
    leaf = logits.clone().requires_grad_()
    out = reconstruction_loss(leaf, target)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, op.reference(logits, target.detach().float()))
    out.sum().backward()
    assert target.grad is None
    torch.testing.assert_close(leaf.grad, torch.sigmoid(logits) - target.detach().float())

from functools import partial
from importlib import import_module

import pytest
import torch
from op_cases import normal

from purify_fast.kernels import aggregate as kernel

op = import_module("purify_fast.ops.aggregate")
METHODS = range(len(op.METHODS))
random = partial(normal, scale=3.0, dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
def test_more_samples_than_a_tile_holds(method):
    logits, grad = random(1, 5000, 3), random(1, 3, scale=1.0, seed=1)
    torch.testing.assert_close(kernel.forward(logits, method), op.reference(logits, method))
    got, expected = kernel.backward(grad, logits, method), op.reference_backward(grad, logits, method)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("method", METHODS, ids=op.METHODS)
@pytest.mark.parametrize(("samples", "classes"), [(8, 10), (3, 2), (1, 7), (20, 3), (5, 101), (9, 300)])
def test_images_that_share_a_program(within_budget, poisoned, samples, classes, method):
    """Of few classes; the last program has fewer images than the others, and each image has the result it has alone."""
    logits, grad = random(29, samples, classes), random(29, classes, scale=1.0, seed=1)
    out, gradient = kernel.forward(logits, method), kernel.backward(grad, logits, method)
    within_budget(out, op.reference(logits.double(), method), op.reference(logits, method))
    golden = op.reference_backward(grad.double(), logits.double(), method)
    within_budget(gradient, golden, op.reference_backward(grad, logits, method))
    assert torch.equal(kernel.forward(logits[13:14], method), out[13:14])
    assert torch.equal(kernel.backward(grad[13:14], logits[13:14], method), gradient[13:14])

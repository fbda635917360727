from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from purify_fast.ops import reconstruction_loss

op = import_module("purify_fast.ops.reconstruction_loss")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (4, 20001), (0, 3, 4, 4))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, within_budget, poisoned, shape, dtype):
    for scale in (1.0, 30.0):
        logits, target = inputs(*shape, dtype=dtype, scale=scale)
        grad = torch.linspace(-1, 2, shape[0], dtype=torch.promote_types(dtype, torch.float32))
        leaf = logits.clone().requires_grad_()
        out = reconstruction_loss(leaf, target)
        within_budget(out, op.reference(logits.double(), target.double()), op.reference(logits, target))
        assert (out >= 0).all()
        (got,) = torch.autograd.grad(out, leaf, grad)
        golden = op.reference_backward(grad.double(), logits.double(), target.double())
        within_budget(got, golden, op.reference_backward(grad, logits, target))


def test_kernels_on_their_own(within_budget, poisoned):
    logits, target = inputs(3, 2, 5, 7)
    grad = torch.tensor([0.5, -1.0, 2.0])
    within_budget(op.OP.handle(logits, target), op.reference(logits.double(), target), op.reference(logits, target))
    golden = op.reference_backward(grad.double(), logits.double(), target)
    within_budget(op.BACKWARD.handle(grad, logits, target), golden, op.reference_backward(grad, logits, target))


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


def test_any_layout(backend):
    logits, target = inputs(3, 4, 9, 7)
    wanted = reconstruction_loss(logits, target)
    grad = torch.sigmoid(logits) - target
    padded = torch.full((5, 6, 11, 12), torch.nan)
    padded[1:4, 1:5, 2:11, 3:10] = logits
    for x, t in (
        (logits.to(memory_format=torch.channels_last), target.to(memory_format=torch.channels_last)),
        (logits, target.to(memory_format=torch.channels_last)),
        (padded[1:4, 1:5, 2:11, 3:10], target),
        (logits.flatten(1), target.flatten(1)),
    ):
        leaf = x.detach().requires_grad_()
        out = reconstruction_loss(leaf, t)
        torch.testing.assert_close(out, wanted)
        (got,) = torch.autograd.grad(out.sum(), leaf)  # the incoming gradient is expanded
        torch.testing.assert_close(got, grad.view_as(got))


def test_batch_split_changes_nothing(backend):
    logits, target = inputs(7, 3, 32, 32)
    whole = reconstruction_loss(logits, target)
    parts = [reconstruction_loss(x, t) for x, t in zip(logits.split(2), target.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_non_finite_logits_are_not_hidden(backend):
    logits, target = inputs(4, 8)
    logits[1, 2], logits[2, 3], logits[3, 1] = torch.nan, torch.inf, -torch.inf
    out = reconstruction_loss(logits, target)
    assert out[0].isfinite() and out[1].isnan() and not out[2].isfinite() and not out[3].isfinite()
    target[0, 0] = torch.nan
    assert reconstruction_loss(logits, target)[0].isnan()


def test_gradcheck():
    logits, target = inputs(3, 2, 3, dtype=torch.float64, scale=2.0)
    leaf = logits.requires_grad_()
    for function in (op._reconstruction_loss, op.reference):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, target), (leaf,))


def test_contract(backend, contract):
    half = inputs(3, 2, 5, dtype=torch.float16)
    mixed = (half[0], inputs(3, 2, 5)[1])
    last = tuple(x.to(memory_format=torch.channels_last) for x in inputs(2, 3, 4, 5))
    sets = [inputs(3, 2, 5), half, mixed, last, inputs(0, 3), inputs(1, 1)]
    contract.registered(op.OP.handle, *sets)
    contract.registered(op.BACKWARD.handle, *((torch.ones(len(s[0])), *s) for s in sets))


def test_compiles(backend, contract):
    def make(size: int) -> tuple:
        logits, target = inputs(size, 3, 8, 8, seed=size)
        return logits.requires_grad_(), target

    contract.compiles(lambda x, t: reconstruction_loss(2 * x, t), make)


def test_export(backend):
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return reconstruction_loss(x, t)

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Loss(), inputs(4, 3, 8, 8), dynamic_shapes=(batch, batch))
    torch.testing.assert_close(program.module()(*inputs(7, 3, 8, 8)), reconstruction_loss(*inputs(7, 3, 8, 8)))


def test_autocast_and_inference_mode(backend):
    arguments = inputs(3, 40, dtype=torch.bfloat16)
    expected = reconstruction_loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        out = reconstruction_loss(*arguments)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_func_grad(backend):
    logits, target = inputs(3, 40)
    got = torch.func.grad(lambda x: reconstruction_loss(x, target).sum())(logits)
    torch.testing.assert_close(got, torch.sigmoid(logits) - target)


def test_what_the_op_cannot_do():
    logits, target = inputs(3, 8)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: op._reconstruction_loss(x[None], target[:1]))(logits)
    leaf, weight = logits.requires_grad_(), torch.ones(3, requires_grad=True)
    (first,) = torch.autograd.grad(op._reconstruction_loss(leaf, target), leaf, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"logits and target need one shape \[B, ...\], got \[3, 4\], \[3, 5\]"),
        (torch.zeros(3), torch.zeros(3), "need one shape"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.uint8), "must be floating point, got torch.float32 and"),
        (torch.zeros(3, 4), torch.zeros(3, 4, device="meta"), "logits are on cpu, target on meta: they must agree"),
    ],
)
def test_errors(logits, target, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(logits, target)

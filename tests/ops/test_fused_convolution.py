"""A convolution with what follows it: PyTorch's operators to the bit, and their derivative in float64."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.ops import fused_convolution
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.registry import Op

op = import_module("purify_fast.ops.fused_convolution")
convolution = import_module("purify_fast.ops.convolution")
FUNCTIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, weight, bias and added map of a layer with stride 2 and padding 1."""
    given = normal(2, 5, 9, 8), normal(6, 5, 3, 3, seed=1) / 6, normal(6, seed=2), normal(2, 6, 5, 4, seed=3)
    return tuple(one.to(dtype) for one in given)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_kernel_it_is_pytorch_s_operators(activation, dtype):
    x, weight, bias, added = layer(dtype)
    for residual in (None, added):
        found = fused_convolution(x, weight, bias, residual, activation, stride=2, padding=1)
        total = F.conv2d(x, weight, bias, 2, 1)
        assert torch.equal(found, FUNCTIONS[activation](total if residual is None else total + residual))


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_the_op_has_the_gradients_of_pytorch_s_operators(monkeypatch, activation):
    """Where a kernel serves, all but the weights have gradients; where the weights need one, PyTorch serves."""
    x, weight, bias, added = layer(torch.bfloat16)
    upstream, results = normal(2, 6, 5, 4, seed=4, dtype=torch.bfloat16), []
    for plain in (True, False):
        monkeypatch.setattr(Op, "uses_reference", lambda *_, plain=plain: plain)
        leaves = [one.clone().requires_grad_() for one in (x, added)]
        out = fused_convolution(leaves[0], weight, bias, leaves[1], activation, stride=2, padding=1)
        assert (type(out.grad_fn).__name__ == "_FusedConvolutionBackward") == (not plain)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    out = fused_convolution(x, weight.requires_grad_(), bias, stride=2, padding=1)
    (of_weight,) = torch.autograd.grad(out.sum(), weight)
    assert of_weight.any()


def composed(z: Tensor, norm: list[Tensor], activation: int) -> Tensor:
    """The images that enter the convolution, from their z with channels first."""
    normed = F.batch_norm(z, *norm, eps=1e-5) if norm else z
    return FUNCTIONS[op.ACTIVATIONS[activation]](normed)


@pytest.mark.parametrize("padding", [[1, 1, 1, 1], [0, 1, 0, 1]])
@pytest.mark.parametrize("activation", [op.RELU, op.SILU])
def test_the_backward_s_definition_is_the_derivative(activation, padding):
    """The loss uses z three times: in the convolution, in another function of the images, and directly."""
    z, weight = normal(2, 4, 6, 8).requires_grad_(), normal(5, 3, 3, 4, seed=1)
    for norm in ([], [normal(4, seed=2), normal(4, seed=3).abs() + 1, normal(4, seed=4), normal(4, seed=5)]):
        images = composed(z, norm, activation)
        settings = [2, 2], padding
        last = images.permute(0, 2, 3, 1)
        out, _ = op.reference(last, weight, None, None, [], 0.0, op.NONE, False, *settings)
        grad, earlier, beside = normal(*out.shape, seed=6), normal(*last.shape, seed=7), normal(*last.shape, seed=8)
        uses = (out * grad).sum() + (last * earlier).sum() + (z.permute(0, 2, 3, 1) * beside).sum()
        (wanted,) = torch.autograd.grad(uses, z)
        entered = (images if activation == op.RELU else z).detach().permute(0, 2, 3, 1)
        given = grad, weight, 6, 8, earlier, entered, norm, 1e-5, beside, activation
        found = op.reference_backward(*given, *settings)
        torch.testing.assert_close(found, wanted.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


def test_the_kept_sum_is_what_enters_the_activation():
    x, weight, bias, added = (one.movedim(1, -1) if one.dim() == 4 else one for one in layer(torch.float64))
    norm = [normal(6, seed=seed).abs() for seed in range(4)]
    out, total = op.reference(x, weight, bias, added, norm, 1e-5, op.SILU, True, [2, 2], [1] * 4)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), composed(total.permute(0, 3, 1, 2), norm, op.SILU))
    _, nothing = op.reference(x, weight, bias, added, norm, 1e-5, op.SILU, False, [2, 2], [1] * 4)
    assert nothing.numel() == 0


@pytest.mark.parametrize("one", [op.OP, op.BACKWARD])
def test_no_kernel_serves_without_a_race_that_it_won(one):
    """Every layer belongs to a variant, and every variant is raced before its kernel serves."""
    assert one.kernel("cuda") == "triton" and one.kernel("cpu") == "reference"
    for variant in op.VARIANTS:
        for style in ("eager", "graph"):
            call = Call(torch.device("cuda"), variant, torch.bfloat16, 20, style)
            assert one.wanted(call).backend == "reference" and "not raced" in one.wanted(call).why
    assert {example.variant for example in one.raced} == set(op.VARIANTS)
    kinds = {op.kind(c, o, (t, t), (s, s)) for c in (3, 64, 640) for o in (3, 64, 640) for t in (1, 3) for s in (1, 2)}
    assert kinds == set(op.VARIANTS)

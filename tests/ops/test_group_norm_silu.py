"""Group normalization with SiLU against float64 and against PyTorch's operators."""

from functools import partial
from importlib import import_module

import op_cases
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.models import UNet
from purify_fast.ops import group_norm_silu, use_backend

op = import_module("purify_fast.ops.group_norm_silu")
LAST, HALF = torch.channels_last, torch.bfloat16
normal = partial(op_cases.normal, dtype=HALF)
#: batch, channels, height, width, groups; one pixel more and less than the kernel's rounds of four, groups of two
#: vectors, several groups in a vector; groups that no kernel takes, no image
FITS = ((2, 16, 1, 2, 1), (3, 32, 5, 5, 2), (2, 96, 4, 7, 3), (1, 192, 8, 8, 12), (3, 48, 5, 3, 12), (2, 64, 3, 6, 8))
SHAPES = (*FITS, (2, 24, 4, 4, 2), (2, 32, 4, 4, 16), (0, 16, 4, 4, 1))


@pytest.fixture(params=["reference", "as on CUDA", "cpp"])
def kernels(request, monkeypatch):
    """All, where the processor has the kernel's instructions."""
    if request.param == "cpp" and op.OP.kernel("cpu") == "reference":
        pytest.skip("no kernel: it needs AVX512-BF16")
    if request.param == "as on CUDA":
        monkeypatch.setattr(op, "MIXED_DTYPES", ())
    with use_backend("cpp" if request.param == "cpp" else "reference"):
        yield request.param


def truth(x: Tensor, grad: Tensor, groups: int, *numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x in float64, by PyTorch's operators."""
    weight, bias, shift = (None if one is None else one.detach().double() for one in numbers)
    leaf = x.detach().double().requires_grad_()
    moved = leaf if shift is None else leaf + shift[:, :, None, None]
    out = F.silu(F.group_norm(moved, groups, weight, bias, 1e-5))
    return out.detach(), torch.autograd.grad(out, leaf, grad.double())[0]


def errors(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [
        ((a.double() - b).norm() / b.norm()).item() if b.numel() else 0.0 for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("rows", [0, 1, "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels, poisoned, monkeypatch, shape, rows):
    *size, groups = shape
    batch, channels = size[:2]
    x = normal(*size).to(memory_format=LAST).requires_grad_()
    weight, bias = (normal(channels, seed=seed, dtype=torch.float32) for seed in (1, 2))
    shift = normal(batch if rows == "each" else rows, channels, seed=3) if rows else None
    grad = normal(*size, seed=4)
    once = kernels == "cpp" and shape in FITS
    if once:
        monkeypatch.setattr(op, "_composed", None)
    out = group_norm_silu(x, groups, weight, bias, shift)
    assert out.dtype == HALF and out.shape == x.shape
    found = out.detach(), torch.autograd.grad(out, x, grad)[0]
    # a rounding to bfloat16 errs by 0.17 %; PyTorch's operators round more than once
    assert max(errors(found, truth(x, grad, groups, weight, bias, shift))) < (0.003 if once else 0.01)
    with torch.no_grad():
        assert torch.equal(group_norm_silu(x, groups, weight, bias, shift), out)


def test_a_large_mean_loses_no_digits(kernels):
    """The squares of numbers near 1,000 have no digits left for a deviation of 4."""
    x = (4 * normal(2, 32, 8, 8, dtype=torch.float32) + 1000).to(HALF).to(memory_format=LAST).requires_grad_()
    weight, bias, grad = torch.ones(32), torch.zeros(32), normal(2, 32, 8, 8, seed=1)
    out = group_norm_silu(x, 2, weight, bias)
    found = out.detach(), torch.autograd.grad(out, x, grad)[0]
    assert max(errors(found, truth(x, grad, 2, weight, bias, None))) < 0.01


def test_far_out_and_non_finite(kernels):
    """Weights of a hundred reach where exp overflows; a NaN stays in the group that it is in."""
    x = normal(1, 32, 4, 4).to(memory_format=LAST)
    out = group_norm_silu(x, 2, torch.full((32,), 100.0), torch.zeros(32))
    assert out.isfinite().all() and out.max() > 100 and -0.3 < out.min() < 0
    x[0, 3, 1, 2] = torch.nan
    out = group_norm_silu(x, 2, torch.ones(32), torch.zeros(32))
    assert out[:, :16].isnan().all() and out[:, 16:].isfinite().all()


def test_other_gradients_are_those_of_pytorch_s_operators(kernels):
    """Whatever else needs a gradient, and whatever dtype and layout x has."""
    for dtype, layout in ((HALF, LAST), (torch.float32, LAST), (HALF, torch.contiguous_format)):
        x = normal(2, 32, 4, 4, dtype=dtype).to(memory_format=layout)
        given = [normal(32, seed=1, dtype=dtype), normal(32, seed=2, dtype=dtype), normal(2, 32, seed=3, dtype=dtype)]
        leaves = [one.requires_grad_() for one in given]
        out = group_norm_silu(x, 2, *leaves)
        wanted = F.silu(F.group_norm(x + leaves[2][:, :, None, None], 2, *leaves[:2], 1e-5))
        assert torch.equal(out, wanted)
        for one, other in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            assert torch.equal(one, other)


def test_the_gradients_of_weights_in_float32(kernels):
    x = normal(2, 32, 4, 4).to(memory_format=LAST).requires_grad_()
    leaves = [x, *(normal(32, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2))]
    out = group_norm_silu(leaves[0], 2, *leaves[1:])
    found = torch.autograd.grad(out.sum(), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(F.silu(F.group_norm(wide[0], 2, *wide[1:])).sum(), wide)
    assert out.dtype == HALF and [one.dtype for one in found] == [HALF, torch.float32, torch.float32]
    assert max(errors(found, wanted)) < 0.02


def test_the_result_depends_on_no_other_image_and_on_no_threads(kernels):
    x = normal(70, 32, 16, 16).to(memory_format=LAST)
    numbers = torch.ones(32), torch.zeros(32)
    alone = torch.cat([group_norm_silu(part, 2, *numbers) for part in x.split(7)])
    for whole in op_cases.by_threads(lambda: group_norm_silu(x, 2, *numbers)):
        assert torch.equal(alone, whole)


def test_transforms_of_torch_func_pass_through_a_network(kernels):
    """Through its convolutions and enlarged maps too; they refuse functions of autograd that are made for speed."""
    torch.manual_seed(0)
    net = UNet(3, 16).to(HALF).requires_grad_(False)
    torch.nn.init.normal_(net.leave.weight)
    x, t = normal(2, 3, 16, 16), torch.tensor(50.0)
    found = torch.func.grad(lambda x: net(x, t).float().square().sum())(x)
    leaf = x.clone().requires_grad_()
    with use_backend("reference"):
        (wanted,) = torch.autograd.grad(net(leaf, t).float().square().sum(), leaf)
    # PyTorch's own gradient of an enlarged map rounds in between
    assert wanted.any() and (found.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()

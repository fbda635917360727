"""Convolutions against float64, over many shapes; the reference is PyTorch's."""

import sys
from functools import partial
from importlib import import_module

import op_cases
import pytest
import torch
from op_cases import by_threads, compiles
from torch.nn import functional as F

from purify_fast import _library
from purify_fast._processor import cpu_features
from purify_fast.models.layers import Conv2d
from purify_fast.ops import conv2d, use_backend

op = import_module("purify_fast.ops.convolution")
LAST, HALF = torch.channels_last, torch.bfloat16
normal = partial(op_cases.normal, dtype=HALF)
#: Shapes whose images and rows threads share.
SHARED = ((3, 17, 33, 31, 40, 3, 1, 1, 1), (2, 96, 16, 16, 96, 3, 2, 2, 2), (3, 40, 33, 31, 96, 3, 1, 2, 2))
TILED = (2, 32, 17, 16, 48, 3, 1, 1, 1)


@pytest.fixture(params=["reference", "cpp"])
def kernels(request):
    """Both, where the processor has the kernels' instructions."""
    if request.param == "cpp" and op.OP.kernel("cpu") == "reference":
        pytest.skip("no kernel: it needs AVX512-BF16, and no AMX")
    with use_backend(request.param):
        yield request.param


def operands(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    b, inputs, height, width, outputs, kernel, *settings = shape
    x = normal(b, inputs, height, width).to(memory_format=LAST)
    weight = normal(outputs, inputs, kernel, kernel, seed=1) * (inputs * kernel**2) ** -0.5
    return x, weight, normal(outputs, seed=2), tuple(settings)


def gradients(x, weight, bias, settings, grad=None):
    """The output, and the gradients of everything."""
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    out = conv2d(*leaves, *settings)
    grad = normal(*out.shape, seed=3, dtype=torch.float32) if grad is None else grad
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("shape", [(2, 24, 12, 12, 16, 3, 1, 1, 1), TILED], ids=str)
def test_gradients_of_float32_weights_are_not_rounded(kernels, shape):
    """Under autocast the weights are float32, and so are the sums that a kernel makes."""
    x, weight, bias, settings = operands(shape)
    weight, bias = weight.float(), bias.float()
    with torch.autocast("cpu", HALF):
        out, of_x, of_weight, of_bias = gradients(x.float(), weight, bias, settings)
    assert out.dtype == HALF and of_x.dtype == of_weight.dtype == of_bias.dtype == torch.float32
    with use_backend("reference"):
        golden = gradients(
            x.double(),
            weight.to(HALF).double(),
            bias.double(),
            settings,
            normal(*out.shape, seed=3, dtype=torch.float32).to(HALF),
        )
    if kernels == "reference":
        # without AVX512-BF16 PyTorch rounds its sums to bfloat16
        for got, exact in ((of_bias, golden[3]), (of_weight, golden[2])):
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=2**-7 * exact.abs().max().item())
        return
    torch.testing.assert_close(of_bias.double(), golden[3], rtol=1e-5, atol=1e-5)
    if shape == TILED:
        # of numbers that were rounded once more
        assert (of_weight - golden[2]).square().mean().sqrt() < 0.005 * golden[2].square().mean().sqrt()
    else:
        torch.testing.assert_close(of_weight.double(), golden[2], rtol=1e-5, atol=1e-5)


def test_any_layout(kernels):
    x, weight, bias, settings = operands((2, 6, 9, 8, 10, 3, 1, 1, 1))
    wanted = gradients(x, weight, bias, settings)
    padded = torch.full((4, 9, 12, 11), torch.nan, dtype=HALF)
    padded[1:3, 2:8, 1:10, 3:] = x
    for images in (x.contiguous(), padded[1:3, 2:8, 1:10, 3:]):
        for weights in (weight.contiguous(), weight.to(memory_format=LAST), weight.mT.contiguous().mT):
            got = gradients(images, weights, bias, settings)
            for one, same in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, same, rtol=1e-2, atol=1e-2 * same.abs().max().item())
    ones = torch.ones(1, dtype=HALF).expand(wanted[0].shape)
    for one, same in zip(
        gradients(x, weight, bias, settings, ones), gradients(x, weight, bias, settings, ones.clone()), strict=True
    ):
        assert torch.equal(one, same)


def test_rows_and_columns_have_their_own_settings(kernels):
    x, weight = normal(2, 6, 13, 9).to(memory_format=LAST), normal(8, 6, 3, 2, seed=1) / 6
    for settings in (((2, 1), (1, 0), (1, 2)), ((1, 3), (0, 4), (2, 1))):
        torch.testing.assert_close(conv2d(x, weight, None, *settings), F.conv2d(x, weight, None, *settings))


def test_only_what_is_needed_gets_a_gradient(kernels):
    x, weight, bias, settings = operands((2, 6, 9, 8, 10, 3, 1, 1, 1))
    for needed in ((0,), (1,), (2,), (0, 2)):
        leaves = [each.detach().requires_grad_(i in needed) for i, each in enumerate((x, weight, bias))]
        conv2d(*leaves, *settings).sum().backward()
        assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(needed)
    assert not conv2d(x, weight, bias, *settings).requires_grad


def test_frozen_weights_keep_no_images(monkeypatch):
    if op.OP.kernel("cpu") == "reference":
        pytest.skip("no kernel")
    x, weight, bias, settings = operands((2, 6, 9, 8, 10, 3, 1, 1, 1))
    saved = []
    with (
        use_backend("cpp"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
    ):
        conv2d(x.requires_grad_(), weight, bias, *settings)
    assert saved == [torch.Size((10, 3, 3, 6))]


@pytest.mark.parametrize("shape", [(7, 24, 20, 20, 24, 3, 1, 1, 1), (7, *TILED[1:])], ids=str)
def test_one_image_does_not_depend_on_the_others(kernels, shape):
    x, weight, bias, settings = operands(shape)
    if kernels == "cpp":
        whole = conv2d(x, weight, bias, *settings)
        assert torch.equal(torch.cat([conv2d(part, weight, bias, *settings) for part in x.split(2)]), whole)


def test_threads_change_nothing(kernels):
    results = by_threads(lambda: [gradients(*operands(shape)) for shape in SHARED])
    if kernels == "cpp":
        for one, two, three in zip(*results, strict=True):
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_non_finite_numbers_reach_what_they_touch(kernels):
    x, weight, bias, settings = operands((1, 6, 9, 9, 8, 3, 1, 1, 1))
    for value in (torch.nan, torch.inf):
        hurt = x.clone()
        hurt[0, 2, 4, 5] = value
        out = conv2d(hurt, weight, bias, *settings)
        touched = torch.zeros(9, 9, dtype=torch.bool)
        touched[3:6, 4:7] = True
        assert (~out.isfinite()).any(1)[0].equal(touched)
        of_weight = gradients(hurt, weight, bias, settings)[2]
        assert not of_weight[:, 2].isfinite().any() and of_weight[:, [0, 1, 3, 4, 5]].isfinite().all()
        grad = normal(1, 8, 9, 9, seed=3)
        grad[0, 3, 2, 2] = value
        _, of_x, of_weight, of_bias = gradients(x, weight, bias, settings, grad)
        touched = torch.zeros(9, 9, dtype=torch.bool)
        touched[1:4, 1:4] = True
        assert (~of_x.isfinite()).any(1)[0].equal(touched)
        assert not of_weight[3].isfinite().any() and of_weight[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
        assert of_bias.isfinite().tolist() == [i != 3 for i in range(8)]


def test_non_finite_numbers_reach_the_tiles_that_they_touch(kernels):
    x, weight, bias, settings = operands((1, *TILED[1:]))
    for value in (torch.nan, torch.inf):
        hurt = x.clone()
        hurt[0, 2, 4, 5] = value
        bad = (~conv2d(hurt, weight, bias, *settings).isfinite()).any(1)[0]
        assert bad[3:6, 4:7].all() and not bad[:2].any() and not bad[7:].any() and not bad[:, :3].any()
        of_weight = gradients(hurt, weight, bias, settings)[2]
        assert not of_weight[:, 2].isfinite().any() and of_weight[:, [0, 1, *range(3, 32)]].isfinite().all()


def test_errors_by_tiles(kernels):
    """They are those that the op's module names, also where sums cancel and where pixels have one sign."""
    x, weight, _, _ = operands((4, 96, 32, 32, 96, 3, 1, 1, 1))
    edges = weight - weight.mean((2, 3), keepdim=True)
    for images, weights in ((x, weight), (x.abs(), weight), (x.abs() + 4, edges.to(HALF))):
        golden = F.conv2d(images.double(), weights.double(), padding=1)
        error = (conv2d(images, weights, None, 1, 1) - golden).square().mean().sqrt() / golden.square().mean().sqrt()
        assert error < (0.0055 if kernels == "cpp" else 0.002), float(error)


def test_what_is_not_for_the_kernels_is_torchs(kernels):
    """Other dtypes, groups, padding by other numbers, no batch: the same bits as torch's layer."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        x, weight, bias = (each.to(dtype) for each in operands((2, 6, 9, 8, 10, 3, 1, 1, 1))[:3])
        assert torch.equal(conv2d(x, weight, bias, 1, 1), F.conv2d(x, weight, bias, 1, 1))
    for options in ({"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
        options = {"padding": 1, **options}
        ours, plain = Conv2d(6, 4, 3, **options), torch.nn.Conv2d(6, 4, 3, **options)
        plain.load_state_dict(ours.state_dict())
        x = normal(2, 6, 8, 8, dtype=torch.float32)
        for autocast in (False, True):
            with torch.autocast("cpu", HALF, enabled=autocast):
                assert torch.equal(ours(x), plain(x))
    layer = Conv2d(6, 4, 3)
    assert layer(normal(6, 8, 8, dtype=torch.float32)).shape == (4, 6, 6)


@pytest.mark.slow
def test_compiles(kernels):
    def make(size: int) -> tuple:
        return (normal(size, 6, 8, 10, seed=size, dtype=torch.float32).requires_grad_(),)

    layer = Conv2d(6, 4, 3, 1, 1)

    def function(x):
        # in bfloat16 PyTorch's own kernel may round otherwise inside a graph, which is no matter of this package
        with torch.autocast("cpu", HALF, enabled=kernels == "cpp"):
            return layer(2 * x).float()

    compiles(function, make)


def test_the_next_layer_may_change_the_result_in_place(kernels):
    x, weight, bias, settings = operands((2, 6, 9, 8, 10, 3, 1, 1, 1))
    for needed in (0, 1):
        leaves = [each.detach().requires_grad_(i == needed) for i, each in enumerate((x, weight))]
        made = [
            torch.autograd.grad(activation(conv2d(*leaves, bias, *settings)).float().square().sum(), leaves[needed])[0]
            for activation in (torch.relu, torch.relu_)
        ]
        assert torch.equal(*made)


def test_there_is_a_kernel_where_there_are_instructions():
    features = cpu_features() if sys.platform == "linux" else ()
    expected = _library.loaded() and "avx512_bf16" in features and "amx_tile" not in features
    assert (op.OP.kernel("cpu") == "cpp") == expected


def test_an_autocast_leaves_float64_alone():
    x, weight = torch.rand(2, 16, 8, 8, dtype=torch.float64), torch.rand(16, 16, 3, 3, dtype=torch.float64)
    with use_backend("cpp"), torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight, padding=1).dtype == F.conv2d(x, weight, padding=1).dtype == torch.float64


def test_a_result_without_gradient_may_be_changed_in_place():
    x, weight = (torch.rand(shape, dtype=torch.bfloat16) for shape in ((2, 16, 8, 8), (16, 16, 3, 3)))
    with use_backend("cpp"), torch.no_grad():
        made = conv2d(x, weight)
    made.mul_(torch.ones((), requires_grad=True))
    assert made.requires_grad

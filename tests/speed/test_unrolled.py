"""Convolutions of small maps as matrix products: the same numbers, only where they pay."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from purify_fast._processor import onednn_takes_bfloat16
from purify_fast.models.layers import Conv2d
from purify_fast.ops.convolution import OP as CONVOLUTION
from purify_fast.speed import InferenceCopy
from purify_fast.speed.folding import unrolled
from purify_fast.speed.folding.unrolled import matrix, packed_matrix, turned

BF16, LAST = torch.bfloat16, torch.channels_last
#: The side of the images, the side of the kernel, the stride and the padding.
FORMS = [(4, 3, 1, 1), (5, 3, 1, 3), (8, 3, 2, 1), (5, 3, 1, 0), (2, 3, 1, 1), (7, 3, 2, 0), (6, 2, 2, 0), (9, 5, 3, 2)]
packs = pytest.mark.skipif(not onednn_takes_bfloat16(), reason="oneDNN takes no bfloat16 without AVX512-BF16")


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setattr(unrolled, "has_tiles", lambda: True)
    # A CPU with tiles has no kernel of `conv2d`.
    monkeypatch.setitem(CONVOLUTION.available, "cpu", ("reference",))


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), FORMS)
def test_results_and_gradients_are_those_of_the_convolution(side, kernel, stride, padding, layout):
    generator = torch.Generator().manual_seed(side + kernel)
    shapes = ((3, 24, side, side), (40, 24, kernel, kernel), (40,))
    given = [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]
    given = [t.to(memory_format=layout) if t.dim() == 4 else t for t in given]
    exact = [t.double() for t in given]
    for images in (given[0], exact[0]):
        images.requires_grad_()
    right = F.conv2d(*exact, stride, padding)
    found = unrolled.unrolled(*given, (stride, stride), (padding, padding))
    assert found.dtype == BF16 and found.is_contiguous(memory_format=LAST) and found.shape == right.shape
    grad = torch.randn(right.shape, generator=generator).to(BF16)
    wanted = [right, *torch.autograd.grad(right, exact[0], grad.double(), retain_graph=True)]
    actual = [found.detach().clone(), *torch.autograd.grad(found, given[0], grad, retain_graph=True)]
    # the next layer may change the result in place
    actual.append(torch.autograd.grad(found.relu_(), given[0], grad)[0])
    wanted.append(torch.autograd.grad(right, exact[0], grad.double() * (found.detach() > 0))[0])
    for a, b in zip(actual, wanted, strict=True):
        assert (a.double() - b).norm() < 0.006 * b.norm()


@packs
def test_the_matrix_of_the_gradient_follows_the_weights():
    """It is kept for frozen weights, and made again after these change. A trace does not record it as a constant."""
    torch.manual_seed(0)
    weight, grad = (torch.randn(shape).to(BF16) for shape in ((64, 64, 3, 3), (2, 64, 4, 4)))
    rest = torch.Size((2, 64, 4, 4)), (1, 1), (1, 1)

    def close(found):
        right = conv2d_input(rest[0], weight.double(), grad.double(), 1, 1)
        return (found.double() - right).norm() < 0.006 * right.norm()

    def layout():
        return packed_matrix(weight, turned, (4, 4))

    assert close(unrolled.input_gradient(grad, weight, *rest))
    kept = layout()
    assert layout() is kept
    weight.mul_(torch.rand(64)[:, None, None, None].to(BF16))
    assert close(unrolled.input_gradient(grad, weight, *rest)) and layout() is not kept
    traced = make_fx(lambda one, other: unrolled.input_gradient(one, other, *rest))(grad, weight)
    weight.neg_()
    assert close(traced(grad, weight))
    with torch.inference_mode():
        assert close(unrolled.input_gradient(grad, weight.clone(), *rest))


@packs
def test_layouts_are_few_and_follow_new_memory():
    weight = torch.rand(64, 64, 3, 3).to(BF16)
    for side in range(1, 12):
        packed_matrix(weight, turned, (side, 1))
    assert len(unrolled._layouts[weight][1]) == unrolled.MOST
    rows = torch.rand(1, 2, 2, 9 * 64).to(BF16)
    unrolled.product(rows, weight, matrix)
    weight.data = torch.zeros_like(weight)
    assert not unrolled.product(rows, weight, matrix).any()


def test_empty_batches_and_fake_tensors():
    weight = torch.rand(512, 512, 3, 3).to(BF16)
    leaf = torch.rand(0, 512, 4, 4).to(BF16).requires_grad_()
    out = unrolled.unrolled(leaf, weight, None, (1, 1), (1, 1))
    assert out.shape == leaf.shape == torch.autograd.grad(out.sum(), leaf)[0].shape
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(one) for one in (torch.rand(2, 512, 4, 4).to(BF16), weight))
        assert unrolled.unrolled(*fakes, None, (1, 1), (1, 1)).shape == (2, 512, 4, 4)


def test_it_serves_small_maps_of_wide_layers_alone():
    x, weight = torch.zeros(2, 512, 4, 4, dtype=BF16), torch.zeros(512, 512, 3, 3, dtype=BF16)
    ones = (1, 1)
    assert unrolled.is_faster(x, weight, ones, ones)
    assert not unrolled.is_faster(torch.zeros(2, 512, 5, 5, dtype=BF16), weight, ones, ones)
    assert unrolled.is_faster(torch.zeros(2, 512, 8, 8, dtype=BF16), weight, (2, 2), ones)
    assert not unrolled.is_faster(x[:, :64], weight[:64, :64], ones, ones)
    assert not unrolled.is_faster(x, weight[:, :, :1, :1], ones, (0, 0))
    assert not unrolled.is_faster(x.float(), weight.float(), ones, ones)
    assert not unrolled.is_faster(x, weight.clone().requires_grad_(), ones, ones)
    with torch.autocast("cpu", BF16):
        assert unrolled.is_faster(x.float(), weight.float(), ones, ones)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 256, 3, 2, 1)
        self.wide, self.grouped = Conv2d(256, 512, 3, 2, 1, bias=False), nn.Conv2d(512, 512, 3, 1, 1, groups=512)
        self.norm, self.head = nn.BatchNorm2d(512), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.wide(F.relu_(self.first(x)))) + 0).mean((2, 3)))


@pytest.mark.parametrize("usable", [False, True])
def test_an_inference_copy_takes_it_where_there_are_tiles(usable, monkeypatch):
    monkeypatch.setattr(unrolled, "has_tiles", lambda: usable)
    calls, torch_s = [], unrolled.unrolled
    monkeypatch.setattr(unrolled, "unrolled", lambda *a: calls.append(len(a)) or torch_s(*a))
    torch.manual_seed(0)
    network = _Net().eval()
    copy = InferenceCopy(network, (3, 16, 16), BF16)
    assert type(network.wide) is Conv2d and type(copy.classifier.grouped) is nn.Conv2d
    calls.clear()
    x = torch.rand(5, 3, 16, 16, requires_grad=True)
    for weight in (1.0, 1.5):
        with torch.no_grad():
            network.wide.weight.mul_(weight)
        copy.refresh(network)
        found, right = (torch.autograd.grad(one(x).logsumexp(1).sum(), x)[0] for one in (copy, network))
        assert (found - right).norm() < 0.1 * right.norm()
    assert len(calls) == (2 if usable else 0)
    # transforms of torch.func take PyTorch's convolution
    torch.func.vmap(lambda one: copy.classifier.wide(one[None])[0])(torch.zeros(2, 256, 8, 8, dtype=BF16))
    assert len(calls) == (2 if usable else 0)

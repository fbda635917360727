"""BatchNorm folded: the same function and gradient; what cannot be folded stays as it was. The tests of a
normalization that is not folded follow."""

import copy

import pytest
import torch
from small_models import answers, with_random_norms as trained
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet18

from purify_fast.models.classifiers import SmallCNN
from purify_fast.models.layers import Normalize, Representation
from purify_fast.speed.folding.batchnorm import fold_batchnorm
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.speed.frozen_copy import Form, FrozenCopy


def norms(model):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def assert_same(folded, model, x, rtol=1e-5):
    """Output and input gradient, relative to the largest value."""
    for mine, right in zip(answers(folded, x), answers(model, x), strict=True):
        assert (mine - right).abs().max() <= rtol * right.abs().max()


class Net(nn.Module):
    """Everything that folds: with and without bias, groups, strides, no affine part, linear layers."""

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        second = nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.BatchNorm2d(8, eps=0.1), nn.SiLU()
        third = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten()
        last = nn.Linear(4 * 36, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 5)
        self.body = nn.Sequential(*first, *second, *third, *last)

    def forward(self, x):
        return self.body(x)


def test_all_kinds_of_layers_fold():
    model, x = trained(Net()), torch.rand(6, 3, 16, 16)
    folded = copy.deepcopy(model)
    assert len(fold_batchnorm(folded)) == 4 and norms(folded) == 0
    assert_same(folded, model, x)


class Awkward(nn.Module):
    """Pairs that only look like pairs, and one that is."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.good = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        if kind == "weight norm":
            self.conv = weight_norm(self.conv)
        if kind == "tied":
            self.conv.weight = self.tied_weight = nn.Conv2d(4, 4, 3).weight
            self.other = nn.Conv2d(4, 4, 3, padding=1)
            self.other.weight = self.conv.weight
        if kind == "no statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = F.relu(self.good(self.first(x)))
        y = self.conv(x)
        if self.kind == "read twice":
            return (self.norm(y) + y).mean((2, 3))
        if self.kind == "changed between":
            return self.norm(y.mul_(2)).square().mean((2, 3))
        if self.kind == "run twice":
            return self.norm(self.conv(self.norm(y))).square().mean((2, 3))
        if self.kind == "tied":
            y = y + self.norm(self.other(x))
            return y.mean((2, 3))
        if self.kind == "another axis":
            return self.norm(y.transpose(1, 2)).square().mean((2, 3))
        return self.norm(y).square().mean((2, 3))


PAIRS = ["read twice", "changed between", "run twice", "tied", "weight norm", "no statistics", "another axis"]


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_that_are_none_stay_and_the_others_fold(kind):
    model, x = Awkward(kind), torch.rand(3, 3, 4, 4)
    if kind != "no statistics":
        trained(model)
    model.eval()
    folded = copy.deepcopy(model)
    assert len(fold_batchnorm(folded)) == 1 and isinstance(folded.good, nn.Identity)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert_same(folded, model, x)


@pytest.mark.parametrize("layer", ["bn1", "layer2.0.downsample"])
def test_tapped_layers_give_the_same_after_folding(layer):
    model, x = trained(resnet18(num_classes=10)), torch.rand(2, 3, 32, 32)
    want = Representation(copy.deepcopy(model), [layer], (3, 32, 32))(x)[0]
    representation = Representation(model, [layer], (3, 32, 32))
    # the second holds a pair, but is none
    assert len(fold_batchnorm(model)) == (19 if layer == "bn1" else 20)
    torch.testing.assert_close(representation(x)[0], want, rtol=1e-5, atol=1e-4)


def test_layers_in_training_mode_stay_and_other_dtypes_are_refused():
    assert fold_batchnorm(Net()) == []
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, torch\.bfloat16"):
        InferenceCopy(SmallCNN(), (1, 16, 16), torch.float16)


class TwoInputs(nn.Module):
    """What a decoder is like: two tensors, and transposed convolutions."""

    runs_in_order = True

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU())
        first = nn.ConvTranspose2d(8, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.SiLU()
        second = nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.stack = nn.Sequential(*first, *second, nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
        self.twice = nn.Sequential(self.shared, nn.BatchNorm1d(6), self.shared)
        self.more = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))])

    def forward(self, a, b):
        return self.stack(self.head(self.more[0](self.twice(a)) + b)[:, :, None, None])


def branches(model):
    """Let a model look at its images, so that no trace of it is possible."""

    class Looks(type(model)):
        def forward(self, a, b):
            return super().forward(a, b) if a.mean() > -1e9 else a

    # A class of its own says so itself that its parts run in order.
    Looks.runs_in_order = vars(type(model)).get("runs_in_order", False)
    model.__class__ = Looks
    return model


@pytest.mark.parametrize("traced", [True, False])
def test_a_decoder_folds_with_and_without_a_trace(traced):
    model, (a, b) = trained(TwoInputs()).double(), torch.rand(2, 5, 6, dtype=torch.float64)
    want = model(a, b)
    fold_batchnorm(model if traced else branches(model))
    assert torch.allclose(model(a, b), want, rtol=1e-10, atol=1e-12)
    # a convolution of groups, and a layer that stands in two places, stay as they were
    assert norms(model) == 2


def test_only_a_class_that_says_so_runs_its_sequentials_in_order():
    class Inherits(TwoInputs):
        """What it calls in its own forward is not known."""

        def forward(self, a, b):
            h = self.more[0][0](a)
            return self.stack(self.head(torch.relu(self.more[0][1](h)) + h + b)[:, :, None, None])

    torch.manual_seed(0)
    model, (a, b) = branches(trained(Inherits())), torch.rand(2, 5, 6)
    want = model(a, b)
    before = norms(model)
    assert fold_batchnorm(model) == [] and norms(model) == before and torch.equal(model(a, b), want)
    # a model that is a Sequential itself is called as a whole
    alone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    assert fold_batchnorm(alone) == [("0", "1")]


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_a_fine_copy_sees_a_perturbation_that_bfloat16_rounds_away(kind):
    # differences of neighboring pixels, which is what the first layer of a network sees
    difference = torch.eye(8)[:7] - torch.eye(8)[1:]
    if kind == "convolution":
        first = nn.Conv2d(1, 1, (1, 2), bias=False)
        first.weight.data = torch.tensor([[[[1.0, -1.0]]]])
        model = nn.Sequential(first, nn.Flatten())
    else:
        model = nn.Sequential(nn.Flatten(), nn.Linear(8, 7, bias=False))
        model[1].weight.data = difference
    # at 0.7 the numbers of bfloat16 are 1/256 apart
    x = 0.7 + torch.tensor([0.0, 1, 0, 0, 1, 1, 0, 1]).view(1, 1, 1, 8) / 1024
    wanted = model.eval().requires_grad_(False)(x)
    fine, coarse = (InferenceCopy(model, (1, 1, 8), fine=fine) for fine in (True, False))
    assert float((fine(x) - wanted).norm() / wanted.norm()) < 0.01 and not coarse(x).any()
    # the copy keeps its class to itself
    assert type(model[0]) in (nn.Conv2d, nn.Flatten)


# -- normalization of a frozen copy ------------------------------------------------------------------------------------
# The normalization of a frozen copy: rounded once, differentiated in every way, and read again.


class Normalized(nn.Module):
    """A normalization far from 0, and convolutions that pad their images with zeros."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize((0.9, 0.1, 0.5), (0.2, 0.3, 0.05), 3)
        # With fewer weights, a copy would keep its images contiguous.
        self.convs = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1))

    def forward(self, x):
        self.seen = self.normalize(x)
        return self.convs(self.seen).flatten(1)


def normalized():
    torch.manual_seed(0)
    return Normalized().requires_grad_(False).eval(), torch.rand(5, 3, 8, 8)


NORMALIZED = [
    (torch.float32, False, torch.float32),
    (torch.bfloat16, True, torch.float32),
    (torch.bfloat16, False, torch.bfloat16),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "fine", "seen"), NORMALIZED)
def test_a_copy_normalizes_as_its_model(dtype, fine, seen, layout):
    model, x = normalized()
    copied = InferenceCopy(model, (3, 8, 8), dtype, fine=fine)
    leaf = x.contiguous(memory_format=layout).requires_grad_()
    got = copied(leaf)
    wanted = model(x)
    network = copied.classifier
    assert network.seen.dtype == seen and network.seen.is_contiguous(memory_format=layout)
    # The images are rounded once, and the pixels beside the padding are right, too.
    error = 2**-8 if seen == torch.bfloat16 else 1e-6
    torch.testing.assert_close(network.seen.float(), model.seen, rtol=error, atol=1e-5)
    error = 1e-6 if dtype == torch.float32 else 2**-7
    assert bool((got - wanted).abs().max() <= error * wanted.abs().max())
    # The gradient of the normalized images, divided by the standard deviation.
    weight = torch.linspace(-1, 1, got.numel()).view_as(got)
    (grad,) = torch.autograd.grad((got * weight).sum(), leaf)
    other = x.clone().requires_grad_()
    (right,) = torch.autograd.grad((model(other) * weight).sum(), other)
    assert grad.dtype == torch.float32
    # A processor without instructions for bfloat16 rounds sums of products more often.
    error = 1e-5 if dtype == torch.float32 else 2**-5
    assert bool((grad - right).abs().max() <= error * right.abs().max())
    # The copy keeps its class to itself.
    assert type(model.normalize) is Normalize


def test_a_copy_follows_other_statistics():
    model, x = normalized()
    copied = FrozenCopy(model, (3, 8, 8), Form(torch.bfloat16), compile=False)
    model.normalize.mean.fill_(0.3)
    model.normalize.std.fill_(0.7)
    wanted = model(x)
    assert bool((copied(x) - wanted).abs().max() <= 2**-7 * wanted.abs().max())


def test_a_copy_is_differentiated_in_every_way():
    model, x = normalized()
    copied = InferenceCopy(model, (3, 8, 8))
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def loss(network):
        return lambda images: network(images).logsumexp(1).sum()

    ways = {
        "grad": lambda network: torch.func.grad(loss(network))(x),
        "twice": lambda network: torch.autograd.functional.hvp(loss(network), x, tangent)[1],
        "batched": lambda network: torch.autograd.functional.jacobian(network, x[:1], vectorize=True),
    }
    for name, way in ways.items():
        got, wanted = way(copied), way(model)
        assert bool((got - wanted).abs().max() <= 2**-5 * wanted.abs().max()), name
    # `forward` itself has forward derivatives; convolutions in bfloat16 have none on every processor.
    layer = copied.classifier.normalize
    with torch.autocast("cpu"), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(moved, tangent / model.normalize.std)

"""Convolutions of few channels: the same sums and gradients as the library's, in another order."""

import copy

import pytest
import torch
from torch import nn

from purify_fast import Carso
from purify_fast.attacks import gradient_copy as copies
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.folding import halving
from purify_fast.speed.folding.halving import (
    Resizing,
    RowByRow,
    SameLayout,
    replace_resizing,
    replacement_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
    nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1, bias=False),
]
ROWS = [
    nn.Conv2d(1, 5, 3, padding=1),
    nn.Conv2d(6, 1, 3, padding=1, bias=False),
    nn.ConvTranspose2d(6, 1, 3, padding=1),
    nn.ConvTranspose2d(1, 4, 3, padding=1, bias=False),
]


@pytest.mark.parametrize("width", [10, 2 * halving.WIDEST_ROW])
@pytest.mark.parametrize("layer", LAYERS + ROWS, ids=str)
def test_the_same_result_and_gradient(layer, width):
    """Channels last both ways, whatever the layout of what comes in; the next layer would copy anything else."""
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    fast = replacement_of(layer)(layer, torch.float64)
    x = torch.randn(3, layer.in_channels, 6, width, dtype=torch.float64, requires_grad=True)
    seen = []
    x.register_hook(lambda gradient: seen.append(gradient.is_contiguous(memory_format=torch.channels_last)))
    want, got = layer(x), fast(x)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    (one,), (other,) = (torch.autograd.grad((out * weight).sum(), x) for out in (want, got))
    assert torch.allclose(other, one, rtol=1e-12, atol=1e-12)
    # wide images go through the layer itself
    if isinstance(fast, Resizing) or width == 10:
        assert got.is_contiguous(memory_format=torch.channels_last) and seen[-1]
    assert fast.weight is layer.weight and fast.bias is layer.bias
    # an image without a batch, and a batch without images
    assert torch.equal(fast(x[0]), layer(x[0]))
    none = x[:0].detach().requires_grad_()
    assert fast(none).shape == want[:0].shape
    assert torch.autograd.grad(fast(none).sum(), none)[0].shape == none.shape


def test_an_activation_keeps_its_layout_and_gradient():
    fast, activation = SameLayout(nn.SiLU()), nn.SiLU()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2, 60, dtype=torch.float64)
    gradients = [torch.autograd.grad((f(x).flatten(1) * weight).sum(), x)[0] for f in (activation, fast)]
    assert torch.allclose(*gradients, rtol=1e-14) and torch.equal(fast(x), activation(x))
    # flattened maps hand back a gradient in the other layout
    layouts = [gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients]
    assert layouts[1]
    flat = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(fast(flat), activation(flat)) and fast(flat).grad_fn.name() == "SiluBackward0"


class Added(nn.Module):
    """Adds a layer's input to its result in place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x)
        out += x
        return out


DOWN = nn.Conv2d(2, 3, 3, stride=2, padding=1)


@pytest.mark.parametrize(
    "layers",
    [
        *([layer, nn.ReLU(inplace=True)] for layer in LAYERS + ROWS),
        [DOWN, Added(nn.SiLU())],
        [DOWN, Added(nn.GELU()), nn.ReLU(inplace=True), nn.ConvTranspose2d(3, 1, 3, 2, 1, 1), Added(nn.SiLU())],
        [DOWN, nn.SiLU(), nn.LeakyReLU(inplace=True), nn.Conv2d(3, 1, 3, padding=1), nn.ELU(inplace=True)],
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [10, 2 * halving.WIDEST_ROW])
def test_results_may_be_changed_in_place(layers, width):
    model = copy.deepcopy(nn.Sequential(*layers)).double().requires_grad_(False)
    fast = copy.deepcopy(model)
    replace_resizing(fast, torch.float64)
    assert any(isinstance(part, (Resizing, RowByRow)) for part in fast.modules())
    x = torch.randn(3, layers[0].in_channels, 6, width, dtype=torch.float64, requires_grad=True)
    want, got = model(x), fast(x)
    weight = torch.randn_like(want)
    (one,), (other,) = (torch.autograd.grad((out * weight).sum(), x) for out in (want, got))
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12) and torch.allclose(other, one, rtol=1e-12, atol=1e-12)
    assert one.abs().max() > 0


def test_a_change_that_spoils_a_gradient_is_noticed():
    """The gradient of ReLU is computed from its result: changed in place, it must be refused rather than wrong."""
    model = nn.Sequential(DOWN, Added(nn.ReLU())).requires_grad_(False)
    fast = copy.deepcopy(model)
    replace_resizing(fast, torch.float32)
    assert isinstance(fast[0], Resizing) and isinstance(fast[1].layer, SameLayout)
    for each in (model, fast):
        x = torch.randn(3, 2, 6, 10, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            each(x).sum().backward()


def test_images_that_cannot_be_halved_go_through_the_layer():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(2, 2, 7, 6)
    assert torch.equal(Resizing(layer, torch.float32)(x), layer(x))


def test_which_layers_it_stands_for():
    assert all(replacement_of(layer) is Resizing for layer in LAYERS)
    assert all(replacement_of(layer) is RowByRow for layer in ROWS)
    for layer in (
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Conv2d(3, 5, 5, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(1, 64, 3, padding=1),
        nn.Conv2d(1, 4, 3),
        nn.Linear(3, 3),
    ):
        assert replacement_of(layer) is None
    hooked = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Sequential(hooked, nn.Conv2d(4, 4, 3)))
    assert replacement_of(hooked) is None
    for _ in range(2):
        replace_resizing(model, torch.float32)
        assert isinstance(model[0], Resizing) and type(model[0].layer) is nn.Conv2d and model[1][0] is hooked
    watched = nn.SiLU()
    watched.register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.SiLU(), watched)
    replace_resizing(model, torch.float32)
    assert [type(layer) for layer in model] == [RowByRow, SameLayout, nn.SiLU]


def test_a_defence_is_attacked_through_folded_and_resizing_layers(monkeypatch):
    torch.manual_seed(0)
    net = SmallCNN(1, 10, (16, 16), 8).eval()
    defence = Carso(net, ["conv2", "conv4"], (1, 16, 16), cond_dim=16, latent_dim=4, samples=3, decoder_width=8).eval()
    x = torch.rand(5, 1, 16, 16)
    made = copies.gradient_copy(defence, x, "bfloat16")
    kinds = [type(module) for module in made.modules()]
    assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    assert (
        kinds.count(Resizing) >= 2
        and kinds.count(RowByRow) == 1
        and any(isinstance(m, Resizing) for m in made.fast.classifier.modules())
    )
    gradients = []
    for model in (defence, made):
        with model.fixed_noise(3):
            leaf = x.clone().requires_grad_()
            logits = model(leaf)
            gradients.append(torch.autograd.grad(logits[:, 0].sum(), leaf)[0])
    a, b = (g.flatten() for g in gradients)
    assert torch.dot(a, b) > 0.97 * a.norm() * b.norm()
    assert not any(isinstance(module, Resizing) for module in defence.modules())

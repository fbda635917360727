"""The normalization of a frozen copy: rounded once, differentiated in every way, and read again."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from purify_fast.models.layers import Normalize
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.speed.frozen_copy import Form, FrozenCopy


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "fine", "seen"),
    [
        (torch.float32, False, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
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

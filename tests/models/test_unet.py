"""The U-Net: images of any size, what it computes by hand, the time, bfloat16, and what it refuses."""

import pytest
import torch
from denoisers import trained_unet
from torch import nn
from torch.nn import functional as F

from purify_fast.models import unet
from purify_fast.models.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")


def network(**options):
    return trained_unet(**{"width": 8, **options}).eval()


SIZES = [(1, (8, 8), 1), (1, (28, 28), 2), (3, (32, 32), 2), (3, (9, 14), 1), (1, (3, 4), 1), (3, (9, 12), 3)]


@pytest.mark.parametrize(("channels", "size", "patch"), SIZES)
@pytest.mark.parametrize("attention", [False, True])
def test_images_of_any_size(channels, size, patch, attention):
    model = network(channels=channels, patch=patch, attention=attention)
    x, t = torch.randn(3, channels, *size, requires_grad=True), torch.tensor([0.0, 10.5, 1000.0])
    out = model(x, t)
    assert out.shape == x.shape and out.isfinite().all()
    # an image's result is its own
    torch.testing.assert_close(model(x[1:2], t[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[1:], t[1]), model(x[1:], t[1].expand(2)))
    out.square().sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(weight.grad is not None and weight.grad.any() for name, weight in model.named_parameters())


def test_it_is_small_and_fresh_it_predicts_nothing():
    model = UNet(3, 32, patch=2)
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    assert not model(torch.randn(2, 3, 8, 8), torch.tensor([3, 700])).any()


def test_attention_by_hand():
    attention = network(channels=1).attention
    h = torch.randn(2, 32, 3, 2)
    query, key, value = attention.project(attention.norm(h)).flatten(2).chunk(3, 1)
    seen = torch.einsum("bqk,bck->bcq", torch.einsum("bcq,bck->bqk", query, key).div(32**0.5).softmax(-1), value)
    torch.testing.assert_close(attention(h), h + attention.out(seen.reshape(h.shape)))


def test_the_time_is_told():
    model, x = network(channels=1), torch.randn(2, 1, 8, 8)
    near = [model(x, torch.tensor(t)) for t in (500, 500.0, 501.0, 900.0)]
    assert torch.equal(near[0], near[1])
    apart = [(other - near[0]).norm() for other in near[2:]]
    assert 0 < apart[0] < apart[1]
    # frequencies from 1 to 1 / 10,000
    assert model.frequencies[0] == 1 and model.frequencies[-1].item() == pytest.approx(1e-4)


@pytest.mark.parametrize("by_device", [True, False], ids=["as on a CPU", "as on CUDA"])
def test_16_bit_images_with_float32_weights(by_device, monkeypatch):
    if not by_device:
        monkeypatch.setattr(unet, "MIXED_DTYPES", ())
    norm, x = nn.GroupNorm(2, 32), torch.randn(2, 32, 4, 4).bfloat16().requires_grad_()
    for weight in norm.parameters():
        nn.init.normal_(weight)
    shift, leaves = torch.randn(2, 32), [x, *norm.parameters()]
    out = unet._active(norm, x, shift)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = F.silu(F.group_norm(exact[0] + shift[:, :, None, None], 2, *exact[1:]))
    assert out.dtype == torch.bfloat16 and (out - wanted).norm() < 0.01 * wanted.norm()
    found, golden = (torch.autograd.grad(one.sum(), all_of) for one, all_of in ((out, leaves), (wanted, exact)))
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert all((one - other).norm() < 0.02 * other.norm() for one, other in zip(found, golden, strict=True))


UNFIT_SIZES = [
    ({"width": 9}, "width must be even and at most 16, or a multiple of 16, got 9"),
    ({"width": 24}, "or a multiple of 16, got 24"),
    ({"channels": 0}, "channels must be at least 1, got 0"),
    ({"patch": 1.5}, "patch must be a whole number, got 1.5"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT_SIZES)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match=r"multiples of 2 and at least 6, got \[2, 1, 8, 7\]"):
        UNet(1, 8, patch=2)(torch.zeros(2, 1, 8, 7), torch.tensor(1))
    for shape in ((2, 1, 8, 8), (2, 3, 8, 2), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], .* got \[[\d, ]*\]"):
            UNet(3, 8)(torch.zeros(shape), torch.tensor(1))

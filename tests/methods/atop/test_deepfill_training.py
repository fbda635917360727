"""DeepFillv2's own training: SN-PatchGAN and its spectral normalization."""

import copy

import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm

from purify_fast.methods.atop.task import PatchDiscriminator, SpectralConv, patch_depth


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return PatchDiscriminator()


def test_fact_6_sizes(published):
    assert sum(p.numel() for p in published.parameters()) == 5_946_816
    assert sum(b.numel() for b in published.buffers()) == 1216
    with torch.no_grad():
        logits = published(torch.rand(1, 4, 256, 256))
        assert logits.shape == (1, 4096) and logits.isfinite().all() and logits.std() > 0
        assert published(torch.rand(2, 4, 64, 64)).shape == (2, 256)


def test_tensors_have_the_official_names(published):
    names = {f"conv{i}.conv_sn.{leaf}" for i in range(1, 7) for leaf in ("weight", "bias", "weight_u")}
    state = published.state_dict()
    assert state.keys() == names
    assert state["conv3.conv_sn.weight"].shape == (256, 128, 5, 5) and state["conv3.conv_sn.weight_u"].shape == (256, 1)


def test_leaky_relu_follows_every_layer_the_last_too():
    torch.manual_seed(0)
    made = PatchDiscriminator(2, 4, depth=1).eval()
    x = torch.randn(1, 2, 6, 6)
    out = made.conv1.conv_sn(x).flatten(1)
    assert (out < 0).any() and torch.equal(made(x), torch.where(out > 0, out, 0.2 * out))


@pytest.mark.parametrize(
    ("size", "depth", "patches"),
    [((256, 256), 6, 16), ((32, 32), 4, 4), ((28, 28), 4, 4), ((16, 16), 3, 4), ((16, 40), 3, 10), ((3, 3), 1, 4)],
)
def test_small_images_have_at_least_2_x_2_patches(size, depth, patches):
    assert patch_depth(size) == depth
    made = PatchDiscriminator(3, 2, depth)
    assert made(torch.rand(2, 3, *size)).shape == (2, patches * 2 * (1, 2, 4, 4, 4, 4)[depth - 1])


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_equal_torchs(training):
    torch.manual_seed(0)
    ours = SpectralConv(3, 8, 5, 2, 2)
    plain = torch.nn.Conv2d(3, 8, 5, 2, 2)
    with torch.no_grad():
        plain.weight.copy_(ours.weight)
        plain.bias.copy_(ours.bias)
    theirs = spectral_norm(plain)
    state = theirs.parametrizations.weight[0]
    matrix = ours.weight.detach().flatten(1)
    v = torch.nn.functional.normalize(matrix.T @ ours.weight_u, dim=0)[:, 0]
    state._u.copy_(ours.weight_u[:, 0])
    state._v.copy_(v)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(2, 3, 8, 8)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    want = theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(ours.weight.grad, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight_u[:, 0], state._u)


def test_autocast_keeps_sigma_exact():
    torch.manual_seed(0)
    layer = SpectralConv(3, 8, 5, 2, 2)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = twin(x)
    assert got.dtype == torch.bfloat16 and torch.equal(layer.weight_u, twin.weight_u)
    assert (got - want).abs().max() < 0.02 * want.abs().max()

"""The conditional autoencoder's parts, for any image size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purify_fast.methods.carso.networks import Decoder, Deconvolution, decoder_plan, pre_encoder, published_decoder


@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28), (3, 17, 45), (2, 4, 4), (3, 64, 64), (1, 5, 1)]
)
def test_the_decoder_ends_at_any_image_size(shape):
    decoder = Decoder(6, 10, shape, *decoder_plan(shape, 4)).eval()
    assert decoder(torch.randn(3, 2, 6), torch.randn(3, 10)).shape == (6, *shape)


def test_the_split_adapter_is_the_plain_layer_on_latent_then_condition():
    decoder = Decoder(6, 10, (1, 16, 16), *decoder_plan((1, 16, 16), 4)).eval()
    z, c = torch.randn(3, 2, 6), torch.randn(3, 10)
    both = torch.cat([z, c[:, None].expand(-1, 2, -1)], 2).flatten(0, 1)
    plain = decoder.stack(F.leaky_relu(decoder.adapter(both), 0.2).unflatten(1, decoder.start))
    torch.testing.assert_close(decoder(z, c), plain)


def test_layers_that_miss_the_image_are_refused():
    with pytest.raises(ValueError, match=r"end at \(1, 8, 8\), the images are \(1, 16, 16\)"):
        Decoder(2, 2, (1, 16, 16), (4, 4, 4), [Deconvolution(1, output_padding=(1, 1))])


@pytest.mark.parametrize(
    ("shape", "features"),
    # the paper's CIFAR-10 system: 160 x 32 x 32 -> 20 x 26 x 26 and so on (specs of arXiv 2306.06081, appendix)
    [
        ((160, 32, 32), 20 * 26 * 26),
        ((320, 16, 16), 40 * 10 * 10),
        ((640, 8, 8), 80 * 2 * 2),
        ((7, 2, 9), 18),
        ((5,), 5),
    ],
)
def test_pre_encoder_sizes(shape, features):
    encoder, size = pre_encoder(shape)
    assert size == features
    assert encoder.eval()(torch.randn(2, *shape)).shape == (2, features)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("shape", "cond", "latent", "total", "layers", "sizes"),
    [
        ((3, 32, 32), 512, 128, 2_455_107, [590_336, 295_168, 73_856, 18_496, 387], [5, 9, 17, 33, 32]),
        ((3, 64, 64), 768, 192, 4_914_979, [590_336, 295_168, 73_856, 18_496, 867], [8, 16, 32, 64, 64]),
    ],
)
def test_facts_3_and_4_published_decoders(shape, cond, latent, total, layers, sizes):
    """Parameters per layer with its BatchNorm, sizes of the maps, and sigmoid's range."""
    start, plan = published_decoder(shape)
    decoder = Decoder(latent, cond, shape, start, plan).eval()
    assert parameters(decoder) == total
    assert parameters(decoder.adapter) == total - sum(layers)
    assert [parameters(decoder.stack[i : i + 3]) for i in range(0, 15, 3)] == layers
    seen = []
    for module in decoder.stack:
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    out = torch.sigmoid(decoder(torch.randn(2, 1, latent), torch.randn(2, cond)))
    assert seen == sizes and start == (256, 3 if shape[1] == 32 else 4, 3 if shape[1] == 32 else 4)
    assert out.shape == (2, *shape) and out.min() > 0 and out.max() < 1


def test_no_decoder_is_published_for_other_images():
    with pytest.raises(ValueError, match=r"not for \(1, 28, 28\)"):
        published_decoder((1, 28, 28))


def test_tokens_are_encoded_one_by_one_and_kept_in_order():
    encoder, size = pre_encoder((5, 12), 3)
    assert size == 5 * 2  # 12 -> 6 -> 3 -> 2
    encoder.eval()
    x = torch.randn(4, 5, 12)
    out = encoder(x)
    assert out.shape == (4, 10)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(encoder(x[:, order]), out.unflatten(1, (5, 2))[:, order].flatten(1))
    encoder.train()(x)  # BatchNorm's statistics: over batch and tokens, per feature
    assert encoder.blocks[0][1].running_mean.shape == (6,)
    want = 0.9 + 0.1 * encoder.blocks[0][0](x).flatten(0, 1).var(0)
    torch.testing.assert_close(encoder.blocks[0][1].running_var, want)

"""The conditional autoencoder's parts, for any image size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purify_fast.nn import Decoder, Deconvolution, decoder_plan, pre_encoder


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


def test_published_decoder_sizes():
    """Fact 3 and 4 of the paper's CIFAR-10 decoder: 3-5-9-17-33-32 and 2,455,107 parameters."""
    block = dict(kernel=3, stride=2, padding=1)
    layers = [Deconvolution(c, **block) for c in (256, 128, 64, 32)] + [Deconvolution(3, 2, 1, 1)]
    decoder = Decoder(128, 512, (3, 32, 32), (256, 3, 3), layers)
    assert sum(p.numel() for p in decoder.parameters()) == 2_455_107
    sizes = []
    for module in decoder.stack:
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
    decoder.eval()(torch.randn(1, 1, 128), torch.randn(1, 512))
    assert sizes == [5, 9, 17, 33, 32]

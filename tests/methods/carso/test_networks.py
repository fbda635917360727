"""The networks of CARSO's purifier: published sizes, any image, the first version, a decoder as one op."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purify_fast.methods.carso import networks
from purify_fast.methods.carso.networks import ConditionEncoderV1, Decoder, DecoderV1, PosteriorEncoderV1, pre_encoder


@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28), (3, 17, 45), (2, 4, 4), (3, 64, 64), (1, 5, 1)]
)
def test_the_decoder_ends_at_any_image_size(shape):
    decoder = Decoder(6, 10, shape, *networks.decoder_plan(shape, 4)).eval()
    assert decoder(torch.randn(3, 2, 6), torch.randn(3, 10)).shape == (6, *shape)


def test_the_split_adapter_is_the_plain_layer_on_latent_then_condition():
    decoder = Decoder(6, 10, (1, 16, 16), *networks.decoder_plan((1, 16, 16), 4)).eval()
    z, c = torch.randn(3, 2, 6), torch.randn(3, 10)
    both = torch.cat([z, c[:, None].expand(-1, 2, -1)], 2).flatten(0, 1)
    plain = decoder.stack(F.leaky_relu(decoder.adapter(both), 0.2).unflatten(1, decoder.start))
    torch.testing.assert_close(decoder(z, c), plain)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


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
    linear, norm, _ = encoder[1]
    assert norm.running_mean.shape == (6,)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * linear(x).flatten(0, 1).var(0))


MNIST = (1, 28, 28)


def test_the_condition_encoder_is_290_260_130_and_a_sigmoid():
    encoder = ConditionEncoderV1([(200,), (80,), (10,)], 130).eval()
    sizes = [(m.in_features, m.out_features) for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(290, 260), (260, 130)]
    assert parameters(encoder) == (290 * 260 + 3 * 260) + (260 * 130 + 3 * 130)
    c = encoder([3 * torch.randn(4, 200), torch.randn(4, 80), torch.randn(4, 10)])
    assert c.shape == (4, 130) and c.min() > 0 and c.max() < 1


def test_the_posterior_encoder_is_1380_738_96_64():
    encoder = PosteriorEncoderV1(MNIST, 130, 64).eval()
    convolution = encoder.image[0]
    assert convolution.weight.shape == (2, 1, 4, 4) and convolution.bias.shape == (2,)
    sizes = [(m.in_features, m.out_features) for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(1380, 738), (738, 96), (96, 64), (96, 64)]
    assert isinstance(encoder.joint[-1], nn.Tanh)
    mean, log_variance = encoder(torch.rand(3, *MNIST), torch.rand(3, 130))
    assert mean.shape == log_variance.shape == (3, 64)


def test_the_decoder_is_194_97_48_24_1_and_1_4_8_14_28():
    decoder = DecoderV1(64, 130, MNIST, *networks.decoder_plan_v1(1, 194)).eval()
    layers = [m for m in decoder.stack if isinstance(m, nn.ConvTranspose2d)]
    assert [tuple(m.weight.shape) for m in layers] == [(194, 97, 4, 4), (97, 48, 4, 4), (48, 24, 4, 4), (24, 1, 4, 4)]
    assert all(m.bias is not None for m in layers)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in decoder.modules())
    sizes = []
    for m in layers:
        m.register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
    assert decoder(torch.randn(3, 2, 64), torch.rand(3, 130)).shape == (6, 1, 28, 28)
    assert sizes == [4, 8, 14, 28]


def test_the_decoder_takes_the_latent_before_the_condition():
    decoder = DecoderV1(10, 6, MNIST, *networks.decoder_plan_v1(1, 16)).eval()
    z, c, seen = torch.randn(2, 3, 10), torch.randn(2, 6), []
    decoder.stack[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    decoder(z, c)
    for image in range(2):
        for sample in range(3):
            want = torch.cat([z[image, sample], c[image]])
            assert torch.equal(seen[0][3 * image + sample].flatten(), want)


def test_sizes_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match=r"must return images \(1, 32, 32\), got \(1, 28, 28\)"):
        DecoderV1(10, 6, (1, 32, 32), *networks.decoder_plan_v1(1, 16))

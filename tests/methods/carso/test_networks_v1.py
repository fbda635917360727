"""The parts of CARSO's first version, against the sizes its code gives for MNIST."""

import pytest
import torch
from torch import nn

from purify_fast.methods.carso.networks_v1 import ConditionEncoderV1, DecoderV1, PosteriorEncoderV1, decoder_plan_v1

MNIST = (1, 28, 28)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_condition_encoder_is_290_260_130_and_a_sigmoid():
    encoder = ConditionEncoderV1([(200,), (80,), (10,)], 130).eval()
    sizes = [(m.in_features, m.out_features) for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(290, 260), (260, 130)]
    assert parameters(encoder) == (290 * 260 + 3 * 260) + (260 * 130 + 3 * 130)
    c = encoder([3 * torch.randn(4, 200), torch.randn(4, 80), torch.randn(4, 10)])
    assert c.shape == (4, 130) and c.min() > 0 and c.max() < 1


def test_the_condition_encoder_flattens_maps_and_tokens():
    assert ConditionEncoderV1([(2, 3, 4), (5, 6)], 7).eval()([torch.rand(2, 2, 3, 4), torch.rand(2, 5, 6)]).shape == (
        2,
        7,
    )


def test_activation_comes_before_batchnorm():
    kinds = [type(m).__name__ for m in ConditionEncoderV1([(20,)], 5).joint]
    assert kinds == ["Linear", "_LeakyReLU", "BatchNorm1d"] * 2 + ["Sigmoid"]
    x = torch.randn(50)
    torch.testing.assert_close(ConditionEncoderV1([(20,)], 5).joint[1](x), nn.LeakyReLU()(x))


def test_the_posterior_encoder_is_1380_738_96_64():
    encoder = PosteriorEncoderV1(MNIST, 130, 64).eval()
    convolution = encoder.image[0]
    assert convolution.weight.shape == (2, 1, 4, 4) and convolution.bias.shape == (2,)
    sizes = [(m.in_features, m.out_features) for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(1380, 738), (738, 96), (96, 64), (96, 64)]
    assert isinstance(encoder.joint[-1], nn.Tanh)
    mean, log_variance = encoder(torch.rand(3, *MNIST), torch.rand(3, 130))
    assert mean.shape == log_variance.shape == (3, 64)
    with pytest.raises(ValueError, match="at least 4 x 4, got 3 x 9"):
        PosteriorEncoderV1((1, 3, 9), 2, 2)


def test_the_decoder_is_194_97_48_24_1_and_1_4_8_14_28():
    decoder = DecoderV1(64, 130, MNIST, *decoder_plan_v1(1, 194)).eval()
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
    decoder = DecoderV1(10, 6, MNIST, *decoder_plan_v1(1, 16)).eval()
    z, c, seen = torch.randn(2, 3, 10), torch.randn(2, 6), []
    decoder.stack[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    decoder(z, c)
    for image in range(2):
        for sample in range(3):
            want = torch.cat([z[image, sample], c[image]])
            assert torch.equal(seen[0][3 * image + sample].flatten(), want)


def test_sizes_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match=r"starts with 9 numbers, its start is \(16, 1, 1\)"):
        DecoderV1(3, 6, MNIST, *decoder_plan_v1(1, 16))
    with pytest.raises(ValueError, match=r"end at \(1, 28, 28\), the images are \(1, 32, 32\)"):
        DecoderV1(10, 6, (1, 32, 32), *decoder_plan_v1(1, 16))

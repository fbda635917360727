"""Many samples of any decoder, against a loop over the samples in float64."""

import pytest
import torch
from small_models import with_random_norms
from torch import Tensor, nn

from purify_fast.ops import Stream, philox
from purify_fast.speed.decoding import PackedDecoder, decode_samples

LATENT, CONDITION, SAMPLES = 6, 10, 4


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LATENT + CONDITION, 12)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.layer(torch.cat([z, condition], 1)).tanh()


def block(inputs: int, outputs: int, *form: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(inputs, outputs, *form, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


def published(slope: float = 0.2) -> nn.Sequential:
    """The form of make_decoder_cifar in the code of CARSO's authors, with fewer channels."""
    adapter = nn.Sequential(nn.Linear(LATENT + CONDITION, 72), nn.LeakyReLU(slope), nn.Unflatten(1, (8, 3, 3)))
    blocks = [block(a, b, 3, 2, 1, 0) for a, b in ((8, 8), (8, 6), (6, 5), (5, 4))]
    return nn.Sequential(adapter, *blocks, nn.ConvTranspose2d(4, 3, 2, 1, 1, 0), nn.Sigmoid())


def mixed() -> nn.Sequential:
    parts = [nn.Linear(LATENT + CONDITION, 72), nn.BatchNorm1d(72), nn.GELU(), nn.Dropout(), nn.Unflatten(1, (8, 3, 3))]
    parts += [nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU()]
    return nn.Sequential(*parts, nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Tanh())


DECODERS = {"published": published, "other layers": mixed, "a module": Own}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    decoder = DECODERS[name]().double()
    return with_random_norms(decoder).eval()


def loop(decoder: nn.Module, z: Tensor, condition: Tensor) -> Tensor:
    def one(z: Tensor) -> Tensor:
        joined = isinstance(decoder, nn.Sequential)
        return decoder(torch.cat([z, condition], 1)) if joined else decoder(z, condition)

    return torch.stack([one(z[:, k]) for k in range(z.shape[1])], 1)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, SAMPLES, LATENT, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), torch.randn(3, CONDITION, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", DECODERS)
def test_the_results_and_all_gradients_are_those_of_a_loop(name, inputs):
    decoder, (z, condition) = make(name), inputs
    got, wanted = decode_samples(decoder, condition, latents=z), loop(decoder, z, condition)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got, wanted, **close)
    weight, leaves = torch.randn_like(got), [z, condition, *decoder.parameters()]
    slopes, expected = (torch.autograd.grad((out * weight).sum(), leaves) for out in (got, wanted))
    for a, b in zip(slopes, expected, strict=True):
        torch.testing.assert_close(a, b, **close)
    # 1e-6 in float32
    plain = decode_samples(decoder.float(), condition.detach().float(), latents=z.detach().float())
    torch.testing.assert_close(plain.double(), wanted.detach(), rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def test_a_packed_decoder_draws_and_decodes_as_the_module(inputs):
    decoder, condition, seed = make("published"), inputs[1], torch.tensor([5])
    packed = PackedDecoder(decoder, torch.float64, latent_dim=LATENT)
    got = decode_samples(packed, condition, SAMPLES, seed=seed)
    z = philox(seed, torch.arange(3), LATENT, stream=Stream.LATENT, distribution="normal", draws=SAMPLES).double()
    wanted = loop(decoder, z, condition)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    drawn = decode_samples(decoder, condition, SAMPLES, latent_dim=LATENT, seed=seed)
    torch.testing.assert_close(drawn, loop(decoder, z, condition), rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(got)
    slopes = [torch.autograd.grad((out * weight).sum(), condition)[0] for out in (got, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def test_a_decoder_that_is_packed_in_bfloat16_adds_in_float32():
    buffers = dict(PackedDecoder(make("published"), torch.bfloat16, latent_dim=LATENT).named_buffers())
    assert buffers.pop("packed").dtype == torch.bfloat16
    wanted = dict.fromkeys(("biases", "weight", "bias"), torch.float32)
    assert {name: value.dtype for name, value in buffers.items()} == wanted


def test_batch_norms_in_training_mode_see_all_samples(inputs):
    decoder, (z, condition) = make("published").train(), inputs
    got = decode_samples(decoder, condition, latents=z)
    joined = torch.cat([z, condition[:, None].expand(-1, SAMPLES, -1)], 2).flatten(0, 1)
    torch.testing.assert_close(got.flatten(0, 1), decoder(joined))


def test_layers_with_hooks_run(inputs):
    decoder, (z, condition), seen = make("published"), inputs, []
    decoder[1][0].register_forward_hook(lambda *_: seen.append(1))
    decoder[0][1].register_forward_hook(lambda *_: seen.append(2))
    found = decode_samples(decoder, condition, latents=z)
    torch.testing.assert_close(found, loop(decoder, z, condition), rtol=1e-9, atol=1e-9)
    assert seen[:2] == [2, 1]


REFUSED = [
    ({"samples": 0}, "draws must be at least 1, got 0"),
    ({"decoder": Own()}, "latent_dim must be given for this decoder, and be at least 1, got -10"),
    ({"seed": 7}, "seed must .* got 7: write torch.tensor"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refusals(change, message):
    arguments = {"decoder": make("published").float(), "condition": torch.zeros(3, 10), "samples": 4}
    with pytest.raises((ValueError, TypeError), match=message):
        decode_samples(**(arguments | change))


UNPACKED = [
    (mixed(), "got Linear, GELU, Unflatten, Conv2d, SiLU, ConvTranspose2d, BatchNorm2d, Tanh: use decode_samples"),
    (Own(), "got Own: use decode_samples"),
    (published(slope=0.1), "ConvTranspose2d with the same activation"),
]


@pytest.mark.parametrize(("decoder", "message"), UNPACKED)
def test_a_decoder_that_cannot_be_packed_gets_the_reason(decoder, message):
    with pytest.raises(ValueError, match=message):
        PackedDecoder(decoder.eval(), latent_dim=LATENT)
    with pytest.raises(ValueError, match="latent_dim must be given for a decoder of type Sequential, got None"):
        PackedDecoder(make("published"))
    with pytest.raises(ValueError, match="decoder must be in evaluation mode"):
        PackedDecoder(make("published").train(), latent_dim=LATENT)

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from purify_fast.ops import Stream, decode_samples, philox

op = import_module("purify_fast.ops.decode_samples")
SEED = torch.tensor([11])


class Decoder(nn.Module):
    """z [B, K, D] and condition [B, E] -> [B K, C, H, W], as the models' decoders are called."""

    def __init__(self):
        super().__init__()
        self.z, self.condition = nn.Linear(4, 6), nn.Linear(5, 6)
        self.out = nn.ConvTranspose2d(6, 3, 4)

    def forward(self, z, condition):
        hidden = torch.relu(self.z(z) + self.condition(condition)[:, None])
        return self.out(hidden.flatten(0, 1)[..., None, None])


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().double()


def arguments(batch: int, samples: int = 3) -> tuple:
    z = op.latents(SEED, torch.arange(batch), samples, 4).double()
    return torch.linspace(-1, 1, batch * 5, dtype=torch.float64).view(batch, 5), z


def test_latents_are_the_named_stream(backend):
    ids = torch.tensor([4, 1, 2**35])
    z = op.latents(SEED, ids, 5, 7)
    assert torch.equal(z, philox(SEED, ids, 7, stream=Stream.LATENT, distribution="normal", draws=5))
    assert torch.equal(op.latents(SEED, ids, 2, 7), z[:, :2])  # more samples never change the first
    assert torch.equal(op.latents(SEED, ids[1:], 5, 7), z[1:])


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_every_sample_is_decoded_under_its_condition(decoder, batch):
    condition, z = arguments(batch)
    out = decode_samples(decoder, condition, z)
    assert out.shape == (batch, 3, 3, 4, 4)
    for b in range(batch):
        for k in range(3):
            torch.testing.assert_close(out[b, k], decoder(z[b : b + 1, k : k + 1], condition[b : b + 1])[0])


def test_permuting_a_batch_permutes_the_images(decoder):
    condition, z = arguments(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = decode_samples(decoder, condition, z)
    torch.testing.assert_close(decode_samples(decoder, condition[order], z[order]), whole[order])


def test_gradients(decoder):
    condition, z = arguments(2)
    leaves = condition.requires_grad_(), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, z: decode_samples(decoder, c, z), leaves)


def test_compiles_and_copies(decoder, contract):
    decoder = decoder.float()

    def make(size: int) -> tuple:
        condition, z = arguments(size)
        return condition.float().requires_grad_(), z.float().requires_grad_()

    contract.compiles(lambda c, z: decode_samples(decoder, c, z), make, (6, 8, 13), compiler="aot_eager")
    condition, z = make(3)
    twin = copy.deepcopy(decoder)
    with torch.inference_mode():
        assert torch.equal(decode_samples(twin, condition, z), decode_samples(decoder, condition, z))
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_samples(decoder, condition, z).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 2, 3, 4)])
def test_errors(decoder, shape):
    with pytest.raises(ValueError, match=r"z must be \[B, K, latent_dim\] with B = 3"):
        decode_samples(decoder, torch.zeros(3, 5), torch.zeros(shape))

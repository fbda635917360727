from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from purify_fast.methods.carso.networks import Decoder, decoder_plan, published_decoder
from purify_fast.methods.carso.networks_v1 import DecoderV1, decoder_plan_v1
from purify_fast.methods.carso.packed_decoder import PackedDecoder, kernel_decodes
from purify_fast.ops import REGISTRY, decode_samples, use_backend
from purify_fast.ops.decode_samples import latents
from purify_fast.ops.dispatch.registry import Op

SEED, IDS = torch.tensor([7]), torch.tensor([4, 0, 9])


def make(form: str) -> nn.Module:
    torch.manual_seed(0)
    if form == "v1":
        decoder: nn.Module = DecoderV1(8, 10, (1, 28, 28), *decoder_plan_v1(1, 18))
    elif form == "published":
        decoder = Decoder(16, 20, (3, 32, 32), *published_decoder((3, 32, 32)))
    else:
        decoder = Decoder(6, 10, (2, 13, 22), *decoder_plan((2, 13, 22), 8))
    for layer in decoder.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return decoder.eval()


def condition_of(decoder: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    size = {"DecoderV1": 10, "Decoder": 20 if decoder.start[0] == 256 else 10}[type(decoder).__name__]
    return torch.randn(3, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("form", ["v1", "published", "general"])
def test_the_same_images_and_gradient_as_the_layers(form):
    decoder = make(form).double()
    condition = condition_of(decoder, torch.float64).requires_grad_()
    z = latents(SEED, IDS, 4, decoder.latent_dim).double()
    logits = decode_samples(decoder, condition, z)
    packed = PackedDecoder(decoder, torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(packed(condition, SEED, IDS, 4, squash=False), logits, **close)
    images = packed(condition, SEED, IDS, 4)
    torch.testing.assert_close(images, torch.sigmoid(logits), **close)
    weight = torch.randn_like(images)
    got, wanted = (torch.autograd.grad((out * weight).sum(), condition)[0] for out in (images, torch.sigmoid(logits)))
    torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(dtype, channels_last):
    decoder = make("general")
    condition = condition_of(decoder, torch.float32)
    exact = PackedDecoder(copy.deepcopy(decoder).double(), torch.float64)(condition.double(), SEED, IDS, 2)
    packed = PackedDecoder(decoder)
    images = packed(condition, SEED, IDS, 2, dtype=dtype, channels_last=channels_last)
    assert images.dtype == dtype and images.shape == (3, 2, 2, 13, 22)
    assert images.flatten(0, 1).is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    assert (images - exact).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(condition, SEED, IDS, 2, dtype=dtype), images)
    assert packed.state_dict() == {}  # a copy of another's weights


def test_any_split_and_number_gives_the_same_images():
    packed = PackedDecoder(make("general"), torch.float64)
    condition = condition_of(make("general"), torch.float64)
    whole = packed(condition, SEED, IDS, 3)
    torch.testing.assert_close(packed(condition[1:], SEED, IDS[1:], 3), whole[1:])
    torch.testing.assert_close(packed(condition, SEED, IDS, 1), whole[:, :1])
    assert packed(condition[:0], SEED, IDS[:0], 3).shape == (0, 3, 2, 13, 22)


def test_refusals():
    decoder = make("general")
    with pytest.raises(ValueError, match="decoder must be a Decoder or a DecoderV1, got Linear"):
        PackedDecoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        PackedDecoder(decoder, torch.float16)
    for condition in (torch.zeros(3, 9), torch.zeros(10), torch.zeros(3, 10, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"condition must be floating point \[B, 10\], got torch"):
            PackedDecoder(decoder)(condition, SEED, IDS, 2)
    with pytest.raises(ValueError, match="decoder must be in evaluation mode"):
        PackedDecoder(decoder.train())


def test_a_kernel_decodes_where_it_serves_some_calls(monkeypatch):
    """After races it may serve large numbers of images and lose the small ones, or those of one dtype."""
    served: set[tuple[torch.dtype, bool]] = set()

    monkeypatch.setattr(
        Op, "serving", lambda self, call: "triton" if (call.dtype, call.bits > 20) in served else "reference"
    )
    device = torch.device("cuda")
    assert not kernel_decodes(device)
    served.add((torch.bfloat16, True))
    assert kernel_decodes(device)
    monkeypatch.setitem(REGISTRY["decode_samples"].available, "cuda", ("reference",))
    with use_backend("triton"):  # what is forced is missing
        assert not kernel_decodes(device)

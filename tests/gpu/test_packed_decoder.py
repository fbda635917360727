"""The decoders people use, on a device: a sample has the same bits in any batch."""

import pytest
import torch
from on_device import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.methods.carso.networks import Decoder, decoder_plan, published_decoder
from purify_fast.ops import REGISTRY, decode_prior, use_backend
from purify_fast.speed.decoding import PackedDecoder

pytestmark = pytest.mark.gpu
BACKEND = REGISTRY["decode_samples"].available[DEVICE.type][-1]
SEED = torch.tensor([2**40 + 5])


def cifar() -> nn.Module:
    return Decoder(128, 512, (3, 32, 32), *published_decoder((3, 32, 32)))


def oblong() -> nn.Module:
    return Decoder(10, 24, (2, 20, 31), *decoder_plan((2, 20, 31), 12))


def made(decoder, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A decoder with BatchNorms that are not the identity, conditions, and ids."""
    torch.manual_seed(0)
    model = decoder()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.02, 0.1)  # about what fresh weights give
    width = {"cifar": 512, "oblong": 24}[decoder.__name__]
    return model.eval(), torch.randn(images, width), torch.arange(images) * 3 + 1


@pytest.fixture(autouse=True)
def kernel():
    """On a GPU the layers alone would be no test: the extension has to be built for it."""
    if DEVICE.type == "cuda" and BACKEND == "reference":
        pytest.fail("decode_samples has no kernel on cuda: Triton is missing", pytrace=False)


@pytest.mark.parametrize("decoder", [cifar, oblong])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_sample_has_the_same_bits_in_any_batch(decoder, channels_last):
    """Plans, tiles and chunks depend on how many there are; what the kernels compute does not.

    The product of the condition before them is cuBLAS's, whose bits depend on the number of rows: it is passed in.
    """
    if BACKEND == "reference":
        pytest.skip("the layers' bits depend on the batch")
    many = 300 if DEVICE.type == "cuda" else 3
    model, condition, ids = made(decoder, many)
    packed = PackedDecoder(model).to(DEVICE)
    product = F.linear(condition.to(DEVICE), packed.weight, packed.bias)
    weights = {"packed": packed.packed, "biases": packed.biases, "geometry": packed.geometry, "slope": packed.slope}

    def decoded(part: slice, samples: int = 4) -> Tensor:
        leaf = product[part].clone().requires_grad_()
        options = {"samples": samples, "channels_last": channels_last, "dtype": torch.bfloat16}
        images = decode_prior(leaf, SEED.to(DEVICE), ids[part].to(DEVICE), **weights, **options)
        (gradient,) = torch.autograd.grad(images.float().square().sum(), leaf)
        assert torch.isfinite(gradient).all() and gradient.any()
        return images.detach()

    with use_backend(BACKEND):
        whole = decoded(slice(None))
        assert torch.equal(decoded(slice(None), samples=1), whole[:, :1])
        for part in (slice(0, 1), slice(1, 8), slice(many - 2, many)):
            assert torch.equal(decoded(part), whole[part])

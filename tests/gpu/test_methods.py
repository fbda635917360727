"""CARSO and AToP on a device: logits and gradients to the images, against the CPU in float64. The tests of decoders
follow."""

import copy

import pytest
import torch
from on_device import DEVICE
from small_models import images, lively, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import frozen_copy
from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.methods.carso import Carso
from purify_fast.methods.carso.networks import Decoder, decoder_plan, published_decoder
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import REGISTRY, decode_prior, use_backend
from purify_fast.speed.decoding import PackedDecoder

pytestmark = pytest.mark.gpu
SHAPE = (1, 16, 16)
#: The kernel that computes each op on such a device.
SERVED = [set(op.available[DEVICE.type]) for op in REGISTRY.values() if DEVICE.type != "cuda" or op.launch is not None]
#: The measured default, and what every one of them has.
BACKENDS = [None, *sorted(set.intersection(*SERVED) - {"reference"})]


def carso() -> nn.Module:
    return with_statistics(Carso(SmallCNN(), ["conv1", "hidden"], SHAPE, 16, 4, 4, decoder_width=4).eval())


def atop(transform: str) -> nn.Module:
    options = {"block": 4, "sigma": 0.05, "samples": 2, "transform": transform}
    return Atop(SmallCNN(), lively(SmallGenerator(1, width=4), 2), SHAPE, **options).eval()


METHODS = {"CARSO": carso, "AToP rt2": lambda: atop("rt2"), "AToP rt3": lambda: atop("rt3")}


def answer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a sum of them."""
    x = x.requires_grad_()
    with model.fixed_noise(3):
        logits = model(x)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)
    return logits.detach(), torch.autograd.grad(logits, x, weights)[0]


def distance(actual: Tensor, golden: Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double().cpu() - golden.double()).norm() / golden.double().norm())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_input_gradients(method, backend):
    made = METHODS[method]()
    with use_backend("reference"):
        golden = answer(copy.deepcopy(made).double(), images().double())
    with use_backend(backend):
        found = answer(copy.deepcopy(made).to(DEVICE), images().to(DEVICE))
    assert golden[1].norm() > 0
    for actual, exact in zip(found, golden, strict=True):
        assert distance(actual, exact) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_logits_of_frozen_copies(method, backend):
    made = METHODS[method]()
    with use_backend("reference"):
        golden = answer(made, images())
    with use_backend(backend):
        x = images().to(DEVICE)
        found = answer(frozen_copy(made.to(DEVICE), x, dtype=torch.bfloat16), x)
    assert distance(found[0], golden[0]) < 0.05  # bfloat16


# -- decoders ----------------------------------------------------------------------------------------------------------
# The decoders people use, on a device: a sample has the same bits in any batch.

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


@pytest.fixture
def kernel():
    """On a GPU the layers alone would be no test: the extension has to be built for it."""
    if DEVICE.type == "cuda" and BACKEND == "reference":
        pytest.fail("decode_samples has no kernel on cuda: Triton is missing", pytrace=False)


@pytest.mark.usefixtures("kernel")
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

"""Every form of decoder in the interpreter, against the definition in float64: with exact products, and in bfloat16."""

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import decode_samples as kernel
from purify_fast.kernels.decoder_sizes import Geometry, Layer
from purify_fast.methods.carso.networks import Deconvolution, decoder_plan, published_decoder
from purify_fast.ops.dispatch.examples import double

op = import_module("purify_fast.ops.decode_samples")
SEED = torch.tensor([2**40 + 5])


def geometry(latent_dim: int, plan: tuple) -> Geometry:
    (channels, h, w), layers = plan
    start, sizes = (channels, h, w), []
    for layer in layers:
        h, w = layer.size(h, w)
        sizes.append(Layer(layer.channels, layer.kernel, layer.stride, layer.padding, h, w))
    return Geometry(latent_dim, start, tuple(sizes))


GEOMETRIES = {
    "cifar10": geometry(128, published_decoder((3, 32, 32))),
    "tiny_imagenet": geometry(192, published_decoder((3, 64, 64))),
    "digits": geometry(10, decoder_plan((1, 16, 16), 8)),
    "oblong": geometry(5, decoder_plan((2, 13, 22), 24)),
    "kernel_below_stride": geometry(33, ((40, 2, 3), [Deconvolution(96, 2, 3, 0), Deconvolution(5, 5, 1, 2)])),
    "no_stride": geometry(7, ((12, 4, 3), [Deconvolution(20, 3, 1, 1), Deconvolution(9, 3, 1, 1)])),
    "alone": geometry(7, ((12, 4, 3), [Deconvolution(17, 3, 2, 1)])),
}
#: Of which one sample takes the interpreter seconds.
LARGE = ("cifar10", "tiny_imagenet", "digits")
#: The geometries whose tests are not slow.
QUICK = ("digits", "kernel_below_stride", "no_stride", "alone")
#: Where the last two layers can be one launch.
TOGETHER = ("cifar10", "tiny_imagenet", "digits", "oblong", "no_stride")


pytestmark = pytest.mark.usefixtures("bfloat16_of_a_gpu")


def geometries(*names: str, quick: tuple[str, ...] = QUICK) -> pytest.MarkDecorator:
    """The parameters of a test of these geometries."""
    marked = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Those of bfloat16 for float32 too: there the interpreter runs fewer programs, and the same ones."""
    own = kernel.tiles
    monkeypatch.setattr(
        kernel, "tiles", lambda width, channels, _, device: own(width, channels, torch.bfloat16, device)
    )


def arguments(name: str, dtype: torch.dtype, images: int = 2, samples: int = 2, slope: float = 0.2) -> tuple:
    """What the op takes but for the last three, with random weights."""
    sizes = GEOMETRIES[name]
    images = 1 if name in LARGE else images
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, h, w = sizes.start
    first = normal(channels, h, w, sizes.latent_dim) / sizes.latent_dim**0.5
    weights, biases = [], []
    for layer in sizes.layers:
        taps = layer.kernel**2 / layer.stride**2
        weights.append(normal(channels, layer.channels, layer.kernel, layer.kernel) / (taps * channels) ** 0.5)
        biases.append(normal(layer.channels) / 2)
        channels = layer.channels
    packed, shifts = op.pack(first, weights, biases)
    condition = normal(images, h * w * sizes.start[0]).float()
    ids = torch.arange(images) * 5 + 2**33
    return condition, SEED, ids, packed.to(dtype), shifts.float(), sizes.numbers(), samples, slope


def together(name: str, given: tuple) -> bool:
    return kernel.Decoder(*given[3:6], slope=0.2, squash=True).together


def differing(signs: torch.Tensor, golden: torch.Tensor) -> float:
    """Return the share of the bits that differ."""
    assert signs.shape == golden.shape and signs.dtype == golden.dtype == torch.int32
    return float(((((signs ^ golden)[..., None] >> torch.arange(32)) & 1) != 0).float().mean())


def error(got: torch.Tensor, golden: torch.Tensor) -> float:
    assert got.shape == golden.shape
    return float((got.double() - golden).norm() / golden.norm())


@geometries(*GEOMETRIES)
def test_every_form_with_exact_products(poisoned, monkeypatch, name):
    """Float32: each sum has thousands of numbers, and nothing else rounds."""
    given = arguments(name, torch.float32, samples=1 if name in LARGE else 2)
    assert not together(name, given)
    golden, signs = op.reference(*double(given), True, False, torch.float64, True)
    image, kept = kernel.forward(*given, True, False, torch.float32, True)
    assert error(image, golden) < 3e-7 and differing(kept, signs) < 1e-5
    logits, _ = op.reference(*double(given), False, False, torch.float64, False)
    grad = torch.randn(golden.shape, generator=torch.Generator().manual_seed(1))
    for image, squash in ((golden, True), (logits, False))[: 1 if name in LARGE else 2]:
        slopes = op.reference_backward(*double((grad, image, signs, *given[3:])), squash)
        assert error(kernel.backward(grad, image.float(), signs, *given[3:], squash), slopes) < 2e-6
    monkeypatch.setattr(kernel, "TOGETHER", (torch.float32,))
    assert together(name, given) == (name in TOGETHER)
    for last in (False, True):
        got, _ = kernel.forward(*given, False, last, torch.float32, False)
        layout = torch.channels_last if last else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout) and error(got, logits) < 2e-6


@geometries("cifar10", "oblong", "kernel_below_stride", quick=("kernel_below_stride",))
def test_bfloat16(poisoned, name):
    """Against float64 the kernel errs about as far as the definition in bfloat16."""
    given = arguments(name, torch.bfloat16)
    golden, right = op.reference(*double(given), True, False, torch.float64, True)
    same, rounded = op.reference(*given, True, False, torch.bfloat16, True)
    got, signs = kernel.forward(*given, True, False, torch.bfloat16, True)
    assert got.dtype == torch.bfloat16 and error(got, golden) < 4 * error(same, golden)
    assert differing(signs, right) < 2 * differing(rounded, right) < 0.02
    grad = torch.randn(golden.shape, generator=torch.Generator().manual_seed(1))
    given = grad, golden.float(), signs, *given[3:], True
    golden, same = op.reference_backward(*double(given)), op.reference_backward(*given)
    assert error(kernel.backward(*given), golden) < 4 * error(same, golden)


@pytest.mark.slow
def test_one_sample_has_the_same_bits_in_every_batch_and_part(monkeypatch):
    given = arguments("oblong", torch.bfloat16, images=3)
    sizes = False, False, torch.float32, True
    whole, signs = kernel.forward(*given, *sizes)
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    slopes = kernel.backward(grad, whole, signs, *given[3:], False)
    image, own = kernel.forward(*[x[1:2] if i in (0, 2) else x for i, x in enumerate(given)], *sizes)
    assert torch.equal(image, whole[2:4]) and torch.equal(own, signs[2:4])
    assert torch.equal(kernel.backward(grad[2:4], image, own, *given[3:], False), slopes[1:2])
    monkeypatch.setattr(kernel, "MEMORY", 20_000)  # parts of two samples or so: images are cut
    decoder = kernel.Decoder(*given[3:6], slope=0.2, squash=False)
    assert len(kernel.parts(6, decoder.elements[1], decoder)) > 1
    assert all(map(torch.equal, kernel.forward(*given, *sizes), (whole, signs)))
    assert torch.equal(kernel.backward(grad, whole, signs, *given[3:], False), slopes)


def test_the_offsets_of_a_parts_images_fit_into_int32():
    """The last layer enlarges a map of one pixel to an image, so the maps need little memory."""
    numbers = [32, 32, 1, 1, *(3, 32, 32, 0, 32, 32)]
    geometry = op.tiles.Geometry.of(numbers)
    packed, biases = (torch.zeros(size) for size in geometry.sizes())
    decoder = kernel.Decoder(packed.bfloat16(), biases, numbers, slope=0.2, squash=False)
    divided = kernel.parts(800_000, 32, decoder)
    assert sum(count for _, count in divided) == 800_000
    assert all(count * kernel.padded(3, kernel.CHANNEL_TILE) * 32 * 32 < 2**31 for _, count in divided)

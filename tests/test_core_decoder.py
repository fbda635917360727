"""The decoder's kernel on the host: its own program (csrc/core/decode_samples.h) with a matrix instruction in float64.

Tiles, index maps, packed weights and epilogues against ``conv_transpose2d``, map by map.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from purify_fast.methods.carso.networks import Deconvolution, decoder_plan, published_decoder
from purify_fast.methods.carso.networks_v1 import decoder_plan_v1
from purify_fast.ops import Stream

op = import_module("purify_fast.ops.decode_samples")
SEED = 0x1234567


def geometry(latent_dim: int, plan: tuple) -> op.Geometry:
    (channels, h, w), layers = plan
    start, sizes = (channels, h, w), []
    for layer in layers:
        h, w = layer.size(h, w)
        sizes.append(op.Layer(layer.channels, layer.kernel, layer.stride, layer.padding, h, w))
    return op.Geometry(latent_dim, start, tuple(sizes))


def v1(channels: int, inputs: int, latent_dim: int) -> op.Geometry:
    """Its first convolution sees one pixel: it is the linear layer."""
    start, (first, *rest) = decoder_plan_v1(channels, inputs)
    return geometry(latent_dim, ((first.channels, *first.size(*start[1:])), rest))


GEOMETRIES = {
    "cifar10": geometry(128, published_decoder((3, 32, 32))),
    "tiny_imagenet": geometry(192, published_decoder((3, 64, 64))),
    "mnist_v1": v1(1, 194, 64),
    "digits": geometry(10, decoder_plan((1, 16, 16), 8)),
    "oblong": geometry(5, decoder_plan((2, 13, 22), 24)),
    "kernel_below_stride": geometry(33, ((40, 2, 3), [Deconvolution(96, 2, 3, 0), Deconvolution(5, 5, 1, 2)])),
}


class Decoder:
    """Random weights of a geometry, and what the layers compute in float64."""

    def __init__(self, sizes: op.Geometry, images: int = 2, samples: int = 3, slope: float = 0.2):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        channels, h, w = sizes.start
        self.sizes, self.samples, self.slope = sizes, samples, slope
        self.ids = torch.arange(images) * 5 + 3
        self.first = normal(channels, h, w, sizes.latent_dim) / sizes.latent_dim**0.5
        self.weights, self.biases = [], []
        for layer in sizes.layers:
            taps = layer.kernel**2 / layer.stride**2
            self.weights.append(normal(channels, layer.channels, layer.kernel, layer.kernel) / (taps * channels) ** 0.5)
            self.biases.append(normal(layer.channels) / 2)
            channels = layer.channels
        self.condition = normal(images, h * w * sizes.start[0])
        self.packed, self.shifts = op.pack(self.first, self.weights, self.biases)

    def arguments(self, squash: bool = True) -> tuple:
        seed = torch.tensor([SEED])
        return (
            self.condition, seed, self.ids, self.packed, self.shifts, self.sizes.numbers(), self.samples, self.slope,
            squash,
        )  # fmt: skip

    def on_host(self, core, kind: str = "Decoder", squash: bool = True, **options):
        numbers, parts = self.sizes.numbers(), (self.packed, self.shifts, self.condition)
        sizes = SEED, self.ids.tolist(), self.samples, self.slope, squash
        return getattr(core, kind)(numbers, *(part.numpy() for part in parts), *sizes, **options)

    def layers(self, core) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every pre-activation [B K, C, H, W], and the image's logits, with a graph."""
        channels, h, w = self.sizes.start
        dim = self.sizes.latent_dim
        draws = [
            [core.draw_group(2, SEED, group, draw, sample, int(Stream.LATENT)) for group in range(-(-dim // 4))]
            for sample in self.ids.tolist()
            for draw in range(self.samples)
        ]
        z = torch.from_numpy(np.array(draws, np.uint32).view(np.float32)).flatten(1)[:, :dim].double()
        x = torch.einsum("bkl,chwl->bkchw", z.unflatten(0, (-1, self.samples)), self.first)
        x = x + self.condition.view(-1, 1, h, w, channels).permute(0, 1, 4, 2, 3)
        maps = [x.flatten(0, 1).requires_grad_()]
        for layer, weight, bias in zip(self.sizes.layers, self.weights, self.biases, strict=True):
            missing = [
                size - ((before - 1) * layer.stride - 2 * layer.padding + layer.kernel)
                for size, before in zip((layer.height, layer.width), maps[-1].shape[2:], strict=True)
            ]
            x = F.leaky_relu(maps[-1], self.slope)
            maps.append(F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding, missing))
            maps[-1].retain_grad()
        return maps[:-1], maps[-1]


@pytest.fixture(scope="module")
def decoders() -> dict[str, Decoder]:
    return {name: Decoder(sizes) for name, sizes in GEOMETRIES.items()}


def close(actual, expected: torch.Tensor) -> None:
    actual = torch.from_numpy(np.ascontiguousarray(actual)).view(expected.shape)
    assert bool(((actual - expected).abs() <= 1e-12 * expected.abs().max()).all())


def close_map(actual, expected: torch.Tensor) -> None:
    """[n, h, w, padded channels] against [n, channels, h, w]; what is padded must be zero."""
    channels = expected.shape[1]
    close(actual[..., :channels], expected.permute(0, 2, 3, 1))
    assert not actual[..., channels:].any()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_map_forward(core, decoders, name):
    decoder = decoders[name]
    maps, logits = decoder.layers(core)
    host = decoder.on_host(core, alone=True)
    close(host.forward(), torch.sigmoid(logits))
    left = host.left()
    assert [index for _, index, _ in left] == list(range(len(maps)))
    for (_, _, actual), expected in zip(left, maps, strict=True):
        close_map(actual, F.leaky_relu(expected, decoder.slope))
    close(decoder.on_host(core, alone=True, squash=False).forward(), logits)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_map_of_the_gradient(core, decoders, name):
    decoder = decoders[name]
    maps, logits = decoder.layers(core)
    image = torch.sigmoid(logits).detach()
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.sigmoid(logits).backward(grad)
    host = decoder.on_host(core, alone=True)
    got = host.backward(grad.numpy().copy(), image.numpy().copy())
    close(got, maps[0].grad.permute(0, 2, 3, 1))
    backward = [(index, actual) for gradient, index, actual in host.left() if gradient]
    assert [index for index, _ in backward] == list(range(len(maps) - 1))
    for index, actual in backward:
        close_map(actual, maps[len(maps) - 1 - index].grad)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("options", [{}, {"processors": 1}, {"processors": 2, "workspace": 1 << 22}])
def test_the_plan_changes_nothing(core, decoders, name, options):
    """Products that share a launch, tiles of rows, fewer samples at a time: the same bits."""
    decoder = decoders[name]
    alone, planned = decoder.on_host(core, alone=True), decoder.on_host(core, **options)
    image = alone.forward()
    assert np.array_equal(planned.forward(), image)
    grad = np.random.default_rng(0).normal(size=image.shape)
    assert np.array_equal(planned.backward(grad, image), alone.backward(grad, image))
    for _, first, last, samples, rows, size in planned.segments():
        assert first <= last and 1 <= samples <= 32 and rows >= 1 and size <= 98 * 1024


def test_plans_share_launches_and_cut_rows(core, decoders):
    """What the test above relies on."""
    few = decoders["cifar10"].on_host(core)
    few.forward()
    (_, first, last, _, rows, _), *_ = few.segments()
    assert first < last and rows < 32
    many = decoders["digits"].on_host(core, processors=1)
    many.forward()
    assert [segment[1:3] for segment in many.segments()] == [(0, len(decoders["digits"].sizes.layers))]


def test_packed_weights_lie_where_the_kernel_reads(core):
    sizes = GEOMETRIES["oblong"]
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(sizes)
    numbers, packed = sizes.numbers(), decoder.packed
    for product, (weight, layer) in enumerate(zip(decoder.weights, sizes.layers, strict=True), 1):
        for _ in range(50):
            i, o = (int(torch.randint(n, (1,), generator=generator)) for n in weight.shape[:2])
            y, x = (int(torch.randint(layer.kernel, (1,), generator=generator)) for _ in range(2))
            tap, back = y * layer.kernel + x, len(sizes.layers) - product
            assert packed[core.weight_index(numbers, False, product, tap, i, o)] == weight[i, o, y, x]
            assert packed[core.weight_index(numbers, True, back, tap, o, i)] == weight[i, o, y, x]


def test_in_bfloat16_the_error_is_the_layers(core):
    """Rounded as on a GPU: at most twice as far from float64 as the same layers in bfloat16."""
    decoder = Decoder(GEOMETRIES["cifar10"])
    exact = op.reference(*decoder.arguments(), False, torch.float64)
    narrow = list(decoder.arguments())
    narrow[0], narrow[3], narrow[4] = narrow[0].float(), narrow[3].bfloat16(), narrow[4].float()
    layers = op.reference(*narrow, False, torch.float32)
    got = torch.from_numpy(decoder.on_host(core, "DecoderInBfloat16").forward()).view(exact.shape)
    assert (got - exact).norm() <= 2 * (layers - exact).norm()
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = op.reference_backward(grad, exact, *decoder.arguments())
    layers = op.reference_backward(grad.float(), layers, *narrow)
    host = decoder.on_host(core, "DecoderInBfloat16")
    got = torch.from_numpy(host.backward(grad.numpy().copy(), got.numpy().copy())).view(2, 3, -1).sum(1)
    assert (got - wanted).norm() <= 2 * (layers - wanted).norm()


@pytest.mark.parametrize("numbers", [[1, 2, 3], [4, 8, 1, 1], [4, 8, 1, 1, 3, 3, 1, 1, 1], [4, 8, 1, 1, *[8] * 72]])
def test_refused_geometries(core, numbers):
    with pytest.raises(RuntimeError, match="geometry must have"):
        core.weight_index(numbers, False, 0, 0, 0, 0)


def test_a_row_too_wide_for_shared_memory(core):
    sizes = geometry(4, ((256, 1, 2000), [Deconvolution(3, 3, 1, 1)]))
    with pytest.raises(RuntimeError, match="needs more than 100352 bytes"):
        Decoder(sizes, 1, 1).on_host(core).forward()

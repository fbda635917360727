"""Makes K reconstructions of each image: a decoder maps K latents from the prior and the image's condition to images.

    z_bk ~ N(0, I) from the Philox stream LATENT, draw index k;   a_bk = z_bk W_z + c_b
    a <- conv_transpose2d(leaky_relu(a)) + bias, layer by layer;   image = sigmoid(a), or a

This is CARSO's inference (arXiv 2306.06081, section 4.4). c_b is the product of the condition with its half of the
first layer's weights, plus the bias. BatchNorms are folded into the weights, which are packed (`pack`). The kernels
(kernels/decode_samples.py) multiply and store activations in the weights' dtype, and add in float32.

The gradient depends on the feature maps only by the signs at the LeakyReLUs. A forward pass that needs a gradient keeps
them in every case: a bit per element, 9 kB for a CIFAR image of 12 kB, which a classifier's own maps exceed by far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional as F

from .._settings import without_autocast
from .._tensors import check_form, memory_format
from ..kernels import decoder_sizes as tiles
from .dispatch.examples import ROWS, examples, normal, stream
from .dispatch.gradient import define_backward, differentiable, needs_gradient
from .dispatch.registry import define_op, wide
from .philox import Stream, default_stream, philox


def _pack(weight: Tensor, columns: int) -> Tensor:
    """Pad a weight [taps, input channels, output channels] to whole tiles, and flatten it."""
    inputs, outputs = weight.shape[1:]
    return F.pad(weight, (0, columns - outputs, 0, tiles.padded(inputs, tiles.CHANNEL_TILE) - inputs)).flatten()


def pack(first: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pack a decoder's weights for the op, into a vector of weights and a vector of biases, both padded with zeros.

    ``first`` is ``[C, H, W, latent_dim]``, the latent's half of the linear layer, and ``weights`` are
    ``[channels in, channels out, k, k]``. Then come the transposed weights for the gradients, last layer first.
    """
    channels, h, w, dim = first.shape
    parts = [_pack(first.permute(1, 2, 3, 0).reshape(h * w, dim, channels), tiles.padded(channels, tiles.CHANNEL_TILE))]
    shifts, backward = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs, outputs, k, _ = weight.shape
        columns = tiles.padded(outputs, tiles.COLUMN_TILE if i == len(weights) - 1 else tiles.CHANNEL_TILE)
        parts.append(_pack(weight.permute(2, 3, 0, 1).reshape(k * k, inputs, outputs), columns))
        shifts.append(F.pad(bias, (0, columns - outputs)))
        transposed = weight.permute(2, 3, 1, 0).reshape(k * k, outputs, inputs)
        backward.append(_pack(transposed, tiles.padded(inputs, tiles.CHANNEL_TILE)))
    return torch.cat([*parts, *reversed(backward)]), torch.cat(shifts)


#: The weights of the first layer, ``[pixels, latent_dim, channels]``, and each further layer's weights and biases.
Weights = tuple[Tensor, list[tuple[Tensor, Tensor]]]


def unpack(packed: Tensor, biases: Tensor, geometry: tiles.Geometry) -> Weights:
    """Undo `pack`: return the weights and biases of the layers without padding, in the packed weights' dtype."""
    products = geometry.products()
    sizes = [math.prod(product) for product in products]
    parts = packed[: sum(sizes)].split(sizes)
    first, *others = (part.view(product) for part, product in zip(parts, products, strict=True))
    shifts = biases.to(packed.dtype).split([columns for _, _, columns in products[1:]])
    inputs, layers = geometry.start[0], []
    for layer, tile, shift in zip(geometry.layers, others, shifts, strict=True):
        kernel = tile[:, :inputs, : layer.channels].unflatten(0, (layer.kernel, layer.kernel))
        layers.append((kernel.permute(2, 3, 0, 1), shift[: layer.channels]))
        inputs = layer.channels
    return first[:, : geometry.latent_dim, : geometry.start[0]], layers


def latents(seed: Tensor, sample_ids: Tensor, samples: int, latent_dim: int) -> Tensor:
    """Draw latents ``[B, samples, latent_dim]``, float32, from the prior. Sample k of an image has draw index k."""
    return philox(seed, sample_ids, latent_dim, stream=Stream.LATENT, distribution="normal", draws=samples)


def maps(
    condition: Tensor, seed: Tensor, ids: Tensor, weights: Weights, geometry: tiles.Geometry, samples: int, slope: float
) -> list[Tensor]:
    """Return the inputs of all LeakyReLUs and, last, the logits of the images: [B * K, C, H, W] of several sizes."""
    (first, layers), (channels, h, w) = weights, geometry.start
    z = latents(seed, ids, samples, geometry.latent_dim).to(first.dtype)
    x = torch.einsum("bkl,plc->bkpc", z, first).to(condition.dtype) + condition.view(-1, 1, h * w, channels)
    out = [x.to(first.dtype).flatten(0, 1).unflatten(1, (h, w)).permute(0, 3, 1, 2)]
    for layer, (weight, bias) in zip(geometry.layers, layers, strict=True):
        _, kernel, stride, padding, *size = layer
        before = [(side - 1) * stride - 2 * padding + kernel for side in out[-1].shape[2:]]
        more = [side - least for side, least in zip(size, before, strict=True)]
        x = F.leaky_relu(out[-1], slope)
        # In bfloat16 on a CPU, torch 2.15 leaves out the bias where a kernel that is smaller than its stride has gaps.
        within = None if kernel < stride else bias
        x = F.conv_transpose2d(x, weight, within, stride=stride, padding=padding, output_padding=more)
        out.append(x + bias.view(-1, 1, 1).to(x.dtype) if within is None else x)
    return out


def signs_of(entered: Sequence[Tensor]) -> Tensor:
    """Pack the signs of the LeakyReLUs' inputs, int32 ``[B * K, words]``.

    The bit of a positive element is 1. A word has 32 neighboring channels of a pixel, from the lowest bit on. The words
    are ordered by layer and pixel, and the channels are padded by zeros.
    """
    words = []
    for x in entered:
        bits = F.pad(x.permute(0, 2, 3, 1) > 0, (0, -x.shape[1] % tiles.CHANNEL_TILE)).unflatten(-1, (-1, 32))
        shifts = torch.arange(32, dtype=torch.int32, device=x.device)
        words.append((bits.to(torch.int32) << shifts).sum(-1, dtype=torch.int32).flatten(1))
    return torch.cat(words, 1)


def _positive(signs: Tensor, geometry: tiles.Geometry) -> list[Tensor]:
    """Undo `signs_of`: tell for each layer where its input [B * K, C, H, W] is positive."""
    shifts = torch.arange(32, dtype=torch.int32, device=signs.device)
    channels = [geometry.start[0], *(layer.channels for layer in geometry.layers)]
    parts = signs.split([h * w * c // 32 for h, w, c in geometry.inputs()], 1)
    bits = [
        (part.unflatten(1, (h, w, -1, 1)) >> shifts) & 1
        for part, (h, w, _) in zip(parts, geometry.inputs(), strict=True)
    ]
    return [flags.flatten(3)[..., :c].permute(0, 3, 1, 2) > 0 for flags, c in zip(bits, channels, strict=False)]


def images(logits: Tensor, squash: bool, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """Convert the logits to the images that the op returns: apply the sigmoid if ``squash``, set dtype and format."""
    x = wide(logits)
    x = (torch.sigmoid(x) if squash else x).to(dtype)
    return x.contiguous(memory_format=memory_format(channels_last))


def reference(
    condition: Tensor, seed: Tensor, ids: Tensor, packed: Tensor, biases: Tensor, numbers: list[int], *settings: Any
) -> tuple[Tensor, Tensor]:
    """Compute the images ``[B * K, C, H, W]`` by PyTorch in the precision of ``packed``; ``numbers`` are the sizes.

    The second result are the signs (`signs_of`) for the backward, or no rows of them, if they are not to be ``kept``.
    """
    samples, slope, squash, channels_last, dtype, kept = settings
    geometry = tiles.Geometry.of(numbers)
    weights = unpack(packed, biases, geometry)
    *entered, logits = maps(condition, seed, ids, weights, geometry, samples=samples, slope=slope)
    return images(logits, squash, channels_last, dtype), signs_of([x if kept else x[:0] for x in entered])


def reference_backward(grad: Tensor, image: Tensor, signs: Tensor, packed: Tensor, *others: Any) -> Tensor:
    """Return grad [B * K, C, H, W] times dimage/dcondition, [B, H * W * C], from the signs of `reference`."""
    biases, numbers, samples, slope, squash = others
    geometry = tiles.Geometry.of(numbers)
    _, layers = unpack(packed, biases, geometry)
    g = wide(grad)
    g = (g * wide(image) * (1 - wide(image)) if squash else g).to(packed.dtype)
    # A caller may run the backward pass under autocast.
    with without_autocast(grad.device):
        positive = _positive(signs, geometry)
        for layer, (weight, _), above in zip(geometry.layers[::-1], layers[::-1], positive[::-1], strict=True):
            g = F.conv2d(g, weight, None, layer.stride, layer.padding)
            g = torch.where(above, g, slope * g)
    by_pixel = wide(g).permute(0, 2, 3, 1).flatten(1)
    return by_pixel.unflatten(0, (-1, samples)).sum(1)


def _fake(condition: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, numbers, samples, _, _, channels_last, dtype, kept = others
    channels, *_, h, w = numbers[-6:]
    total = condition.shape[0] * samples
    out = condition.new_empty((total, channels, h, w), dtype=dtype)
    words = sum(h * w * c // 32 for h, w, c in tiles.Geometry.of(numbers).inputs())
    signs = condition.new_empty((total if kept else 0, words), dtype=torch.int32)
    return out.contiguous(memory_format=memory_format(channels_last)), signs


_SIZES = "Tensor packed, Tensor biases, int[] numbers, int samples, float slope, bool squash"
_CIFAR = [(channels, 3, 2, 1, side, side) for channels, side in ((256, 5), (128, 9), (64, 17), (32, 33))]

#: Each entry has the size of the latent, the first feature map and the convolutions (channels, kernel, stride, padding,
#: height, width). In "tiled", "one" and "full" each layer is a launch. In "joined" and "broad" the last two layers are
#: a single launch. "wide" is for float32 weights. "cifar" is CARSO's decoder for images of 32 x 32.
DECODERS = {
    "tiled": tiles.Geometry.of([12, 40, 3, 3, *(70, 3, 2, 1, 5, 6), *(3, 2, 1, 1, 4, 5)]),
    "one": tiles.Geometry.of([33, 96, 1, 2, *(5, 4, 2, 1, 2, 4)]),
    "joined": tiles.Geometry.of([12, 40, 3, 3, *(24, 4, 2, 1, 6, 6), *(3, 3, 1, 1, 6, 6)]),
    "full": tiles.Geometry.of([12, 192, 8, 8, *(192, 1, 1, 0, 8, 8), *(5, 4, 2, 1, 16, 16)]),
    "broad": tiles.Geometry.of([12, 40, 1, 32, *(24, 4, 2, 1, 2, 64), *(3, 3, 1, 1, 2, 64)]),
    "wide": tiles.Geometry.of([12, 40, 3, 3, *(3, 4, 2, 1, 6, 6)]),
    "cifar": tiles.Geometry.of([128, 256, 3, 3, *(n for layer in _CIFAR for n in layer), *(3, 2, 1, 1, 32, 32)]),
}
#: By decoder, samples, dtype of the weights, "squashed" with a sigmoid, and "kept" signs; for the values see
#: `Example.gpu`. "full" has the largest tiles of one layer, "broad" of two layers, and the others have the smallest.
EXAMPLES = {
    ("tiled", 3, torch.bfloat16, "squashed", ""): "",
    ("tiled", 3, torch.bfloat16, "", ""): "b",
    ("tiled", 3, torch.bfloat16, "", "kept"): "b",
    ("one", 5, torch.bfloat16, "squashed", ""): "",
    ("one", 5, torch.bfloat16, "", ""): "",
    ("full", 30, torch.bfloat16, "", ""): "b",
    ("joined", 2, torch.bfloat16, "squashed", ""): "f",
    ("joined", 2, torch.bfloat16, "", ""): "b",
    ("joined", 2, torch.bfloat16, "", "kept"): "b",
    ("broad", 2, torch.bfloat16, "", "kept"): "b",
    ("wide", 2, torch.float32, "squashed", ""): "f",
    ("wide", 2, torch.float32, "", "kept"): "f",
}


def _arguments(*setting: Any) -> tuple[Any, ...]:
    decoder, samples, weight_dtype, squash, kept, dtype, seed = setting
    sizes = DECODERS[decoder]
    weights, biases, channels = [], [], sizes.start[0]
    for i, layer in enumerate(sizes.layers):
        shape = channels, layer.channels, layer.kernel, layer.kernel
        weights.append(normal(seed + i, *shape, scale=(channels * layer.kernel) ** -0.5))
        biases.append(normal(seed + 10 + i, layer.channels))
        channels = layer.channels
    first = normal(seed + 20, *sizes.start, sizes.latent_dim, scale=sizes.latent_dim**-0.5)
    packed, shifts = pack(first, weights, biases)
    condition = normal(seed + 30, ROWS, math.prod(sizes.start)).float()
    # The weights are parameters, because `tile` repeats the rows of all tensors that are not parameters.
    parameters = Parameter(packed.to(weight_dtype), False), Parameter(shifts.float(), False)
    settings = samples, 0.2, bool(squash), squash == "", dtype, bool(kept)
    return condition, *stream(seed), *parameters, sizes.numbers(), *settings


def _saved(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the backward after the gradient: the results, and the inputs from the weights on."""
    return *outputs, *inputs[3:9]


OP = define_op(
    "decode_samples",
    f"(Tensor condition, Tensor seed, Tensor sample_ids, {_SIZES}, bool channels_last, ScalarType dtype, "
    "bool kept) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    # Rounding decides some of the signs, which are kept for the backward.
    examples=examples(
        _arguments, EXAMPLES, dtypes=(torch.float32, torch.bfloat16), jumps=lambda *setting: setting[-1] == "kept"
    ),
    # From benchmarks/results: nvidia-h200/kernels.csv. There is no kernel for CPUs.
    cpu=None,
    in_graphs={"cuda": ("",)},
)
BACKWARD = define_backward(
    OP,
    f"(Tensor grad, Tensor image, Tensor signs, {_SIZES}) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, image, signs, packed, biases, numbers, samples, *_: wide(packed[:0]).new_empty(
        (grad.shape[0] // samples, math.prod(numbers[1:4]))
    ),
    saved=lambda inputs, _: _saved(inputs, reference(*inputs[:-1], True)),
    constants=1,
    changes={"jumps": False},
)


_decode = differentiable(OP.handle, lambda *args: BACKWARD(*args), _saved, constants=1)


def decode_prior(
    condition: Tensor,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    packed: Tensor,
    biases: Tensor,
    geometry: tiles.Geometry,
    samples: int,
    *,
    slope: float = 0.2,
    squash: bool = True,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw K latents per image, and decode them with packed weights (see `purify_fast.methods.carso.PackedDecoder`).

    Args:
        condition: ``[B, H * W * C]`` for a first feature map [C, H, W]: the product of the condition with its half of
            the linear layer's weights, plus the bias, ordered by pixel and then by channel; float32 (float64 with
            float64 weights). Only this argument gets a gradient.
        seed: int64 ``[1]``, on the condition's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each image (see `philox`). None: 0 to B - 1.
        packed: weights from `pack`. Their dtype, bfloat16, float32 or float64, is the precision of the products. A
            GPU's kernel uses the matrix units for bfloat16 only, so float32 is many times slower.
        biases: biases from `pack`, in the condition's dtype.
        geometry: sizes of the decoder.
        samples: K, at least 1.
        slope: slope of the LeakyReLU between the layers, at least 0.
        squash: True to map the images to (0, 1) by a sigmoid. If False, the op returns their logits.
        channels_last: True to return the images in the memory format channels_last.
        dtype: dtype of the images, float32 (default) or bfloat16; float64 with float64 weights.

    Returns:
        Images ``[B, K, C, H, W]``. Sample k of an image has draw index k, for every K and every batch.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: a shape, dtype, device or setting is wrong.

    The op is deterministic and has first-order gradients only. It does not support ``vmap``.
    """
    channels, h, w = geometry.start
    if packed.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"packed must be bfloat16, float32 or float64, got {packed.dtype}")
    real = torch.promote_types(packed.dtype, torch.float32)
    dtype = real if dtype is None else dtype
    check_form("condition", condition, real, "[B, H * W * C]", (*condition.shape[:1], channels * h * w))
    weights_size, shifts = geometry.sizes()
    check_form("packed", packed, packed.dtype, f"for {geometry}", (weights_size,))
    check_form("biases", biases, real, f"for {geometry}", (shifts,))
    if not (packed.is_contiguous() and biases.is_contiguous()):
        raise ValueError("packed and biases must be contiguous")
    if dtype not in ((torch.float64,) if real == torch.float64 else (torch.float32, torch.bfloat16)):
        raise ValueError(f"dtype must be float32 or bfloat16 (float64 for float64 weights), got {dtype}")
    others = {"packed": packed, "biases": biases}
    seed, sample_ids = default_stream(seed, sample_ids, len(condition), condition=condition, **others)
    if samples < 1 or not 0 <= slope < float("inf"):
        raise ValueError(f"samples must be at least 1, and slope finite and at least 0, got {samples} and {slope}")
    plain, kept = OP.uses_reference(condition.device, condition.numel()), needs_gradient(condition)
    # The backward multiplies by image * (1 - image), but bfloat16 rounds an image above 0.998 to 1.
    output = real if squash and condition.requires_grad and torch.is_grad_enabled() else dtype
    settings = geometry.numbers(), samples, float(slope), squash, channels_last, output, kept and not plain
    kernel = _decode if kept else OP.handle
    call = reference if plain else kernel
    with without_autocast(condition.device):
        out = call(condition, seed, sample_ids, packed, biases, *settings)[0]
    return out.to(dtype).unflatten(0, (-1, samples))

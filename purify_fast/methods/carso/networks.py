"""The parts of CARSO's conditional variational autoencoder, for any image size and any layers.

arXiv 2306.06081, section 4.2. Convolution block: conv (no bias), BatchNorm, LeakyReLU(0.2). The paper's CIFAR-10 and
TinyImageNet systems are instances; the sizes for other images are this package's own choice.

The classes of V1 are those of the paper's versions 1 and 2 (2023), as their code has them for MNIST and FashionMNIST: a
flat representation, linear encoders with LeakyReLU(0.01) before BatchNorm, a decoder that starts at one pixel and has
no BatchNorm. `PackedDecoder` is a trained decoder as one op, `purify_fast.ops.decode_prior`.

``runs_in_order`` says that every nn.Sequential in a class is called as a whole, which folding a BatchNorm relies on
(`purify_fast.speed.folding.batchnorm.fold_sequential`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import without_autocast
from ...kernels.decoder_sizes import Geometry, Layer
from ...models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU
from ...ops import REGISTRY
from ...ops.decode_samples import Weights, decode_prior, pack, unpack
from ...speed.folding.batchnorm import folded

Shape = tuple[int, int, int]
#: The map that a decoder starts with, (C, h, w), and its transposed convolutions.
Plan = tuple[Shape, list["Deconvolution"]]


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """Conv2d without bias, BatchNorm2d, LeakyReLU(0.2)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), BatchNorm2d(outputs), LeakyReLU()
    )


def linear_block(inputs: int, outputs: int) -> nn.Sequential:
    """Linear without bias, BatchNorm1d, LeakyReLU(0.2)."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), BatchNorm1d(outputs), LeakyReLU())


def pre_encoder(shape: tuple[int, ...], depth: int = 3) -> tuple[nn.Module, int]:
    """A layer's pre-encoder and the number of features that it gives.

    A map (C, H, W) goes through ``depth`` convolution blocks that halve the channels (C/2, C/4, C/8, rounded up), 3 x 3
    without padding while the map is large enough, else 1 x 1; a vector (F,) passes unchanged.

    Tokens (T, D) go through ``depth`` linear blocks that halve D (rounded up); that is not in the paper. The tokens
    share the blocks, as positions share a convolution's weights. BatchNorm's statistics are taken over batch and
    tokens, and the joint layer that follows distinguishes the tokens.

    Args:
        shape: shape of the layer's output without the batch: (C, H, W), (T, D) or (F,).
        depth: blocks.
    """
    if len(shape) == 1:
        return nn.Identity(), shape[0]
    if len(shape) == 2:
        tokens, dim = shape
        sizes = [ceil(dim / 2**i) for i in range(depth + 1)]
        linear = [linear_block(a, b) for a, b in pairwise(sizes)]
        parts = [nn.Flatten(0, 1), *linear, nn.Unflatten(0, (-1, tokens)), nn.Flatten()]
        return nn.Sequential(*parts), tokens * sizes[-1]
    channels, h, w = shape
    blocks: list[nn.Module] = []
    for i in range(depth):
        kernel = 3 if min(h, w) > 2 else 1
        before, after = ceil(channels / 2**i), ceil(channels / 2 ** (i + 1))
        blocks.append(conv_block(before, after, kernel))
        h, w, last = h - kernel + 1, w - kernel + 1, after
    return nn.Sequential(*blocks, nn.Flatten()), last * h * w


class ConditionEncoder(nn.Module):
    """Representation tensors -> condition ``c [B, cond_dim]``: a pre-encoder per layer, then one joint linear block."""

    runs_in_order = True

    def __init__(self, shapes: Sequence[tuple[int, ...]], cond_dim: int, depth: int = 3):
        super().__init__()
        parts, sizes = zip(*(pre_encoder(shape, depth) for shape in shapes), strict=True)
        self.layers = nn.ModuleList(parts)
        self.joint = linear_block(sum(sizes), cond_dim)

    def forward(self, representation: Sequence[Tensor]) -> Tensor:
        parts = [layer(x) for layer, x in zip(self.layers, representation, strict=True)]
        return self.joint(torch.cat(parts, 1))


class PosteriorEncoder(nn.Module):
    """Image and condition -> mean and log-variance of q(z | x, c), each ``[B, latent_dim]``.

    Two convolution blocks of stride 2 (C, 2 C, 4 C channels), flattened beside c, one linear block, two linear heads.
    """

    runs_in_order = True

    def __init__(self, image_shape: Shape, cond_dim: int, latent_dim: int):
        super().__init__()
        self.image, self.joint, size = self._layers(image_shape, cond_dim, latent_dim)
        self.mean = nn.Linear(size, latent_dim)
        self.log_variance = nn.Linear(size, latent_dim)

    def _layers(self, image_shape: Shape, cond_dim: int, latent_dim: int) -> tuple[nn.Module, nn.Module, int]:
        """The layers of the image, those of image and condition, and the size of their result."""
        channels, h, w = image_shape
        first, second = conv_block(channels, 2 * channels, 3, 2, 1), conv_block(2 * channels, 4 * channels, 3, 2, 1)
        size = 4 * channels * ceil(ceil(h / 2) / 2) * ceil(ceil(w / 2) / 2)
        return nn.Sequential(first, second, nn.Flatten()), linear_block(size + cond_dim, latent_dim), latent_dim

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        h = self.joint(torch.cat([self.image(x), condition], 1))
        return self.mean(h), self.log_variance(h)


@dataclass(frozen=True)
class Deconvolution:
    """A transposed convolution.

    Args:
        channels: channels of its output.
        kernel: side of its kernel.
        stride: in both directions.
        padding: on all sides.
        output_padding: (h, w), added below and to the right.
    """

    channels: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    output_padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, layer: nn.ConvTranspose2d) -> Deconvolution:
        """The settings of a square layer.

        Args:
            layer: a layer with equal kernel, stride and padding in both directions.
        """
        more_h, more_w = layer.output_padding
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        return cls(layer.out_channels, kernel, stride, padding, (more_h, more_w))

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width that this layer makes.

        Args:
            h: height of its input.
            w: width of its input.
        """
        return (
            (h - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[0],
            (w - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[1],
        )


def decoder_plan(image_shape: Shape, width: int = 32) -> Plan:
    """Start shape and layers of a decoder that ends at ``image_shape``, after the pattern of the paper's two.

    The image is halved (rounded up) until it is at most 4 on its longer side; channels double inwards from ``width``,
    to at most ``8 width``; a last 3 x 3 layer of stride 1 makes the image.

    Args:
        image_shape: (C, H, W).
        width: channels of the last hidden layer.
    """
    channels, h, w = image_shape
    layers: list[Deconvolution] = [Deconvolution(channels, stride=1)]
    depth = 0
    while max(h, w) > 4:
        layers.insert(0, Deconvolution(min(width << depth, 8 * width), output_padding=(1 - h % 2, 1 - w % 2)))
        h, w, depth = ceil(h / 2), ceil(w / 2), depth + 1
    return (min(width << depth, 8 * width), h, w), layers


#: The published decoders by the shape of their images: side of the start, output padding of all layers but the last,
#: and the last layer's kernel. The sides are 3 - 5 - 9 - 17 - 33 - 32 and 4 - 8 - 16 - 32 - 64 - 64.
PUBLISHED: dict[Shape, tuple[int, int, int]] = {(3, 32, 32): (3, 0, 2), (3, 64, 64): (4, 1, 3)}


def published_decoder(image_shape: Shape) -> Plan:
    """Start shape and layers of the paper's decoder for 3 x 32 x 32 (CIFAR) or 3 x 64 x 64 (TinyImageNet).

    Args:
        image_shape: (C, H, W).

    Raises:
        ValueError: no decoder is published for image_shape; `decoder_plan` makes one.
    """
    channels, h, w = image_shape
    if (channels, h, w) not in PUBLISHED:
        raise ValueError(f"decoders are published for 3 x 32 x 32 and 3 x 64 x 64, not for {tuple(image_shape)}")
    side, padding, kernel = PUBLISHED[channels, h, w]
    hidden = [Deconvolution(width, output_padding=(padding, padding)) for width in (256, 128, 64, 32)]
    return (256, side, side), [*hidden, Deconvolution(channels, kernel, stride=1)]


def deconvolution_stack(
    start: Shape, layers: Sequence[Deconvolution], image_shape: Shape, batch_norm: bool = True
) -> nn.Sequential:
    """The transposed convolutions of a decoder, from a map ``start`` to ``image_shape``.

    BatchNorm and LeakyReLU(0.2) follow each but the last, which alone has a bias; without ``batch_norm`` all have one,
    and LeakyReLU(0.01) follows.

    Raises:
        ValueError: the layers do not end at image_shape.
    """
    stack: list[nn.Module] = []
    channels, h, w = start
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        form = (layer.kernel, layer.stride, layer.padding, layer.output_padding)
        stack.append(nn.ConvTranspose2d(channels, layer.channels, *form, bias=last or not batch_norm))
        if not last:
            stack += [BatchNorm2d(layer.channels), LeakyReLU()] if batch_norm else [_LeakyReLU()]
        channels, (h, w) = layer.channels, layer.size(h, w)
    if (channels, h, w) != tuple(image_shape):
        raise ValueError(f"the decoder's layers end at {(channels, h, w)}, the images are {tuple(image_shape)}")
    return nn.Sequential(*stack)


class Decoder(nn.Module):
    """Latent and condition -> image logits: a linear adapter, then transposed convolutions.

    ``forward(z [B, K, latent_dim], c [B, cond_dim]) -> [B * K, C, H, W]``, before the sigmoid. All layers but the last
    are ConvTranspose2d without bias, BatchNorm2d, LeakyReLU(0.2); the last has a bias and nothing after it.

    Args:
        latent_dim: size of a latent.
        cond_dim: size of the condition.
        image_shape: (C, H, W) of the images it must end at.
        start: (C, h, w) of the map that the adapter makes.
        layers: the transposed convolutions, in order.

    Raises:
        ValueError: at construction, layers that do not end at image_shape.
    """

    runs_in_order = True
    #: the slope of LeakyReLU behind the layers of the stack, and whether BatchNorm stands before it
    slope = 0.2
    normalizes = True

    def __init__(
        self, latent_dim: int, cond_dim: int, image_shape: Shape, start: Shape, layers: Sequence[Deconvolution]
    ):
        super().__init__()
        self.latent_dim, self.start = latent_dim, tuple(start)
        if self.normalizes:
            self.adapter = nn.Linear(latent_dim + cond_dim, prod(start))
        self.stack = deconvolution_stack(start, layers, image_shape, self.normalizes)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        # the condition's half of the adapter once per image, not once per sample
        weight_z, weight_c = self.adapter.weight.split([self.latent_dim, condition.shape[1]], 1)
        h = F.linear(z, weight_z) + F.linear(condition, weight_c, self.adapter.bias)[:, None]
        return self.stack(F.leaky_relu(h, 0.2).flatten(0, 1).unflatten(1, self.start))


class _LeakyReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.01)  # a literal, for the reason given in purify_fast/models/layers.py


def _linear_blocks(*sizes: int) -> list[nn.Module]:
    """Linear with bias, LeakyReLU(0.01), BatchNorm1d, for each pair of sizes."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), _LeakyReLU(), BatchNorm1d(after)]
    return layers


class ConditionEncoderV1(nn.Module):
    """Representation tensors -> condition ``c [B, cond_dim]`` in (0, 1): all flattened, two linear blocks, a sigmoid.

    The hidden size is ``2 cond_dim`` (published: 290 -> 260 -> 130). The depth is always 2.
    """

    runs_in_order = True

    def __init__(self, shapes: Sequence[tuple[int, ...]], cond_dim: int, depth: int = 2):
        super().__init__()
        size = sum(prod(shape) for shape in shapes)
        self.joint = nn.Sequential(*_linear_blocks(size, 2 * cond_dim, cond_dim), nn.Sigmoid())

    def forward(self, representation: Sequence[Tensor]) -> Tensor:
        return self.joint(torch.cat([x.flatten(1) for x in representation], 1))


class PosteriorEncoderV1(PosteriorEncoder):
    """Image and condition -> mean and log-variance of q(z | x, c), each ``[B, latent_dim]``.

    A 4 x 4 convolution with just enough channels to lose no numbers, flattened beside c, two linear blocks and a tanh
    down to ``1.5 latent_dim`` (published: 96 for 64), two linear heads.
    """

    def _layers(self, image_shape: Shape, cond_dim: int, latent_dim: int) -> tuple[nn.Module, nn.Module, int]:
        channels, h, w = image_shape
        if min(h, w) < 4:
            raise ValueError(f"version v1 needs images of at least 4 x 4, got {h} x {w}")
        positions = (h - 3) * (w - 3)
        detail = ceil(channels * h * w / positions)
        image = nn.Sequential(nn.Conv2d(channels, detail, 4), nn.Flatten())
        size, shared = detail * positions + cond_dim, 3 * latent_dim // 2
        joint = nn.Sequential(*_linear_blocks(size, (size + shared) // 2, shared), nn.Tanh())
        return image, joint, shared


def decoder_plan_v1(channels: int, inputs: int) -> Plan:
    """Start shape and layers of the first version's decoder, from ``inputs`` numbers to ``channels`` x 28 x 28."""
    return (inputs, 1, 1), [
        Deconvolution(inputs // 2, 4, 1, 0),
        Deconvolution(inputs // 4, 4, 2, 1),
        Deconvolution(inputs // 8, 4, 2, 2),
        Deconvolution(channels, 4, 2, 1),
    ]


class DecoderV1(Decoder):
    """Latent and condition, side by side at one pixel -> image logits, by transposed convolutions with bias.

    ``forward(z [B, K, latent_dim], c [B, cond_dim]) -> [B * K, C, H, W]``, before the sigmoid. LeakyReLU(0.01) between
    the layers, no BatchNorm, no adapter.

    Raises:
        ValueError: at construction, layers that do not end at image_shape.
    """

    slope = 0.01
    normalizes = False

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        h = torch.cat([z, condition[:, None].expand(-1, z.shape[1], -1)], 2)
        return self.stack(h.flatten(0, 1).unflatten(1, self.start))


#: The networks of each version of the method: condition encoder, posterior encoder, decoder.
NETWORKS: dict[str, tuple[Any, ...]] = {
    "v4": (ConditionEncoder, PosteriorEncoder, Decoder),
    "v1": (ConditionEncoderV1, PosteriorEncoderV1, DecoderV1),
}


class PackedDecoder(nn.Module):
    """Draws latents and decodes them: ``forward(condition, seed, sample_ids, samples) -> images [B, K, C, H, W]``.

    A copy of a decoder's weights as they are now, in evaluation mode: the gradient reaches the condition only. Behind
    it is one op; on a GPU, K latents per image are drawn and decoded by a launch for each layer, the last two in one.

    Args:
        decoder: a `Decoder` or `DecoderV1` in evaluation mode.
        dtype: dtype of the products, bfloat16 (the only one that a GPU multiplies fast), float32 or float64; sums are
            in float32 (float64 for float64).

    Raises:
        ValueError: a decoder in training mode.
    """

    packed: Tensor
    biases: Tensor
    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        if any(isinstance(layer, BatchNorm2d) and layer.training for layer in decoder.modules()):
            raise ValueError("decoder must be in evaluation mode: a BatchNorm that still learns cannot be folded")
        layers: list[Any] = list(decoder.stack)
        if decoder.normalizes:
            start = decoder.start
            joint = decoder.adapter.weight.double().unflatten(0, start)  # [C, h, w, z and c]
            shift = decoder.adapter.bias.double().view(start)
        else:  # its first convolution sees one pixel, so that it is a linear layer
            first, *layers = layers
            joint = first.weight.double().permute(1, 2, 3, 0)
            start = tuple(joint.shape[:3])
            shift = first.bias.double().view(-1, 1, 1).expand(start)
        latent_dim, self.slope = decoder.latent_dim, decoder.slope
        weights, shifts, sizes = [], [], []
        _, h, w = start
        for layer, norm in zip(layers, [*layers[1:], None], strict=True):
            if not isinstance(layer, nn.ConvTranspose2d):
                continue
            weight, bias = (
                folded(layer, norm) if isinstance(norm, BatchNorm2d) else (layer.weight, layer.get_parameter("bias"))
            )
            weights.append(weight.double())
            shifts.append(bias.double())
            part = Deconvolution.of(layer)
            h, w = part.size(h, w)
            sizes.append(Layer(part.channels, part.kernel, part.stride, part.padding, height=h, width=w))
        self.geometry = Geometry(latent_dim, start, tuple(sizes))
        packed, biases = pack(joint[..., :latent_dim], weights, shifts)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        by_pixel = joint[..., latent_dim:].permute(1, 2, 0, 3).flatten(0, 2)
        shift = shift.permute(1, 2, 0).flatten()
        for name, value in {"packed": packed, "biases": biases, "weight": by_pixel, "bias": shift}.items():
            value = value.to(dtype if name == "packed" else real).contiguous()
            self.register_buffer(name, value, persistent=False)
        self._layers = self._unpacked()

    def _unpacked(self) -> Weights:
        """The weights of the layers, which decode where no kernel serves."""
        weights = unpack(self.packed, self.biases, self.geometry)
        layers = tuple(weight.contiguous(memory_format=torch.channels_last) for weight in weights.layers)
        return Weights(weights.first.contiguous(), layers, weights.biases)

    def tensors(self) -> list[Tensor]:
        """All tensors that it computes with."""
        layers = self._layers
        return [*self.buffers(), layers.first, *layers.layers, *layers.biases]

    def forward(self, condition: Tensor, seed: Tensor, sample_ids: Tensor, samples: int, **options: Any) -> Tensor:
        """Images in (0, 1), or their logits, ``[B, K, C, H, W]``.

        Args:
            condition: ``[B, cond_dim]``, floating point; the gradient flows here.
            seed: int64 ``[1]``, on the condition's device.
            sample_ids: int64 ``[B]``, on the condition's device.
            samples: K.
            options: ``squash``, ``channels_last`` and ``dtype`` of `purify_fast.ops.decode_prior`.

        Raises:
            ValueError: `decode_prior` refuses the arguments.
        """
        with without_autocast(condition.device):
            first = F.linear(condition.to(self.weight.dtype), self.weight, self.bias)
        if (self._layers.first.device, self._layers.first.dtype) != (self.packed.device, self.packed.dtype):
            # The module was moved or converted since they were unpacked.
            self._layers = self._unpacked()
        return decode_prior(
            first,
            seed,
            sample_ids,
            packed=self.packed,
            biases=self.biases,
            geometry=self.geometry,
            samples=samples,
            slope=self.slope,
            weights=self._layers,
            **options,
        )


def kernel_decodes(device: torch.device) -> bool:
    """Tell whether a kernel can decode on ``device``. False inside torch.compile, which fuses the plain layers.

    The kernel may not serve every dtype and batch size: for the others `decode_prior` runs the layers.

    Args:
        device: device of the latents.
    """
    return not torch.compiler.is_compiling() and REGISTRY["decode_samples"].may_serve(device)

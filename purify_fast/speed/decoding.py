"""Decodes K latents for each condition, by any decoder: the latents as one batch, and the condition once per image.

`PackedDecoder` makes a single op, `decode_prior`, of the layers that this op knows, and folds their BatchNorms. Without
the op they are not folded: on a CPU, PyTorch is slow to add the bias that a folded transposed convolution needs.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._settings import without_autocast
from ..kernels.decoder_sizes import Geometry, Layer
from ..ops import REGISTRY
from ..ops.decode_samples import decode_prior, latents as prior, pack
from ..ops.philox import default_stream
from .folding.arithmetic import fold, foldable, hooked

_NEUTRAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a plain Sequential, and of Sequentials in it, in order; else only the decoder itself."""
    if type(decoder) is not nn.Sequential or hooked(decoder):
        return [decoder]
    return [layer for child in decoder for layer in layers_of(child)]


def decode_samples(
    decoder: Callable[..., Tensor],
    condition: Tensor,
    samples: int = 8,
    *,
    latent_dim: int | None = None,
    latents: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Decode K latents for each condition, as one batch.

    Args:
        decoder: a module or function ``decoder(z [N, D], condition [N, C])``, or a plain ``nn.Sequential`` that begins
            with ``nn.Linear`` and gets ``[N, D + C]``, the latents first. A `PackedDecoder` is the fastest on a GPU.
        condition: ``[B, C]``, floating point.
        samples: K, at least 1. Given latents decide K themselves.
        latent_dim: D, if the decoder is not such a Sequential, whose linear layer tells it.
        latents: ``[B, K, D]``; None draws them from N(0, I), as `purify_fast.ops.philox` does for the stream LATENT.
        seed: int64 ``[1]``, on the condition's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each image (see `philox`). None: 0 to B - 1.

    Returns:
        The decoder's results, ``[B, K, ...]``. Latents, condition and weights get their gradients. BatchNorms in
        training mode use the statistics of all B K latents.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: ``latent_dim`` is missing, or samples is below 1.
    """
    layers: list[Any] = layers_of(decoder) if isinstance(decoder, nn.Module) else []
    joined = len(layers) > 0 and type(layers[0]) is nn.Linear and not hooked(layers[0])
    if latents is None:
        if isinstance(decoder, PackedDecoder):
            return decoder(condition, seed, sample_ids, samples)
        if latent_dim is None:
            latent_dim = (layers[0].in_features if joined else 0) - condition.shape[1]
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be given for this decoder, and be at least 1, got {latent_dim}")
        seed, sample_ids = default_stream(seed, sample_ids, len(condition), condition=condition)
        latents = prior(seed, sample_ids, samples, latent_dim).to(condition.dtype)
    batch, samples = latents.shape[:2]
    if not joined:
        repeated = condition[:, None].expand(-1, samples, -1).flatten(0, 1)
        return decoder(latents.flatten(0, 1), repeated).unflatten(0, (batch, samples))
    linear, *others = layers
    of_latents, of_condition = linear.weight.split([latents.shape[2], condition.shape[1]], 1)
    by_condition = F.linear(condition, of_condition, linear.bias)[:, None]
    out = (F.linear(latents, of_latents) + by_condition).flatten(0, 1)
    for layer in others:
        out = layer(out)
    return out.unflatten(0, (batch, samples))


#: The layers of a decoder that can be packed, as a pattern of the letters in `_letter`.
PATTERN = re.compile("L(UA|AU)(TA)*TS?")


def _bias(layer: Any) -> Tensor:
    """Return the bias of a layer, or zeros."""
    outputs = layer.weight.shape[isinstance(layer, nn.ConvTranspose2d)]
    zeros: Tensor = layer.weight.new_zeros(outputs)
    return zeros if layer.bias is None else layer.bias


def _slope(layer: nn.Module) -> float | None:
    """Return the slope of a LeakyReLU or ReLU for negative numbers; None for other layers."""
    return 0.0 if isinstance(layer, nn.ReLU) else getattr(layer, "negative_slope", None)


def _letter(layer: nn.Module) -> str:
    """Return a letter for the kind of a layer, or its name if it is of another kind."""
    if isinstance(layer, nn.ConvTranspose2d):
        square = all(len({*side}) == 1 for side in (layer.kernel_size, layer.stride, layer.padding))
        if not square or layer.groups != 1 or layer.dilation != (1, 1):
            return type(layer).__name__
    if _slope(layer) is not None:
        return "A"
    kinds: dict[type, str] = {nn.Linear: "L", nn.Unflatten: "U", nn.ConvTranspose2d: "T", nn.Sigmoid: "S"}
    return kinds.get(type(layer), type(layer).__name__)


def _folded(layers: list[nn.Module]) -> list[Any]:
    """Copy layers in float64, fold BatchNorms into the layers before them, and leave out neutral layers."""
    active = [layer for layer in layers if layer.training or hooked(layer) or not isinstance(layer, _NEUTRAL)]
    copies = [copy.deepcopy(layer).double() for layer in active]
    pairs = [(layer, norm) for layer, norm in pairwise(copies) if foldable(layer, norm)]
    fold(pairs)
    return [layer for layer in copies if layer not in [norm for _, norm in pairs]]


def _in_order(decoder: nn.Module) -> list[Any]:
    """Return a decoder's layers, with folded BatchNorms, or raise ValueError."""
    own = getattr(decoder, "in_order", None)
    layers = _folded(layers_of(decoder) if own is None else own())
    slopes = {_slope(layer) for layer in layers} - {None}
    if PATTERN.fullmatch("".join(map(_letter, layers))) is None or len(slopes) != 1:
        names = ", ".join(type(layer).__name__ for layer in layers)
        needs = "Linear, Unflatten, and square ConvTranspose2d with the same activation between them"
        raise ValueError(f"decoder must have {needs}, got {names}: use decode_samples, which runs any decoder")
    return layers


class PackedDecoder(nn.Module):
    """Draws latents and decodes them, by one op and with a copy of a decoder's weights.

    ``forward(condition, seed, sample_ids, samples) -> images [B, K, C, H, W]``

    The gradient reaches only the condition.

    Args:
        decoder: in evaluation mode: a decoder of `purify_fast.methods.carso`, or an ``nn.Sequential`` of Linear,
            LeakyReLU or ReLU, Unflatten, and ConvTranspose2d with the same activation between them. BatchNorms may
            follow Linear and ConvTranspose2d, and Sigmoid may be last. The convolutions must have square kernels, one
            group and no dilation. Later changes of the weights have no effect.
        dtype: dtype of the products: bfloat16 (the only fast dtype on a GPU), float32 or float64. Sums are in float32,
            or in float64 for float64.
        latent_dim: size of a latent, the first inputs of the linear layer; needed for a Sequential.

    Raises:
        ValueError: the decoder is in training mode, or has unknown layers, or latent_dim is missing.
    """

    packed: Tensor
    biases: Tensor
    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, decoder: nn.Module, dtype: torch.dtype = torch.bfloat16, latent_dim: int | None = None):
        super().__init__()
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training for layer in decoder.modules()):
            raise ValueError("decoder must be in evaluation mode: a BatchNorm in training mode cannot be folded")
        dim = getattr(decoder, "latent_dim", latent_dim)
        if not isinstance(dim, int):
            raise ValueError(f"latent_dim must be given for a decoder of type {type(decoder).__name__}, got {dim}")
        linear, *layers = _in_order(decoder)
        start: Any = next(layer.unflattened_size for layer in layers if isinstance(layer, nn.Unflatten))
        # `joint` is [C, h, w, latent_dim + cond_dim]
        joint, shift = linear.weight.unflatten(0, start), _bias(linear).unflatten(0, start)
        self.slope = next(slope for slope in map(_slope, layers) if slope is not None)
        self.squash = not isinstance(decoder, nn.Sequential) or isinstance(layers[-1], nn.Sigmoid)
        convolutions = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
        sizes, (h, w) = list[Layer](), start[1:]
        for layer in convolutions:
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            h, w = (
                (side - 1) * stride - 2 * padding + kernel + more
                for side, more in zip((h, w), layer.output_padding, strict=True)
            )
            sizes.append(Layer(layer.out_channels, kernel, stride, padding, height=h, width=w))
        self.geometry = Geometry(dim, tuple(start), tuple(sizes))
        packed, biases = pack(joint[..., :dim], [layer.weight for layer in convolutions], [*map(_bias, convolutions)])
        real = torch.float64 if dtype == torch.float64 else torch.float32
        by_pixel = joint[..., dim:].permute(1, 2, 0, 3).flatten(0, 2)
        shift = shift.permute(1, 2, 0).flatten()
        for name, value in {"packed": packed, "biases": biases, "weight": by_pixel, "bias": shift}.items():
            value = value.to(dtype if name == "packed" else real).contiguous()
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, condition: Tensor, seed: Tensor | None, sample_ids: Tensor | None, samples: int, **options: Any
    ) -> Tensor:
        """Return images ``[B, K, C, H, W]``: in (0, 1) if the decoder ends with a sigmoid or is one of CARSO's.

        Args:
            condition: the condition, floating point ``[B, cond_dim]``. The gradient reaches it.
            seed: seed of the latents, int64 ``[1]``, on the condition's device. None: a new seed.
            sample_ids: numbers that decide each image's latents, int64 ``[B]``, on its device. None: 0 to B - 1.
            samples: K.
            options: ``squash``, ``channels_last`` and ``dtype`` of `purify_fast.ops.decode_prior`.

        Raises:
            ValueError: `decode_prior` refuses the arguments.
        """
        with without_autocast(condition.device):
            first = F.linear(condition.to(self.weight.dtype), self.weight, self.bias)
        return decode_prior(
            first,
            seed,
            sample_ids,
            packed=self.packed,
            biases=self.biases,
            geometry=self.geometry,
            samples=samples,
            slope=self.slope,
            **({"squash": self.squash} | options),
        )


def kernel_decodes(device: torch.device) -> bool:
    """Return True if `PackedDecoder` should be used on ``device``, or else the decoder's own layers."""
    # A forced backend that the op does not have raises an error.
    with contextlib.suppress(RuntimeError):
        op = REGISTRY["decode_samples"]
        return not torch.compiler.is_compiling() and op.backend_for(device, sys.maxsize) != "reference"
    return False

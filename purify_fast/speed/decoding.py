"""Decodes K latents for each condition, by any decoder: the latents as one batch, and the condition once per image.

`PackedDecoder` makes a single op, `decode_prior`, of the layers that this op knows, and folds their BatchNorms. Without
the op they are not folded: on a CPU, PyTorch is slow to add the bias that a folded transposed convolution needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._tensors import check_floating, without_autocast
from ..kernels.decoder_sizes import Geometry, Layer
from ..ops import REGISTRY
from ..ops.decode_samples import Weights, decode_prior, pack, unpack
from ..ops.decode_samples import latents as prior
from ..ops.philox import default_stream
from .folding.batchnorm import folded, hooked

_LINEAR = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_NEUTRAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a plain Sequential, and of Sequentials in it, in order; else only the decoder itself."""
    if type(decoder) is not nn.Sequential or hooked(decoder):
        return [decoder]
    return [layer for child in decoder for layer in layers_of(child)]


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    """Tell whether ``norm`` is a BatchNorm that can be folded into the layer before it."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.training or norm.running_mean is None:
        return False
    fits = type(layer) in _LINEAR and (not isinstance(layer, nn.ConvTranspose2d) or layer.groups == 1)
    return fits and not hooked(layer) and not hooked(norm)


class _Step(NamedTuple):
    """A layer; with a folded BatchNorm also the new weight and bias."""

    layer: Any
    weight: Tensor | None = None
    bias: Tensor | None = None

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias."""
        weight = self.layer.weight if self.weight is None else self.weight
        bias = self.layer.bias if self.weight is None else self.bias
        outputs = weight.shape[isinstance(self.layer, nn.ConvTranspose2d)]
        return weight, weight.new_zeros(outputs) if bias is None else bias


def _steps(layers: list[nn.Module]) -> list[_Step]:
    """Fold BatchNorms into the layers before them in float64, and leave out neutral layers."""
    steps: list[_Step] = []
    for layer in layers:
        before = steps[-1].layer if steps and steps[-1].weight is None else None
        if before is not None and _folds(before, layer):
            steps[-1] = _Step(before, *folded(before, layer))
        elif layer.training or hooked(layer) or not isinstance(layer, _NEUTRAL):
            steps.append(_Step(layer))
    return steps


def _first_linear(layers: list[Any], latents: Tensor, condition: Tensor) -> int | None:
    """Return the index of a linear layer that gets latents and condition joined, if the layers begin with it."""
    at = next((i for i, layer in enumerate(layers[:2]) if type(layer) is nn.Linear and not hooked(layer)), None)
    if at is None or (at == 1 and not _joins(layers[0], latents, condition)):
        return None
    together = latents.shape[1] + condition.shape[1]
    if layers[at].in_features != together:
        got = f"{latents.shape[1]} + {condition.shape[1]} = {together}"
        raise ValueError(f"latents and condition must have {layers[at].in_features} numbers together, got {got}")
    return at


def _joins(layer: nn.Module, z: Tensor, condition: Tensor) -> bool:
    """Tell whether a layer without weights maps (z, condition) to their concatenation, by its result for a row."""
    if any(True for _ in layer.parameters()) or hooked(layer):
        return False
    row = z[:1].detach(), condition[:1].detach()
    joined = layer(row)
    return isinstance(joined, Tensor) and torch.equal(joined, torch.cat(row, 1))


def _check(condition: Tensor, latents: Tensor | None, samples: int) -> None:
    """Raise ValueError if the arguments of `decode_samples` do not match."""
    check_floating(condition=condition)
    if condition.dim() != 2:
        raise ValueError(f"condition must be [B, C], got {list(condition.shape)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if latents is not None:
        check_floating(condition=condition, latents=latents)
        if latents.dim() != 3 or len(latents) != len(condition):
            raise ValueError(f"latents must be [B, K, D] with B = {len(condition)}, got {list(latents.shape)}")


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
        decoder: a module or function ``decoder(z [N, D], condition [N, C])``, or a plain ``nn.Sequential``. If it
            begins with ``nn.Linear``, it gets ``[N, D + C]``, the latents first, else the pair (z, condition), which
            its first layer joins. A `PackedDecoder` is the fastest on a GPU.
        condition: ``[B, C]``, floating point.
        samples: K, at least 1. Given latents decide K themselves.
        latent_dim: D, if a Sequential does not tell it by its linear layer.
        latents: ``[B, K, D]``; None draws them from N(0, I), as `purify_fast.ops.philox` does for the stream LATENT.
        seed: int64 ``[1]``, on the condition's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each image (see `philox`). None: 0 to B - 1.

    Returns:
        The decoder's results, ``[B, K, ...]``. Latents, condition and weights get their gradients. BatchNorms in
        training mode use the statistics of all B K latents.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: shapes, dtypes or devices do not match, ``latent_dim`` is missing, or results are not one per
            latent.
    """
    _check(condition, latents, samples)
    layers: list[Any] = layers_of(decoder) if isinstance(decoder, nn.Module) else []
    if latents is None:
        if isinstance(decoder, PackedDecoder):
            return decoder(condition, seed, sample_ids, samples)
        if latent_dim is None:
            linear = next((layer.in_features for layer in layers[:2] if type(layer) is nn.Linear), 0)
            latent_dim = linear - condition.shape[1]
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be given for this decoder, and be at least 1, got {latent_dim}")
        seed, sample_ids = default_stream(seed, sample_ids, len(condition), condition=condition)
        latents = prior(seed, sample_ids, samples, latent_dim).to(condition.dtype)
    batch, samples = latents.shape[:2]
    at = _first_linear(layers, latents[:, 0], condition)
    if at is not None:
        linear, *layers = layers[at:]
        of_latents, of_condition = linear.weight.split([latents.shape[2], condition.shape[1]], 1)
        out: Any = (F.linear(latents, of_latents) + F.linear(condition, of_condition, linear.bias)[:, None]).flatten(
            0, 1
        )
    else:
        pair = latents.flatten(0, 1), condition[:, None].expand(-1, samples, -1).flatten(0, 1)
        out, layers = (pair, layers) if len(layers) > 1 else (decoder(*pair), [])
    for layer in layers:
        out = layer(out)
    if len(out) != batch * samples:
        raise ValueError(f"decoder must return {batch * samples} results, one for each latent, got {list(out.shape)}")
    return out.unflatten(0, (batch, samples))


#: The layers of a decoder that can be packed, as a pattern of the letters in `_letter`.
PATTERN = re.compile("L(UA|AU)(TA)*TS?")


def _slope(step: _Step) -> float | None:
    """Return the slope of a LeakyReLU or ReLU for negative numbers; None for other layers."""
    return 0.0 if isinstance(step.layer, nn.ReLU) else getattr(step.layer, "negative_slope", None)


def _letter(step: _Step) -> str:
    """Return a letter for the kind of a layer, or its name if it is of another kind."""
    layer = step.layer
    if isinstance(layer, nn.ConvTranspose2d):
        square = all(len({*side}) == 1 for side in (layer.kernel_size, layer.stride, layer.padding))
        if not square or layer.groups != 1 or layer.dilation != (1, 1):
            return type(layer).__name__
    if _slope(step) is not None:
        return "A"
    kinds = {nn.Linear: "L", nn.Unflatten: "U", nn.ConvTranspose2d: "T", nn.Sigmoid: "S"}
    return next((letter for kind, letter in kinds.items() if type(layer) is kind), type(layer).__name__)


def _in_order(decoder: nn.Module, latent_dim: int) -> list[_Step]:
    """Return a decoder's layers, with folded BatchNorms, from the linear layer on, or raise ValueError."""
    own = getattr(decoder, "in_order", None)
    steps = _steps(layers_of(decoder) if own is None else own())
    if len(steps) > 1 and type(steps[1].layer) is nn.Linear:
        inputs = steps[1].layer.in_features
        rows = torch.randn(1, inputs).split([latent_dim, inputs - latent_dim], 1)
        steps = steps[1:] if _joins(steps[0].layer, *rows) else steps
    letters = [_letter(step) for step in steps]
    if PATTERN.fullmatch("".join(letters)) is None or len({_slope(step) for step in steps} - {None}) != 1:
        names = ", ".join(type(step.layer).__name__ for step in steps)
        raise ValueError(
            "decoder must be an nn.Sequential of Linear, LeakyReLU or ReLU, Unflatten, and ConvTranspose2d with the "
            "same activation between them. BatchNorms in evaluation mode may follow Linear and ConvTranspose2d, and "
            "Sigmoid may be last. The convolutions must have square kernels, one group and no dilation. Got "
            f"{names}: use decode_samples, which runs any decoder"
        )
    return steps


class PackedDecoder(nn.Module):
    """Draws latents and decodes them, by one op and with a copy of a decoder's weights.

    ``forward(condition, seed, sample_ids, samples) -> images [B, K, C, H, W]``

    The gradient reaches only the condition.

    Args:
        decoder: in evaluation mode: a decoder of `purify_fast.methods.carso`, or an ``nn.Sequential`` of Linear,
            LeakyReLU or ReLU, Unflatten, and ConvTranspose2d with the same activation between them. BatchNorms may
            follow Linear and ConvTranspose2d, and Sigmoid may be last. A first layer may join (z, condition). Later
            changes of the weights have no effect.
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
        linear, *steps = _in_order(decoder, dim)
        start: Any = next(step.layer.unflattened_size for step in steps if isinstance(step.layer, nn.Unflatten))
        # `joint` is [C, h, w, latent_dim + cond_dim]
        joint, shift = (value.double().unflatten(0, start) for value in linear.numbers())
        self.slope = next(slope for slope in map(_slope, steps) if slope is not None)
        self.squash = not isinstance(decoder, nn.Sequential) or isinstance(steps[-1].layer, nn.Sigmoid)
        weights, shifts, sizes = [], [], []
        h, w = start[1:]
        for step in steps:
            layer = step.layer
            if not isinstance(layer, nn.ConvTranspose2d):
                continue
            weight, bias = step.numbers()
            weights.append(weight.double())
            shifts.append(bias.double())
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            more_h, more_w = layer.output_padding
            h, w = ((side - 1) * stride - 2 * padding + kernel for side in (h, w))
            h, w = h + more_h, w + more_w
            sizes.append(Layer(layer.out_channels, kernel, stride, padding, height=h, width=w))
        self.geometry = Geometry(dim, tuple(start), tuple(sizes))
        packed, biases = pack(joint[..., :dim], weights, shifts)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        by_pixel = joint[..., dim:].permute(1, 2, 0, 3).flatten(0, 2)
        shift = shift.permute(1, 2, 0).flatten()
        for name, value in {"packed": packed, "biases": biases, "weight": by_pixel, "bias": shift}.items():
            value = value.to(dtype if name == "packed" else real).contiguous()
            self.register_buffer(name, value, persistent=False)
        self._layers = self._unpacked()

    def _unpacked(self) -> Weights:
        """Return the weights of the layers, which are used if there is no kernel."""
        weights = unpack(self.packed, self.biases, self.geometry)
        layers = tuple(weight.contiguous(memory_format=torch.channels_last) for weight in weights.layers)
        return Weights(weights.first.contiguous(), layers, weights.biases)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that ``forward`` uses."""
        layers = self._layers
        return [*self.buffers(), layers.first, *layers.layers, *layers.biases]

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
        if (self._layers.first.device, self._layers.first.dtype) != (self.packed.device, self.packed.dtype):
            # the module was moved or converted after the weights were unpacked
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
            **({"squash": self.squash} | options),
        )


def kernel_decodes(device: torch.device) -> bool:
    """Tell whether `PackedDecoder` should be used on ``device``, or else the decoder's own layers."""
    return not torch.compiler.is_compiling() and REGISTRY["decode_samples"].may_serve(device)

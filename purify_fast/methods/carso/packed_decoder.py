"""A trained decoder as one op: BatchNorm folded, weights packed for `purify_fast.ops.decode_prior`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import without_autocast
from ...models.layers import BatchNorm2d
from ...ops import REGISTRY
from ...ops.decode_samples import Geometry, Layer, Weights, decode_prior, pack, unpack
from ...speed.folding.batchnorm import folded
from .networks import Decoder, Deconvolution
from .networks_v1 import DecoderV1


def _folded(layer: nn.ConvTranspose2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight [in, out, k, k] and bias [out] in float64, with the BatchNorm after it; without one there is a bias."""
    if isinstance(norm, BatchNorm2d):
        return folded(layer, norm)
    assert layer.bias is not None
    return layer.weight.double(), layer.bias.double()


class PackedDecoder(nn.Module):
    """Draws latents and decodes them: ``forward(condition, seed, sample_ids, samples) -> images [B, K, C, H, W]``.

    A copy of a decoder's weights as they are now, in evaluation mode: the gradient reaches the condition only. Behind
    it is one op; on a GPU, K latents per image are drawn and decoded by a launch for each layer, the last two in one.

    Args:
        decoder: a `Decoder` or `DecoderV1` in evaluation mode.
        dtype: of the products, bfloat16 (all that a GPU multiplies fast), float32 or float64; float32 sums (float64).

    Raises:
        ValueError: another kind of decoder or dtype, or one in training mode.
    """

    packed: Tensor
    biases: Tensor
    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, decoder: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        if not isinstance(decoder, (Decoder, DecoderV1)):
            raise ValueError(f"decoder must be a Decoder or a DecoderV1, got {type(decoder).__name__}")
        if dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype must be bfloat16, float32 or float64, got {dtype}")
        if any(isinstance(layer, BatchNorm2d) and layer.training for layer in decoder.modules()):
            raise ValueError("decoder must be in evaluation mode: a BatchNorm that still learns cannot be folded")
        layers: list[Any] = list(decoder.stack)
        if isinstance(decoder, Decoder):
            start = decoder.start
            joint = decoder.adapter.weight.double().unflatten(0, start)  # [C, h, w, z and c]
            shift = decoder.adapter.bias.double().view(start)
        else:  # its first convolution sees one pixel: a linear layer
            first, *layers = layers
            joint = first.weight.double().permute(1, 2, 3, 0)
            start = tuple(joint.shape[:3])
            shift = first.bias.double().view(-1, 1, 1).expand(start)
        latent_dim, self.slope = decoder.latent_dim, decoder.slope
        after = [*layers[1:], None]
        convolutions = [
            (layer, *_folded(layer, norm))
            for layer, norm in zip(layers, after, strict=True)
            if isinstance(layer, nn.ConvTranspose2d)
        ]
        (_, h, w), sizes = start, []
        for layer, *_ in convolutions:
            made = Deconvolution.of(layer)
            h, w = made.size(h, w)
            sizes.append(
                Layer(
                    channels=made.channels,
                    kernel=made.kernel,
                    stride=made.stride,
                    padding=made.padding,
                    height=h,
                    width=w,
                )
            )
        self.geometry = Geometry(latent_dim, start, tuple(sizes))
        packed, biases = pack(joint[..., :latent_dim], [w for _, w, _ in convolutions], [b for *_, b in convolutions])
        real = torch.float64 if dtype == torch.float64 else torch.float32
        by_pixel = joint[..., latent_dim:].permute(1, 2, 0, 3).flatten(0, 2)
        for name, value, kind in (
            ("packed", packed, dtype),
            ("biases", biases, real),
            ("weight", by_pixel, real),
            ("bias", shift.permute(1, 2, 0).flatten(), real),
        ):
            self.register_buffer(name, value.to(kind).contiguous(), persistent=False)
        self._layers = self._unpacked()

    def _unpacked(self) -> Weights:
        """The weights of the layers, which decode where no kernel serves."""
        made = unpack(self.packed, self.biases, self.geometry)
        last = tuple(weight.contiguous(memory_format=torch.channels_last) for weight in made.layers)
        return Weights(made.first.contiguous(), last, made.biases)

    @torch.no_grad()
    def refill(self, decoder: nn.Module) -> None:
        """Take the weights that a decoder has now, in the memory of the old ones.

        Args:
            decoder: one of the sizes of that which this is a copy of, in evaluation mode.

        Raises:
            ValueError: as the constructor.
        """
        new = PackedDecoder(decoder, self.packed.dtype)
        for old, value in zip(self._tensors(), new._tensors(), strict=True):
            old.copy_(value)

    def _tensors(self) -> list[Tensor]:
        layers = self._layers
        return [*self.buffers(), layers.first, *layers.layers, *layers.biases]

    def forward(
        self,
        condition: Tensor,
        seed: Tensor,
        sample_ids: Tensor,
        samples: int,
        *,
        squash: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Images in (0, 1), or their logits, ``[B, K, C, H, W]``.

        Args:
            condition: ``[B, cond_dim]``, floating point; the gradient flows here.
            seed: int64 ``[1]``, on the condition's device.
            sample_ids: int64 ``[B]``, on the condition's device.
            samples: K.
            squash: whether to end with a sigmoid.
            channels_last: whether the images are laid out so.
            dtype: of the images, as `purify_fast.ops.decode_prior` takes it.

        Raises:
            ValueError: a condition of another shape; what `decode_prior` refuses.
        """
        if condition.dim() != 2 or condition.shape[1] != self.weight.shape[1] or not condition.is_floating_point():
            raise ValueError(
                f"condition must be floating point [B, {self.weight.shape[1]}], got {condition.dtype} "
                f"{list(condition.shape)}"
            )
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
            squash=squash,
            channels_last=channels_last,
            dtype=dtype,
            weights=self._layers,
        )


def kernel_decodes(device: torch.device) -> bool:
    """Whether a kernel decodes on ``device``; in a compiled graph the layers do, fused with the rest.

    It need not serve images of every dtype and number: `decode_prior` runs the layers where it does not.

    Args:
        device: of the latents.
    """
    if torch.compiler.is_compiling():
        return False
    return REGISTRY["decode_samples"].may_serve(device)


def times_written(tensor: Tensor) -> int:
    """A number that changes whenever the tensor is written to or replaced by another.

    Args:
        tensor: any tensor; those made in inference mode count no writes.
    """
    return hash((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))

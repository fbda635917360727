"""Convolutions of few channels that halve or double an image, as fast forwards as backwards on a CPU.

A 3 x 3 convolution of stride 2 has a slow direction: from the small image to the large one, which is its backward pass,
or the forward pass of its transpose. CPU libraries compute it pixel by pixel of the large image, and with few channels
most of that is overhead. Here it is one 2 x 2 convolution on the small image, which makes the four pixels of every
2 x 2 block as channels of their own; the blocks are then laid out. The sums are the same ones in another order.

It is for frozen copies of models: weights get no gradient, and there are no second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Input and output channels up to which this is faster: beyond it the libraries' own kernels are.
MOST_CHANNELS = 32
#: Which taps of the kernel a pixel of a block sees, by its place in the block: (tap, offset on the small image).
_TAPS = {0: ((1, 0),), 1: ((2, 0), (0, 1))}


def spread_weight(weight: Tensor) -> Tensor:
    """The weight of the 2 x 2 convolution, ``[4 outputs, inputs, 2, 2]``.

    Args:
        weight: of the transposed convolution, ``[inputs, outputs, 3, 3]``.
    """
    inputs, outputs = weight.shape[:2]
    whole = weight.new_zeros(outputs, 2, 2, inputs, 2, 2)
    for row, rows in _TAPS.items():
        for column, columns in _TAPS.items():
            for i, down in rows:
                for j, right in columns:
                    whole[:, row, column, :, down, right] = weight[:, :, i, j].T
    return whole.reshape(4 * outputs, inputs, 2, 2).contiguous(memory_format=torch.channels_last)


def spread(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv_transpose2d(x, ..., bias, stride=2, padding=1, output_padding=1)``, ``[B, outputs, 2 H, 2 W]``.

    Args:
        x: ``[B, inputs, H, W]``.
        weight: what `spread_weight` made.
        bias: ``[outputs]``, or None.
    """
    shift = None if bias is None else bias.repeat_interleave(4)
    return F.pixel_shuffle(F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, shift), 2)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, whole: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return spread(x, whole, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.conv2d(grad, ctx.saved_tensors[0], None, 2, 1), None, None, None


class _Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, whole: Tensor) -> Tensor:
        ctx.save_for_backward(whole)
        return F.conv2d(x, weight, bias, 2, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return spread(grad, ctx.saved_tensors[0]), None, None, None


class Resizing(nn.Module):
    """In the place of a frozen convolution that halves an image, or of its transpose, which doubles one.

    Args:
        layer: the convolution; `can_stand_for` says which.
        dtype: of the arithmetic; results are in it.
    """

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype
        self.function = _Double if isinstance(layer, nn.ConvTranspose2d) else _Halve
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach().to(dtype)
        own = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        for name, value in (("_weight", own), ("_bias", bias), ("_whole", spread_weight(weight).to(dtype))):
            self.register_buffer(name, value, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The layer's own."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.function is _Halve and (x.shape[2] % 2 or x.shape[3] % 2):
            return self.layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.function.apply(x.to(self.dtype), self._weight, self._bias, self._whole)


def can_stand_for(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that `Resizing` computes faster on a CPU.

    Args:
        layer: any module.
    """
    # a subclass may compute something of its own
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) or type(layer) not in (nn.Conv2d, nn.ConvTranspose2d):
        return False
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    doubling = not isinstance(layer, nn.ConvTranspose2d) or layer.output_padding == (1, 1)
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    small = max(layer.in_channels, layer.out_channels) <= MOST_CHANNELS
    return shape == ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros") and doubling and small and not hooked


def replace_resizing(model: nn.Module, dtype: torch.dtype) -> int:
    """Put `Resizing` in the place of every layer that it can stand for, in place.

    Args:
        model: a frozen copy of a model, on a CPU.
        dtype: of the arithmetic.

    Returns:
        How many layers were replaced.
    """
    done = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(parent, Resizing) and can_stand_for(layer):
                setattr(parent, name, Resizing(layer, dtype))  # type: ignore[arg-type]
                done += 1
    return done

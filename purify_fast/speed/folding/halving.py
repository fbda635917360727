"""Convolutions of few channels on small images, as fast forwards as backwards on a CPU.

A 3 x 3 convolution of stride 2 has a slow direction: from the small image to the large one, which is its backward pass,
or the forward pass of its transpose. CPU libraries compute it pixel by pixel of the large image, and with few channels
most of that is overhead. Here it is one 2 x 2 convolution on the small image, which makes the four pixels of every
2 x 2 block as channels of their own; the blocks are then laid out. The sums are the same ones in another order.

A convolution that makes an image of one channel is slower still, because libraries fill their registers with channels.
Here a whole row of such an image is one pixel with as many channels as the row is wide, and the convolution goes over
rows alone. Most of its weights are zeros; a matrix product with them is faster than loops over single channels.

It serves frozen copies of models: weights get no gradient, and there are no second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import without_autocast
from .batchnorm import hooked

#: Input and output channels up to which this is faster: beyond it the libraries' own kernels are.
MOST_CHANNELS = 32
#: Numbers of a row, width times channels, up to which it is computed as one pixel.
WIDEST_ROW = 32
#: By tap of the kernel: the place in a block of the pixel that sees it, and the offset on the small image.
_TAPS = {0: (1, 1), 1: (0, 0), 2: (1, 0)}
#: Activations whose backward pass is slow where the gradient lies otherwise in memory than what was activated.
_ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.ELU)


def _last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """``[B, H, W, C]``, in the memory of x where that is channels_last."""
    return x.permute(0, 2, 3, 1)


def _as_row(x: Tensor) -> Tensor:
    """``[B, W C, H, 1]``: every row is one pixel."""
    return _pixels(x).flatten(2)[:, :, None].permute(0, 3, 1, 2)


def _from_row(rows: Tensor, channels: int, width: int) -> Tensor:
    """``[B, C, H, W]``, channels_last, of ``[B, k W C, H / k, 1]``, in which k rows may stand in one pixel."""
    # given and not inferred: an empty batch gives nothing to infer from
    height = rows.shape[1] * rows.shape[2] // (width * channels)
    return _pixels(rows).reshape(len(rows), height, width, channels).permute(0, 3, 1, 2)


def spread_weight(weight: Tensor) -> Tensor:
    """The weight of the 2 x 2 convolution, ``[4 outputs, inputs, 2, 2]``, from ``[inputs, outputs, 3, 3]``."""
    inputs, outputs = weight.shape[:2]
    whole = weight.new_zeros(2, 2, outputs, inputs, 2, 2)
    for i, (row, down) in _TAPS.items():
        for j, (column, right) in _TAPS.items():
            whole[row, column, :, :, down, right] = weight[:, :, i, j].T
    return _last(whole.reshape(4 * outputs, inputs, 2, 2))


def spread_row_weight(weight: Tensor, width: int) -> Tensor:
    """The weight of the convolution from a row to two rows, ``[2 * 2 width outputs, width inputs, 2, 1]``.

    It is made of the transposed convolution's, ``[inputs, outputs, 3, 3]``, for small images of a width.
    """
    inputs, outputs = weight.shape[:2]
    whole = weight.new_zeros(2, 2 * width, outputs, width, inputs, 2)
    for i, (row, down) in _TAPS.items():
        for j in range(3):
            for small in range(1 if j == 0 else 0, width):
                whole[row, 2 * small - 1 + j, :, small, :, down] = weight[:, :, i, j].T
    return _last(whole.reshape(4 * width * outputs, width * inputs, 2, 1))


def row_weight(weight: Tensor, width: int) -> Tensor:
    """The weight of a 3 x 3 convolution of stride 1 and padding 1, as one over rows of images of a width.

    ``[outputs, inputs, 3, 3]`` -> ``[width outputs, width inputs, 3, 1]``.
    """
    outputs, inputs = weight.shape[:2]
    whole = weight.new_zeros(width, outputs, width, inputs, 3)
    for j in range(3):
        for column in range(max(0, 1 - j), min(width, width + 1 - j)):
            whole[column, :, column + j - 1] = weight[:, :, :, j]
    return _last(whole.reshape(width * outputs, width * inputs, 3, 1))


def _halve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d(x, weight, bias, stride=2, padding=1)``, channels_last."""
    if x.shape[1] == 1:
        # one channel lies alike in both layouts, and the library is faster where it is called the usual one
        x, weight = (each.flatten(1).view(each.shape) for each in (x, weight))
    return _last(F.conv2d(x, weight, bias, 2, 1))


class _Linear(torch.autograd.Function):
    """``forth(x)``, a linear map and a bias, whose gradient is the map's transpose, ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        # No longer as a view: PyTorch refuses to change a view from a custom function in place. Nobody else has the
        # tensor of which this is a view; a change of any other would no longer be noticed.
        return forth(x).data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad), None, None


class _Replacement(nn.Module):
    """A replacement of a frozen convolution: it has the layer's weight and bias, and the bias in another dtype.

    A subclass computes batches of images in `_computed`. Whatever it does not serve, the layer itself computes.

    Args:
        layer: the convolution.
        dtype: dtype of the arithmetic and of the results.
    """

    _bias: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.register_buffer("_bias", bias, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The layer's own parameter."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own parameter."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        # an image without a batch goes through the layer too
        if x.dim() != 4 or not self._serves(x):
            return self.layer(x)
        with without_autocast(x.device):
            return self._computed(x.to(self.dtype))

    def _serves(self, x: Tensor) -> bool:
        """Tell whether `_computed` is right and fast for images of this size, ``[B, C, H, W]``."""
        raise NotImplementedError

    def _computed(self, x: Tensor) -> Tensor:
        """Compute the layer's result from images ``[B, C, H, W]`` in the dtype of the arithmetic."""
        raise NotImplementedError


class Resizing(_Replacement):
    """A replacement of a frozen convolution that halves an image, or of its transpose, which doubles one.

    Args:
        layer: the convolution; `replacement_of` says which.
        dtype: dtype of the arithmetic and of the results.
    """

    _weight: Tensor

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, dtype: torch.dtype):
        super().__init__(layer, dtype)
        self.doubles = isinstance(layer, nn.ConvTranspose2d)
        weight = layer.weight.detach()
        self.register_buffer("_weight", _last(weight.to(dtype)), persistent=False)
        self._blocks, self._rows = spread_weight(weight).to(dtype), dict[int, Tensor]()

    def _serves(self, x: Tensor) -> bool:
        return self.doubles or not (x.shape[2] % 2 or x.shape[3] % 2)

    def _computed(self, x: Tensor) -> Tensor:
        if self.doubles:
            return _Linear.apply(x, partial(self._spread, bias=self._bias), partial(_halve, weight=self._weight))
        return _Linear.apply(x, partial(_halve, weight=self._weight, bias=self._bias), self._spread)

    def _spread(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)``, ``[B, outputs, 2 H, 2 W]``."""
        outputs, width = self.layer.weight.shape[1], 2 * x.shape[3]
        if width * outputs <= WIDEST_ROW:
            if x.shape[3] not in self._rows:
                self._rows[x.shape[3]] = spread_row_weight(self.layer.weight.detach(), x.shape[3]).to(self.dtype)
            shift = None if bias is None else bias.repeat(2 * width)
            return _from_row(F.conv2d(F.pad(_as_row(x), (0, 0, 0, 1)), self._rows[x.shape[3]], shift), outputs, width)
        shift = None if bias is None else bias.repeat(4)
        blocks = _pixels(F.conv2d(F.pad(x, (0, 1, 0, 1)), self._blocks, shift))
        # row by row of the large image: block rows, rows of a block, then what lies side by side
        large = blocks.unflatten(3, (2, -1)).transpose(2, 3).reshape(len(x), 2 * x.shape[2], width, outputs)
        return large.permute(0, 3, 1, 2)


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution over rows, by `row_weight`."""
    width = x.shape[3]
    shift = None if bias is None else bias.repeat(width)
    return _from_row(F.conv2d(_as_row(x), weight, shift, 1, (1, 0)), len(weight) // width, width)


class RowByRow(_Replacement):
    """A replacement of a frozen 3 x 3 convolution of stride 1, transposed or not, to or from narrow rows.

    Args:
        layer: the convolution; `replacement_of` says which.
        dtype: dtype of the arithmetic and of the results.
    """

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, dtype: torch.dtype):
        super().__init__(layer, dtype)
        weight = layer.weight.detach()
        other = weight.flip(2, 3).transpose(0, 1)
        # a transposed convolution of stride 1 is a convolution with the kernel turned
        self._both = (other, weight) if isinstance(layer, nn.ConvTranspose2d) else (weight, other)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def _serves(self, x: Tensor) -> bool:
        return x.shape[3] * min(self.layer.in_channels, self.layer.out_channels) <= WIDEST_ROW

    def _computed(self, x: Tensor) -> Tensor:
        width = x.shape[3]
        if width not in self._rows:
            first, second = (row_weight(each, width).to(self.dtype) for each in self._both)
            self._rows[width] = first, second
        weight, back = self._rows[width]
        return _Linear.apply(x, partial(_row_by_row, weight=weight, bias=self._bias), partial(_row_by_row, weight=back))


class SameLayout(nn.Module):
    """An activation whose gradient is laid out as its result: elsewhere a library walks through both in steps.

    Args:
        layer: the activation.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        last = out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)
        if last and out.requires_grad:
            # a function of autograd would return a view, which the next layer could not change in place
            out.register_hook(_last)
        return out


def replacement_of(layer: nn.Module) -> type[Resizing | RowByRow] | None:
    """The class that computes a layer faster on a CPU: `Resizing`, or `RowByRow` for narrow images; None for neither.

    The layer is a 3 x 3 convolution of padding 1, without hooks, whose formula is known.
    """
    # a subclass may compute something else
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) or type(layer) not in (nn.Conv2d, nn.ConvTranspose2d):
        return None
    stride, channels = layer.stride[0], (layer.in_channels, layer.out_channels)
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    known = shape == ((3, 3), (stride, stride), (1, 1), (1, 1), 1, "zeros") and not hooked(layer)
    if isinstance(layer, nn.ConvTranspose2d):
        known = known and layer.output_padding == (stride - 1, stride - 1)
    if not known or max(channels) > MOST_CHANNELS:
        return None
    return {2: Resizing, 1: RowByRow if min(channels) == 1 else None}.get(stride)


def replace_resizing(model: nn.Module, dtype: torch.dtype) -> None:
    """Put `Resizing`, `RowByRow` and `SameLayout` in the place of layers of a frozen copy on a CPU, in place.

    They compute in ``dtype``.
    """
    for parent in list(model.modules()):
        if isinstance(parent, (_Replacement, SameLayout)):
            continue
        for name, layer in list(parent.named_children()):
            kind = replacement_of(layer)
            if kind is not None:
                setattr(parent, name, kind(layer, dtype))  # type: ignore[arg-type]
            elif type(layer) in _ACTIVATIONS and not hooked(layer):
                setattr(parent, name, SameLayout(layer))

"""Convolutions of small maps as matrix products, for CPUs with matrix tiles (AMX).

oneDNN's convolutions fill a tile with the pixels of one row of the result, so a map of 4 x 4 pixels fills a quarter of
it. A product of matrices, whose rows are the patches of all images, fills it whole. For larger maps or fewer channels,
to make the patches takes longer than is gained.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from ..._processor import has_tiles, onednn_takes_bfloat16
from ...models.layers import Conv2d
from ...ops.dispatch.gradient import first_order, transformed

#: For each frozen tensor of weights, its state and its layouts by name.
_layouts = WeakTensorKeyDictionary()
#: The largest number of layouts of a tensor. Maps of another size need another layout.
MOST = 8
#: oneDNN chooses a layout for a batch. It is always this batch, so that the layout, and with it the rounding of the
#: products, never depends on which batch came first.
BATCH = 32
#: The largest number of pixels in a map of the result.
PIXELS = 16
#: The smallest product of the numbers of input and output channels.
CHANNELS = 2**17


def patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """Return the patches of images ``[B, C, H, W]`` as rows of a matrix: ``[B, H', W', K L C]``."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)


def matrix(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[O, K L C]`` of the patches. It is a view in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def turned(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[C, K L O]`` of the gradient, with the taps in reverse order."""
    return weight.detach().flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2).mT


def transposed(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[K L C, O]``, which adds up a gradient for each tap."""
    return matrix(weight).mT


def packed_matrix(weight: Tensor, form: Callable[[Tensor], Tensor], size: Sequence[int]) -> Tensor:
    """Return a matrix of weights ``[N, M]`` as the weights ``[N, M, 1, 1]`` of a convolution, in oneDNN's layout.

    The layout of frozen weights is made again after a write in place, but not after a write to ``weight.data``.
    """

    def make() -> Tensor:
        made = form(weight.detach())[:, :, None, None].contiguous(memory_format=torch.channels_last)
        given = [0, 0], [1, 1], [1, 1], 1, [1, made.shape[1], BATCH * size[0], size[1]]
        return torch.ops.mkldnn._reorder_convolution_weight(made, *given)

    # Tensors of the inference mode have no version.
    if weight.is_inference():
        return make()
    state, name = (weight._version, weight.data_ptr()), (form.__name__, *size)
    known, layouts = _layouts.get(weight, (None, {}))
    if known != state:
        layouts = dict[Hashable, Tensor]()
        _layouts[weight] = state, layouts
    if name not in layouts:
        if len(layouts) >= MOST:
            del layouts[next(iter(layouts))]
        layouts[name] = make()
    result: Tensor = layouts[name]
    return result


def product(rows: Tensor, weight: Tensor, form: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply pixels ``[B, H, W, M]`` in bfloat16 with a matrix of weights ``[N, M]``, as a convolution of one image.

    PyTorch computes such a product in a single thread if the matrix has a few hundred rows, but a convolution in
    several.
    """
    if type(rows) is not Tensor or not rows.numel() or _get_current_dispatch_mode() or not onednn_takes_bfloat16():
        # A trace would record the packed weights as a constant, and fake tensors cannot be packed.
        return F.linear(rows, form(weight), bias)
    b, h, w, _ = rows.shape
    image = rows.view(1, b * h, w, -1).permute(0, 3, 1, 2)
    settings: tuple[Any, ...] = [0, 0], [1, 1], [1, 1], 1, "none", [], ""
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(image, packed_matrix(weight, form, (h, w)), bias, *settings)
    return out.permute(0, 2, 3, 1).view(b, h, w, -1)


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.settings = x.shape, stride, padding
        ctx.save_for_backward(weight)
        rows = patches(x, weight.shape[2:], stride, padding)
        # The next layer may change the result in place, which a view that a Function returns does not allow.
        return product(rows, weight, matrix, bias).permute(0, 3, 1, 2).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradient(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def is_faster(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Tell whether a convolution is faster as a product of matrices; in compiled code it is not."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() != 4 or weight.requires_grad:
        return False
    if weight.shape[0] * weight.shape[1] < CHANNELS or weight.shape[2:] == (1, 1):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not (cast or x.dtype == weight.dtype == torch.bfloat16) or not has_tiles():
        return False
    sides = [(x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return min(sides) > 0 and sides[0] * sides[1] <= PIXELS


def input_gradient(
    grad: Tensor, weight: Tensor, shape: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return the gradient of images of the shape ``(B, C, H, W)`` as a product of matrices."""
    (b, c, h, w), (rows, columns), (top, left) = shape, weight.shape[2:], padding
    around = rows - 1 - top, columns - 1 - left
    if stride == (1, 1) and min(around) >= 0:
        return product(patches(grad, (rows, columns), stride, around), weight, turned).permute(0, 3, 1, 2)
    # Each pixel of the result adds to the pixels of its patch.
    grad = grad.permute(0, 2, 3, 1)
    high, wide = grad.shape[1:3]
    taps = product(grad.contiguous(), weight, transposed).unflatten(3, (rows, columns, c))
    total = torch.zeros(b, h + 2 * top, w + 2 * left, c, dtype=torch.float32, device=grad.device)
    for i in range(rows):
        for j in range(columns):
            across = slice(j, j + stride[1] * (wide - 1) + 1, stride[1])
            total[:, i : i + stride[0] * (high - 1) + 1 : stride[0], across] += taps[:, :, :, i, j]
    return total[:, top : top + h, left : left + w].to(grad.dtype).permute(0, 3, 1, 2)


def unrolled(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Compute a convolution with frozen weights in bfloat16 as a product of matrices; see `is_faster`."""
    half = torch.bfloat16
    shift = None if bias is None else bias.to(half)
    # An attribute of a module has the type of a tuple of any length, which torch.compile treats as constants.
    result: Tensor = _Unrolled.apply(x.to(half), weight.to(half), shift, tuple(stride), tuple(padding))
    return result


class _UnrolledConv2d(nn.Conv2d):
    """A convolution of a frozen copy, which is computed by `unrolled` where that pays."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if not transformed() and is_faster(input, weight, self.stride, padding):
            return unrolled(input, weight, bias, self.stride, padding)
        return super()._conv_forward(input, weight, bias)


def unroll(model: nn.Module) -> None:
    """Let the wide convolutions of a frozen model compute small maps by `unrolled`, in place, on a CPU with tiles."""
    if not has_tiles():
        return
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and type(module) in (nn.Conv2d, Conv2d)
            and module.in_channels * module.out_channels >= CHANNELS
            and module.kernel_size != (1, 1)
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        ):
            module.__class__ = _UnrolledConv2d

"""Convolutions of bfloat16 images on a CPU, and their gradients, faster than PyTorch's.

    out[b, y, x, o] = bias[o] + sum over i, j, c of input[b, y s + i d - p, x s + j d - p, c] weight[o, i, j, c]

with stride s, zero padding p and dilation d. The kernels support a single case: bfloat16, channels_last, one group, on
a processor with AVX512-BF16 and without AMX. Sums and the gradients of weight and bias are float32.

3 x 3 convolutions with stride 1 and enough channels and pixels use Winograd's algorithm F(2 x 2, 3 x 3) (Lavin and
Gray, CVPR 2016) with half the products. It rounds sums of four pixels and of nine weights to bfloat16. The relative
error is 0.4 % for normal numbers. Infinities and NaN affect neighboring pixels, and sums of huge numbers overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .._tensors import check_floating
from .dispatch.examples import ROWS, examples, normal, wide_dtype
from .dispatch.gradient import first_order, needs_gradient, transformed
from .dispatch.registry import define_op, wide

#: The processor multiplies 16 channels together. With fewer channels part of each instruction is wasted.
FEW = 16
_SETTINGS = "int[] stride, int[] padding, int[] dilation"


def channels_first(x: Tensor) -> Tensor:
    """Return a view with channels first, as PyTorch's convolutions need it."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Return a view with channels last, as the ops need it. It is contiguous if the argument is channels_last."""
    return x.permute(0, 2, 3, 1)


def reference(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Sequence[int]) -> Tensor:
    """Compute [B, H', W', O] in plain PyTorch: input [B, H, W, C], weight [O, K, L, C], bias [O] or None."""
    shift = None if bias is None else bias.to(input.dtype)
    stride, padding, dilation = settings
    out = F.conv2d(channels_first(input), channels_first(weight), shift, stride, padding=padding, dilation=dilation)
    return channels_last(out).contiguous()


def reference_input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, *settings: Sequence[int]) -> Tensor:
    """Return grad [B, H', W', O] times d out / d input: [B, H, W, C] with the given height and width."""
    size = grad.shape[0], weight.shape[3], height, width
    return channels_last(conv2d_input(size, channels_first(weight), channels_first(grad), *settings)).contiguous()


def reference_weight_gradient(
    grad: Tensor, input: Tensor, kernel: Sequence[int], *settings: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return grad times d out / d weight and d out / d bias: [O, K, L, C] and [O], in float32 (float64 for float64)."""
    like, outputs = input.new_empty(1).expand(grad.shape[3], input.shape[3], *kernel), [grad.shape[3]]
    lists = [list(one) for one in settings]
    operands = (
        channels_first(grad),
        channels_first(input),
        like,
        outputs,
        *lists,
        False,
        [0, 0],
        1,
        [False, True, True],
    )
    _, of_weight, of_bias = torch.ops.aten.convolution_backward.default(*operands)
    return wide(channels_last(of_weight)).contiguous(), wide(of_bias)


def kind(inputs: int, outputs: int, stride: Sequence[int]) -> str:
    """Return the group of a layer. The layers of a group had similar timings, so all of them use the same backend."""
    if min(inputs, outputs) < FEW:
        return "few channels"
    return "strided" if max(stride) > 1 else "stride 1"


def output_size(size: Sequence[int], kernel: Sequence[int], *settings: Sequence[int]) -> list[int]:
    """Return the numbers of rows and columns of the result, from those of the images and the kernel."""
    return [
        (pixels + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for pixels, taps, stride, padding, dilation in zip(size, kernel, *settings, strict=True)
    ]


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: list[int]) -> Tensor:
    size = output_size(input.shape[1:3], weight.shape[1:3], *settings)
    return input.new_empty(input.shape[0], *size, weight.shape[0])


def _fake_weight_gradient(grad: Tensor, input: Tensor, kernel: list[int], *settings: Any) -> tuple[Tensor, Tensor]:
    dtype, outputs = torch.promote_types(grad.dtype, torch.float32), grad.shape[3]
    return grad.new_empty(outputs, *kernel, input.shape[3], dtype=dtype), grad.new_empty(outputs, dtype=dtype)


#: Those `EXAMPLES` for which the kernel uses Winograd's algorithm.
_TILED = (
    ((ROWS, 17, 16, 40), 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((ROWS, 18, 23, 32), 40, (3, 3), (1, 1), (2, 0), (2, 1)),
)
#: Each example is a tuple of the images' shape (channels last), the number of output channels, the kernel, the stride,
#: the padding and the dilation. The last four have a number for rows and a number for columns.
EXAMPLES = (
    ((ROWS, 9, 8, 24), 24, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((ROWS, 7, 10, 3), 40, (5, 5), (1, 1), (2, 2), (1, 1)),
    ((ROWS, 12, 11, 17), 6, (3, 2), (2, 1), (1, 0), (1, 2)),
    ((ROWS, 18, 16, 10), 96, (3, 3), (1, 1), (8, 8), (8, 8)),
    ((ROWS, 6, 5, 1), 1, (1, 1), (2, 2), (0, 0), (1, 1)),
    *_TILED,
)
#: These examples are layers of DeepFillv2's generator. A row below has the number of input channels, the side of the
#: images, the number of output channels, the kernel, the stride and the dilation.
RACED = tuple(
    ((ROWS, side, side, inputs), outputs, (kernel,) * 2, (stride,) * 2, (d * (kernel // 2),) * 2, (d, d))
    for inputs, side, outputs, kernel, stride, d in (
        (24, 8, 48, 3, 1, 1),
        (24, 32, 24, 3, 1, 1),
        (96, 32, 192, 3, 1, 1),
        (96, 32, 192, 3, 1, 8),
        (24, 64, 48, 3, 2, 1),
        (48, 32, 192, 3, 2, 1),
        (3, 32, 48, 5, 1, 1),
    )
)
#: The additional error allowed for Winograd's algorithm, which rounds its factors to bfloat16: 2 ** -7 of the largest
#: number, here as a multiple of float32's eps, 2 ** -23. The gradient of the weights needs this allowance, because it
#: is in float32. Results in bfloat16 have rounding errors of this size anyway.
_ROUNDED = 2.0**16


PROPERTIES: dict[str, Any] = {
    "dtypes": (torch.bfloat16,),
    "slack": lambda *setting: _ROUNDED if setting in _TILED else 0.0,
    "variant": lambda shape, outputs, kernel, stride, *_: kind(shape[-1], outputs, stride),
}


def _operands(*setting: Any) -> tuple[Tensor, ...]:
    """Make random images, weights, a bias, and a gradient of the result."""
    shape, outputs, kernel, stride, padding, dilation, dtype, seed = setting
    # The weights are scaled, so that the results are about as large as the numbers of the images, as in a network.
    scale = (math.prod(kernel) * shape[-1]) ** -0.5
    x, weight = normal(seed, *shape).to(dtype), normal(seed + 100, outputs, *kernel, shape[-1], scale=scale).to(dtype)
    size = output_size(shape[1:3], kernel, stride, padding, dilation)
    bias = normal(seed + 200, outputs).to(wide_dtype(dtype))
    return x, Parameter(weight, False), Parameter(bias, False), normal(seed + 300, ROWS, *size, outputs).to(dtype)


def _arguments(*setting: Any) -> tuple[Any, ...]:
    return *_operands(*setting)[:3], *map(list, setting[3:6])


def _arguments_input_gradient(*setting: Any) -> tuple[Any, ...]:
    x, weight, _, grad = _operands(*setting)
    return grad, weight, *x.shape[1:3], *map(list, setting[3:6])


def _arguments_weight_gradient(*setting: Any) -> tuple[Any, ...]:
    x, _, _, grad = _operands(*setting)
    return grad, x, *map(list, setting[2:6])


OP = define_op(
    "convolution",
    f"(Tensor input, Tensor weight, Tensor? bias, {_SETTINGS}) -> Tensor",
    reference=reference,
    fake=_fake,
    examples=examples(_arguments, EXAMPLES, **PROPERTIES),
    raced=examples(_arguments, RACED, **PROPERTIES),
)
INPUT_GRADIENT = define_op(
    "convolution_input_gradient",
    f"(Tensor grad, Tensor weight, SymInt height, SymInt width, {_SETTINGS}) -> Tensor",
    reference=reference_input_gradient,
    fake=lambda grad, weight, height, width, *_: grad.new_empty(grad.shape[0], height, width, weight.shape[3]),
    examples=examples(_arguments_input_gradient, EXAMPLES, **PROPERTIES),
    raced=examples(_arguments_input_gradient, RACED, **PROPERTIES),
)
WEIGHT_GRADIENT = define_op(
    "convolution_weight_gradient",
    f"(Tensor grad, Tensor input, int[] kernel, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference_weight_gradient,
    fake=_fake_weight_gradient,
    examples=examples(_arguments_weight_gradient, EXAMPLES, summed=True, **PROPERTIES),
    raced=examples(_arguments_weight_gradient, RACED, summed=True, **PROPERTIES),
)


def _by_kernel(images: Tensor, rounded: Tensor, bias: Tensor | None, settings: tuple[list[int], ...]) -> Tensor:
    """Compute the convolution of images ``[B, C, H, W]`` by the kernel. The weights are ``[O, K, L, C]``."""
    # The next layer may change the result in place, but a view returned by an autograd.Function cannot be changed in
    # place. `.data` has the same memory and is not a view. Nothing else refers to this memory.
    return channels_first(OP.handle(channels_last(images), rounded, bias, *settings)).data


# This class has no `setup_context`; `transformed` explains why.
class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor, settings: tuple[list[int], ...]
    ) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.size, ctx.settings = images.shape[2:], settings
        # If no weight needs a gradient, the backward does not need the images.
        ctx.save_for_backward(rounded, images if any(ctx.needs_input_grad[1:3]) else None)
        return _by_kernel(images, rounded, bias, settings)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rounded, images = ctx.saved_tensors
        grad = channels_last(grad)
        of_input, of_weight, of_bias = None, None, None
        variant = kind(rounded.shape[3], rounded.shape[0], ctx.settings[0])
        if ctx.needs_input_grad[0]:
            of_input = channels_first(INPUT_GRADIENT(grad, rounded, *ctx.size, *ctx.settings, variant=variant))
        if images is not None:
            kernel = list(rounded.shape[1:3])
            of_weight, of_bias = WEIGHT_GRADIENT(grad, channels_last(images), kernel, *ctx.settings, variant=variant)
            of_weight = channels_first(of_weight).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
            of_bias = of_bias.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias, None, None


def _pair_of(name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Expand ``value`` to rows and columns. Raise ValueError if it is not one or two integers that are large enough."""
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or any(type(one) is not int or one < least for one in pair):
        raise ValueError(f"{name} must be one or two whole numbers of at least {least}, got {value!r}")
    return pair


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors fit."""
    named = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(**named)
    for name, tensor in named.items():
        if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"outside autocast, {name} must have input's dtype {input.dtype}, got {tensor.dtype}")
    if input.dim() != 4 or weight.dim() != 4 or input.shape[1] != weight.shape[1] or 0 in weight.shape:
        shapes = f"got {list(input.shape)} and {list(weight.shape)}"
        raise ValueError(f"input must be [B, C, H, W] and weight [O, C, K, L] without a size of 0, {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [O] = [{weight.shape[0]}], got {list(bias.shape)}")


def _plain(input: Tensor, elements: int, variant: str) -> bool:
    """Return True if PyTorch's convolution is used for an input whose result has ``elements`` elements."""
    # Most processors have no kernel. There, `uses_reference` would raise an error if kernels are forced for other ops.
    if OP.kernel("cpu") == "reference":
        return True
    # Autocast does not change float64.
    autocast = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
    if dtype != torch.bfloat16:
        return True
    backwards = (op.uses_reference(input.device, dtype, elements, variant) for op in (INPUT_GRADIENT, WEIGHT_GRADIENT))
    return OP.uses_reference(input.device, dtype, input.numel(), variant) and all(backwards)


def _elements(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> int:
    """Return the number of elements of the result. Raise ValueError if an image is smaller than the kernel."""
    size, kernel = input.shape[2:], weight.shape[2:]
    sides = output_size(size, kernel, stride, padding, dilation)
    if min(sides) < 1:
        words = f"{list(size)}, padding {padding}, kernel {list(kernel)}, dilation {dilation}"
        raise ValueError(f"input with its padding must be at least as large as the kernel, got {words}")
    return input.shape[0] * weight.shape[0] * math.prod(sides)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Compute ``torch.nn.functional.conv2d`` with one group, by a kernel of this package if that is faster.

    Args:
        input: images ``[B, C, H, W]``, floating point, H and W at least 1. A kernel needs bfloat16 (or autocast to it).
        weight: ``[O, C, K, L]`` in input's dtype, or in any dtype under autocast. Its gradient has weight's dtype.
        bias: ``[O]``, with the same dtypes as weight, or None.
        stride: stride of rows and columns, or one number for both.
        padding: number of zeros added on each side, or two numbers for rows and columns.
        dilation: distance between taps in pixels, or two numbers for rows and columns.

    Returns:
        ``[B, O, H', W']`` in the dtype that PyTorch returns. A kernel always returns channels_last.

    Raises:
        TypeError: input, weight or bias is not a tensor.
        ValueError: shapes, dtypes, devices or settings do not match.

    Inside transforms of ``torch.func``, PyTorch's convolution is used. A kernel has first-order gradients only:
    ``create_graph=True`` is refused, except within ``use_backend("reference")``. The result does not depend on the
    number of threads, nor that of an image on the other images. But the choice between kernel and PyTorch depends on
    the batch size. Numbers below float32's normal range count as zero.
    """
    _check(input, weight, bias)
    settings = _pair_of("stride", stride, 1), _pair_of("padding", padding, 0), _pair_of("dilation", dilation, 1)
    elements = _elements(input, weight, *settings)
    if (
        elements == 0
        or input.device.type != "cpu"
        or transformed()
        or _plain(input, elements, kind(weight.shape[1], weight.shape[0], settings[0]))
    ):
        return F.conv2d(input, weight, bias, *settings)
    images, rounded = input.to(torch.bfloat16), channels_last(weight).detach().to(torch.bfloat16)
    if needs_gradient(input, weight, *([] if bias is None else [bias])):
        return _Convolution.apply(images, weight, bias, rounded, settings)
    return _by_kernel(images, rounded, bias, settings)

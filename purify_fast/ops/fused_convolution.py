"""A convolution of frozen weights together with what follows it in a network: bias, sum, normalization and activation.

    z[b, y, x, o] = bias[o] + added[b, y, x, o]
                    + sum over i, j, c of input[b, y s + i - p, x s + j - p, c] weight[o, i, j, c]
    out           = a(n(z)),   n(z) = (z - mean) gamma / sqrt(var + eps) + beta

with stride s, zero padding p, an activation a (none, ReLU or SiLU), and a BatchNorm n in evaluation mode, for networks
with pre-activation (He et al., ECCV 2016), in which z itself is used, too. The backward computes only the gradient of
the z of the images, which are themselves the result a(n(z)) of another layer:

    dx = (dz * w + earlier) a'(n(x)) gamma / sqrt(var + eps) + beside

Here dz * w is the transposed convolution of the gradient dz of z, ``earlier`` is the gradient of the images from their
other uses, and ``beside`` that of their z from its uses without activation. a' is computed from ``entered``: the images
themselves for ReLU, and their z for SiLU. The kernel serves bfloat16 in channels_last with one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .._validation import check_literal
from .convolution import channels_first, channels_last, check_convolution, pair_of, result_shape
from .dispatch.examples import ROWS, examples, normal, wide_dtype
from .dispatch.gradient import first_order, needs_gradient, transformed
from .dispatch.registry import define_op

Activation = Literal["none", "relu", "silu"]
#: The activations, in the order of the numbers in the op's schema.
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "silu")
NONE, RELU, SILU = range(3)
#: Convolutions with fewer input or output channels than this are raced separately.
FEW = 16


def _normalized(x: Tensor, norm: list[Tensor], eps: float) -> Tensor:
    """Apply a BatchNorm, given by its mean, variance, weight and bias, to a map with channels first."""
    return F.batch_norm(x, norm[0], norm[1], norm[2], norm[3], eps=eps) if norm else x


def activated(x: Tensor, activation: int) -> Tensor:
    """Apply ReLU or SiLU, by its number in `ACTIVATIONS`."""
    return F.relu(x) if activation == RELU else F.silu(x)


def through_activation(grad: Tensor, entered: Tensor | None, norm: list[Tensor], eps: float, activation: int) -> Tensor:
    """Return the gradient of z from that of a(n(z)). ``entered`` is the result of ReLU, or the z of SiLU."""
    if activation:
        assert entered is not None, "an activation needs the map that entered"
        if activation == RELU:
            grad = torch.ops.aten.threshold_backward(grad, entered, 0)
        else:
            grad = torch.ops.aten.silu_backward(grad, _normalized(entered, norm, eps))
    # PyTorch's operator divides by 0 for an empty batch, which ends the process.
    if norm and grad.numel():
        mean, variance, weight, _ = norm
        # In evaluation mode, this operator does not read the values of its second argument.
        backward = torch.ops.aten.native_batch_norm_backward
        # The arguments are positional because the operator has no names for them in Python.
        grad = backward(grad, grad, weight, mean, variance, None, None, False, eps, [True, False, False])[0]
    return grad


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    norm: list[Tensor],
    eps: float,
    activation: int,
    keep: bool,
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, channels last: out, and z if ``keep``, or else an empty tensor."""
    top, bottom, left, right = padding
    x, at_ends = channels_first(input), (top, left)
    if (top, left) != (bottom, right):
        x, at_ends = F.pad(x, (left, right, top, bottom)), (0, 0)
    shift = None if bias is None else bias.to(input.dtype)
    total = F.conv2d(x, channels_first(weight), shift, tuple(stride), padding=at_ends)
    if added is not None:
        total = total + channels_first(added)
    out = _normalized(total, norm, eps)
    if activation:
        out = activated(out, activation)
    return channels_last(out).contiguous(), channels_last(total).contiguous() if keep else input.new_empty(0)


def reference_backward(
    grad: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    earlier: Tensor | None,
    entered: Tensor | None,
    norm: list[Tensor],
    eps: float,
    beside: Tensor | None,
    activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Return the gradient of the images' z ``[B, H, W, C]``, in the notation of the module's docstring."""
    top, bottom, left, right = padding
    size = grad.shape[0], weight.shape[3]
    given = list(stride), channels_first(weight), channels_first(grad)
    if (top, left) == (bottom, right):
        out = conv2d_input((*size, height, width), *given[1:], given[0], [top, left])
    else:
        whole = conv2d_input((*size, height + top + bottom, width + left + right), *given[1:], given[0])
        out = whole[:, :, top : top + height, left : left + width]
    if earlier is not None:
        out = out + channels_first(earlier)
    entered = None if entered is None else channels_first(entered)
    out = through_activation(out, entered, norm, eps, activation)
    if beside is not None:
        out = out + channels_first(beside)
    return channels_last(out).contiguous()


def kind(inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> str:
    """Return the group of a layer. All layers of a group use the same backend at the same size."""
    if min(inputs, outputs) < FEW:
        return "few channels"
    strided = max(stride) > 1
    wide = tuple(kernel) == (3, 3) and not strided and min(inputs, outputs) >= 128
    return "x".join(map(str, kernel)) + " strided" * strided + " wide" * wide


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return the numbers of rows and columns of the result, from those of the images and the kernel."""
    around = padding[0] + padding[1], padding[2] + padding[3]
    return [
        (pixels + zeros - taps) // step + 1
        for pixels, zeros, taps, step in zip(size, around, kernel, stride, strict=True)
    ]


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    norm: list[Tensor],
    eps: float,
    activation: int,
    keep: bool,
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    size = output_size(input.shape[1:3], weight.shape[1:3], stride, padding)
    out = input.new_empty(input.shape[0], *size, weight.shape[0])
    return out, torch.empty_like(out) if keep else input.new_empty(0)


def _fake_backward(grad: Tensor, weight: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], height, width, weight.shape[3])


#: Each example is a tuple of the images' shape (channels last), the number of output channels, the kernel, the stride,
#: the padding, the activation, and what else is applied, by its first letters: ``b`` the bias, ``a`` the added map (or
#: the map ``earlier`` of the gradient), ``n`` the normalization, ``k`` the kept z (or the map ``beside``).
EXAMPLES = {
    ((ROWS, 9, 8, 32), 64, (3, 3), (1, 1), (1, 1, 1, 1), RELU, "ba"): "b",
    ((ROWS, 5, 6, 128), 160, (3, 3), (1, 1), (1, 1, 1, 1), SILU, "bank"): "b",
    ((ROWS, 9, 12, 24), 48, (3, 3), (2, 2), (1, 1, 1, 1), RELU, "bnk"): "b",
    ((ROWS, 8, 10, 32), 40, (3, 3), (2, 2), (0, 1, 0, 1), SILU, "bk"): "b",
    ((ROWS, 5, 6, 16), 128, (1, 1), (1, 1), (0, 0, 0, 0), NONE, "ba"): "b",
    ((ROWS, 7, 6, 48), 96, (1, 1), (2, 2), (0, 0, 0, 0), NONE, ""): "b",
    ((ROWS, 11, 9, 3), 32, (3, 3), (1, 1), (1, 1, 1, 1), RELU, "b"): "b",
    ((ROWS, 6, 9, 32), 3, (3, 3), (1, 1), (1, 1, 1, 1), NONE, "b"): "b",
}
#: Layers of a ResNet-18 for images of 32 x 32 pixels. A row below has the number of input channels, the side of the
#: images, the number of output channels, the kernel, the stride, the activation, and what else is applied.
RACED = tuple(
    ((ROWS, side, side, inputs), outputs, (taps,) * 2, (stride,) * 2, (taps // 2,) * 4, activation, parts)
    for inputs, side, outputs, taps, stride, activation, parts in (
        (64, 32, 64, 3, 1, RELU, "ba"),
        (128, 16, 128, 3, 1, RELU, "ba"),
        (512, 4, 512, 3, 1, RELU, "ba"),
        (64, 32, 128, 3, 2, RELU, "b"),
        (256, 8, 512, 3, 2, RELU, "b"),
        (192, 8, 64, 1, 1, NONE, "b"),
        (128, 16, 256, 1, 2, NONE, "b"),
        (3, 32, 64, 3, 1, RELU, "b"),
    )
)
PROPERTIES: dict[str, Any] = {
    "dtypes": (torch.bfloat16,),
    "variant": lambda shape, outputs, kernel, stride, *_: kind(shape[-1], outputs, kernel, stride),
}


def _norm(channels: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Make a random BatchNorm: mean, variance, weight and bias."""
    mean, spread, weight, bias = (normal(seed + i, channels) for i in range(4))
    values = mean / 2, 1 + spread.abs(), 1 + weight / 4, bias / 2
    return [Parameter(one.to(wide_dtype(dtype)), False) for one in values]


def _operands(*setting: Any) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Make random images, weights and a gradient of z, and return them with the size of z."""
    shape, outputs, kernel, stride, padding, _, _, dtype, seed = setting
    # The weights are scaled, so that the results are about as large as the numbers of the images, as in a network.
    weight = normal(seed + 100, outputs, *kernel, shape[-1], scale=(math.prod(kernel) * shape[-1]) ** -0.5).to(dtype)
    size = output_size(shape[1:3], kernel, stride, padding)
    grad = normal(seed + 300, shape[0], *size, outputs).to(dtype)
    return normal(seed, *shape).to(dtype), Parameter(weight, False), grad, size


def _arguments(*setting: Any) -> tuple[Any, ...]:
    shape, outputs, _, stride, padding, activation, parts, dtype, seed = setting
    x, weight, _, size = _operands(*setting)
    bias = Parameter(normal(seed + 200, outputs).to(dtype), False) if "b" in parts else None
    added = normal(seed + 400, shape[0], *size, outputs).to(dtype) if "a" in parts else None
    norm = _norm(outputs, dtype, seed + 500) if "n" in parts else []
    return x, weight, bias, added, norm, 1e-5, activation, "k" in parts, list(stride), list(padding)


def _arguments_backward(*setting: Any) -> tuple[Any, ...]:
    shape, _, _, stride, padding, activation, parts, dtype, seed = setting
    _, weight, grad, _ = _operands(*setting)
    earlier, entered, beside = (
        normal(seed + 600 + i, *shape).to(dtype) if wanted else None
        for i, wanted in enumerate(("a" in parts, activation, "k" in parts))
    )
    norm = _norm(shape[-1], dtype, seed + 500) if "n" in parts else []
    given = grad, weight, *shape[1:3], earlier, entered, norm, 1e-5, beside, activation
    return *given, list(stride), list(padding)


#: Every variant is served by the reference unless its kernel won a race on this device. The reference of a bare
#: convolution is a few launches, and cuDNN's products may be faster than the kernel's.
VARIANTS = tuple(dict.fromkeys(PROPERTIES["variant"](*setting) for setting in EXAMPLES))

OP = define_op(
    "fused_convolution",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? added, Tensor[] norm, float eps, int activation, bool keep, "
    "int[] stride, int[] padding) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    examples=examples(_arguments, EXAMPLES, **PROPERTIES),
    raced=examples(_arguments, RACED, **PROPERTIES),
    few_launches=VARIANTS,
)
BACKWARD = define_op(
    "fused_convolution_backward",
    "(Tensor grad, Tensor weight, SymInt height, SymInt width, Tensor? earlier, Tensor? entered, Tensor[] norm, "
    "float eps, Tensor? beside, int activation, int[] stride, int[] padding) -> Tensor",
    reference=reference_backward,
    fake=_fake_backward,
    examples=examples(_arguments_backward, EXAMPLES, **PROPERTIES),
    raced=examples(_arguments_backward, RACED, **PROPERTIES),
    few_launches=VARIANTS,
)


# This class has no `setup_context`; `transformed` explains why.
class _FusedConvolution(torch.autograd.Function):
    """Applies the kernels to images ``[B, C, H, W]``. Weight and bias must not need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        added: Tensor | None,
        activation: int,
        settings: tuple[list[int], list[int]],
    ) -> Tensor:
        keep = activation == SILU
        given = channels_last(images), channels_last(weight), bias, None if added is None else channels_last(added)
        out, total = OP.handle(*given, [], 0.0, activation, keep, *settings)
        ctx.settings, ctx.activation, ctx.size = settings, activation, images.shape[2:]
        ctx.save_for_backward(channels_last(weight), total if keep else out if activation == RELU else None)
        # The next layer may change the result in place, which a view that a Function returns does not allow. Autograd
        # must know of such a change if the result itself is kept.
        return channels_first(out) if activation == RELU else channels_first(out).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, entered = ctx.saved_tensors
        entered = None if entered is None else channels_first(entered)
        grad = channels_last(through_activation(grad, entered, [], 0.0, ctx.activation))
        of_input = None
        if ctx.needs_input_grad[0]:
            variant = kind(weight.shape[3], weight.shape[0], weight.shape[1:3], ctx.settings[0])
            given = grad, weight, *ctx.size, None, None, [], 0.0, None, NONE, *ctx.settings
            of_input = channels_first(BACKWARD(*given, variant=variant))
        return of_input, None, None, channels_first(grad) if ctx.needs_input_grad[3] else None, None, None


def _plain(input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> bool:
    """Return True if PyTorch's operators compute a call."""
    # Under autocast, the dtypes may differ.
    autocast = torch.is_autocast_enabled(input.device.type)
    if input.dtype != torch.bfloat16 or autocast or input.numel() == 0 or transformed():
        return True
    # The kernel has no gradient of the weights.
    if needs_gradient(*([weight] if bias is None else [weight, bias])):
        return True
    variant = kind(weight.shape[1], weight.shape[0], weight.shape[2:], stride)
    # Other variants have no examples, so their kernel would be neither verified nor raced.
    return variant not in VARIANTS or OP.uses_reference(input.device, input.dtype, input.numel(), variant)


def fused_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    activation: Activation = "none",
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """Compute an activation of a convolution plus another map, as at the end of a residual block.

    Args:
        input: images ``[B, C, H, W]``, floating point. A kernel needs bfloat16.
        weight: ``[O, C, K, L]`` in input's dtype. If weight or bias needs a gradient, PyTorch's operators are used.
        bias: ``[O]`` in input's dtype, or None.
        added: map that is added to the result of the convolution, ``[B, O, H', W']`` in input's dtype, or None.
        activation: "none", "relu" or "silu".
        stride: stride of rows and columns, or one number for both.
        padding: number of zeros added on each side, or two numbers for rows and columns.

    Returns:
        ``[B, O, H', W']`` in input's dtype. A kernel returns channels_last, and rounds only once.

    Raises:
        TypeError: input, weight, bias or added is not a tensor.
        ValueError: shapes, dtypes, devices or settings do not match.

    Inside transforms of ``torch.func``, PyTorch's operators are used. A kernel has first-order gradients only, of input
    and added. The result of an image does not depend on the other images.
    """
    check_convolution(input, weight, bias=bias, added=added)
    check_literal("activation", activation, Activation)
    steps, (y, x) = pair_of("stride", stride, 1), pair_of("padding", padding, 0)
    shape = result_shape(input, weight, steps, [y, x])
    if added is not None and list(added.shape) != shape:
        raise ValueError(f"added must be [B, O, H', W'] = {shape}, got {list(added.shape)}")
    number = ACTIVATIONS.index(activation)
    if _plain(input, weight, bias, steps):
        out = F.conv2d(input, weight, bias, tuple(steps), padding=(y, x))
        out = out if added is None else out + added
        return activated(out, number) if number else out
    return _FusedConvolution.apply(input, weight, bias, added, number, (steps, [y, y, x, x]))

"""Group normalization (Wu & He, ECCV 2018, arXiv 1803.08494) and SiLU in one pass, as before a denoiser's convolutions.

    y = n s(n),   n = w u + b,   u = (h - mean) / sqrt(var + eps),   h = x + shift,   s the sigmoid

The mean and the variance of h are over the pixels and channels of one group of one image. The backward, with the
gradient g of y, m = g s(n) (1 + n s(-n)) and means over the group, is

    dx = (w m - mean(w m) - u mean(w m u)) / sqrt(var + eps)       dw = sum m u       db = sum m

The kernel needs AVX512-BF16, and computes only the gradient of x. On GPUs, compilers fuse the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from .._tensors import check_floating, last_channels
from .dispatch.examples import ROWS, examples, normal, wide_dtype
from .dispatch.gradient import first_order, needs_gradient, transformed
from .dispatch.registry import define_backward, define_op, second_argument, wide

#: The number of channels that the kernel processes together, and the sizes of groups of which it processes several.
LANES, SEVERAL = 16, (4, 8)
#: The types of devices on which `torch.group_norm` accepts images of 16 bits with weights in float32. CUDA does not.
MIXED_DTYPES = ("cpu", "meta")


def group_norm(images: Tensor, groups: int, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Compute a group normalization by PyTorch, also for 16-bit images with float32 weights, in the images' dtype."""
    device, dtype = images.device.type, images.dtype
    if weight.dtype != dtype and device not in MIXED_DTYPES and not torch.is_autocast_enabled(device):
        return torch.group_norm(images.to(weight.dtype), groups, weight, bias, eps).to(dtype)
    # `F.group_norm` would raise an error for groups of one value.
    return torch.group_norm(images, groups, weight, bias, eps)


def _composed(images: Tensor, numbers: tuple[Tensor, Tensor, Tensor | None], groups: int, eps: float) -> Tensor:
    """Compute the op in plain PyTorch for images ``[B, C, ...]``, and weight, bias and shift."""
    weight, bias, shift = numbers
    if shift is not None:
        images = images + shift.to(images.dtype).view(*shift.shape, *[1] * (images.dim() - 2))
    return F.silu(group_norm(images, groups, weight, bias, eps=eps))


def reference(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float) -> Tensor:
    """Compute the op by PyTorch for x ``[B, ..., C]``, in float32 (float64 for float64). The result has x's dtype."""
    shift = None if shift is None else wide(shift)
    out = _composed(wide(x).movedim(-1, 1), (wide(weight), wide(bias), shift), groups, eps)
    return out.movedim(1, -1).to(x.dtype).contiguous()


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Return grad times dy/dx, in x's dtype and shape."""
    h = wide(x).flatten(1, -2) if shift is None else wide(x).flatten(1, -2) + wide(shift)[:, None]
    # The new shape of h is [B, pixels, groups, channels of a group].
    h, size = h.unflatten(2, (groups, -1)), (1, 3)
    w, b = (wide(one).view(groups, -1) for one in (weight, bias))
    variance, mean = torch.var_mean(h, size, correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    unit = (h - mean) * inverse
    n = unit * w + b
    slope = torch.sigmoid(n) * (1 + n * torch.sigmoid(-n))
    m = grad.to(h.dtype).reshape(h.shape) * slope * w
    of_x = (m - m.mean(size, keepdim=True) - unit * (m * unit).mean(size, keepdim=True)) * inverse
    return of_x.view(x.shape).to(x.dtype).contiguous()


#: The shape with channels last, the number of groups, and the rows of the shift, which is 0 without a shift.
EXAMPLES = (
    ((ROWS, 7, 6, 32), 2, 1),
    ((ROWS, 5, 4, 96), 2, ROWS),
    ((ROWS, 9, 1, 16), 1, 0),
    ((ROWS, 3, 5, 32), 8, ROWS),
    ((ROWS, 5, 4, 48), 6, 1),
)
#: Feature maps of `purify_fast.models.UNet` with width 32.
RACED = (((ROWS, 16, 16, 32), 2, 1), ((ROWS, 8, 8, 192), 12, 0), ((ROWS, 4, 4, 128), 8, 1))


def _arguments(
    shape: tuple[int, ...], groups: int, shifts: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, float]:
    channels, kind = shape[-1], wide_dtype(dtype)
    # The weights are parameters, because a race repeats the rows of all tensors that are not parameters.
    weight, bias = (Parameter(normal(seed + 100 * i, channels).to(kind), False) for i in (1, 2))
    rows = normal(seed + 300, shifts, channels).to(kind) if shifts else None
    shift = Parameter(rows, False) if rows is not None and shifts < ROWS else rows
    return normal(seed, *shape, scale=2.0).to(dtype), weight, bias, shift, groups, 1e-5


OP = define_op(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps) -> Tensor",
    reference=reference,
    examples=examples(_arguments, EXAMPLES, dtypes=(torch.bfloat16,)),
    raced=examples(_arguments, RACED, dtypes=(torch.bfloat16,)),
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps) -> Tensor",
    reference=reference_backward,
    size_key=second_argument,
)


class _Normalized(torch.autograd.Function):
    """Applies the kernel to images ``[B, C, H, W]``. The weights must not need a gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, *numbers: Any) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        ctx.save_for_backward(x, *numbers[:3])
        ctx.settings = numbers[3:]
        # The next layer may change the result in place, which a view that a Function returns does not allow.
        return OP.handle(x, *numbers).permute(0, 3, 1, 2).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = *ctx.saved_tensors, *ctx.settings
        return BACKWARD(grad.permute(0, 2, 3, 1), *given).permute(0, 3, 1, 2), None, None, None, None, None


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float) -> None:
    """Raise TypeError or ValueError if an argument of `group_norm_silu` does not match its documentation."""
    named = {"x": x, "weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    check_floating(**named)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, ...], got {list(x.shape)}")
    if any(size == 0 for size in x.shape[2:]):
        raise ValueError(f"x must have at least one pixel, got {list(x.shape)}")
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels == 0 or channels % groups:
        raise ValueError(
            f"groups must be a whole number, at least 1, that divides the {channels} channels, got {groups!r}"
        )
    if weight.shape != (channels,) or bias.shape != (channels,):
        shapes = f"{list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"weight and bias must be [C] = [{channels}], got {shapes}")
    if weight.dtype != bias.dtype or weight.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"weight and bias must be float32 or {x.dtype}, got {weight.dtype} and {bias.dtype}")
    if shift is not None and shift.shape not in ((1, channels), (x.shape[0], channels)):
        raise ValueError(f"shift must be [B, C] = {[x.shape[0], channels]} or [1, C], got {list(shift.shape)}")
    if not isinstance(eps, (int, float, torch.SymFloat)) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {eps!r}")


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Compute SiLU of the group normalization of ``x + shift``.

    Args:
        x: images ``[B, C, ...]``, floating point. A kernel accepts ``[B, C, H, W]`` in bfloat16 and channels_last, if C
            is a multiple of 16 and C / groups is 4, 8 or a multiple of 16.
        groups: number of groups of channels.
        weight: ``[C]``, in float32 or x's dtype.
        bias: ``[C]``, in weight's dtype.
        shift: ``[B, C]``, or ``[1, C]`` for all images, added to every pixel before the normalization. None: nothing.
        eps: number added to the variances, at least 0.

    Returns:
        ``x``'s shape, in the dtype that PyTorch's operators return. A kernel returns bfloat16 in channels_last.

    Raises:
        TypeError: x, weight, bias or shift is not a tensor.
        ValueError: shapes, dtypes or devices do not match.

    The kernel computes in float32, and has first-order gradients of x only. PyTorch's operators are used if another
    tensor needs a gradient, and inside transforms of ``torch.func``.
    """
    _check(x, groups, weight, bias, shift, eps=eps)
    numbers = (weight, bias) if shift is None else (weight, bias, shift)
    if (
        x.dtype != torch.bfloat16
        or x.shape[1] % LANES
        or (x.shape[1] // groups % LANES and x.shape[1] // groups not in SEVERAL)
        or not last_channels(x)
        or transformed()
        or needs_gradient(*numbers)
        or OP.uses_reference(x.device, x.dtype, x.numel())
    ):
        return _composed(x, (weight, bias, shift), groups, eps)
    if needs_gradient(x):
        return _Normalized.apply(x, weight, bias, shift, groups, eps)
    return OP.handle(x.permute(0, 2, 3, 1), weight, bias, shift, groups, eps).permute(0, 3, 1, 2)

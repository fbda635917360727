"""The gated unit after a convolution: ELU of the first half a of the channels, times a gate from the second half b.

    y = ELU(a) s(b),   da = g s(b) (1 for a > 0, exp(a) else),   db = g ELU(a) s(b) s(-b),   s the sigmoid

Source: DeepFillv2 (Yu et al., ICCV 2019), the generator of AToP (arXiv 2401.16352). g is the gradient of y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import check_floating, last_channels
from .dispatch.examples import ROWS, examples, normal
from .dispatch.gradient import define_backward, differentiable, needs_gradient
from .dispatch.registry import define_op, wide


def reference(features: Tensor, dim: int) -> Tensor:
    """Compute the op in plain PyTorch, with halves of ``dim``, in float32 (float64 for float64)."""
    a, b = wide(features).chunk(2, dim)
    return (F.elu(a) * torch.sigmoid(b)).to(features.dtype)


def reference_backward(grad: Tensor, features: Tensor, dim: int) -> Tensor:
    """Return grad times dy/dfeatures, in the features' dtype and shape."""
    a, b = wide(features).chunk(2, dim)
    g, gate = grad.to(a.dtype), torch.sigmoid(b)
    slope = torch.exp(torch.where(a > 0, 0.0, a))
    out = torch.cat((g * gate * slope, g * F.elu(a) * gate * torch.sigmoid(-b)), dim)
    return out.to(features.dtype).contiguous()


#: By shape, and the dimension that is divided, the last for channels_last; for the values see `Example.gpu`.
EXAMPLES = {((ROWS, 6, 17, 15), 1): "", ((ROWS, 8, 8, 48), 3): "f", ((ROWS, 2050), 1): "b", ((ROWS, 5, 7, 14), 3): "h"}


def _arguments(shape: tuple[int, ...], dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, int]:
    return normal(seed, *shape, scale=2.0).to(dtype), dim


OP = define_op(
    "gated_elu",
    "(Tensor features, int dim) -> Tensor",
    reference=lambda features, dim: reference(features, dim).contiguous(),
    fake=lambda features, dim: features.new_empty(features.chunk(2, dim)[0].shape),
    examples=examples(_arguments, EXAMPLES, slack=16.0),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    cuda=2**20,
)
BACKWARD = define_backward(
    OP, "(Tensor grad, Tensor features, int dim) -> Tensor", reference=reference_backward, cuda=0
)


_gated_elu = differentiable(OP.handle, lambda *args: BACKWARD(*args))


def gated_elu(features: Tensor) -> Tensor:
    """Compute ELU of the first half of the channels, times the sigmoid of the second half.

    Args:
        features: ``[B, 2C, ...]``, float16, bfloat16, float32 or float64. Another shape or dtype raises a ValueError.

    Returns:
        ``[B, C, ...]``, the features' dtype, also under autocast; computed in float32 (float64 for float64).
        Contiguous, or channels_last if the features are.

    The op has first-order gradients only and is deterministic. The kernels do not support ``vmap``.
    """
    check_floating(features=features)
    if features.dim() < 2 or features.shape[1] % 2:
        raise ValueError(f"features must be [B, 2C, ...], so with an even second size, got {list(features.shape)}")
    if OP.uses_reference(features.device, features.numel()):
        return reference(features, 1)
    call = _gated_elu if needs_gradient(features) else OP.handle
    # The op gets contiguous rows with their halves in the last dimension, for every memory layout.
    if last_channels(features):
        return call(features.permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2)
    return call(features, 1)

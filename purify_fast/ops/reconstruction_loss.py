"""Computes the binary cross-entropy of reconstructions, given by their logits, summed over each sample.

    loss_b = sum_p  max(l, 0) - l t + log(1 + exp(-|l|)) = sum_p -[ t log s + (1 - t) log(1 - s) ],   s = sigmoid(l)

This is CARSO's reconstruction term (arXiv 2306.06081, section 4.3). Only the logits have a gradient, s - t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import check_floating, per_image
from .dispatch.examples import IMAGES, examples, normal, uniform
from .dispatch.gradient import SCALED_ROWS, cpu_kernel, define_backward, differentiable, needs_gradient, saves
from .dispatch.registry import define_op, forced_backends, wide


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the op in plain PyTorch: map logits and target [B, ...] to [B], in float32 (float64 for float64)."""
    x, t = wide(logits).flatten(1), wide(target).flatten(1)
    return F.binary_cross_entropy_with_logits(x, t.to(x.dtype), reduction="none").sum(1)


def reference_backward(grad: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Return grad [B] times dloss/dlogits, in the logits' dtype and shape."""
    x = wide(logits)
    g = per_image(grad.to(x.dtype), x)
    return (g * (torch.sigmoid(x) - target.to(x.dtype))).to(logits.dtype).contiguous()


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return normal(seed, *shape, scale=3.0).to(dtype), uniform(seed + 100, *shape).to(dtype)


OP = define_op(
    "reconstruction_loss",
    "(Tensor logits, Tensor target) -> Tensor",
    reference=reference,
    fake=lambda logits, target: wide(logits).new_empty(logits.shape[0]),
    examples=examples(_arguments, IMAGES),
)
BACKWARD = define_backward(
    OP, "(Tensor grad, Tensor logits, Tensor target) -> Tensor", reference=reference_backward, cuda=2**20
)


#: A CPU kernel that returns the loss, and s - t in the dtype of the arithmetic, which the backward needs.
SAVING = cpu_kernel("reconstruction_loss_keeping", "(Tensor logits, Tensor target) -> (Tensor, Tensor)")


_with_saved = differentiable(SAVING, SCALED_ROWS, lambda inputs, outputs: (outputs[1], inputs[0].dtype), constants=1)
_reconstruction_loss = differentiable(OP.handle, lambda *args: BACKWARD(*args))


#: A call with a gradient on a CPU uses the kernel from this number of elements on (docs/ops.md).
SMALLEST = 2**13


def reconstruction_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the binary cross-entropy between reconstructions and target images, summed over each reconstruction.

    Args:
        logits: reconstructions before the sigmoid, ``[B, ...]``; float16, bfloat16, float32 or float64. They get a
            gradient.
        target: target images in [0, 1], with the shape and device of the logits, in any of these dtypes. They get no
            gradient.

    Returns:
        ``[B]``, in nats, at least 0; float32 (float64 for float64 logits), also under autocast.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    The op is deterministic. The kernels have first-order gradients only and do not support ``vmap``.
    """
    if logits.shape != target.shape or target.dim() < 2:
        shapes = f"{list(logits.shape)} and {list(target.shape)}"
        raise ValueError(f"logits and target must have the same shape [B, ...], got {shapes}")
    check_floating(logits=logits, target=target)
    target, gradient = target.detach(), needs_gradient(logits)
    # An autograd function of Python takes longer than the operators that it saves.
    small = gradient and logits.device.type == "cpu" and not forced_backends() and logits.numel() < SMALLEST
    if small or OP.uses_reference(logits.device, logits.numel()):
        return reference(logits, target)
    if gradient and saves(BACKWARD, logits):
        return _with_saved(logits, target)[0]
    return (_reconstruction_loss if gradient else OP.handle)(logits, target)

"""Computes the loss of reconstructions, summed over each sample. The kernels compute binary cross-entropy of logits.

    loss_b = sum_p  max(l, 0) - l t + log(1 + exp(-|l|)) = sum_p -[ t log s + (1 - t) log(1 - s) ],   s = sigmoid(l)

This is CARSO's reconstruction term (arXiv 2306.06081, section 4.3). Only the logits have a gradient, s - t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import check_floating, per_image, without_autocast
from .dispatch.examples import IMAGES, RGB, examples, normal, uniform
from .dispatch.gradient import SCALED_ROWS, cpu_kernel, differentiable, needs_gradient, saves
from .dispatch.registry import define_backward, define_op, forced_backends, second_argument, wide


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
    raced=examples(_arguments, RGB),
    compiler_fuses=("",),
)
BACKWARD = define_backward(
    OP, "(Tensor grad, Tensor logits, Tensor target) -> Tensor", reference=reference_backward, size_key=second_argument
)


#: A CPU kernel that returns the loss, and s - t in the dtype of the arithmetic, which the backward needs.
SAVING = cpu_kernel("reconstruction_loss_keeping", "(Tensor logits, Tensor target) -> (Tensor, Tensor)")


_with_saved = differentiable(SAVING, SCALED_ROWS, lambda inputs, outputs: (outputs[1], inputs[0].dtype), constants=1)
_reconstruction_loss = differentiable(OP.handle, lambda *given: BACKWARD(*given))


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the loss [B] of logits whose target has the same shape."""
    gradient = needs_gradient(logits)
    # An autograd function of Python takes longer than the operators that it saves.
    small = gradient and logits.device.type == "cpu" and not forced_backends() and logits.numel() < SMALLEST
    if small or OP.uses_reference(logits.device, logits.dtype, logits.numel()):
        return reference(logits, target)
    if not gradient:
        return OP.handle(logits, target)
    if saves(BACKWARD, logits):
        return _with_saved(logits, target)[0]
    return _reconstruction_loss(logits, target)


def _plain(reconstruction: Tensor, target: Tensor, kind: tuple[str, bool]) -> Tensor:
    """Compute one of the `KINDS` by PyTorch, summed over the target's dimensions, for one or K reconstructions."""
    x, t = wide(reconstruction), wide(target)
    leading = 1 + x.dim() - t.dim()
    t = (t if leading == 1 else t[:, None]).to(x.dtype).expand_as(x)
    # PyTorch refuses binary_cross_entropy under autocast.
    with without_autocast(x.device):
        return KINDS[kind](x, t, reduction="none").sum(tuple(range(leading, x.dim())))


#: By kind and whether the reconstructions are logits.
KINDS: dict[tuple[str, bool], Callable[..., Tensor]] = {
    ("bce", True): F.binary_cross_entropy_with_logits,
    ("bce", False): F.binary_cross_entropy,
    ("mse", True): F.mse_loss,
    ("mse", False): F.mse_loss,
}
#: The kernel serves a call with a gradient on a CPU from this number of elements on.
SMALLEST = 2**13


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, kind: str = "bce", *, from_logits: bool = True, reduction: str = "none"
) -> Tensor:
    """Compute the loss between reconstructions and target images, summed over each reconstruction.

    Args:
        reconstruction: ``[B, ...]``, or ``[B, K, ...]`` for K reconstructions of each target; float16, bfloat16,
            float32 or float64. It gets a gradient. By default it holds logits, which are numbers before the sigmoid.
        target: target images ``[B, ...]``, on the device of the reconstruction, in any of these dtypes; in [0, 1] for
            ``bce``. It gets no gradient.
        kind: ``bce`` (binary cross-entropy) or ``mse`` (squared differences of the numbers as they are).
        from_logits: False if the reconstructions are probabilities in [0, 1], whose logarithm is at least -100. Only
            ``bce`` uses it. Logits are more exact.
        reduction: ``none``; ``mean`` or ``sum`` over the reconstructions.

    Returns:
        ``[B]`` or ``[B, K]``, or ``[]`` with a reduction; in nats for ``bce``, at least 0; float32 (float64 for a
        float64 reconstruction), also under autocast.

    Raises:
        RuntimeError: a probability is outside [0, 1] (on a CPU).
        ValueError: a shape, dtype, device, kind or reduction is wrong.

    Kernels serve logits of the target's shape, for ``bce``. PyTorch's operators serve the other forms. The op is
    deterministic. The kernels have first-order gradients only and do not support ``vmap``.
    """
    several = reconstruction.dim() == target.dim() + 1
    shape = reconstruction.shape[:1] + reconstruction.shape[2:] if several else reconstruction.shape
    if shape != target.shape or target.dim() < 2:
        shapes = f"{list(reconstruction.shape)} and {list(target.shape)}"
        raise ValueError(f"reconstruction must have target's shape [B, ...], or be [B, K, ...], got {shapes}")
    check_floating(reconstruction=reconstruction, target=target)
    if (kind, from_logits) not in KINDS:
        raise ValueError(f"kind must be bce or mse, got {kind!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")
    target = target.detach()
    if kind == "bce" and from_logits and not several:
        loss = _bce(reconstruction, target)
    else:
        loss = _plain(reconstruction, target, (kind, from_logits))
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

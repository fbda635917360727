"""BatchNorm over the images of several processes, on CPUs and GPUs.

On CUDA it is computed by the functions of PyTorch that torch.nn.SyncBatchNorm is made of
(torch/nn/modules/_functions.py), in five operators forward and four backward. They exist on CUDA alone, and
SyncBatchNorm refuses tensors on a CPU, on which several processes are trained and tested as well. So other devices have
a form of their own, of more operators. Each form exchanges one tensor forward and one backward.

SyncBatchNorm itself leaves out processes without images, and waits for the device to find them; here every process must
have some.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

#: Kinds of devices for which PyTorch has its functions for statistics of several processes.
BY_TORCH = ("cuda",)
_EPS, _MOMENTUM = 1e-5, 0.1
# the newer of the two names; PyTorch warns of the older one where it has both
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def batch_norm_everywhere(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, world: int
) -> Tensor:
    """BatchNorm in training mode by the images of all processes, with torch's default eps and momentum.

    Args:
        x: this process's ``[B, C, ...]``, any floating-point dtype; B may differ between processes, and is at least 1.
        weight: ``[C]``.
        bias: ``[C]``.
        running: the running mean and variance, ``[C]`` each, which are brought up to date; None without them.
        world: how many processes there are.

    Returns:
        As ``x``. The gradients of weight and bias are those of this process's images.
    """
    if x.device.type in BY_TORCH:
        # torch's functions read both layouts, but no other strides
        x = x if _is_channels_last(x) else x.contiguous()
        return _NormalizeByTorch.apply(x, weight, bias, running, world)
    with torch.no_grad():
        mean, variance, count = moments_everywhere(x, world)
        if running is not None:
            running[0].mul_(1 - _MOMENTUM).add_(mean, alpha=_MOMENTUM)
            running[1].mul_(1 - _MOMENTUM).add_(variance * count / (count - 1), alpha=_MOMENTUM)
    return _Normalize.apply(x, weight, bias, mean, variance, count)


def moments_everywhere(x: Tensor, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over the images of all processes.

    Args:
        x: this process's ``[B, C, ...]``, any floating-point dtype.
        world: how many processes there are.

    Returns:
        The mean, the biased variance, and how many values went into each, all ``[C]``, float32 (float64 for float64).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    own = torch.stack([mean, variance, torch.full_like(mean, x.numel() / x.shape[1])])
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own)
    means, variances, counts = torch.stack(parts, 1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    # the squares' sum less the mean's square would lose the digits that large means share
    variance = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, variance, count


class _Normalize(torch.autograd.Function):
    """BatchNorm with `moments_everywhere`.

    These depend on x, so that the backward's own moments are those of all processes too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=_EPS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # positional because the operator has no names for its arguments in Python
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, _EPS, [True, True, True]
        )
        # the sums of dy, and of dy (x - mean) / deviation
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        inverse = torch.rsqrt(variance + _EPS)
        shift, slope = sums / count * weight * inverse
        shape = [-1, *[1] * (x.dim() - 2)]
        through = shift.view(shape) + (x - mean.view(shape)) * (slope * inverse).view(shape)
        return (direct - through).to(x.dtype), grad_weight, grad_bias, None, None, None


class _NormalizeByTorch(torch.autograd.Function):
    """BatchNorm over all processes by PyTorch's functions, which compute statistics in float32, or in float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, world: int
    ) -> Tensor:
        mean, inverse = torch.batch_norm_stats(x, _EPS)
        own = torch.cat([mean, inverse, mean.new_full((1,), x.numel() // x.shape[1])])
        gathered = own.new_empty(world * len(own))
        _all_gather(gathered, own)
        means, inverses, counts = gathered.view(world, -1).split([len(mean), len(mean), 1], 1)
        running_mean, running_var = (None, None) if running is None else running
        # positional because the function has no names for its arguments in Python
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x,
            means,
            inverses,
            running_mean,
            running_var,
            _MOMENTUM,
            _EPS,
            # in the dtype that the function reads them in
            counts[:, 0].to(x.dtype if running_mean is None else running_mean.dtype),
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts)
        # positional because the function has no names for its arguments in Python
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, _EPS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        grad = grad if _is_channels_last(grad) else grad.contiguous()
        # positional because the function has no names for its arguments in Python
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse, weight, True, True, True
        )
        sums = torch.cat([sum_dy, sum_dy_xmu])
        dist.all_reduce(sums)
        sum_dy, sum_dy_xmu = sums.chunk(2)
        # positional because the function has no names for its arguments in Python
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse, weight.to(mean.dtype), sum_dy, sum_dy_xmu, counts[:, 0].to(torch.int32)
        )
        return grad_x, grad_weight, grad_bias, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)

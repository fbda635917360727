"""BatchNorm over the images of several processes, on CPUs and GPUs.

torch's SyncBatchNorm refuses tensors on a CPU, on which several processes are trained and tested as well; one
implementation for both devices gives the same figures on both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


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


class NormalizeEverywhere(torch.autograd.Function):
    """BatchNorm with `moments_everywhere`.

    These depend on x, so that the backward's own moments are those of all processes too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # positional because the operator has no names for its arguments in Python
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, 1e-5, [True, True, True]
        )
        # the sums of dy, and of dy (x - mean) / deviation
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        inverse = torch.rsqrt(variance + 1e-5)
        shift, slope = sums / count * weight * inverse
        shape = [-1, *[1] * (x.dim() - 2)]
        through = shift.view(shape) + (x - mean.view(shape)) * (slope * inverse).view(shape)
        return (direct - through).to(x.dtype), grad_weight, grad_bias, None, None, None

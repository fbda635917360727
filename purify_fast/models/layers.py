"""Layers that more than one network is made of.

Numbers kept as module attributes are symbols to a dynamic compile, which then starts over to make them constants again:
these layers hold theirs as literals. Parameters, buffers and results are torch's.

In training mode within a process group of several, BatchNorm normalises by the images of all processes, forward and
backward, on CPUs and GPUs (torch's SyncBatchNorm: GPUs only). Every process must then run the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .._process import processes


class LeakyReLU(nn.Module):
    """LeakyReLU with CARSO's slope, 0.2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


def _moments_everywhere(x: Tensor, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of x ``[B, C, ...]`` over the images of all processes, and their count, each ``[C]``."""
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


class _NormaliseEverywhere(torch.autograd.Function):
    """BatchNorm with `_moments_everywhere`; backward, they depend on x: the gradients' moments are global too."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count):
        ctx.save_for_backward(x, weight, mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mean, variance, count = ctx.saved_tensors
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, 1e-5, [True, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight])  # of dy, and of dy (x - mean) / deviation
        dist.all_reduce(sums)
        inverse = torch.rsqrt(variance + 1e-5)
        shift, slope = sums / count * weight * inverse
        shape = [-1, *[1] * (x.dim() - 2)]
        through = shift.view(shape) + (x - mean.view(shape)) * (slope * inverse).view(shape)
        return (direct - through).to(x.dtype), grad_weight, grad_bias, None, None, None


class _LiteralBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features: int):
        super().__init__(num_features)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.training and (world := processes()[1]) > 1:
            return self._everywhere(input, world)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum=0.1, eps=1e-5
        )

    def _everywhere(self, input: Tensor, world: int) -> Tensor:
        with torch.no_grad():
            mean, variance, count = _moments_everywhere(input, world)
            if self.running_mean is not None and self.running_var is not None:
                self.running_mean.mul_(0.9).add_(mean, alpha=0.1)
                self.running_var.mul_(0.9).add_(variance * count / (count - 1), alpha=0.1)
        return _NormaliseEverywhere.apply(input, self.weight, self.bias, mean, variance, count)


class BatchNorm1d(_LiteralBatchNorm, nn.BatchNorm1d):
    """torch's BatchNorm1d with its default eps and momentum."""


class BatchNorm2d(_LiteralBatchNorm, nn.BatchNorm2d):
    """torch's BatchNorm2d with its default eps and momentum."""


def per_channel(name: str, statistic: float | Sequence[float] | Tensor, channels: int) -> list[float]:
    """``statistic`` as a list of 1 or ``channels`` numbers; ValueError naming it for any other count."""
    if hasattr(statistic, "flatten"):  # a tensor or an array; torch.as_tensor would be no numbers on the meta device
        statistic = statistic.flatten().tolist()
    values = [float(value) for value in (statistic if isinstance(statistic, Sequence) else [statistic])]
    if len(values) not in (1, channels):
        raise ValueError(f"{name} needs 1 or {channels} numbers, got {len(values)}")
    return values


def normalisation(mean: float | Sequence[float], std: float | Sequence[float], channels: int) -> dict[str, list[float]]:
    """``mean`` and ``std`` by `per_channel`; ValueError for a std that is not above 0."""
    found = {"mean": per_channel("mean", mean, channels), "std": per_channel("std", std, channels)}
    if not min(found["std"]) > 0:
        raise ValueError(f"std must be above 0, got {found['std']}")
    return found


class Normalise(nn.Module):
    """(x - mean) / std per channel, for ``[B, C, H, W]``; the statistics are no part of the state dict.

    Attributes:
        arguments: ``mean`` and ``std`` as lists.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float], channels: int):
        super().__init__()
        self.arguments = normalisation(mean, std, channels)
        for name, values in self.arguments.items():
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

"""Layers that more than one network is made of.

Numbers kept as module attributes are symbols to a dynamic compile, which then starts over to make them constants again:
these layers hold theirs as literals. Parameters, buffers and results are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeakyReLU(nn.Module):
    """LeakyReLU with CARSO's slope, 0.2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


class _LiteralBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features: int):
        super().__init__(num_features)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum=0.1, eps=1e-5
        )


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

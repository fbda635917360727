"""Layers that more than one network is made of.

`LeakyReLU` and the BatchNorms are torch's, with their numbers (slope, eps, momentum) written into the call. torch keeps
these numbers as attributes of the module. ``torch.compile(dynamic=True)`` first takes such an attribute for a number
that may change, and starts all over again when it finds that an operator needs a constant. Parameters, buffers and
results are torch's.

In training mode within a process group of several, BatchNorm normalizes by the images of all processes. Every process
must then run the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._process import processes
from ..ops.convolution import conv2d
from .synced_batch_norm import batch_norm_everywhere


class Conv2d(nn.Conv2d):
    """torch's Conv2d, with its arguments and names. In bfloat16 on a CPU `purify_fast.ops.conv2d` computes it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # on other devices there is no kernel, and the checks of `conv2d` would cost each call 9 us on an AMD EPYC
        if input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        if self.groups != 1 or self.padding_mode != "zeros" or isinstance(self.padding, str) or input.dim() != 4:
            return super()._conv_forward(input, weight, bias)
        settings = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return conv2d(input, weight, bias, **settings)


class LeakyReLU(nn.Module):
    """LeakyReLU with CARSO's slope, 0.2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


class _LiteralBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features: int):
        super().__init__(num_features)

    def forward(self, input: Tensor) -> Tensor:
        # torch's, without types
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        if self.training and (world := processes()[1]) > 1:
            running = None if mean is None or var is None else (mean, var)
            return batch_norm_everywhere(input, self.weight, self.bias, running, world)
        return F.batch_norm(
            input, mean, var, weight=self.weight, bias=self.bias, training=self.training, momentum=0.1, eps=1e-5
        )


class BatchNorm1d(_LiteralBatchNorm, nn.BatchNorm1d):
    """torch's BatchNorm1d with its default eps and momentum."""


class BatchNorm2d(_LiteralBatchNorm, nn.BatchNorm2d):
    """torch's BatchNorm2d with its default eps and momentum."""


def per_channel(name: str, statistic: float | Sequence[float] | Tensor | np.ndarray, channels: int) -> list[float]:
    """A statistic of the images as a list of numbers.

    Args:
        name: what an error calls it.
        statistic: a number for all channels, or one per channel, as a sequence, a tensor or an array.
        channels: how many channels there are.

    Returns:
        1 or ``channels`` numbers.

    Raises:
        ValueError: another count of numbers.
    """
    # not torch.as_tensor, which holds no numbers where modules are made on the meta device
    if isinstance(statistic, (Tensor, np.ndarray)):
        statistic = statistic.flatten().tolist()
    values = [float(value) for value in (statistic if isinstance(statistic, Sequence) else [statistic])]
    if len(values) not in (1, channels):
        raise ValueError(f"{name} needs 1 or {channels} numbers, got {len(values)}")
    return values


def normalization(mean: float | Sequence[float], std: float | Sequence[float], channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation of the images as lists, as `Normalize` takes and files keep them.

    Args:
        mean: a number, or one per channel, in image units.
        std: likewise, above 0.
        channels: how many channels there are.

    Returns:
        ``mean`` and ``std``, 1 or ``channels`` numbers each.

    Raises:
        ValueError: another count of numbers, or a std that is not above 0.
    """
    found = {"mean": per_channel("mean", mean, channels), "std": per_channel("std", std, channels)}
    if not min(found["std"]) > 0:
        raise ValueError(f"std must be above 0, got {found['std']}")
    return found


class Normalize(nn.Module):
    """(x - mean) / std per channel, for ``[B, C, H, W]``; the statistics are no part of the state dict.

    Args:
        mean: a number, or one per channel, in image units.
        std: likewise, above 0.
        channels: how many channels the images have.

    Attributes:
        arguments: ``mean`` and ``std`` as lists.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float], channels: int):
        super().__init__()
        self.arguments = normalization(mean, std, channels)
        for name, values in self.arguments.items():
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

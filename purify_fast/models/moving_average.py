"""Computes a moving average of a model's weights over a training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .representation import without_recorders


def moving_average(model: nn.Module, decay: float, warm_up: bool = False) -> AveragedModel:
    """Return a copy of a model."""

    def follow(averages: Iterable[Tensor], values: Iterable[Tensor], steps: Tensor | int) -> None:
        # torch's count of updates includes the first, which only copied the weights, so steps is n + 1
        least = 9 / (9 + torch.as_tensor(steps)) if warm_up else torch.zeros(())
        moved = least.clamp(min=1 - decay)
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, moved.to(average))
            else:
                average.copy_(value)

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    without_recorders(average.module).requires_grad_(False)
    # the first update copies the weights, so the average begins with them
    average.update_parameters(model)
    return average

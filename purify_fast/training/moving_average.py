"""A moving average of a model's weights, which follows them while they are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..models.representation import without_recorders


def moving_average(model: nn.Module, decay: float, warm_up: bool = False) -> AveragedModel:
    """A copy of a model that follows its weights and buffers; buffers of whole numbers are copied.

    Args:
        model: the model to follow.
        decay: share of the average that each step keeps.
        warm_up: whether a step keeps at most (1 + n) / (10 + n) after n others, so that the initial weights count
            little in a short training.
    """

    def follow(averages: Iterable[Tensor], values: Iterable[Tensor], steps: Tensor | int) -> None:
        # torch counts the first update, which copies the weights, as one
        least = 9 / (9 + torch.as_tensor(steps)) if warm_up else torch.zeros(())
        moved = least.clamp(min=1 - decay)
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, moved.to(average))
            else:
                average.copy_(value)

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    without_recorders(average.module).requires_grad_(False)
    # its first update copies the weights, so that the average begins with them
    average.update_parameters(model)
    return average

"""Computes a moving average of a model's weights over a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .representation import without_recorders

#: The dtypes whose average is kept in float32.
HALF = (torch.float16, torch.bfloat16)


def moving_average(model: nn.Module, decay: float, warm_up: bool = False) -> AveragedModel:
    """Return a copy of a model. Floating-point weights are averaged in float32, or in float64 if they are float64."""

    def follow(averages: Iterable[Tensor], values: Iterable[Tensor], steps: Tensor | int) -> None:
        # torch's count of updates includes the first, which only copied the weights, so steps is n + 1
        least = 9 / (9 + torch.as_tensor(steps)) if warm_up else torch.zeros(())
        moved = least.clamp(min=1 - decay)
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), moved.to(average))
            else:
                average.copy_(value)

    def follow_one(average: Tensor, value: Tensor, steps: Tensor | int) -> Tensor:
        follow([moved := average.clone()], [value], steps)
        return moved

    half = any(one.dtype in HALF for one in (*model.parameters(), *model.buffers()))
    # PyTorch groups tensors by their dtype, which a float32 average of a half weight has not.
    how: dict[str, Any] = {"avg_fn": follow_one} if half else {"multi_avg_fn": follow}
    average = AveragedModel(model, use_buffers=True, **how)
    without_recorders(average.module).requires_grad_(False)
    if half:
        # A small step would be lost in the few digits of half precision.
        average.module._apply(lambda one: one.float() if one.dtype in HALF else one)
    # the first update copies the weights, so the average begins with them
    average.update_parameters(model)
    return average

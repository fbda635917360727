"""Computes a moving average of a model's weights over a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from .representation import without_recorders

#: The dtypes whose average is kept in float32.
HALF = (torch.float16, torch.bfloat16)


class AveragedModel(swa_utils.AveragedModel):
    """A copy of a model. Floating-point weights are averaged in float32, or in float64 if they are float64.

    It has the name and the state of PyTorch's class, which copies its count of updates to the device in every step.
    """

    def __init__(self, model: nn.Module, decay: float, warm_up: bool = False):
        super().__init__(model, use_buffers=True)
        self.decay, self.warm_up = decay, warm_up
        without_recorders(self.module).requires_grad_(False)
        # A small step would be lost in the few digits of half precision.
        self.module._apply(lambda one: one.float() if one.dtype in HALF else one)
        # The average begins with the model's weights. The count stays on the host, also with another default device.
        self.n_averaged = torch.ones((), dtype=torch.int64, device="cpu")

    def _apply(self, function: Any, recurse: bool = True) -> AveragedModel:
        count = self.n_averaged
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.n_averaged = count
        return self

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the averages towards the weights of ``model``, and copy its integer buffers."""
        averages, values = ([*one.parameters(), *one.buffers()] for one in (self.module, model))
        pairs = list(zip(averages, values, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        # The count includes the beginning, so it is n + 1 after n updates.
        least = 9 / (9 + int(self.n_averaged)) if self.warm_up else 0.0
        if floating:
            targets = [value.to(average) for average, value in floating]
            torch._foreach_lerp_([average for average, _ in floating], targets, max(least, 1 - self.decay))
        if others:
            torch._foreach_copy_([average for average, _ in others], [value for _, value in others])
        self.n_averaged += 1

"""Finds the first loss of a training that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

#: The losses are checked after every INTERVAL steps, because a check waits for the device.
INTERVAL = 100


class Diverged(FloatingPointError):
    """Raised if the loss or a weight is not finite, in the step ``step``, counted from 0 (None: unknown)."""

    def __init__(self, text: str, step: int | None = None):
        super().__init__(text)
        self.step = step


class LossWatch:
    """Stores the losses since the last check on the device, and checks them every `INTERVAL` steps."""

    def __init__(self) -> None:
        self.losses = dict[int, Tensor]()

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of a step. A check raises Diverged if it finds a loss that is not finite."""
        self.losses[step] = loss
        if (step + 1) % INTERVAL == 0:
            if (bad := self.first_bad()) is not None:
                raise Diverged(f"the loss of step {bad} is not finite", bad)
            self.losses = {}

    def first_bad(self) -> int | None:
        """Return the first step since the last check whose loss is not finite, or None. This waits for the device."""
        finite = torch.stack([*self.losses.values()]).isfinite().tolist() if self.losses else []
        return next((step for step, good in zip(self.losses, finite, strict=True) if not good), None)

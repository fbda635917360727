"""Computes the length of a run, the step in which each delayed loss term begins, and the learning rate of each step.

Learning rates are functions of the progress, without a state to store. torch's schedulers could not repeat published
runs to the bit: OneCycleLR reaches its peak and its end one step earlier, and LambdaLR rounds differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DelayUnit = Literal["epochs", "steps", "images"]


@dataclass(frozen=True)
class RunLength:
    """The length of a run; ``batch_size`` and ``images_per_epoch`` are 0 for a loader."""

    epochs: int
    steps_per_epoch: int
    batch_size: int = 0
    images_per_epoch: int = 0

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def last_batch(self) -> int:
        """The number of images in an epoch's last step; 0 for a loader."""
        return self.images_per_epoch - (self.steps_per_epoch - 1) * self.batch_size

    def images_before(self, step: int) -> int:
        """Return the number of images that the steps before ``step``, counted from 0, train on; 0 for a loader."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.images_per_epoch + steps * self.batch_size

    def first_step(self, delay: float, unit: DelayUnit) -> int:
        """Return the first step after a delay, or raise ValueError for images without a known batch size."""
        if delay <= 0:
            return 0
        if unit == "steps":
            return -int(-delay // 1)
        if unit == "epochs":
            return -int(-delay // 1) * self.steps_per_epoch
        if not self.batch_size:
            raise ValueError("a loader's batch size is not known: give the delay in steps in place of images")
        epochs, images = divmod(-int(-delay // 1), self.images_per_epoch)
        return epochs * self.steps_per_epoch - (-images // self.batch_size)

    def check_acts(self, step: int, argument: str) -> int:
        """Return ``step``, or raise ValueError for a loss term whose delay is at least as long as the run."""
        if step >= self.steps:
            raise ValueError(f"{argument} is too long: its term would begin in step {step + 1} of {self.steps}; give 0")
        return step


def one_cycle(progress: float, peak: float) -> float:
    """Return the learning rate of a one-cycle schedule (Smith, 2018), at a share ``progress`` of the run.

    It rises along a cosine from ``peak / 25`` to ``peak`` in the first fifth, and then falls to ``peak / 1000``.
    """
    if progress < 0.2:
        low, position = peak / 25, 1 - progress / 0.2
    else:
        low, position = peak / 1000, (progress - 0.2) / 0.8
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * position))

"""The length of a run, the first steps of its delayed loss terms, and learning rates over the run.

Learning rates are functions of progress through the run, or of the epoch. torch's schedulers are not used: OneCycleLR
counts to the step before the last and joins its halves one step later, and LambdaLR multiplies by a factor, which
rounds otherwise, so that published runs would not be repeated to the bit. And a function of the step has no state that
a checkpoint would have to hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DelayUnit = Literal["epochs", "steps", "images"]


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Args:
        epochs: epochs of the whole run.
        steps_per_epoch: steps of an epoch.
        batch_size: images of a step, of all processes together; 0 if that is known only when they arrive.
        images_per_epoch: images of an epoch; 0 as above.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int = 0
    images_per_epoch: int = 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def last_batch(self) -> int:
        """Images of an epoch's last step; 0 if that is known only when they arrive."""
        return self.images_per_epoch - (self.steps_per_epoch - 1) * self.batch_size

    def images_before(self, step: int) -> int:
        """Images that the steps before one, counted from 0, have trained on; 0 if the size of a batch is not known."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.images_per_epoch + steps * self.batch_size

    def first_step(self, delay: float, unit: DelayUnit) -> int:
        """The first step before which at least this much of the run has passed.

        Args:
            delay: the length of the delay.
            unit: unit of ``delay``.

        Raises:
            ValueError: ``unit`` is "images", and the size of a batch is not known.
        """
        if unit == "steps":
            return -int(-delay // 1)
        if unit == "epochs":
            return -int(-delay // 1) * self.steps_per_epoch
        if not self.batch_size:
            raise ValueError(
                "a delay in images needs images in a tensor: the size of a loader's batch is known only when it "
                "arrives; give the delay in steps"
            )
        epochs, images = divmod(-int(-delay // 1), self.images_per_epoch)
        return epochs * self.steps_per_epoch - (-images // self.batch_size)

    def check_acts(self, step: int, *, argument: str, value: str, weight: str) -> int:
        """Refuse a delay that lasts as long as the run.

        Args:
            step: the first step at which the term acts.
            argument: the setting that delays it.
            value: value of the setting, with its unit.
            weight: the setting that weights the term, with its value.

        Returns:
            ``step``.

        Raises:
            ValueError: the run ends before that step.
        """
        if step < self.steps:
            return step
        images = f" of {self.batch_size} images" if self.batch_size else ""
        epochs = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        raise ValueError(
            f"{argument} is {value}, and the training has {epochs} of {self.steps_per_epoch} steps{images}: "
            f"the term that {weight} weights would first act in step {step + 1}, and the training ends after "
            f"{self.steps}, so that it would never act. Train longer, give a smaller {argument}, or set "
            f"{weight.split()[0]} to 0 to train without the term"
        )


def one_cycle(progress: float, peak: float, warm: float = 0.2, floor: float = 1e-3) -> float:
    """Cosine up from ``peak / 25`` over the first ``warm`` of the run, cosine down to ``floor * peak``; Smith 2018.

    Args:
        progress: share of the run's steps that have been taken, in [0, 1).
        peak: the highest rate.
        warm: share of the run in which the rate rises.
        floor: the rate at the end, as a share of ``peak``.
    """
    if progress < warm:
        low, position = peak / 25, 1 - progress / warm
    else:
        low, position = floor * peak, (progress - warm) / (1 - warm)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * position))


def carso_published(epoch: int, epochs: int, peak: float) -> float:
    """CARSO's rate for ``epoch`` in 0 .. epochs - 1, constant within it (arXiv 2306.06081, official code).

    Linear from 5e-9 to ``peak`` over int(epochs / 8) epochs, flat for as many, linear to 1.25e-4 ``peak`` over the
    rest; at least 3 epochs to rise, 1 flat and 3 to fall. The official peak is 1e-4 times the batch of one process.

    Args:
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        peak: the highest rate.
    """
    rise, flat = max(3, int(epochs / 8)), max(1, int(epochs / 8))
    fall = max(3, epochs - 2 * int(epochs / 8))
    if epoch < rise:
        return 5e-9 + (peak - 5e-9) * epoch / rise
    return peak * (1 - (1 - 1.25e-4) * min(1.0, max(0, epoch - rise - flat) / fall))


def carso_v1_published(epoch: int, epochs: int, peak: float) -> float:
    """The rate of CARSO's first version: linear from 5e-9 to ``peak`` over int(epochs / 3) epochs, linear back down.

    Args:
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        peak: the highest rate.
    """
    rise = max(1, int(epochs / 3))
    position = epoch / rise if epoch <= rise else (epochs - epoch) / max(1, epochs - rise)
    return 5e-9 + (peak - 5e-9) * position


def arrest_published(epoch: int, epochs: int, peak: float) -> float:
    """ARREST's rate for ``epoch`` in 0 .. epochs - 1, constant within it (arXiv 2308.16454, by sgmath12/FAT).

    The first 11 of 20 epochs have ``peak``, the next two 0.8 ``peak``, then the rate halves every two epochs: from a
    peak of 0.025 down to 0.00125. Other numbers of epochs stretch that.

    Args:
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        peak: the highest rate.
    """
    place = epoch * 20 // epochs
    return peak if place < 11 else 0.8 * peak * 0.5 ** ((place - 11) // 2)


def rising(value: float, epoch: int, epochs: int, share: float) -> float:
    """Rise linearly to ``value`` in the first ``share`` of the epochs, and keep it.

    Args:
        value: the value to rise to.
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        share: share of the epochs; 0 for none.
    """
    return value if share == 0 else value * min(1.0, (epoch + 1) / (share * epochs))

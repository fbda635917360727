"""How long a run is, and from which step on a delayed term of its loss acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DelayUnit = Literal["epochs", "steps", "images"]


class NeverActs(ValueError):
    """A term of the loss has a weight, and its delay lasts as long as the training."""


@dataclass(frozen=True)
class RunLength:
    """How long a run is.

    Args:
        epochs: of the whole run.
        steps_per_epoch: steps of an epoch.
        batch_size: images of a step, of all processes together; None if that is known only when they arrive.
        images_per_epoch: images of an epoch; None as above.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int | None = None
    images_per_epoch: int | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def last_batch(self) -> int | None:
        """Images of an epoch's last step; None if that is known only when they arrive."""
        if self.batch_size is None or self.images_per_epoch is None:
            return None
        return self.images_per_epoch - (self.steps_per_epoch - 1) * self.batch_size

    def images_before(self, step: int) -> int:
        """Images that the steps before one, counted from 0, have trained on; 0 if the size of a batch is not known."""
        if self.batch_size is None or self.images_per_epoch is None:
            return 0
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.images_per_epoch + steps * self.batch_size

    def first_step(self, delay: float, unit: DelayUnit) -> int:
        """The first step that has at least so much of the run behind it.

        Args:
            delay: how much.
            unit: of ``delay``.

        Raises:
            ValueError: ``unit`` is "images", and the size of a batch is not known.
        """
        if unit == "steps":
            return -int(-delay // 1)
        if unit == "epochs":
            return -int(-delay // 1) * self.steps_per_epoch
        if self.batch_size is None or self.images_per_epoch is None:
            raise ValueError(
                "a delay in images needs images in a tensor: how many a loader's batch holds is known only when it "
                "arrives; give the delay in steps"
            )
        epochs, images = divmod(-int(-delay // 1), self.images_per_epoch)
        return epochs * self.steps_per_epoch - (-images // self.batch_size)

    def check_acts(self, step: int, *, argument: str, value: str, weight: str) -> int:
        """Refuse a delay that lasts as long as the run.

        Args:
            step: the first step at which the term acts.
            argument: the setting that delays it.
            value: what the setting is, with its unit.
            weight: the setting that weights the term, with its value.

        Returns:
            ``step``.

        Raises:
            NeverActs: the run ends before that step.
        """
        if step < self.steps:
            return step
        images = "" if self.batch_size is None else f" of {self.batch_size} images"
        epochs = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        raise NeverActs(
            f"{argument} is {value}, and the training has {epochs} of {self.steps_per_epoch} steps{images}: "
            f"the term that {weight} weights would first act in step {step + 1}, and the training ends after "
            f"{self.steps}, so that it would never act. Train longer, give a smaller {argument}, or set "
            f"{weight.split()[0]} to 0 to train without the term"
        )

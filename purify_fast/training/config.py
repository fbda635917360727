"""The settings of the training loop and of a classifier's training."""

from __future__ import annotations

from dataclasses import dataclass

from .._compat import flat_arguments
from .attack import TrainingAttack


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train; every number is this package's own choice, a method's numbers stand in its config.

    Args:
        epochs: passes over the data.
        batch_size: images per step, of all processes together. An epoch's last, smaller batch is dropped.
        seed: of everything random.
        padding: pixels of black around an image before it is cropped at random; 0 for none.
        flip: whether half of the images, drawn at random, are mirrored from left to right.
        checkpoint_seconds: seconds between checkpoints within an epoch; one is always written at an epoch's end.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    epochs: int
    batch_size: int = 128
    seed: int = 0
    padding: int = 0
    flip: bool = False
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.padding < 0 or self.checkpoint_seconds < 0 or not 0 <= self.seed < 2**31:
            raise ValueError(f"padding and checkpoint_seconds must be >= 0 and 0 <= seed < 2^31, got {self}")


@flat_arguments(renamed={}, attack={"warm_up": "eps_warmup"})
@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained; every number is this package's own choice.

    Args:
        attack: PGD that makes the training examples; eps 0 trains on clean images.
        learning_rate: the highest rate of a one-cycle schedule.
        weight_decay: of AdamW.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=7, relative_alpha=2.0, eps_warmup=0.2)
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")

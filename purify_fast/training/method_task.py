"""Defines what the trainings of classifiers and of all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._settings import first_tensor
from .config import settings
from .schedules import one_cycle
from .task import Task


class MethodTask(Task):
    """A training with settings of precision and learning rates."""

    #: The method's name in checkpoints.
    name: ClassVar[str]
    #: The published schedules by name: functions of the epoch, the number of epochs and the highest learning rate.
    published: ClassVar[Mapping[str, Callable[[int, int, float], float]]] = {}
    #: The name of the initial weights. A run is resumed only with the same name.
    origin: str

    def __init__(self, config: Any, model: nn.Module):
        # Only a new task asks which precision a device has, and so needs what this module imports.
        from ..speed.precision import with_known_precision

        self.model = model
        self.config = with_known_precision(config, first_tensor(model).device)
        self.tf32 = config.precision == "tf32"
        self.dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **settings(self.config), "origin": self.origin}

    def adamw(self, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return AdamW with the learning rate and the weight decay of the settings."""
        decay = self.config.weight_decay
        return torch.optim.AdamW(weights, lr=self.config.learning_rate, weight_decay=decay, foreach=True)

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        peak, schedule = self.config.learning_rate, getattr(self.config, "schedule", "one_cycle")
        if schedule in self.published:
            return self.published[schedule](epoch, epochs, peak)
        return peak if schedule == "constant" else one_cycle(progress, peak)


def cross_entropy_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of predictions, and their accuracy, detached."""
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy

"""Defines what the trainings of classifiers and of all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._settings import first_tensor
from ..models.layers import AveragedModel
from .config import settings
from .schedules import one_cycle
from .task import Task


class MethodTask(Task):
    """A training with settings of precision, learning rates and, if asked for, a moving average of the weights."""

    #: The method's name in checkpoints.
    name: ClassVar[str]
    #: The published schedules by name: functions of the epoch, the number of epochs and the highest learning rate.
    published: ClassVar[Mapping[str, Callable[[int, int, float], float]]] = {}
    #: The name of the initial weights. A run is resumed only with the same name.
    origin: str
    average: AveragedModel | None = None
    averaged: nn.Module

    def __init__(self, config: Any, model: nn.Module):
        # Only a new task asks which precision a device has, and so needs what this module imports.
        from ..speed.precision import with_known_precision

        self.model = model
        self.config = with_known_precision(config, first_tensor(model).device)
        self.tf32 = config.precision == "tf32"
        self.dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    def keep_average(self, decay: float) -> None:
        """Update a moving average of the weights after every step; it is "average" in the checkpoints."""
        self.averaged = self.model
        if decay > 0:
            self.average = AveragedModel(self.averaged, decay)
            self.model = nn.ModuleDict({"model": self.averaged, "average": self.average})

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **settings(self.config), "origin": self.origin}

    @property
    def result(self) -> nn.Module:
        """The trained model; with a moving average, the model with the averaged weights."""
        return self.model if self.average is None else self.average.module

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.averaged)

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

"""Defines what the trainings of all methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from .._process import processes
from .._processor import with_known_precision
from .._tensors import first_tensor, weights_fingerprint
from ..defences.base import Defence
from ..models.moving_average import moving_average
from ..training.config import TrainingAttack, settings
from ..training.schedules import one_cycle
from ..training.task import Batch, Task, check_labels

D = TypeVar("D", bound=Defence)


class MethodTask(Task):
    """The base class of the methods' trainings, with precision, learning rates and a moving average of the weights.

    Args:
        config: settings, a dataclass with ``precision``, ``learning_rate`` and ``weight_decay``; ``schedule`` is
            optional.
        model: the trained model, on the device of the training.
    """

    #: The method's name in checkpoints.
    name: ClassVar[str]
    #: The published schedules by name: functions of the epoch, the number of epochs and the highest learning rate.
    published: ClassVar[Mapping[str, Callable[[int, int, float], float]]] = {}
    #: The name of the initial weights. A run is resumed only with the same name.
    origin: str
    average: AveragedModel | None = None
    averaged: nn.Module

    def __init__(self, config: Any, model: nn.Module):
        self.config = with_known_precision(config, first_tensor(model).device)
        self.tf32 = config.precision == "tf32"

    def keep_average(self, name: str, decay: float, warm_up: bool = False) -> None:
        """Make a moving average of the model's weights, update it after every step, and add it to the checkpoints.

        Args:
            name: name of the model in checkpoints. The average has the name "average" there.
            decay: as in `purify_fast.models.moving_average.moving_average`; 0 for no average.
            warm_up: as in `purify_fast.models.moving_average.moving_average`.
        """
        self.averaged = self.model
        if decay > 0:
            self.average = moving_average(self.averaged, decay, warm_up)
            self.model = nn.ModuleDict({name: self.averaged, "average": self.average})

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **settings(self.config), "origin": self.origin}

    @property
    def result(self) -> nn.Module:
        """The trained model; with a moving average, the model with the averaged weights."""
        return self.model if self.average is None else self.average.module

    def after_step(self) -> None:
        """Update the moving average of the weights."""
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


class PurifierTask(MethodTask, Generic[D]):
    """Trains the purifier of a defence. The classifier is frozen, unless a setting of the method makes it trainable.

    Args:
        defence: the defence to train.
        config: settings of the training. With the precision "bfloat16", the defence is accelerated.
        origin: name of the purifier's initial weights. A run is resumed only with the same name.
    """

    def __init__(self, defence: D, config: Any, origin: str):
        super().__init__(config, defence)
        config = self.config
        self.defence, self.origin = defence, origin
        self.model = defence
        # the fingerprint is taken before the training, because a method may train the classifier too
        self.classifier = weights_fingerprint(defence.classifier)
        # `accelerate` would discard compiled parts, so it is not called for a defence that has this precision already
        if (config.precision == "bfloat16") != defence.computes_in_bfloat16:
            defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        # an earlier task may have made the classifier trainable
        defence.classifier.requires_grad_(False)

    @property
    def result(self) -> D:
        return self.defence

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "defence": self.defence.arguments, "classifier": self.classifier}

    def attack_facts(self, attack: TrainingAttack) -> dict[str, Any]:
        """Return the facts, except the radius, that determine the images of an attack on the frozen classifier.

        Args:
            attack: the attack.

        Raises:
            ValueError: the radius rises from epoch to epoch.
        """
        if attack.eps_warmup:
            raise ValueError(
                f"bank needs one radius for all epochs, but eps_warmup {attack.eps_warmup:g} changes the radius in the "
                "first epochs: set eps_warmup to 0, or train without a bank"
            )
        facts = {"classifier": self.classifier, "precision": self.config.precision, "task": self.name}
        return facts | {name: value for name, value in asdict(attack).items() if name not in ("eps", "eps_warmup")}

    def finish(self) -> None:
        super().finish()
        self.defence.refresh()

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        if tuple(shape) != self.defence.image_shape:
            raise ValueError(f"x must have images {list(self.defence.image_shape)}, got {list(shape)}")
        check_labels(classes, self.defence.num_classes)


def cross_entropy_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of predictions, and their accuracy, detached."""
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy


def noise_of(defence: Defence, batch: Batch) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a defence draws each image's noise by its position in the batch of all processes."""
    rank, world = (0, 1) if batch.whole else processes()
    return defence.noise_ids(torch.arange(rank, world * len(batch.x), world, device=batch.x.device))

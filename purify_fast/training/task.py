"""The interface between a method and `purify_fast.training.fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._tensors import first_tensor
from ..models.representation import count_classes, evaluation_mode
from ..speed.graphs.step_graphs import StepGraphs
from .optimizers import Lookahead
from .schedules import DelayUnit, RunLength

if TYPE_CHECKING:
    from .bank import BankedStep, FrozenAttacks

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """The input of a step. With several processes, the images are this process's share of the batch.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1].
        y: labels, int64 ``[B]``.
        sample_ids: index of each image in the whole data set, int64 ``[B]``.
        seed: seed of this step's randomness, the same for all processes.
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        step: the step, from 0, of the whole run.
        images_before: images that the steps before have trained on, of all processes together.
        bank: bank of attacks on these images, for a task that has `Task.frozen_attacks`; None keeps nothing.
    """

    x: Tensor
    y: Tensor
    sample_ids: Tensor
    seed: int
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    images_before: int = 0
    bank: BankedStep | None = None

    def progress_in(self, unit: DelayUnit) -> int:
        """The part of the run that is behind this batch.

        Args:
            unit: unit of the returned number.
        """
        return {"epochs": self.epoch, "steps": self.step, "images": self.images_before}[unit]


@dataclass(frozen=True)
class Update:
    """The work of one optimizer in a step.

    Args:
        optimizer: its name among the task's optimizers.
        loss: the loss that it lowers.
        metrics: detached scalars to log.
    """

    optimizer: str
    loss: Tensor
    metrics: Metrics


class Task:
    """A training, step by step; a method subclasses it. `fit` does for each batch, and each update of it,

        zero_grad, backward of the loss, mean of the gradients over the processes,
        task.before_step(), optimizer.step(), task.after_step()

    and calls ``finish`` when the run is over. Most tasks give a model, an optimizer and the first three methods.

    Attributes:
        model: the trained model; its whole state is saved in checkpoints and restored.
        optimizer: its optimizer.
        tf32: whether a GPU may round the factors of float32 convolutions and matrix products to ten bits while `fit`
            trains; without it, float32 has the precision of IEEE.
        graphs: captures the steps of the training's attacks, for a task that hands it to them; `fit` gives one on a
            CUDA device.
        acts_from_step: the answer of `terms` for the run; `fit` sets it.
        bank: the facts of the adversarial bank that it is trained with; `fit` sets it. Empty without one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tf32: bool = False
    graphs: StepGraphs | None = None
    acts_from_step: Mapping[str, int] = MappingProxyType({})
    bank: Mapping[str, Any] = MappingProxyType({})

    @property
    def result(self) -> nn.Module:
        """The model that the training makes, and that is saved."""
        return self.model

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss to minimize, and detached scalars to log.

        The loss is the mean over the batch; a loss that is a sum is multiplied by the number of processes.

        Args:
            batch: the images to train on.
        """
        raise NotImplementedError

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """The learning rate of a step.

        Args:
            progress: share of the run's steps that have been taken, in [0, 1).
            epoch: the epoch, from 0.
            epochs: epochs of the whole run.
        """
        raise NotImplementedError

    def terms(self, length: RunLength) -> dict[str, int]:
        """The terms of the loss whose weight is above 0, and the step from which on each acts.

        `fit` asks before the first step, and writes the answer into the run's log; a method writes it into the saved
        model. A term is called as its metric.

        Args:
            length: length of the run.

        Raises:
            ValueError: a term is delayed for the whole run, or a batch of the run is too small for the method.
        """
        return {}

    def frozen_attacks(self) -> FrozenAttacks | None:
        """The training's attacks, if all of them attack a model that it never changes; None otherwise.

        They can be kept in a bank then.

        Raises:
            ValueError: such attacks, which differ from epoch to epoch.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """The settings that must be equal for a checkpoint to be resumed, as JSON values; ``task`` is the kind."""
        raise NotImplementedError

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Every optimizer by name, the one of the model first. Their states are saved in checkpoints and restored."""
        return {"model": self.optimizer}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The updates of one step, each made when the one before it has been applied.

        The loss and the metrics of the last one are logged.

        Args:
            batch: the images to train on.
        """
        loss, metrics = self.training_step(batch)
        yield Update("model", loss, metrics)

    def before_step(self) -> None:
        """Called when the gradients are known and the optimizer has not moved the weights yet."""

    def after_step(self) -> None:
        """Called when the optimizer has moved the weights."""

    def finish(self) -> None:
        """Put the training's result into the model. May be called in the middle of a run, to validate it."""
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, Lookahead):
                optimizer.load_slow()
        if self.acts_from_step:
            # saved with the model
            self.result.acts_from_step = dict(self.acts_from_step)  # type: ignore[assignment]
        if self.bank:
            self.result.bank = dict(self.bank)  # type: ignore[assignment]

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        """Refuse images or labels that the model does not take, before any step.

        Args:
            shape: shape of an image, (C, H, W).
            classes: the largest label plus one.

        Raises:
            ValueError: the message says what does not fit.
        """

    def validate(self, batch: Batch) -> Metrics:
        """``loss`` and metrics of held-out images, detached; the model is in evaluation mode, and finished.

        Args:
            batch: held-out images, as of the run's last epoch.
        """
        with torch.no_grad():
            loss, metrics = self.training_step(batch)
        return {"loss": loss.detach(), **metrics}


@torch.no_grad()
def check_classifier(model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Refuse images or labels that a classifier does not take, by a look at one black image.

    Args:
        model: images to logits.
        shape: shape of an image, (C, H, W).
        classes: the largest label plus one.

    Raises:
        ValueError: the message says what does not fit.
    """
    weight = first_tensor(model)
    image = torch.zeros((1, *shape), device=weight.device, dtype=weight.dtype)
    with evaluation_mode(model):
        try:
            known = count_classes(lambda: model(image), shape, 1)
        except ValueError as error:
            raise ValueError(f"x: {error}") from error
    check_labels(classes, known)


def check_labels(classes: int, known: int) -> None:
    """ValueError if ``classes``, the largest label plus one, exceeds the number of classes of the model."""
    if classes > known:
        raise ValueError(f"y: the largest label is {classes - 1}, but the model has {known} classes, 0 to {known - 1}")

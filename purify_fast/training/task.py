"""The interface between a method and `purify_fast.training.fit`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._settings import first_tensor
from .._tensors import check_one_device
from .._validation import DelayUnit, Precision
from ..attacks.attacked_model import not_logits
from ..models.layers import count_classes, evaluation_mode
from ..speed.layout import autocast_to
from .optimizers import Lookahead, set_modes

if TYPE_CHECKING:
    from ..speed.frozen_copy import AttackedCopy
    from ..speed.graphs.graphed_loop import StepGraphs


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


# Learning rates are functions of the progress, without a state to store. torch's schedulers could not repeat published
# runs to the bit: OneCycleLR reaches its peak and its end one step earlier, and LambdaLR rounds differently.
def one_cycle(progress: float, peak: float) -> float:
    """Return the learning rate of a one-cycle schedule (Smith, 2018), at a share ``progress`` of the run.

    It rises along a cosine from ``peak / 25`` to ``peak`` in the first fifth, and then falls to ``peak / 1000``.
    """
    if progress < 0.2:
        low, position = peak / 25, 1 - progress / 0.2
    else:
        low, position = peak / 1000, (progress - 0.2) / 0.8
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * position))


# -- the interface between a method and `purify_fast.training.fit` -----------------------------------------------------

logger = logging.getLogger("purify_fast")

Metrics = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Batch:
    """The input of a training step. With several processes, the images are this process's share of the batch.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1].
        y: labels, int64 ``[B]``.
        sample_ids: index of each image in the whole data set, int64 ``[B]``.
        seed: seed of this step's randomness, the same for all processes.
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
        step: the step, from 0, of the whole run.
        images_before: number of images that earlier steps trained on, over all processes.
        whole: whether every process has the whole batch, as in a validation.
        images: number of this process's images in the step, if x is a part of them (`FitConfig.accumulate`); 0 means
            those of x. A loss that is a sum is the mean over x times this number.
        first: place of the first image of x among these images.

    Raises:
        ValueError: if x, y and sample_ids are not on one device.
    """

    x: Tensor
    y: Tensor
    sample_ids: Tensor
    seed: int
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    images_before: int = 0
    whole: bool = False
    images: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check_one_device(x=self.x, y=self.y, sample_ids=self.sample_ids)
        # A normal assignment would raise an error, because the dataclass is frozen.
        object.__setattr__(self, "images", self.images or len(self.x))

    def progress_in(self, unit: DelayUnit) -> int:
        """Return how many epochs, steps or images of the run lie before this batch."""
        return {"epochs": self.epoch, "steps": self.step, "images": self.images_before}[unit]


@dataclass(frozen=True)
class Update:
    """One update of a step: an optimizer, and the loss that it lowers.

    Args:
        optimizer: name of the optimizer in `Task.optimizers`.
        loss: the loss that the optimizer lowers.
        metrics: detached scalars to log.
    """

    optimizer: str
    loss: Tensor
    metrics: Metrics


class Task:
    """The base class of trainings; each method has a subclass. For each update of each batch, `fit` runs

        zero_grad, backward of the loss, mean of the gradients over the processes,
        optimizer.step(), task.after_step()

    and it calls ``finish`` at the end of the run. Most tasks set ``model`` and ``optimizer``, and define
    ``training_step``, ``learning_rate`` and ``describe``.

    Attributes:
        model: the trained model. Checkpoints save and restore its whole state.
        optimizer: the optimizer of the model.
        tf32: whether a GPU may round the factors of float32 convolutions and matrix products to ten bits of mantissa
            while `fit` trains; if False, float32 has the precision of IEEE.
        frozen: parts of the model that remain in evaluation mode; `fit` sets them by `frozen_parts`.
        graphs: captures the steps of the training's attacks in CUDA graphs, if the task passes this object to its
            attacks; `fit` sets it on a CUDA device.
        attacked: chooses the copy that the training attacks, which a resumed run must choose too; None: it has none.
        compiles: whether the attacked copy and the functions of `compiled` are compiled; `fit` sets it.
        max_gradient: largest Euclidean norm of an update's gradient, to which `fit` scales larger ones; None: no bound.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tf32: bool = False
    graphs: StepGraphs | None = None
    frozen: Sequence[nn.Module] = ()
    attacked: AttackedCopy | None = None
    compiles: bool = False
    max_gradient: float | None = None

    def compiled(self, function: Function) -> Function:
        """Return a function in the form in which a step calls it: compiled, or itself in validations.

        The function must not draw random numbers, and its numbers that change from step to step must be tensors.
        """
        if not (self.compiles and torch.is_grad_enabled()):
            return function
        # A copy of the task has methods of its own, so the functions of methods are compiled.
        own, bound = getattr(function, "__func__", function), getattr(function, "__self__", None)
        programs = vars(self).setdefault("_compiled", {})
        if own not in programs:
            # Its import is slow.
            from ..speed.graphs.compiled_step import compiled

            programs[own] = compiled(own, dynamic=False)
        return cast(Function, programs[own] if bound is None else partial(programs[own], bound))

    @property
    def result(self) -> nn.Module:
        """The model that the training produces and saves."""
        return self.model

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss to minimize, and detached scalars to log.

        The loss must be a mean over the batch. Multiply a loss that is a sum by the number of processes, because `fit`
        averages the gradients over the processes.
        """
        raise NotImplementedError

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """Return the learning rate of a step. ``progress`` is the share of the run's steps before it, in [0, 1)."""
        raise NotImplementedError

    def terms(self, length: RunLength) -> dict[str, int]:
        """Return the terms of the loss that may be delayed, each with the first step in which its weight is above 0.

        `fit` calls this before the first step, and writes the result into the run's log. The saved model also contains
        the result. The name of a term is the name of its metric.

        Raises:
            ValueError: a term is delayed for the whole run, or a batch is too small for the method.
        """
        return {}

    def answer(self, images: Tensor) -> Any:
        """Return what the network computes for images ``[B, C, H, W]`` in [0, 1], a tensor.

        A checkpoint has the answer for two fixed images, unless this raises an error. If a resumed network gives
        another answer, `fit` logs a warning.
        """
        return self.result(images)

    def describe(self) -> dict[str, Any]:
        """Return the settings that a run must share with a checkpoint to resume from it, as JSON values.

        The key ``task`` names the kind of training.
        """
        raise NotImplementedError

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """All optimizers by name; the model's optimizer is the first. Checkpoints save and restore their states."""
        return {"model": self.optimizer}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yield the updates of one step. Each update is computed only when the previous update has been applied.

        The loss and the metrics of the last update are logged.
        """
        loss, metrics = self.training_step(batch)
        yield Update("model", loss, metrics)

    def begin(self) -> None:
        """Run by `fit` once before the first step, when a checkpoint has been loaded."""

    def train(self) -> None:
        """Put the model and its optimizers into training mode, except the parts that the user froze."""
        set_modes(self.optimizers.values(), training=True)
        self.model.train()
        for part in self.frozen:
            part.training = False

    def after_step(self) -> None:
        """Run by `fit` after the optimizer has changed the weights."""

    def finish(self) -> None:
        """Put the training's result into the model. Validations in the middle of a run call this too."""
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, Lookahead):
                optimizer.load_slow()
        set_modes(self.optimizers.values(), training=False)

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        """Refuse images or labels that the model does not accept by a ValueError, before any step.

        ``shape`` is the shape of an image, (C, H, W), and ``classes`` the largest label plus one.
        """

    def validate(self, batch: Batch) -> Metrics:
        """Return ``loss`` and metrics of held-out images, detached.

        `fit` calls this after `finish`, with the model in evaluation mode. The batch's epoch is the last of the run.
        """
        with torch.no_grad():
            loss, metrics = self.training_step(batch)
        return {"loss": loss.detach(), **metrics}


def frozen_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules in evaluation mode that belong to a part without a weight to train.

    Other modules may be in evaluation mode only because they were loaded, so a training changes their mode. So does a
    part without any weights, such as a dropout, unless the module around it is in training mode.
    """
    frozen = dict[nn.Module, None]()
    for owner in model.modules():
        for part in owner.children():
            weights = list(part.parameters())
            if not any(weight.requires_grad for weight in weights) and (weights or owner.training):
                frozen |= dict.fromkeys(inner for inner in part.modules() if not inner.training)
    return list(frozen)


@torch.no_grad()
@torch.inference_mode(False)
def check_classifier(
    model: nn.Module, shape: tuple[int, ...], classes: int, precision: Precision = "float32", trained: bool = True
) -> None:
    """Run a classifier on two black images, and refuse images or labels that it does not accept.

    A copy is run, because a call may leave traces, in evaluation mode and if ``trained`` in training mode. A model that
    cannot be copied is run itself, in evaluation mode.
    """
    # A step needs none of these.
    from ..attacks.attacked_model import WritesToItsInput
    from ..speed.copying import deep_copy
    from ..speed.draws import same_draws

    device, modes = first_tensor(model).device, (True, False) if trained else (False,)
    try:
        copied = deep_copy(model)
    except TypeError:
        copied, modes = model, (False,)
    autocast = autocast_to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with evaluation_mode(copied), same_draws(copied, device), autocast:
        for training in modes:
            copied.train(training)
            images = torch.zeros((2, *shape), device=device)
            try:
                count = count_classes(partial(copied, images), shape, 2)
            except ValueError as error:
                raise ValueError(f"the model in training mode: {error}" if training else str(error)) from error
            if images._version > 0:
                raise WritesToItsInput
        output = copied(images)
    check_labels(classes, count)
    if mistake := not_logits(output):
        logger.warning("the model %s. The loss of the training takes logits, so it will be wrong", mistake)


def check_labels(classes: int, count: int) -> None:
    """Raise ValueError if ``classes``, the largest label plus one, exceeds ``count``, the model's number of classes."""
    if classes > count:
        raise ValueError(f"y: the largest label is {classes - 1}, but the model has {count} classes, 0 to {count - 1}")


# -- what the trainings of classifiers and of all methods share --------------------------------------------------------


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


def settings(config: Any) -> dict[str, Any]:
    """Return a training's configuration as one flat dict, with the fields of its `TrainingAttack` in place of that.

    So no field of a configuration may have the name of a field of `TrainingAttack`. Checkpoints store this dict.
    """
    flat: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        flat |= settings(value) if field.name == "attack" else {field.name: value}
    return flat


def cross_entropy_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of predictions, and their accuracy, detached."""
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy

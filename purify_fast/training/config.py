"""The settings of a training: of the loop, of a classifier, and of the attack that makes adversarial examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from .._files import OnFull
from .._validation import (
    AtLeast0,
    Count,
    CudaGraphs,
    CudnnBenchmark,
    Norm,
    Positive,
    Precision,
    Range,
    Share,
    ShareBelow1,
    check_types,
    read_norm,
)
from .schedules import rising

if TYPE_CHECKING:
    from torch import Tensor

    from ..protocols import Classifier
    from ..speed.graphs.step_graphs import StepGraphs
    from .task import Batch

Radius = TypeVar("Radius", float, "Tensor")


@dataclass(frozen=True)
class TrainingAttack:
    """PGD as a training runs it.

    Args:
        eps: radius of the ball in image units; 0 trains on clean images, where a method allows that.
        steps: steps of PGD.
        norm: norm of the ball: "linf", "l2" or "l1"; "Linf", "L2" and "L1" mean the same.
        alpha: length of a step in image units when eps has its full size; None takes relative_alpha * eps / steps.
        relative_alpha: length of all steps together, as a multiple of eps, where alpha is None.
        random_start: whether PGD begins at a random point of the ball, in place of the image itself.
        start_std: standard deviation of a normal random start in image units, which is projected onto the ball; None
            for a start that is uniform in the ball.
        eps_warmup: share of the epochs in which eps rises linearly from 0; alpha rises with it. Adversarial training
            from fresh weights can collapse without it.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    eps: AtLeast0
    steps: Count
    norm: Norm = "linf"
    alpha: float | None = None
    relative_alpha: Positive = 2.5
    random_start: bool = True
    start_std: float | None = None
    eps_warmup: Share = 0.0

    def __post_init__(self) -> None:
        if (norm := read_norm(self.norm)) != self.norm:
            # the dataclass is frozen
            object.__setattr__(self, "norm", norm)
        check_types(self)
        if self.norm == "linf" and not self.eps <= 1:
            raise ValueError(f"eps is in image units, at most 1 for linf, got {self.eps}: is {self.eps:g}/255 meant?")
        if self.alpha is not None and (math.isnan(self.alpha) or (self.eps > 0 and not self.alpha > 0)):
            raise ValueError(f"alpha must be above 0, got {self.alpha}: the images would not move")
        if self.start_std is not None and not (self.random_start and self.start_std > 0):
            raise ValueError(f"start_std must be above 0 and needs random_start=True, got start_std={self.start_std}")

    def at_epoch(self, epoch: int, epochs: int) -> TrainingAttack:
        """The attack of one epoch: during the warm-up eps is smaller, and so is alpha if it is given.

        Args:
            epoch: the epoch, from 0.
            epochs: epochs of the whole run.

        Returns:
            The attack to run, which has no warm-up any more.
        """
        eps = rising(self.eps, epoch, epochs, self.eps_warmup)
        alpha = self.alpha if self.alpha is None or eps == self.eps else self.alpha * eps / self.eps
        return replace(self, eps=eps, alpha=alpha, eps_warmup=0.0)

    def run(
        self,
        model: Classifier,
        batch: Batch,
        *,
        graphs: StepGraphs | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """PGD on a model, as the training runs it in the batch's epoch.

        Args:
            model: the attacked model, images to logits.
            batch: the images, and the seed and sample ids of their random starts.
            graphs: captures the attack's step, if given.
            rows: indices of the images to attack, int64 ``[A]``; None for all.

        Returns:
            The adversarial images ``[A, C, H, W]``.
        """
        # PyTorch takes 1.8 seconds to import: the command line's --help reads this class without it
        from ..attacks import pgd

        now = self.at_epoch(batch.epoch, batch.epochs)
        x, y, ids = (part if rows is None else part[rows] for part in (batch.x, batch.y, batch.sample_ids))
        return pgd(
            model,
            x,
            y,
            eps=now.eps,
            alpha=now.step_size(now.eps),
            steps=now.steps,
            norm=now.norm,
            random_start=now.random_start,
            start_std=now.start_std,
            seed=batch.seed,
            sample_ids=ids,
            graphs=graphs,
        )

    def of_validations(self) -> TrainingAttack:
        """The attack on held-out images: this attack, or PGD-10 from a random start if this attack has fewer steps.

        A model that overfits to an attack of few steps withstands that attack alone.
        """
        return self if self.steps >= 10 or self.eps == 0 else TrainingAttack(eps=self.eps, steps=10, norm=self.norm)

    def step_size(self, eps: Radius) -> Radius | float:
        """The length of a step.

        Args:
            eps: the radius that the step is for, a number or one per image, ``[B]``. It differs from this attack's own
                where a batch is attacked with several radii.

        Returns:
            alpha as it is, whatever the radius; without one relative_alpha * eps / steps, as eps a number or ``[B]``.
        """
        return self.relative_alpha * eps / self.steps if self.alpha is None else self.alpha


def settings(config: Any) -> dict[str, Any]:
    """A training's configuration as one flat table, the fields of its `TrainingAttack` among the others.

    This is what a checkpoint keeps and what a refused resume names: no two of the fields have one name.
    """
    flat: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        flat |= settings(value) if isinstance(value, TrainingAttack) else {field.name: value}
    return flat


@dataclass(frozen=True)
class FitConfig:
    """The length and the settings of a training. Every number is this package's choice; a method has its own config.

    Args:
        epochs: passes over the data.
        batch_size: images per step, of all processes together.
        seed: seed of all random draws.
        padding: pixels of black around an image before it is cropped at random; 0 for none.
        flip: whether half of the images, drawn at random, are mirrored from left to right.
        drop_last: whether an epoch's last batch is left out if it is smaller than the others.
        steps_per_epoch: steps after which an epoch ends, although not all images have been trained on; the next epoch
            draws from all of them again. None: every epoch is a pass over the data.
        checkpoint_seconds: seconds between checkpoints within an epoch; one is always written at an epoch's end.
        validation_share: share of the images, drawn by the seed, that is not trained on but validated with; 0 for none.
        validation_every: epochs from one validation to the next; the last epoch's end has one in any case.
        keep_best: "off" leaves the weights of the run's end; "loss" and "accuracy" leave those of the validation with
            the lowest loss or the highest accuracy, under the training's own attack at its full eps. Classifiers whose
            training attack has fewer than 10 steps are validated by PGD-10.
        on_full: "stop" ends the run when its disk is full, with the last checkpoint kept; "wait" tries again every few
            seconds until there is room.
        on_nan: "stop" ends a run whose loss or weights are no longer finite, with the last checkpoint kept; "back_off"
            returns to that checkpoint and continues with half of the learning rate, at most 5 times.
        on_collapse: "back_off" returns to the last good checkpoint when the accuracy of a validation is below half of
            the best one so far, and goes on with half of the learning rate, at most 5 times; it needs held-out images.
            So it ends for single-step adversarial training that overfits to its own attack within an epoch, the
            catastrophic overfitting of Wong et al. (ICLR 2020). "off" goes on.
        cuda_graphs: on a CUDA device, "auto" captures a step of the training's attack once its launches have cost as
            much as a capture, and keeps the graph if a replay saves at least a tenth; "always" does so wherever it is
            possible, "off" never. A graph needs the memory of one attack step for itself. Choose "off" for a model that
            keeps settings in an object which is not a module, dataclass or namespace, and changes them there: a
            captured step does not see the change.
        cudnn_benchmark: "auto" lets cuDNN race its algorithms once for each shape, unless the process asks for
            deterministic algorithms; "on" does so always, "off" leaves cuDNN as it is. It acts on CUDA devices only.
        fused_optimizers: "auto" lets torch's optimizers step in one kernel on a CUDA device; "off" leaves them as they
            were made.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    epochs: Count
    batch_size: Count = 128
    seed: Annotated[int, Range(0, 2**31, below=True)] = 0
    padding: Annotated[int, Range(0)] = 0
    flip: bool = False
    drop_last: bool = True
    steps_per_epoch: Count | None = None
    checkpoint_seconds: AtLeast0 = 30.0
    validation_share: ShareBelow1 = 0.0
    validation_every: Count = 1
    keep_best: Literal["off", "loss", "accuracy"] = "off"
    on_full: OnFull = "stop"
    on_nan: Literal["stop", "back_off"] = "stop"
    on_collapse: Literal["off", "back_off"] = "off"
    cuda_graphs: CudaGraphs = "auto"
    cudnn_benchmark: CudnnBenchmark = "auto"
    fused_optimizers: Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class ClassifierConfig:
    """The settings of a classifier's training. Every number is this package's choice, if no source is named.

    Args:
        attack: PGD that makes the training examples; eps 0 trains on clean images.
        adversarial: how the training examples are made. "pgd" is the attack as it is. The others are cheaper, know
            linf alone, and take eps for the length of a step where the attack has no alpha. "n_fgsm": one step without
            projection from noise in twice the ball (de Jorge et al., NeurIPS 2022, Algorithm 1). "nuat": one step, and
            cross-entropy on clean images beside the nuclear norm of what the logits change (Sriramanan et al., NeurIPS
            2021); one process. "free": each batch is trained on as often as the attack has steps, and the gradient
            that moves the weights moves the images too (Shafahi et al., NeurIPS 2019, Algorithm 1, but every batch
            begins at a random point of the ball and not at the last batch's): an epoch counts as so many.
            Validations of the cheaper ones are by PGD-10, as are those of attacks with fewer steps.
        nuclear_weight: highest weight of the nuclear norm in "nuat". It rises from 0, epoch by epoch, over the first
            nine tenths of the epochs; the authors use 4.5 for a ResNet-18 on CIFAR-10 and batches of 64 (their
            CIFAR10/NuAT_cifar10.py, lines 37 and 274).
        learning_rate: the highest rate of a one-cycle schedule.
        weight_decay: weight decay of AdamW.
        precision: "float32", which on a GPU is that of IEEE too; "tf32", which there rounds what is multiplied to ten
            bits of mantissa, while `purify_fast.training.fit` trains; or "bfloat16" within matrix products. Weights
            and their updates stay in float32.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=7, relative_alpha=2.0, eps_warmup=0.2)
    adversarial: Literal["pgd", "n_fgsm", "nuat", "free"] = "pgd"
    nuclear_weight: AtLeast0 = 4.5
    learning_rate: Positive = 3e-3
    weight_decay: Annotated[float, Range(0, below=True)] = 5e-4
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if self.adversarial == "pgd":
            return
        if self.attack.norm != "linf" or self.attack.start_std is not None or not self.attack.random_start:
            raise ValueError(f"adversarial {self.adversarial!r} supports norm='linf' with a uniform random start only")
        if self.attack.eps == 0:
            raise ValueError(f"adversarial {self.adversarial!r} needs attack.eps above 0, got eps=0")
        if self.adversarial != "free" and self.attack.steps != 1:
            raise ValueError(f"adversarial {self.adversarial!r} takes one step, got steps={self.attack.steps}")

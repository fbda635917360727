"""The settings of the training loop and of a classifier's training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .._files import OnFull
from .._validation import CudaGraphs, CudnnBenchmark, Precision, check_types
from .attack import TrainingAttack

KeepBest = Literal["off", "loss", "accuracy"]
OnNan = Literal["stop", "back_off"]
FusedOptimizers = Literal["auto", "off"]


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train; every number is this package's own choice, a method's numbers stand in its config.

    Args:
        epochs: passes over the data.
        batch_size: images per step, of all processes together.
        seed: of everything random.
        padding: pixels of black around an image before it is cropped at random; 0 for none.
        flip: whether half of the images, drawn at random, are mirrored from left to right.
        drop_last: whether an epoch's last batch is left out where it is smaller than the others.
        steps_per_epoch: steps after which an epoch ends, although not all images have been trained on; the next epoch
            draws from all of them again. None: every epoch is a pass over the data.
        checkpoint_seconds: seconds between checkpoints within an epoch; one is always written at an epoch's end.
        validation_share: share of the images, drawn by the seed, that is not trained on but validated with; 0 for none.
        validation_every: epochs from one validation to the next; the last epoch's end has one in any case.
        keep_best: "off" leaves the weights of the run's end; "loss" and "accuracy" leave those of the validation with
            the lowest loss or the highest accuracy, under the training's own attack at its full eps.
        on_full: "stop" ends the run when its disk is full, with the last checkpoint kept; "wait" tries again every few
            seconds until there is room.
        on_nan: "stop" ends a run whose loss or weights are no longer finite, with the last checkpoint kept; "back_off"
            returns to that checkpoint and goes on with half of the learning rate, at most 5 times.
        cuda_graphs: "auto" captures a step of the training's attack once and replays it, on a CUDA device where
            launching takes longer than computing; "always" wherever that is possible, "off" never. A graph needs the
            memory of one attack step for itself. Choose "off" for a model that keeps settings in an object of a class
            of its own, no module, dataclass or namespace, and changes them there: a captured step does not see it.
        cudnn_benchmark: "auto" lets cuDNN race its algorithms once for each shape, unless the process asks for
            deterministic ones; "on" in any case, "off" leaves cuDNN as it is. A CUDA device only.
        fused_optimizers: "auto" lets torch's optimizers step in one kernel on a CUDA device; "off" leaves them as they
            were made.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    epochs: int
    batch_size: int = 128
    seed: int = 0
    padding: int = 0
    flip: bool = False
    drop_last: bool = True
    steps_per_epoch: int | None = None
    checkpoint_seconds: float = 30.0
    validation_share: float = 0.0
    validation_every: int = 1
    keep_best: KeepBest = "off"
    on_full: OnFull = "stop"
    on_nan: OnNan = "stop"
    cuda_graphs: CudaGraphs = "auto"
    cudnn_benchmark: CudnnBenchmark = "auto"
    fused_optimizers: FusedOptimizers = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "validation_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {self.steps_per_epoch}")
        for name in ("padding", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share must be in [0, 1), got {self.validation_share}")


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained; every number is this package's own choice.

    Args:
        attack: PGD that makes the training examples; eps 0 trains on clean images.
        learning_rate: the highest rate of a one-cycle schedule.
        weight_decay: of AdamW.
        precision: "float32", which on a GPU is that of IEEE too; "tf32", which there rounds what is multiplied to ten
            bits of mantissa, while `purify_fast.training.fit` trains; or "bfloat16" within matrix products. Weights
            and their updates stay in float32.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=7, relative_alpha=2.0, eps_warmup=0.2)
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")

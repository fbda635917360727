"""The description of ARREST, and the options of its training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import cos, radians
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..._validation import AtLeast0, Positive, Precision, Range, Share, ShareBelow1, check_types
from ...training import FitConfig
from ...training.config import TrainingAttack
from ..trainings import FollowsRecipe, Method, OnClassifier

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...data import DataSet
    from . import ArrestTask


@dataclass(frozen=True)
class ArrestConfig:
    """The settings of ARREST's finetuning of a classifier.

    "Paper" is the abstract of arXiv 2308.16454, or a text that quotes the paper. "Port" is a re-implementation by
    readers of the paper (sgmath12/FAT). "Own" is this package's choice. With ``distillation_weight=0, replay=False``,
    the training is plain adversarial finetuning, or PGD adversarial training of an untrained classifier.

    Args:
        attack: PGD on the cross-entropy (paper: linf, eps 8/255; paper and port: 10 steps of 2/255; own: the random
            start). If alpha is None, a step has the length 2.5 eps / steps, which is 2/255 for these numbers. In the
            port, eps has no warm-up.
        distillation_weight: lambda, weight of the distillation (port: 50). 0 means no distillation.
        distance: d, distance of two representations: "abs_cosine" (port; the paper calls it angular), "cosine",
            "angular" or "l2".
        pooled: whether maps and tokens are averaged over all positions before they are compared (port). The paper
            compares the maps before pooling (according to the port). It must be False if all layers return vectors.
        replay: whether to use noisy replay: an image gets noise in place of an attack if its drift is above tau. The
            drift is the distance between its representations in the classifier and in the teacher (the classifier
            before the training).
        angle: phi, threshold of the replay as an angle in degrees (port: 30). tau is then the distance of two vectors
            with this angle between them.
        tau: threshold of the replay as a distance, in place of ``angle``; required for the distance "l2". None means
            the distance that belongs to ``angle``.
        replay_share: share of the epochs, from the start of the run, in which examples are replayed (port: half).
        drift_mode: mode of the classifier when the drift is measured: "eval" (own), which does not change BatchNorm's
            statistics, or "train" (port).
        optimizer: "sgd" with momentum (port), or "adamw" (own).
        learning_rate: highest learning rate of the schedule (port: 0.025, for batches of 128 images; the command
            ``train arrest`` and recipes scale it in proportion to the batch).
        max_gradient: largest Euclidean norm of a step's gradient; a larger gradient is scaled down to it (own). None
            means 1 for "sgd" and a classifier without a normalization layer, and no bound for others.
        momentum: momentum of "sgd" (port: 0.9).
        weight_decay: weight decay of the optimizer (port: 5e-4).
        schedule: schedule of the learning rate: "published" (port; `arrest_published`), or "one_cycle" or "constant"
            (own).
        ema_decay: decay of a moving average of the weights, which is then the result (not part of ARREST). 0 means
            none.
        precision: "float32", with full IEEE precision on a GPU too; "tf32" (own), which on a GPU rounds the factors of
            products to ten bits of mantissa during the training; or "bfloat16" for matrix products (own).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=10)
    distillation_weight: AtLeast0 = 50.0
    distance: Literal["abs_cosine", "cosine", "angular", "l2"] = "abs_cosine"
    pooled: bool = False
    replay: bool = True
    angle: Annotated[float, Range(0, 90, unit=" degrees")] = 30.0
    tau: AtLeast0 | None = None
    replay_share: Share = 0.5
    drift_mode: Literal["eval", "train"] = "eval"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: AtLeast0 = 0.025
    max_gradient: Positive | None = None
    momentum: ShareBelow1 = 0.9
    weight_decay: AtLeast0 = 5e-4
    schedule: Literal["published", "one_cycle", "constant"] = "published"
    ema_decay: ShareBelow1 = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if self.replay and self.attack.norm != "linf":
            raise ValueError(f"replay draws noise in a ball of norm 'linf', got {self.attack.norm!r}")
        if self.replay and self.tau is None and self.distance == "l2":
            raise ValueError("tau must be given for distance='l2': angle sets tau only for other distances")
        if not self.attack.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.attack.eps}")

    @property
    def threshold(self) -> float:
        """The threshold tau: an image with a larger drift gets noise in place of an attack."""
        if self.tau is not None:
            return self.tau
        return self.angle / 180 if self.distance == "angular" else 1 - cos(radians(self.angle))

    def replays(self, epoch: int, epochs: int) -> bool:
        """Return True if an epoch, counted from 0, uses noisy replay."""
        # The product is rounded, because 0.07 * 100 is slightly above 7 in floating point.
        return self.replay and epoch < round(self.replay_share * epochs, 9)


# -- the description of ARREST, and the options of its training --------------------------------------------------------


@dataclass(frozen=True)
class TrainArrest(FollowsRecipe, OnClassifier):
    """Finetune a standard classifier adversarially by ARREST, so that its representation changes little.

    The result is a classifier, which `evaluate` can attack, and which `train carso` and `train atop` can use. An
    interrupted training continues if the same command is run again.

    Args:
        layers: Names of the layers whose outputs are the representation. Default: the last map before pooling.
    """

    called: ClassVar[str] = "train arrest"

    out: Path = Path("runs/arrest")
    classifier: str = "runs/standard"
    layers: tuple[str, ...] = ()
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    @classmethod
    def of_recipe(cls, name: str | None, official_code: bool, batch_size: int | None = None) -> Self:
        options = super().of_recipe(name, official_code, batch_size)
        if name is not None or batch_size is None:
            return options
        rate = options.method.learning_rate * batch_size / options.loop.batch_size
        return replace(options, method=replace(options.method, learning_rate=rate))

    def task(self, images: DataSet, classifier: Any) -> ArrestTask:
        from . import ArrestTask

        return ArrestTask(classifier, self.method, images.image_shape, self.layers or None)


METHOD = Method((TrainArrest,), recipes=True)

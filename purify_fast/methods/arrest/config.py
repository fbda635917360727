"""The settings of ARREST's finetuning, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians
from typing import Annotated, Literal

from ..._validation import AtLeast0, Count, Positive, Precision, Range, Share, ShareBelow1, check_types
from ...training.config import TrainingAttack


@dataclass(frozen=True)
class ArrestConfig:
    """The settings of ARREST's finetuning of a classifier.

    "Paper" is the abstract of arXiv 2308.16454 or text that quotes it, "port" a re-implementation by readers of the
    paper (sgmath12/FAT), "own" a choice of this package if neither names the setting. With ``distillation_weight=0,
    replay=False`` it is adversarial finetuning, and with a fresh classifier PGD adversarial training.

    Args:
        attack: PGD on the cross-entropy alone. Paper: eps 8/255, linf; paper and port: 10 steps of 2/255, which alpha
            None, 2.5 eps / steps, gives at these numbers and keeps in proportion at others. Its steps must together
            reach eps. Own: the random start. The port has no warm-up.
        distillation_weight: weight of the distillation, lambda (port: 50); 0 leaves it out.
        distance: d, the distance of two representations: "abs_cosine" (port; the paper calls it angular), "cosine",
            "angular" or "l2".
        pooled: whether maps are read after global average pooling (the port's deviation) and not before it (paper, says
            the port); not for vectors.
        replay: whether noisy replay is on.
        angle: the replay's threshold as an angle, phi, in degrees (port: 30); tau is the distance of two vectors at it.
        tau: the replay's threshold as the distance itself, for a distance that no angle decides, or to set it freely;
            None takes the angle's.
        replay_share: share of the epochs, from the first on, in which examples are replayed (port: half).
        drift_mode: mode of the classifier in the drift test: "eval" (own), which leaves BatchNorm's statistics alone,
            or "train" (port).
        optimizer: "sgd" with momentum (port), or "adamw" (own).
        learning_rate: the highest rate of the schedule (port: 0.025).
        momentum: momentum of sgd (port: 0.9).
        weight_decay: weight decay of either optimizer (port: 5e-4).
        schedule: schedule of the learning rate: "published" (port; `purify_fast.training.schedules.arrest_published`),
            "one_cycle" or "constant" (own).
        ema_decay: decay of a moving average of the weights, which is then the result; 0 for none (an extra, not part of
            ARREST).
        awp_gamma: gamma of adversarial weight perturbation, Wu et al., NeurIPS 2020; 0 for none (an extra, not part of
            ARREST).
        precision: "float32", which on a GPU is that of IEEE too; "tf32" (own), which there rounds what is
            multiplied to ten bits of mantissa, while `purify_fast.training.fit` trains; or
            "bfloat16" within matrix products (own).

    Raises:
        ValueError: a setting out of range; the message names it.
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
    momentum: ShareBelow1 = 0.9
    weight_decay: AtLeast0 = 5e-4
    schedule: Literal["published", "one_cycle", "constant"] = "published"
    ema_decay: ShareBelow1 = 0.0
    awp_gamma: AtLeast0 = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if self.replay and self.attack.norm != "linf":
            raise ValueError(f"replay needs norm 'linf', whose ball its noise fills, got {self.attack.norm!r}")
        if self.replay and self.tau is None and self.distance == "l2":
            raise ValueError("distance='l2' needs tau: no angle decides it")

        eps, steps = self.attack.eps, self.attack.steps
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        alpha = self.attack.step_size(eps)
        reach = steps * alpha
        if reach < eps * (1 - 1e-6):
            raise ValueError(
                f"{steps} steps of alpha {alpha:.4g} reach {reach:.4g} of eps {eps:.4g}: "
                f"give a larger alpha, or None for 2.5 eps / steps = {2.5 * eps / steps:.4g}"
            )

    @property
    def threshold(self) -> float:
        """The drift above which an example is replayed, tau."""
        if self.tau is not None:
            return self.tau
        return self.angle / 180 if self.distance == "angular" else 1 - cos(radians(self.angle))

    def replays(self, epoch: int, epochs: int) -> bool:
        """Tell whether examples may be replayed in ``epoch`` of 0 .. epochs - 1."""
        # round, because 0.07 * 100 is above 7
        return self.replay and epoch < round(self.replay_share * epochs, 9)


@dataclass(frozen=True)
class AblationConfig:
    """The rows of an ablation; every number is this package's own choice.

    Each lambda and each threshold of the replay makes a row alone, and so do all pairs of the two.

    Args:
        weights: lambdas of the distillation.
        angles: thresholds of the replay as angles, phi, in degrees.
        taus: thresholds of the replay as the distance itself.
        shares: shares of eps that further classifiers are trained at from scratch; with the standard one and the one at
            eps they make the reference curve.
        standard_epochs: epochs of the standard classifier.
        scratch_epochs: epochs of adversarial training from scratch.
        attack_steps: steps of PGD when attacking, with cross-entropy, then with DLR.
        images: the first so many held-out images are attacked.
        autoattack: the first so many of these are attacked by AutoAttack (standard) as well, where PGD failed; 0 for
            none. If it runs, SUM and the other trade-offs are the paper's, of clean accuracy and AutoAttack's on its
            images, else of PGD's.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    weights: tuple[Positive, ...] = (50.0,)
    angles: tuple[float, ...] = (30.0,)
    taus: tuple[float, ...] = ()
    shares: tuple[Annotated[float, Range(0, 1, above=True, below=True)], ...] = (0.5,)
    standard_epochs: Count = 100
    scratch_epochs: Count = 100
    attack_steps: Count = 50
    images: Count = 1000
    autoattack: Annotated[int, Range(0)] = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("weights", "angles", "taus", "shares"):
            values = getattr(self, name)
            # the rows are named with six digits
            if len({f"{value:g}" for value in values}) < len(values):
                raise ValueError(f"{name} must be different in six digits, got {values}")

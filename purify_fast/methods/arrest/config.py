"""The settings of ARREST's finetuning, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians
from typing import Literal

from ..._compat import flat_arguments
from ..._validation import check_literal
from ...training.attack import TrainingAttack

Distance = Literal["abs_cosine", "cosine", "angular", "l2"]
DriftMode = Literal["eval", "train"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["published", "one_cycle", "constant"]
Precision = Literal["float32", "bfloat16"]


@flat_arguments(
    renamed={"weight": "distillation_weight", "average": "ema_decay", "awp": "awp_gamma"},
    attack={"start": "random_start", "warm_up": "eps_warmup"},
)
@dataclass(frozen=True)
class ArrestConfig:
    """How ARREST finetunes a classifier.

    "Paper" is the abstract of arXiv 2308.16454 or text that quotes it, "port" a re-implementation by readers of the
    paper (sgmath12/FAT), "own" a choice of this package where neither tells. With ``distillation_weight=0,
    replay=False`` it is adversarial finetuning, and of a fresh classifier PGD adversarial training.

    Args:
        attack: PGD on the cross-entropy alone. Paper: eps 8/255, linf; paper and port: 10 steps of 2/255. Its steps
            must together reach eps. Own: the random start, and alpha None, which is 2.5 eps / steps. The port has no
            warm-up.
        distillation_weight: weight of the distillation, lambda (port: 50); 0 leaves it out.
        distance: d, of two representations: "abs_cosine" (port; what the paper calls angular), "cosine", "angular" or
            "l2".
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
        momentum: of sgd (port: 0.9).
        weight_decay: of either optimizer (port: 5e-4).
        schedule: of the learning rate: "published" (port; `purify_fast.training.schedules.arrest_published`),
            "one_cycle" or "constant" (own).
        ema_decay: decay of a moving average of the weights, which is then the result; 0 for none (an extra, not part of
            ARREST).
        awp_gamma: gamma of adversarial weight perturbation, Wu et al., NeurIPS 2020; 0 for none (an extra, not part of
            ARREST).
        precision: "float32", or "bfloat16" within matrix products (own).

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=10, alpha=2 / 255)
    distillation_weight: float = 50.0
    distance: Distance = "abs_cosine"
    pooled: bool = False
    replay: bool = True
    angle: float = 30.0
    tau: float | None = None
    replay_share: float = 0.5
    drift_mode: DriftMode = "eval"
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "published"
    ema_decay: float = 0.0
    awp_gamma: float = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_literal("distance", self.distance, Distance)
        check_literal("drift_mode", self.drift_mode, DriftMode)
        check_literal("optimizer", self.optimizer, Optimizer)
        check_literal("schedule", self.schedule, Schedule)
        check_literal("precision", self.precision, Precision)
        self._check_attack()
        for name in ("distillation_weight", "learning_rate", "weight_decay", "awp_gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.replay_share <= 1:
            raise ValueError(f"replay_share must be in [0, 1], got {self.replay_share}")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.angle <= 90:
            raise ValueError(f"angle must be in [0, 90] degrees, got {self.angle}")
        if self.tau is not None and not self.tau >= 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")
        if self.replay and self.attack.norm != "linf":
            raise ValueError(f"replay needs norm 'linf', whose ball its noise fills, got {self.attack.norm!r}")
        if self.replay and self.tau is None and self.distance == "l2":
            raise ValueError("tau must be given with distance 'l2': no angle decides it")

    def _check_attack(self) -> None:
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
        """Whether examples may be replayed in ``epoch`` of 0 .. epochs - 1."""
        # rounded: 0.07 * 100 is above 7
        return self.replay and epoch < round(self.replay_share * epochs, 9)

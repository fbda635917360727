"""The attack that adversarial training makes its examples with, described the same way for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .._validation import Norm, check_types
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
        norm: norm of the ball: "linf", "l2" or "l1".
        alpha: length of a step in image units when eps has its full size; None takes relative_alpha * eps / steps.
        relative_alpha: length of all steps together, as a multiple of eps, where alpha is None.
        random_start: whether PGD begins at a random point of the ball and not at the image itself.
        start_std: standard deviation of a normal random start in image units, which is projected onto the ball; None
            for a start that is uniform in the ball.
        eps_warmup: share of the epochs in which eps rises linearly from 0; alpha rises with it. Adversarial training
            from fresh weights can collapse without it.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    eps: float
    steps: int
    norm: Norm = "linf"
    alpha: float | None = None
    relative_alpha: float = 2.5
    random_start: bool = True
    start_std: float | None = None
    eps_warmup: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if not self.eps >= 0:
            raise ValueError(f"eps must be above 0, got {self.eps}; only 0 itself, for clean images, is as good")
        if self.norm == "linf" and not self.eps <= 1:
            raise ValueError(f"eps is in image units, at most 1 for linf, got {self.eps}: is {self.eps:g}/255 meant?")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.alpha is not None and (math.isnan(self.alpha) or (self.eps > 0 and not self.alpha > 0)):
            raise ValueError(f"alpha must be above 0, got {self.alpha}: the images would not move")
        if not self.relative_alpha > 0:
            raise ValueError(f"relative_alpha must be above 0, got {self.relative_alpha}: the images would not move")
        if self.start_std is not None and not (self.random_start and self.start_std > 0):
            raise ValueError(f"start_std must be above 0, and goes with random_start, got {self.start_std}")
        if not 0 <= self.eps_warmup <= 1:
            raise ValueError(f"eps_warmup must be in [0, 1], got {self.eps_warmup}")

    def at_epoch(self, epoch: int, epochs: int) -> TrainingAttack:
        """The attack of one epoch: eps, and a given alpha with it, may still be rising to their full sizes.

        Args:
            epoch: the epoch, from 0.
            epochs: epochs of the whole run.

        Returns:
            The attack to run, with no warm-up of its own left.
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
            model: what is attacked, images to logits.
            batch: the images, and the seed and sample ids of their random starts.
            graphs: captures the attack's step, if given.
            rows: of the images to attack, int64 ``[A]``; None for all.

        Returns:
            The adversarial images ``[A, C, H, W]``.
        """
        # PyTorch takes 1.8 seconds to import: the command line's --help reads this class without it
        from ..attacks import pgd

        now = self.at_epoch(batch.epoch, batch.epochs)
        x, y, ids = (part if rows is None else part[rows] for part in (batch.x, batch.y, batch.sample_ids))
        return pgd(
            model, x, y, eps=now.eps, alpha=now.step_size(now.eps), steps=now.steps, norm=now.norm,
            random_start=now.random_start, start_std=now.start_std, seed=batch.seed, sample_ids=ids, graphs=graphs,
        )  # fmt: skip

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

"""The settings that an attack gets from a judge, besides those that every attack has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..._validation import GradientPrecision, check_counts
from ...attacks.context import AttackContext
from ...protocols import Classifier


@dataclass(frozen=True, kw_only=True)
class JudgeContext(AttackContext):
    """The settings of an attack whose images are judged.

    Args:
        judge_draws: number of fresh predictions that check a success on a random model. None takes the number of
            predictions that a step averages.
        judge_share: the share of these fresh predictions that must be wrong for a success.
        gradients_from: another model from which attacks with `Attack.follows_gradients` take their gradients. The
            attacked model still checks every success. With None, the attacked model gives the gradients.
        batch_size: the largest number of images in one batch of a search; a search with another target or restart takes
            the place of an image. None stands for 64, or for the number of images if that is larger.
        copies: the `Copies` of an evaluation, which an attack with the precision "auto" attacks; None: the model.

    Raises:
        ValueError: a count that is not allowed.
    """

    seed: int = 0
    judge_draws: int | None = None
    judge_share: float = 1.0
    gradients_from: Classifier | None = None
    batch_size: int | None = None
    copies: Any = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(judge_draws=self.judge_draws, batch_size=self.batch_size)

    @classmethod
    def of(cls, context: AttackContext) -> JudgeContext:
        """Return the context itself, or a judge's context with the same settings."""
        if isinstance(context, cls):
            return context
        return cls(**{field.name: getattr(context, field.name) for field in fields(context)})

    def judges(self, draws: int) -> int:
        """Return how many fresh predictions judge an image, for an attack whose steps average ``draws`` draws."""
        return (self.judge_draws or draws) if self.draws_differ else 1

    def source(self, model: Classifier, x: Tensor, precision: GradientPrecision) -> Classifier:
        if self.copies is None or precision == "float32" or not len(x):
            return super().source(model, x, precision)
        return self.copies.copy_for(model, precision)

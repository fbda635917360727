"""Carlini & Wagner (S&P 2017), l2: a search for the smallest misclassified change. Adam minimizes

    |x' - x|^2 + c max(l_y - max_{j != y} l_j, 0),   x' = (tanh(w) + 1) / 2

for images from 0 to 1. Adam optimizes w, and begins at the image itself for every c. A bisection searches c for each
image. The result is the nearest misclassified point over all c and all steps. Two things are not in the paper. The
search of an image ends once a misclassified point lies in the ball. And at the end the nearest point is projected onto
the ball and tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .._tensors import per_image
from .._validation import Count
from .base import EngineAttack, as_function, times
from .context import AttackContext
from .engine.nearest import NEAREST_OR_IMAGE, NearestSearch
from .engine.row_batches import ActiveSet, has_fallen, waves
from .objective import Objective

#: The steps for each c. The authors' code takes up to 10,000 steps, and stops early when the loss no longer falls.
STEPS = 1000
#: The values of the authors' code. CONSTANTS: the number of values of c. FIRST: the first c. FACTOR: c grows by this
#: factor until a point is misclassified. RATE: Adam's learning rate. INSIDE: the first point's distance from the middle
#: of the pixels' range is multiplied by this factor, so that w is finite.
CONSTANTS, FIRST, FACTOR, RATE, INSIDE = 9, 1e-3, 10.0, 0.01, 0.999999
#: Adam's usual decay rates, and its usual epsilon.
BETAS, TINY = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(EngineAttack):
    """Carlini & Wagner's attack in the l2 norm, with confidence 0; the first run begins at the image itself.

    The attack supports only the norm "l2".

    Args:
        steps: steps of Adam for each c; None: 1000. The ``steps`` of an `EvaluateConfig` do not change this.
        constants: the number of values of c that are tried, one after the other.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "carlini_wagner"
    code_version: ClassVar[str] = "2"
    has_pace: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    usual_steps: ClassVar[int | None] = STEPS
    loss: ClassVar[str] = "margin"

    steps: Count | None = None
    constants: Count = CONSTANTS

    def name(self, context: AttackContext) -> str:
        return f"C&W {self.constants} x {self.decided(context).steps}" + times(self.restarts)

    def cost(self, context: AttackContext) -> int:
        steps, draws, *_ = self.decided(context)
        judges = context.judges(draws)
        return self.restarts * ((steps * self.constants + 2) * draws + 2 * judges) + judges

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        steps = self.decided(context).steps * self.constants
        for rows in waves(active, (None,), self.restarts, context, at_image=True):
            _CarliniWagnerSearch(objective, active, rows, steps).run(self.constants)


carlini_wagner = as_function("carlini_wagner", CarliniWagner, NEAREST_OR_IMAGE, precision="float32", norm="l2")


class _CarliniWagnerSearch(NearestSearch):
    """One run of the attack; the loss of the objective is the margin."""

    def run(self, constants: int) -> None:
        """Try ``constants`` values of c for each row, each with an equal share of the steps."""
        ball, wide = self.rows.ball, torch.promote_types(self.point.dtype, torch.float32)
        self.middle, self.half = (ball.clip_max + ball.clip_min) / 2, (ball.clip_max - ball.clip_min) / 2
        self.begin = torch.atanh((self.point.to(wide) - self.middle) / self.half * INSIDE)
        # For each row: the present c, the largest c without a misclassified point, and the smallest c with a
        # misclassified point.
        self.c = torch.full_like(self.distance, FIRST)
        self.low, self.high = torch.zeros_like(self.c), torch.full_like(self.c, torch.inf)
        each = self.steps // constants
        for constant in range(constants):
            self.w, self.mean, self.square = self.begin, torch.zeros_like(self.begin), torch.zeros_like(self.begin)
            self.crossed = torch.zeros_like(self.c, dtype=torch.bool)
            for i in range(each):
                self._step(i + 1)
                if self.ended(constant * each + i + 1):
                    return
            self.low = torch.where(self.crossed, self.low, self.c)
            self.high = torch.where(self.crossed, self.c, self.high)
            self.c = torch.where(self.high.isfinite(), (self.low + self.high) / 2, FACTOR * self.c)
        self.finish()

    def _step(self, step: int) -> None:
        """Take one step of Adam; ``step`` counts the steps for the present c from 1."""
        gradient = self.gradients.at(self.point)
        across = has_fallen(gradient.wrong)
        self.see_gradient(gradient.image, across)
        self.note(self.point, across)
        self.crossed = self.crossed | across
        # The term with c has a gradient only while the point is classified correctly.
        weight = torch.where(gradient.loss <= 0, self.c, 0.0) / self.objective.eot_iter
        moved = (self.point - self.rows.x).to(self.w.dtype) / (2 * self.half)
        slope = 2 * moved - per_image(weight, moved) * gradient.image.to(self.w.dtype) * 2 * self.half
        slope = slope * (1 - torch.tanh(self.w).square()) / 2
        # A non-finite value, such as the square of a very large number, would remain in Adam's means forever.
        slope = torch.where(slope.square().isfinite(), slope, 0.0)
        self.mean = torch.lerp(slope, self.mean, BETAS[0])
        self.square = torch.lerp(slope.square(), self.square, BETAS[1])
        mean, square = self.mean / (1 - BETAS[0] ** step), self.square / (1 - BETAS[1] ** step)
        self.w = self.w - RATE * mean / (square.sqrt() + TINY)
        self.point = (self.middle + self.half * torch.tanh(self.w)).to(self.point.dtype)

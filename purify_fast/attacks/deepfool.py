"""DeepFool (Moosavi-Dezfooli, Fawzi & Frossard, CVPR 2016): step by step across the nearest border.

A step goes to where the model's linear approximation says that the nearest of some other classes takes over. The moves
add up, and the image moved by a little more than their sum is tried. The search ends at the first point across the
border. Two things are not in the paper: a step is the shortest within the range of the pixels, and a point outside the
ball is cut off at the ball and tried as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import Count
from ..ops.hyperplane_projection import hyperplane_projection
from .base import USUAL_TARGETS, EngineAttack, as_function, targets_and_times
from .context import AttackContext
from .engine.nearest import NearestSearch, border, length_of
from .engine.row_batches import ActiveSet, has_fallen, likeliest_wrong, waves
from .objective import Objective

#: The values of the authors' code. STEPS: the most steps. OVERSHOOT: a point goes beyond the sum of the moves by this
#: share.
STEPS, OVERSHOOT = 50, 0.02


@dataclass(frozen=True, kw_only=True)
class DeepFool(EngineAttack):
    """DeepFool: from the image itself in the first run, from a random point in the ball in the others.

    Args:
        steps: the most steps of a run; None: 50, as in its authors' code, in an evaluation too.
        n_target_classes: the number of other classes whose border is searched, those of highest logit on the image; a
            step takes a gradient for each. None, or more than there are: all, as in the paper. Its authors' code has 9.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "deepfool"
    code_version: ClassVar[str] = "2"
    has_pace: ClassVar[bool] = False
    usual_steps: ClassVar[int | None] = STEPS
    loss: ClassVar[str] = "margin"

    steps: Count | None = None
    n_target_classes: Count | None = USUAL_TARGETS

    def name(self, context: AttackContext) -> str:
        return f"DeepFool {self.decided(context).steps}" + targets_and_times(self.n_target_classes, self.restarts)

    def cost(self, context: AttackContext) -> int:
        steps, draws, _, targets = self.decided(context)
        judges = context.judges(draws)
        # The last prediction is that of the clean image, which gives the likeliest classes.
        return self.restarts * ((steps * (targets or 1) + 2) * draws + 2 * judges) + judges + 1

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        classes = likeliest_wrong(active.logits, active.y, self.n_target_classes)
        # CUDA graphs are off, because a graph captures a step towards a single class, and a step here has several.
        objective = replace(objective, graphs=None)
        for rows in waves(active, (None,), self.restarts, context, at_image=True):
            steps = self.decided(context).steps
            search = _DeepFoolSearch(objective, active, rows, steps)
            search.run(torch.stack(classes, 1)[rows.owner])


deepfool = as_function(
    "deepfool",
    DeepFool,
    "Per image the point that made it fall; otherwise the point where the search ended, cut off at the ball. A radius "
    "that holds every image, such as 1 in linf, returns DeepFool's own points.",
    precision="float32",
)


class _DeepFoolSearch(NearestSearch):
    """One run; the objective is the margin."""

    def run(self, classes: Tensor) -> None:
        """Take all steps, or stop when no row is left; the borders are those to some classes, int64 ``[R, K]``."""
        self.classes = classes
        # If a run does not begin at the image, the way from the image to its beginning counts as the first move.
        self.moved = self.point - self.rows.x
        for i in range(self.steps):
            across, move = self._step()
            self.note(self.point, across)
            self.moved = self.moved + move
            point = torch.add(self.rows.x, self.moved, alpha=1 + OVERSHOOT)
            self.point = point.clamp(self.rows.ball.clip_min, self.rows.ball.clip_max)
            if self.ended(i + 1, ends_across=True):
                return
        # For rows that crossed no border, the last point is tried.
        self.nearest = torch.where(per_image(self.distance.isfinite(), self.point), self.nearest, self.point)
        self.finish()

    def _step(self) -> tuple[Tensor, Tensor]:
        """Tell which points are across the border, bool ``[R]``, and return the shortest move to any class's border."""
        towards = replace(self.objective, loss="margin_targeted")
        best, shortest = torch.zeros_like(self.point), torch.full_like(self.distance, torch.inf)
        for target in self.classes.unbind(1):
            gradient = towards.gradient(self.point, torch.stack([self.rows.labels, target], 1))
            self.see_gradient(gradient.image)
            normal, offset = border(self.point, self.averaged(gradient))
            move = hyperplane_projection(self.point, normal, offset, **self.rows.ball.bounds)
            # `part` is the share of the distance to the border that a move covers. It is below 1 if the range of the
            # pixels cuts the move off. Without a gradient it is not above 0, and the class is never the nearest.
            part = (normal * move).flatten(1).sum(1).abs() / gradient.loss.abs()
            length = length_of(self.rows, move).to(shortest.dtype) / part
            length = torch.where(part > 0, length, torch.inf)
            best = torch.where(per_image(length < shortest, move), move, best)
            shortest = torch.minimum(length, shortest)
        return has_fallen(gradient.wrong), best

"""DeepFool (Moosavi-Dezfooli, Fawzi & Frossard, CVPR 2016): it steps across the nearest decision boundary ("border").

Each step linearizes the model, and moves the point to the nearest border of some other classes. The next point is the
image plus a little more than the sum of all moves so far. The search ends at the first misclassified point. Two things
are not in the paper. Each step is the shortest step that keeps the pixels in their range. And a misclassified point
outside the ball is projected onto the ball and tried there.
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

#: The values of the authors' code. STEPS: the most steps. OVERSHOOT: the sum of the moves is lengthened by this share.
STEPS, OVERSHOOT = 50, 0.02


@dataclass(frozen=True, kw_only=True)
class DeepFool(EngineAttack):
    """DeepFool: the first run begins at the image itself, every other run at a random point in the ball.

    Args:
        steps: the most steps of a run; None: 50, as in its authors' code. The ``steps`` of an `EvaluateConfig` do not
            change this.
        n_target_classes: the number of wrong classes whose borders are searched: the classes of highest logit on the
            image. A step takes a gradient for each class. None: all classes, as in the paper; the authors' code has 9.

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
        # The last term is one prediction of the clean image, which gives the wrong classes of highest logit.
        return self.restarts * ((steps * (targets or 1) + 2) * draws + 2 * judges) + judges + 1

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        classes = likeliest_wrong(active.logits, active.y, self.n_target_classes)
        # No CUDA graphs are used: a graph would capture a step towards one class, but a step here has several classes.
        objective = replace(objective, graphs=None)
        for rows in waves(active, (None,), self.restarts, context, at_image=True):
            steps = self.decided(context).steps
            search = _DeepFoolSearch(objective, active, rows, steps)
            search.run(torch.stack(classes, 1)[rows.owner])


deepfool = as_function(
    "deepfool",
    DeepFool,
    "Per image the misclassified point in the ball that was found; otherwise the last point of the search, projected "
    "onto the ball. With a radius that holds every image, such as 1 in linf, these are DeepFool's own points.",
    precision="float32",
)


class _DeepFoolSearch(NearestSearch):
    """One run of DeepFool; the loss of the objective is the margin."""

    def run(self, classes: Tensor) -> None:
        """Take all steps, or stop when no row is left; ``classes``, int64 ``[R, K]``, are the wrong classes to try."""
        self.classes = classes
        # If a run does not begin at the image, the difference between its first point and the image is the first move.
        self.moved = self.point - self.rows.x
        for i in range(self.steps):
            across, move = self._step()
            self.note(self.point, across)
            self.moved = self.moved + move
            point = torch.add(self.rows.x, self.moved, alpha=1 + OVERSHOOT)
            self.point = point.clamp(self.rows.ball.clip_min, self.rows.ball.clip_max)
            if self.ended(i + 1, ends_across=True):
                return
        # If no point of a row was misclassified, its last point is tried.
        self.nearest = torch.where(per_image(self.distance.isfinite(), self.point), self.nearest, self.point)
        self.finish()

    def _step(self) -> tuple[Tensor, Tensor]:
        """Tell which points are misclassified, bool ``[R]``, and return the shortest move to the border of a class."""
        towards = replace(self.objective, loss="margin_targeted")
        best, shortest = torch.zeros_like(self.point), torch.full_like(self.distance, torch.inf)
        for target in self.classes.unbind(1):
            gradient = towards.gradient(self.point, torch.stack([self.rows.labels, target], 1))
            self.see_gradient(gradient.image)
            normal, offset = border(self.point, self.averaged(gradient))
            move = hyperplane_projection(self.point, normal, offset, **self.rows.ball.bounds)
            # `part` is the share of the distance to the border that a move covers. It is below 1 if the range of the
            # pixels shortens the move. It is 0 or NaN without a gradient, and this class is then not chosen.
            part = (normal * move).flatten(1).sum(1).abs() / gradient.loss.abs()
            length = length_of(self.rows, move).to(shortest.dtype) / part
            length = torch.where(part > 0, length, torch.inf)
            best = torch.where(per_image(length < shortest, move), move, best)
            shortest = torch.minimum(length, shortest)
        return has_fallen(gradient.wrong), best

"""FAB-T (Croce & Hein, "Fast Adaptive Boundary Attack", ICML 2020): the nearest point of another class, class by class.

A step goes to where the model's linear approximation says that the target class takes over, drawn back a little towards
the clean image; a point across the border is drawn back further. The attack has no radius: a point counts once it lies
in the ball, and its image then leaves. Two things are not in the paper: a point across the border is drawn back after
its gradient is taken and not before, which saves a forward pass per step; and at the end the nearest point across the
border is cut off at the ball and tried as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import GradientPrecision
from ..ops.hyperplane_projection import hyperplane_projection
from ..protocols import Classifier
from .ball import projected
from .base import AttackContext, Radius, TargetedAttack, run_alone
from .engine.rows import ActiveSet, Rows, RowSearch, has_fallen, likeliest_wrong, shrinks_after
from .objective import Gradient, Objective

#: The authors' own numbers: steps, the largest weight of the clean image, the overshoot, and how far a point across the
#: border is drawn back.
STEPS, LARGEST_PULL, OVERSHOOT, BACK = 100, 0.1, 1.05, 0.9
_ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


@dataclass(frozen=True, kw_only=True)
class FABT(TargetedAttack):
    """FAB-T: from the image itself in the first run for each target, from a point in the ball in the others.

    Args:
        steps: of a run; None: 100, its authors' own, whatever the report's steps.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "fab"
    usual_steps: ClassVar[int | None] = STEPS
    loss: ClassVar[str] = "margin_targeted"

    def name(self, context: AttackContext) -> str:
        return self.full_name(f"FAB-T {self.decided(context).steps}")

    def cost(self, context: AttackContext) -> int:
        # at the end the last point is looked at, and the nearest one is tried and judged
        steps, draws, _ = self.decided(context)
        runs, judges = self.restarts * (self.targets(context) or 1), context.judges(draws)
        return runs * ((steps + 2) * draws + judges) + judges + 1

    def revision(self) -> str:
        return "5"

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        active.judge_clean_images()
        goals = likeliest_wrong(active.judge.logits(active.x), active.y, self.n_target_classes)
        steps = self.decided(context).steps
        for rows in self.waves(active, goals, context, at_image=True):
            _FabSearch(objective, active, rows, steps, health=context.health, give_up=self.give_up).run()


def fab_t(
    model: Classifier, x: Tensor, y: Tensor, *, eps: Radius, precision: GradientPrecision = "float32", **options: Any
) -> Tensor:
    """FAB towards one class after the other; images leave it as soon as they have fallen.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``; a point further away is no success.
        precision: what gradients are computed in: "float32", "bfloat16" or "auto"; a success is always judged by the
            model itself.
        **options: of `FABT`, such as ``steps``, ``n_target_classes`` and ``restarts``, and of `AttackContext`, such
            as ``norm``, ``seed``, ``max_forward_batch`` and ``graphs``.

    Returns:
        Per image the point that made it fall; otherwise the nearest point across the border, cut off at the ball, or
        the image itself. Shape and dtype of x.

    Raises:
        TypeError: x or y is no tensor, or there is no such option.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name, count or range; or a model that writes to its input.
    """
    return run_alone(FABT, model, x, y, eps=eps, precision=precision, **options)


class _FabSearch(RowSearch):
    """One run, which offers the nearest points across the border."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.nearest = self.point
        #: How far the nearest points across the border are from the images, ``[R]``.
        self.distance = torch.full_like(self.rows.ball.eps, torch.inf)

    def run(self) -> None:
        """Take all steps, or as many as there are rows for."""
        for i in range(self.steps):
            gradient = self.gradients.at(self.point)
            self.see_gradient(gradient.image)
            if self.objective.eot_iter > 1:
                gradient = gradient._replace(image=gradient.image / self.objective.eot_iter)
            across, moved = has_fallen(gradient.wrong), self.point - self.rows.x
            self._note(moved, across)
            origin = torch.where(per_image(across, self.point), torch.add(self.rows.x, moved, alpha=BACK), self.point)
            self.point = _step(self.rows, origin, self.point, gradient)
            if shrinks_after(i + 1):
                self._shrink(i + 1)
                if len(self.point) == 0:
                    return
        across = has_fallen(self.objective.score(self.point, self.rows.labels)[0])
        self._note(self.point - self.rows.x, across)
        self._offer(self.rows, self.nearest)

    def _note(self, moved: Tensor, across: Tensor) -> None:
        """Keep the points, by how far they moved, that are the nearest across the border."""
        far = _length(self.rows, moved).to(self.distance.dtype)
        nearer = across & (far < self.distance)
        self.nearest = torch.where(per_image(nearer, self.point), self.point, self.nearest)
        self.distance = torch.where(nearer, far, self.distance)

    def _shrink(self, step: int) -> None:
        """Let the rows leave whose images have fallen, and those that are given up."""
        rows = self.rows
        inside = (self.distance <= rows.ball.eps).float()
        judged, fell = self.active.settle(rows.owner, self.nearest, inside, rows.run)
        # the search goes on for what the model refuses
        self.distance = torch.where((inside > 0) & (judged < inside), torch.inf, self.distance)
        lost = self.out_of_reach(step, self.distance - rows.ball.eps)
        if lost is not None:
            index = lost.nonzero()[:, 0]
            self._offer(rows.take(index), self.nearest[index])
            self.see_given_up(index)
        staying = self.active.staying(rows.owner, lost) if fell or lost is not None else None
        if staying is not None:
            self.take(staying)

    def _offer(self, rows: Rows, nearest: Tensor) -> None:
        """Try the nearest points cut off at the ball, and keep the best of them."""
        cut = projected(rows.x, nearest, rows.ball)
        score = self.objective.score(cut, rows.labels)
        share, _ = self.active.settle(rows.owner, cut, torch.ones_like(score[0]), rows.run)
        self.active.offer(rows.owner, cut, torch.stack([share, score[1]]))


def _length(rows: Rows, moved: Tensor) -> Tensor:
    """In the norm of the ball, ``[R]``."""
    return torch.linalg.vector_norm(moved.flatten(1), ord=_ORDERS[rows.ball.norm], dim=1)


def _step(rows: Rows, origin: Tensor, point: Tensor, at_point: Gradient) -> Tensor:
    """Towards the border of the linear approximation, from the origin and, with a small weight, from the clean image.

    The gradient, of the target's logit minus the label's, was taken at ``point``; the step begins at ``origin``.
    """
    bounds = rows.ball.bounds
    gradient = at_point.image.to(point.dtype)
    # the border is where the product of the gradient and an image is this
    offset = (gradient * point).flatten(1).sum(1) - at_point.loss
    ahead, back = (hyperplane_projection(start, gradient, offset, **bounds) for start in (origin, rows.x))
    length, other = (_length(rows, move).clamp_min(1e-8) for move in (ahead, back))
    pull = per_image((length / (length + other)).clamp_max(LARGEST_PULL), point)
    from_origin, from_clean = torch.add(origin, ahead, alpha=OVERSHOOT), torch.add(rows.x, back, alpha=OVERSHOOT)
    return torch.lerp(from_origin, from_clean, pull).clamp(rows.ball.clip_min, rows.ball.clip_max)

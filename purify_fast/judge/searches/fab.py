"""FAB-T (Croce & Hein, "Fast Adaptive Boundary Attack", ICML 2020) searches for the nearest point of a target class.

Two things are not in the paper. A point across the decision boundary ("border") is moved back towards the image after
its gradient is taken, which saves a forward pass. At the end, the nearest such point is projected onto the ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._tensors import per_image
from ..._validation import Count
from ...attacks.base import AttackContext, Ball, keeping, projected
from ...attacks.objective import FAULTS, Gradient, Objective, ObjectiveStep, faults
from ...ops.hyperplane_projection import hyperplane_projection
from ...speed.graphs.step_loop import State, Steps
from . import engine
from .engine import USUAL_TARGETS, ActiveSet, EngineAttack, JudgeContext, Rows, RowSearch

#: The authors' values. STEPS: the steps of a run. LARGEST_PULL: the largest weight of the step that begins at the clean
#: image. OVERSHOOT: a step is the distance to the border times this factor. BACK: a point across the border is moved
#: back to this share of its distance from the image.
STEPS, LARGEST_PULL, OVERSHOOT, BACK = 100, 0.1, 1.05, 0.9
#: The order of each norm for `torch.linalg.vector_norm`.
_ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


@dataclass(frozen=True, kw_only=True)
class FABT(EngineAttack):
    """FAB-T: the first run for each target begins at the image itself, every other run at a random point in the ball.

    Only a misclassified point inside the ball is a success.

    Args:
        steps: steps of a run. None stands for 100, as in the authors' code, even if an evaluation sets ``steps``.
        n_target_classes: number of target classes, each with a run of its own: the classes with the nearest decision
            boundaries, by the model's linear approximation at the image. None takes all wrong classes.
    """

    kind: ClassVar[str] = "fab"
    code_version: ClassVar[str] = "7"
    usual_steps: ClassVar[int | None] = STEPS
    loss: ClassVar[str] = "margin_targeted"

    steps: Count | None = None
    n_target_classes: Count | None = USUAL_TARGETS

    def name(self, context: AttackContext) -> str:
        return f"FAB-T {self.resolved_for(context).steps}" + engine.targets_and_times(self)

    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        goals = engine.nearest_borders(active, objective, self.n_target_classes)
        steps = self.resolved_for(context).steps
        for rows in engine.waves(active, goals, self.restarts, context, at_image=True):
            search = _FabSearch(objective, active, rows, steps, give_up=self.give_up)
            with keeping(search.keep):
                search.run()


@dataclass(frozen=True)
class FabStep(ObjectiveStep):
    """A step of FAB that a CUDA graph can capture. It does not use the ball's radius."""

    ball: Ball
    counts: bool

    def __call__(self, state: State) -> State:
        """Move every point. With `counts`, count the faulty gradients."""
        point, x, draws, counts = state["point"], state["x"], self.objective.eot_iter, State()
        gradient = self.objective.gradient(point, state["y"])
        if self.counts:
            faulty = faults(gradient.image)[:2].sum(1)
            counts = {name: state[name] + count for name, count in zip(FAULTS[:2], faulty, strict=True)}
        if draws > 1:
            gradient = gradient._replace(image=gradient.image / draws)
        across, moved = engine.has_fallen(gradient.wrong), point - x
        near = nearer(self.ball, state, across)
        origin = torch.where(per_image(across, point), torch.add(x, moved, alpha=BACK), point)
        return {"point": _step(self.ball, x, origin, point, gradient), **near, **counts}


def nearer(ball: Ball, state: State, across: Tensor) -> State:
    """The nearest points and their distances, after the points ``across`` the border, bool ``[R]``, are compared."""
    point, nearest, distance = state["point"], state["nearest"], state["distance"]
    far = _length(ball, point - state["x"]).to(distance.dtype)
    closer = across & (far < distance)
    nearest = torch.where(per_image(closer, point), point, nearest)
    return {"nearest": nearest, "distance": torch.where(closer, far, distance)}


class _FabSearch(RowSearch):
    """The search of FAB from one start. ``nearest`` is the nearest point across the border, or the first point."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        begin, eps = self.rows.begin, self.rows.ball.eps
        state = {"x": self.rows.x, "y": self.rows.labels, "point": begin, "nearest": begin}
        state["distance"] = torch.full_like(eps, torch.inf)
        if self.health is not None:
            state |= {name: eps.new_zeros((), dtype=torch.int64) for name in FAULTS}
        self.begin(FabStep(self.objective, self.rows.ball, self.health is not None), state)

    def finish(self) -> None:
        # Only a copy of the state remains, because the steps have ended.
        self.loop = Steps(self.step, self.loop.values())
        across = engine.has_fallen(self.objective.score(self.loop.state["point"], self.rows.labels)[0])
        self.loop.put(**nearer(self.rows.ball, self.loop.state, across))
        self.active.tried.index_fill_(0, self.rows.owner, True)
        self._try(self.rows, self.loop.state["nearest"])

    def keep(self) -> Tensor:
        """Remember the best points so far without a judgement, and return the best point of each image."""
        distance, ball = self.loop.state["distance"], self.rows.ball
        points = projected(self.rows.x, self.loop.state["nearest"], ball)
        score = torch.stack([(distance <= ball.eps).float(), -distance])
        return self.active.keep_best(self.rows.owner, points, score)

    def ends_after(self, step: int) -> bool:
        """Remove the rows of fallen images, and the rows that are given up."""
        if not self.shrinks_after(step):
            return False
        rows, state = self.rows, self.loop.state
        inside = (state["distance"] <= rows.ball.eps).float()
        judged, fell = self.active.confirm_successes(rows.owner, state["nearest"], inside)
        # A point that the model itself does not confirm is forgotten, and the search continues.
        distance = torch.where((inside > 0) & (judged < inside), torch.inf, state["distance"])
        self.loop.put(distance=distance)
        lost = self.out_of_reach(step, distance - rows.ball.eps)
        if lost is not None:
            index = lost.nonzero()[:, 0]
            self._try(rows.take(index), state["nearest"][index])
        kept = self.active.rows_to_keep(rows.owner, lost) if fell or lost is not None else None
        if kept is not None:
            self.take(kept)
        return False

    def _try(self, rows: Rows, nearest: Tensor) -> None:
        """Project the nearest points onto the ball, let the model judge them, and keep the best points."""
        cut = projected(rows.x, nearest, rows.ball)
        self.active.judge_points(rows.owner, cut, self.objective.score(cut, rows.labels)[1])


def _length(ball: Ball, moved: Tensor) -> Tensor:
    """The length of each row's move in the norm of the ball, ``[R]``."""
    return torch.linalg.vector_norm(moved.flatten(1), ord=_ORDERS[ball.norm], dim=1)


def _step(ball: Ball, x: Tensor, origin: Tensor, point: Tensor, at_point: Gradient) -> Tensor:
    """Mix two steps to the linearized border: from ``origin``, and a little from the clean image."""
    bounds = ball.bounds
    # The border of the linearized model is the hyperplane with this normal and this offset.
    gradient = at_point.image.to(point.dtype)
    offset = (gradient * point).flatten(1).sum(1) - at_point.loss
    ahead, back = (hyperplane_projection(start, gradient, offset, **bounds) for start in (origin, x))
    length, other = (_length(ball, move).clamp_min(1e-8) for move in (ahead, back))
    pull = per_image((length / (length + other)).clamp_max(LARGEST_PULL), point)
    from_origin, from_clean = torch.add(origin, ahead, alpha=OVERSHOOT), torch.add(x, back, alpha=OVERSHOOT)
    return torch.lerp(from_origin, from_clean, pull).clamp(ball.clip_min, ball.clip_max)

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
from .._validation import check_literal
from ..ops.hyperplane_projection import hyperplane_projection
from ..ops.pgd_step import pgd_step
from ..protocols import Classifier
from ..speed.step_graphs import StepGraphs
from .arguments import Fallen, NormName, Precision, check_at_least_one, check_images, check_switch
from .ball import Ball, ball_around
from .base import AttackContext, TargetedAttack
from .draws import Gradient, Gradients, Objective, drawn_once_per_call
from .engine.active_set import ActiveSet
from .engine.auto_pgd import shrinks_after
from .engine.gradient_copy import COMPARED, GradientCopies, gradient_copy
from .engine.judge import Judge, has_fallen
from .engine.reach import reach_of_steps, some_of
from .engine.waves import Rows, Waves, add_counts, likeliest_wrong
from .frozen_model import frozen
from .health import GradientHealth, HealthOfRows

#: The authors' own numbers: steps, the largest weight of the clean image, the overshoot, and how far a point across the
#: border is drawn back.
STEPS, LARGEST_PULL, OVERSHOOT, BACK = 100, 0.1, 1.05, 0.9
_ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


def fab_t(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = STEPS,
    norm: NormName = "linf",
    n_target_classes: int | None = 9,
    eot_iter: int = 1,
    restarts: int = 1,
    give_up: bool = False,
    fallen: Fallen = "all",
    judge_draws: int | None = None,
    precision: Precision = "float32",
    copies: GradientCopies | None = None,
    most_rows: int | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    health: GradientHealth | None = None,
    graphs: StepGraphs | None = None,
    found: dict[str, int] | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """FAB towards one class after the other; images leave it as soon as they have fallen.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``; a point further away is no success.
        steps: of a run.
        norm: "linf", "l2" or "l1".
        n_target_classes: wrong classes that are tried, those of highest logit on x; None, or more than there are: all.
        eot_iter: draws of a random model averaged per step.
        restarts: runs for each target; the first begins at the image, the others in the ball around it.
        give_up: whether a search ends whose nearest point across the border would not come into the ball even at eight
            times its recent pace; decided after 40, 60 and 80 % of the steps, in runs of 50 steps or more.
        fallen: of a random model, by which share of fresh draws an image falls: "any", "majority" or "all".
        judge_draws: fresh draws for that; None: as many as ``eot_iter``.
        precision: what gradients are computed in: "float32", "bfloat16" or "auto"; a success is always judged by the
            model itself.
        copies: keeps a copy in bfloat16 for the next attack, if given.
        most_rows: searches at once, where several targets of an image are tried together; None: 64, or as many as there
            are images, if those are more.
        seed: of the random starts.
        sample_ids: int64 ``[B]``; an image's random start depends on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; exact. None: no limit.
        health: counts gradients, if given.
        graphs: on a CUDA device, captures what a step asks of the model, as of `apgd`; one graph for each batch size.
        found: to the name of each target and restart is added how many images fell to it, if given.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        Per image the point that made it fall; otherwise the nearest point across the border, cut off at the ball, or
        the image itself. Shape and dtype of x.

    Raises:
        TypeError: x or y is no tensor.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name, count or range; or a model that writes to its input.
    """
    check_images(x, y, clip_min, clip_max)
    ball = ball_around(x, eps, norm, clip_min, clip_max)
    check_literal("fallen", fallen, Fallen)
    check_literal("precision", precision, Precision)
    check_switch("give_up", give_up)
    check_at_least_one(
        steps=steps, n_target_classes=n_target_classes, eot_iter=eot_iter, restarts=restarts, judge_draws=judge_draws,
        most_rows=most_rows, max_forward_batch=max_forward_batch,
    )  # fmt: skip
    if len(x) == 0:
        return x.clone()
    x = x.detach().clone()
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    judges = judge_draws or eot_iter
    with frozen(model):
        apart = drawn_once_per_call(model, x, max(judges, eot_iter), max_forward_batch)
        judge = Judge(model, fallen, judges, max_forward_batch, apart)
        active = ActiveSet(x, y, judge)
        goals = likeliest_wrong(judge.logits(x), y, n_target_classes)
        source = gradient_copy(model, x[:COMPARED], precision, copies)
        objective = Objective(source, "margin_targeted", eot_iter, max_forward_batch, graphs, apart=apart)
        waves = Waves(x, y, ball, goals, restarts, seed=seed, ids=ids, most=most_rows, at_image=True)
        with frozen(source):
            for rows in waves.over(active):
                _run(objective, active, rows, steps, health=health, give_up=give_up)
    if found is not None:
        add_counts(found, waves.counted(active))
    return active.found


def _run(
    objective: Objective,
    active: ActiveSet,
    rows: Rows,
    steps: int,
    *,
    health: GradientHealth | None,
    give_up: bool,
) -> None:
    """One run: what falls is noted in ``active``, and the nearest points of the others are offered to it."""
    point = nearest = rows.begin
    nearest_at = torch.full_like(rows.ball.eps, torch.inf)
    # the batch may shrink after any of the first steps
    gradients = Gradients(objective, point, rows.labels)
    reach = reach_of_steps(steps) if give_up else None
    seen = None if health is None else HealthOfRows(health, point)
    for i in range(steps):
        found = gradients.at(point)
        if seen is not None:
            seen.see_gradient(found.image)
        if objective.eot_iter > 1:
            found = found._replace(image=found.image / objective.eot_iter)
        across, moved = has_fallen(found.wrong, active.judge.rule), point - rows.x
        nearest, nearest_at = _nearer(rows, (point, moved), across, (nearest, nearest_at))
        origin = torch.where(per_image(across, point), torch.add(rows.x, moved, alpha=BACK), point)
        point = _step(rows, origin, point, found)
        if shrinks_after(i + 1):
            inside = (nearest_at <= rows.ball.eps).float()
            judged, fell = active.settle(rows.owner, nearest, inside, rows.run)
            # what the model refuses is as if it had not been found
            nearest_at = torch.where((inside > 0) & (judged < inside), torch.inf, nearest_at)
            lost = None if reach is None else reach.lost(i + 1, nearest_at - rows.ball.eps)
            lost = None if lost is None else some_of(lost & ~active.fallen[rows.owner])
            if lost is not None:
                out = lost.nonzero()[:, 0]
                _offer(objective, active, rows.of(out), nearest[out])
                if seen is not None:
                    seen.give_up(out, steps)
            kept = active.kept(rows.owner, lost) if fell or lost is not None else None
            if kept is not None:
                if reach is not None:
                    reach.take(kept)
                if seen is not None:
                    seen.take(kept)
                rows, point, nearest, nearest_at = rows.of(kept), point[kept], nearest[kept], nearest_at[kept]
                if len(point) == 0:
                    return
                gradients.now_of(point, rows.labels)
    across = has_fallen(objective.score(point, rows.labels)[0], active.judge.rule)
    _offer(objective, active, rows, _nearer(rows, (point, point - rows.x), across, (nearest, nearest_at))[0])


def _nearer(
    rows: Rows, new: tuple[Tensor, Tensor], across: Tensor, known: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The nearest points across the border and their distances, with new points, and their moves, among them."""
    (point, moved), (nearest, nearest_at) = new, known
    far = _length(rows, moved).to(nearest_at.dtype)
    nearer = across & (far < nearest_at)
    return torch.where(per_image(nearer, point), point, nearest), torch.where(nearer, far, nearest_at)


def _length(rows: Rows, moved: Tensor) -> Tensor:
    """In the norm of the ball, ``[R]``."""
    return torch.linalg.vector_norm(moved.flatten(1), ord=_ORDERS[rows.ball.norm], dim=1)


def _step(rows: Rows, origin: Tensor, point: Tensor, found: Gradient) -> Tensor:
    """Towards the border of the linear approximation, from the origin and, with a small weight, from the clean image.

    Args:
        rows: the rows.
        origin: where the step begins, ``[R, ...]``.
        point: where the gradient was taken, ``[R, ...]``.
        found: the gradient there of the target's logit minus the label's, and their difference.
    """
    bounds = rows.ball.bounds
    gradient = found.image.to(point.dtype)
    # the border is where the product of the gradient and an image is this
    offset = (gradient * point).flatten(1).sum(1) - found.loss
    ahead, back = (hyperplane_projection(start, gradient, offset, **bounds) for start in (origin, rows.x))
    length, other = (_length(rows, move).clamp_min(1e-8) for move in (ahead, back))
    pull = per_image((length / (length + other)).clamp_max(LARGEST_PULL), point)
    from_origin, from_clean = torch.add(origin, ahead, alpha=OVERSHOOT), torch.add(rows.x, back, alpha=OVERSHOOT)
    return torch.lerp(from_origin, from_clean, pull).clamp(rows.ball.clip_min, rows.ball.clip_max)


def _offer(objective: Objective, active: ActiveSet, rows: Rows, nearest: Tensor) -> None:
    """Try the nearest points cut off at the ball, and keep the best of them."""
    ball: Ball = rows.ball
    cut = pgd_step(nearest, torch.zeros_like(nearest), rows.x, 0.0, ball.eps, **ball.bounds)
    score = objective.score(cut, rows.labels)
    share, _ = active.settle(rows.owner, cut, torch.ones_like(score[0]), rows.run)
    active.offer(rows.owner, cut, torch.stack([share, score[1]]))


@dataclass(frozen=True, kw_only=True)
class FABT(TargetedAttack):
    """FAB-T, as a row of an evaluation.

    Args:
        steps: of a run; None: 100, its authors' own, whatever the report's steps.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "fab"

    def name(self, context: AttackContext) -> str:
        return self.with_restarts(self.with_targets(f"FAB-T {self.steps or STEPS}"))

    def cost(self, context: AttackContext) -> int:
        # at the end the last point is looked at, and the nearest one is tried and judged
        draws, runs = self.draws(context), self.restarts * self.targets(context.num_classes)
        return runs * (((self.steps or STEPS) + 2) * draws + context.judges) + context.judges + 1

    def settings(self, context: AttackContext) -> dict[str, Any]:
        own = {"steps": self.steps or STEPS, "n_target_classes": self.targets(context.num_classes)}
        return super().settings(context) | own

    def revision(self) -> str:
        return "5"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        options = self.options(context) | {"graphs": context.graphs}
        return fab_t(target, x, y, steps=self.steps or STEPS, **options)

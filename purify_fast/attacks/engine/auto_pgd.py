"""One run of Auto-PGD over a batch of rows, which leave it as soon as their images have fallen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.pgd_step import pgd_step
from ..draws import Gradients, Objective
from ..health import GradientHealth, HealthOfRows
from ..search import better_of, forgiven
from .active_set import ActiveSet
from .reach import border, reach_of_steps, some_of
from .step_size import SPARSER, Schedule, StepSize, StepSizeL1, changed_share
from .waves import Rows

#: After which of the first steps the batch may shrink; later every `SHRINK_EVERY` steps. Each of these waits for the
#: device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5
#: Of the l1 ball, with ever smaller radii: by how much the radii are larger, and the share of the steps at each.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)


def shrinks_after(step: int) -> bool:
    """Whether the batch may shrink after so many steps."""
    return step in SHRINK_AFTER or step % SHRINK_EVERY == 0


def run(
    objective: Objective,
    active: ActiveSet,
    rows: Rows,
    schedule: Schedule,
    *,
    health: GradientHealth | None = None,
    claims: bool = True,
    share: Tensor | None = None,
    give_up: bool = False,
) -> tuple[Rows, StepSize]:
    """One run: what falls is noted in ``active``, and the best points of the others are offered to it.

    Args:
        objective: the loss, on what gradients are taken from.
        active: the images.
        rows: what is searched.
        schedule: steps and rho.
        health: counts gradients and movement, if given.
        claims: whether a misclassified point is a success; it is none in a ball that is too large.
        share: of the l1 ball: the share of the coordinates that the first steps move, ``[R]``.
        give_up: whether rows leave that are out of reach.

    Returns:
        The rows that are left, and their step sizes with the points of highest loss.
    """
    point = previous = best = rows.begin
    size = _step_size(rows, schedule, share)
    score = torch.full((2, len(point)), -torch.inf, device=point.device)
    # the batch may shrink after any of the first steps
    gradients = Gradients(objective, point, rows.labels)
    reach = reach_of_steps(schedule.steps) if give_up else None
    seen = None if health is None else HealthOfRows(health, point)
    for i in range(schedule.steps):
        found = gradients.at(point)
        gradient = found.image.to(point.dtype)
        if seen is not None:
            seen.see_gradient(gradient, forgiven(objective, found))
        best, score = better_of(best, score, point, found.score)
        size.see(point, gradient, found.loss)
        if claims and active.leave and shrinks_after(i + 1):
            refused, fell = active.settle(rows.owner, best, score[0], rows.run)
            score = torch.stack([refused, score[1]])
            lost = None
            if reach is not None:
                missing = border(objective.loss) - size.top_loss
                lost = _out_of_reach(reach.lost(i + 1, missing), active, rows, point, gradient)
            kept = active.kept(rows.owner, lost) if fell or lost is not None else None
            if kept is not None and reach is not None:
                reach.take(kept)
            if lost is not None:
                out = lost.nonzero()[:, 0]
                _finish(objective, active, rows.of(out), point[out], (best[out], score[:, out]))
                if seen is not None:
                    seen.health.see_move(rows.begin[out], point[out], active.correct[rows.owner[out]])
                    seen.give_up(out, schedule.steps)
            if kept is not None:
                if seen is not None:
                    seen.health.see_fallen(max(0, len(point) - len(kept) - (0 if lost is None else len(out))))
                    seen.take(kept)
                rows, score = rows.of(kept), score[:, kept]
                point, previous, best, gradient = point[kept], previous[kept], best[kept], gradient[kept]
                size.take(kept)
                if len(point) == 0:
                    return rows, size
                gradients.now_of(point, rows.labels)
        origin, gradient = size.origin(i, point, gradient)
        previous, point = origin, size.move(i, origin, gradient, previous)
    if health is not None:
        health.see_move(rows.begin, point, active.correct[rows.owner])
    if claims:
        _finish(objective, active, rows, point, (best, score))
    return rows, size


def _out_of_reach(lost: Tensor | None, active: ActiveSet, rows: Rows, point: Tensor, gradient: Tensor) -> Tensor | None:
    """Those rows that are given up, bool ``[R]``; None if there are none.

    A row without a gradient, or one that never moved, is searched to the end: it shows that gradients are masked.
    """
    if lost is None:
        return None
    alive = gradient.flatten(1).any(1) & (point != rows.begin).flatten(1).any(1)
    return some_of(lost & alive & ~active.fallen[rows.owner])


def run_from_larger(
    objective: Objective, active: ActiveSet, rows: Rows, schedule: Schedule, *, health: GradientHealth | None = None
) -> None:
    """One run of the l1 ball: in a ball three times as large, then twice, then in the ball itself.

    Args:
        objective: the loss, on what gradients are taken from.
        active: the images.
        rows: what is searched; they begin anywhere.
        schedule: all steps, and rho.
        health: counts gradients and movement, if given.
    """
    steps = [math.ceil(part * schedule.steps) for part in LARGER_STEPS[:-1]]
    # of very few steps the last radius gets one at least
    steps.append(max(1, schedule.steps - sum(steps)))
    begin = rows.begin
    for times, count in zip(LARGER, steps, strict=True):
        ball = replace(rows.ball, eps=times * rows.ball.eps)
        begin = pgd_step(begin, torch.zeros_like(begin), rows.x, 0.0, ball.eps, **ball.bounds)
        part = replace(rows, ball=ball, begin=begin)
        share = changed_share(begin, rows.x) / SPARSER
        _, size = run(
            objective, active, part, Schedule(count, schedule.rho), health=health, claims=times == 1, share=share
        )
        begin = size.top


def _step_size(rows: Rows, schedule: Schedule, share: Tensor | None) -> StepSize:
    if rows.ball.norm == "l1":
        return StepSizeL1(rows.begin, rows.x, rows.ball, schedule, share)
    return StepSize(rows.begin, rows.x, rows.ball, schedule)


def _finish(objective: Objective, active: ActiveSet, rows: Rows, last: Tensor, known: tuple[Tensor, Tensor]) -> None:
    """Judge the best points, the last ones included, and keep the best of those that are no success."""
    best, score = known
    if objective.eot_iter > 1:
        # the highest of many noisy scores is high by luck
        score = objective.score(best, rows.labels)
    best, score = better_of(best, score, last, objective.score(last, rows.labels))
    if active.leave:
        # a copy's opinion is none: where it sees no success the model may
        all_of_them = objective.model is not active.judge.model
        refused, _ = active.settle(rows.owner, best, torch.ones_like(score[0]) if all_of_them else score[0], rows.run)
        score = torch.stack([refused, score[1]])
    active.offer(rows.owner, best, score)

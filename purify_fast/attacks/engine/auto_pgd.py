"""One run of Auto-PGD over a batch of rows, which leave it as soon as their images have fallen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.pgd_step import pgd_step
from ..health import GradientHealth, HealthOfRows
from ..objective import Gradients, Objective
from ..search import better_of, forgiven
from .reach import border, reach_of_steps, some_of
from .rows import ActiveSet, Rows
from .step_size import SPARSER, Schedule, StepSize, StepSizeL1, changed_share

#: After which of the first steps the batch may shrink; later every `SHRINK_EVERY` steps. Each of these waits for the
#: device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5
#: Of the l1 ball, with ever smaller radii: by how much the radii are larger, and the share of the steps at each.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)


def shrinks_after(step: int) -> bool:
    """Whether the batch may shrink after so many steps."""
    return step in SHRINK_AFTER or step % SHRINK_EVERY == 0


class AutoPgd:
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

    Attributes:
        size: the step sizes of the rows that are left, with their points of highest loss.
    """

    def __init__(
        self,
        objective: Objective,
        active: ActiveSet,
        rows: Rows,
        schedule: Schedule,
        *,
        health: GradientHealth | None = None,
        claims: bool = True,
        share: Tensor | None = None,
        give_up: bool = False,
    ):
        self.objective, self.active, self.rows, self.steps = objective, active, rows, schedule.steps
        self.may_shrink, self.claims = claims and active.leave, claims
        self.point = self.previous = self.best = self.gradient = rows.begin
        self.score = torch.full((2, len(self.point)), -torch.inf, device=self.point.device)
        if rows.ball.norm == "l1":
            self.size: StepSize = StepSizeL1(rows.begin, rows.x, rows.ball, schedule, share)
        else:
            self.size = StepSize(rows.begin, rows.x, rows.ball, schedule)
        # the batch may shrink after any of the first steps
        self.gradients = Gradients(objective, self.point, rows.labels, schedule.steps)
        self.reach = reach_of_steps(schedule.steps) if give_up else None
        self.health = None if health is None else HealthOfRows(health, self.point)

    def take(self, index: Tensor) -> None:
        """Go on with some of the rows."""
        self.rows, self.score = self.rows.take(index), self.score[:, index]
        self.point, self.previous = self.point[index], self.previous[index]
        self.best, self.gradient = self.best[index], self.gradient[index]
        for part in (self.size, self.reach, self.health):
            if part is not None:
                part.take(index)
        if len(index):
            self.gradients.now_of(self.point, self.rows.labels)

    def run(self) -> None:
        """Take all steps, or as many as there are rows for."""
        for i in range(self.steps):
            self._look()
            if self.may_shrink and shrinks_after(i + 1):
                self._shrink(i + 1)
                if len(self.point) == 0:
                    return
            origin, gradient = self.size.origin(i, self.point, self.gradient)
            self.previous, self.point = origin, self.size.move(i, origin, gradient, self.previous)
        if self.health is not None:
            self._see_move(slice(None))
        if self.claims:
            self._finish(slice(None))

    def _look(self) -> None:
        """Take the gradient, and note the point."""
        now = self.gradients.at(self.point)
        self.gradient = now.image.to(self.point.dtype)
        if self.health is not None:
            self.health.see_gradient(self.gradient, forgiven(self.objective, now))
        self.best, self.score = better_of(self.best, self.score, self.point, now.score)
        self.size.see(self.point, self.gradient, now.loss)

    def _shrink(self, step: int) -> None:
        """Let the rows leave whose images have fallen, and those that are given up."""
        share, fell = self.active.settle(self.rows.owner, self.best, self.score[0], self.rows.run)
        self.score = torch.stack([share, self.score[1]])
        lost = self._out_of_reach(step)
        staying = self.active.staying(self.rows.owner, lost) if fell or lost is not None else None
        given_up = 0
        if lost is not None:
            index = lost.nonzero()[:, 0]
            given_up = len(index)
            self._finish(index)
            if self.health is not None:
                self._see_move(index)
                self.health.give_up(index, self.steps)
        if staying is not None:
            if self.health is not None:
                self.health.health.see_fallen(max(0, len(self.point) - len(staying) - given_up))
            self.take(staying)

    def _out_of_reach(self, step: int) -> Tensor | None:
        """Those rows that are given up, bool ``[R]``; None if there are none.

        A row without a gradient, or one that never moved, is searched to the end: it shows that gradients are masked.
        """
        if self.reach is None:
            return None
        lost = self.reach.lost(step, border(self.objective.loss) - self.size.top_loss)
        if lost is None:
            return None
        alive = self.gradient.flatten(1).any(1) & (self.point != self.rows.begin).flatten(1).any(1)
        return some_of(lost & alive & ~self.active.fallen[self.rows.owner])

    def _see_move(self, index: Tensor | slice) -> None:
        assert self.health is not None
        correct = self.active.correct[self.rows.owner[index]]
        self.health.health.see_move(self.rows.begin[index], self.point[index], correct)

    def _finish(self, index: Tensor | slice) -> None:
        """Judge the best points of some rows, the last ones included, and keep those that are no success."""
        rows = self.rows if isinstance(index, slice) else self.rows.take(index)
        best, last, score = self.best[index], self.point[index], self.score[:, index]
        if self.objective.eot_iter > 1:
            # the highest of many noisy scores is high by luck
            score = self.objective.score(best, rows.labels)
        best, score = better_of(best, score, last, self.objective.score(last, rows.labels))
        if self.active.leave:
            # where a copy sees no success the model itself may see one: every point is judged
            by_copy = self.objective.model is not self.active.judge.model
            claimed = torch.ones_like(score[0]) if by_copy else score[0]
            share, _ = self.active.settle(rows.owner, best, claimed, rows.run)
            score = torch.stack([share, score[1]])
        self.active.offer(rows.owner, best, score)


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
    for factor, count in zip(LARGER, steps, strict=True):
        ball = replace(rows.ball, eps=factor * rows.ball.eps)
        begin = pgd_step(begin, torch.zeros_like(begin), rows.x, 0.0, ball.eps, **ball.bounds)
        part, part_schedule = replace(rows, ball=ball, begin=begin), replace(schedule, steps=count)
        share = changed_share(begin, rows.x) / SPARSER
        search = AutoPgd(objective, active, part, part_schedule, health=health, claims=factor == 1, share=share)
        search.run()
        begin = search.size.top

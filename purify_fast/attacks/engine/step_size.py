"""How long Auto-PGD's steps are, and from where it goes on: decided per row and on the device, never in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._tensors import per_image
from ...ops.apgd_step import apgd_step
from ...ops.pgd_step import pgd_step
from ..ball import Ball

#: The paper's a, the weight of a new step; that of the last move is 1 - a.
MOMENTUM = 0.75
#: Of the l1 ball (Croce & Hein, "Mind the box", ICML 2021): the share of the coordinates that the first steps move, by
#: how much smaller the next share is than that of the best point's changed ones, and by how much a step shrinks and how
#: far at most.
FIRST_SHARE, SPARSER, SHRINK, SHORTEST = 0.2, 1.5, 1.5, 10.0
#: The changed coordinates of the best point count as fewer when there are less than this share of them.
FEWER = 0.95


@dataclass(frozen=True)
class Schedule:
    """When a run's steps are judged.

    Args:
        steps: gradient steps of a run.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
    """

    steps: int
    rho: float = 0.75


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps an image is judged, and over how many: 22 %, then 3 % fewer each time, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


def checkpoints_l1(steps: int) -> dict[int, int]:
    """The same for the l1 ball: every 4 % of the steps."""
    length = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(length, steps, length), length)


class StepSize:
    """Every row's step, which is halved at the checkpoints, and the point of highest loss, where it then goes on.

    Args:
        begin: where the rows begin, ``[R, ...]``.
        x: their clean images, ``[R, ...]``.
        ball: around these.
        schedule: steps and rho.
    """

    def __init__(self, begin: Tensor, x: Tensor, ball: Ball, schedule: Schedule):
        nothing = torch.full((len(begin),), -torch.inf, device=begin.device)
        self.x, self.ball, self.rho = x, ball, schedule.rho
        self.marks = checkpoints(schedule.steps)
        self.step, self.halved = 2 * ball.eps, torch.ones_like(nothing, dtype=torch.bool)
        self.top, self.top_gradient, self.top_loss = begin, torch.zeros_like(begin), nothing
        self.last_loss, self.checked_loss, self.rises = -nothing, nothing, torch.zeros_like(nothing)

    def take(self, index: Tensor) -> None:
        """Keep some of the rows.

        Args:
            index: which, int64.
        """
        self.ball = self.ball.take(index)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])

    def see(self, point: Tensor, gradient: Tensor, loss: Tensor) -> None:
        """Take note of a point's loss.

        Args:
            point: the rows' points, ``[R, ...]``.
            gradient: theirs, ``[R, ...]``.
            loss: theirs, ``[R]``.
        """
        higher = loss > self.top_loss
        wide = per_image(higher, point)
        self.top = torch.where(wide, point, self.top)
        self.top_gradient = torch.where(wide, gradient, self.top_gradient)
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.rises = self.rises + (loss > self.last_loss)
        self.last_loss = loss

    def origin(self, i: int, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """From where step ``i`` is taken, and along which gradient: from ``point``, or from the top after a halving.

        Args:
            i: the step, from 0.
            point: the rows' points, ``[R, ...]``.
            gradient: theirs, ``[R, ...]``.
        """
        if i not in self.marks:
            return point, gradient
        few = self.rises <= self.rho * self.marks[i]
        stuck = ~self.halved & (self.top_loss <= self.checked_loss)
        self.halved = few | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.last_loss = torch.where(self.halved, self.top_loss, self.last_loss)
        self.checked_loss, self.rises = self.top_loss, torch.zeros_like(self.rises)
        wide = per_image(self.halved, point)
        return torch.where(wide, self.top, point), torch.where(wide, self.top_gradient, gradient)

    def move(self, i: int, point: Tensor, gradient: Tensor, previous: Tensor) -> Tensor:
        """Step ``i``.

        Args:
            i: the step, from 0.
            point: the rows' points, ``[R, ...]``.
            gradient: theirs, ``[R, ...]``.
            previous: what the points were before their last step, ``[R, ...]``.
        """
        momentum = MOMENTUM if i > 0 else 1.0
        return apgd_step(
            point, gradient, self.x, previous, self.step, eps=self.ball.eps, momentum=momentum, **self.ball.bounds
        )


class StepSizeL1(StepSize):
    """The l1 ball's: a step moves a share of the coordinates, fitted to how many the best point has changed.

    Args:
        begin: where the rows begin, ``[R, ...]``.
        x: their clean images, ``[R, ...]``.
        ball: around these.
        schedule: the steps.
        share: of the coordinates that the first steps move, ``[R]``; None: a fifth.
    """

    def __init__(self, begin: Tensor, x: Tensor, ball: Ball, schedule: Schedule, share: Tensor | None = None):
        super().__init__(begin, x, ball, schedule)
        self.marks, self.step = checkpoints_l1(schedule.steps), ball.eps.clone()
        # a share that is given is that of the point where the run begins
        self.changed = torch.ones_like(self.top_loss) if share is None else share * SPARSER
        self.share = torch.full_like(self.top_loss, FIRST_SHARE) if share is None else share

    def origin(self, i: int, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if i not in self.marks:
            return point, gradient
        changed = changed_share(self.top, self.x)
        sparser = changed < FEWER * self.changed
        shortened = (self.step / SHRINK).maximum(self.ball.eps / SHORTEST)
        self.step = torch.where(sparser, self.ball.eps, shortened)
        self.share, self.changed = changed / SPARSER, changed
        wide = per_image(sparser, point)
        return torch.where(wide, self.top, point), torch.where(wide, self.top_gradient, gradient)

    def move(self, i: int, point: Tensor, gradient: Tensor, previous: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        size = torch.where(flat.isfinite().all(1, keepdim=True), flat.abs(), 0.0)
        place = ((1 - self.share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
        least = size.sort(1).values.gather(1, place[:, None])
        sign = torch.where((size >= least) & (size > 0), flat.sign(), 0.0)
        unit = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        moved = point + per_image(self.step.to(point.dtype), point) * unit.view_as(point)
        # a step of no length projects onto ball and box at once
        return pgd_step(moved, torch.zeros_like(moved), self.x, 0.0, self.ball.eps, **self.ball.bounds)


def changed_share(point: Tensor, x: Tensor) -> Tensor:
    """The share of the coordinates in which points differ from their images, ``[R]``.

    Args:
        point: the points, ``[R, ...]``.
        x: the images, ``[R, ...]``.
    """
    return (point != x).flatten(1).float().mean(1)

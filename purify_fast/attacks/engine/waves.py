"""The runs of an attack, by restart and target, several at once where few images are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ball import Ball, sample_in_ball
from .active_set import ActiveSet

#: Rows that are searched at once in any case, however few images there are: a batch of a few is slow.
FEWEST_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """What is searched at once; every field is by row.

    Args:
        owner: the image of each row, int64 ``[R]``.
        x: the clean images, ``[R, ...]``.
        labels: int64 ``[R]``, or ``[R, 2]`` labels and targets.
        ball: around the images.
        begin: where the rows begin, ``[R, ...]``.
        run: the number of the run that each row belongs to, int64 ``[R]``.
    """

    owner: Tensor
    x: Tensor
    labels: Tensor
    ball: Ball
    begin: Tensor
    run: Tensor

    def of(self, index: Tensor) -> Rows:
        """Some of the rows.

        Args:
            index: which, int64.
        """
        values = (self.owner[index], self.x[index], self.labels[index], self.ball.of(index))
        return Rows(*values, begin=self.begin[index], run=self.run[index])


@dataclass(frozen=True)
class Waves:
    """Makes the rows, wave by wave.

    Args:
        x: clean images ``[N, ...]``.
        y: labels, int64 ``[N]``.
        ball: around the images.
        goals: the target of each run, int64 ``[N]``; None for a run without one.
        restarts: how often all of these runs are made.
        seed: of the random starts; each run has its own.
        ids: int64 ``[N]``; an image's random start depends on the run's seed and its id alone.
        most: rows at once; None: `FEWEST_ROWS`, or as many as there are images, if those are more.
        at_image: whether the first run for each target begins at the images themselves.
    """

    x: Tensor
    y: Tensor
    ball: Ball
    goals: tuple[Tensor | None, ...]
    restarts: int
    seed: int
    ids: Tensor
    most: int | None = None
    at_image: bool = False

    def over(self, active: ActiveSet) -> Iterator[Rows]:
        """The rows of one wave after the other, of the images that are left by then; waits for the device once each.

        The first wave has one run, because most images fall to any. Later ones have as many as fit.

        Args:
            active: the images.
        """
        runs = list(enumerate(goal for _ in range(self.restarts) for goal in self.goals))
        most = max(FEWEST_ROWS, len(self.x)) if self.most is None else self.most
        together = 1
        while runs:
            left = active.left()
            if len(left) == 0:
                return
            yield self._rows(runs[:together], left)
            runs, together = runs[together:], max(1, most // max(1, len(active.left())))

    def counted(self, active: ActiveSet) -> dict[str, int]:
        """How many images fell to which target and restart.

        Args:
            active: the images, after the attack.
        """
        found: dict[str, int] = {}
        for number in active.felled_by[active.felled_by >= 0].tolist():
            restart, goal = divmod(number, len(self.goals))
            name = f"restart {restart + 1}" if self.goals[goal] is None else f"target {goal + 1}"
            if self.goals[goal] is not None and self.restarts > 1:
                name += f", restart {restart + 1}"
            found[name] = found.get(name, 0) + 1
        return found

    def _rows(self, wave: list[tuple[int, Tensor | None]], left: Tensor) -> Rows:
        owner, around = left.repeat(len(wave)), self.ball.of(left)
        begins = []
        for number, _ in wave:
            at_image = self.at_image and number < len(self.goals)
            seed, ids = self.seed + number, self.ids[left]
            begins.append(self.x[left] if at_image else sample_in_ball(self.x[left], around, seed=seed, sample_ids=ids))
        labels = [self.y[left] if goal is None else torch.stack([self.y, goal], 1)[left] for _, goal in wave]
        values = (owner, self.x[owner], torch.cat(labels), self.ball.of(owner))
        # the runs of a wave have consecutive numbers; a list of them would be copied, which waits for the device
        numbers = torch.arange(wave[0][0], wave[0][0] + len(wave), device=owner.device)
        return Rows(*values, begin=torch.cat(begins), run=numbers.repeat_interleave(len(left)))


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """The wrong classes of highest logit, the highest first, each int64 ``[B]``.

    Args:
        logits: of the clean images, ``[B, classes]``.
        y: labels, int64 ``[B]``.
        count: how many; None, or more than there are: all.
    """
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)


def add_counts(found: dict[str, int], more: dict[str, int]) -> None:
    """Add counts to others of the same names, in place.

    Args:
        found: what is known.
        more: what is added.
    """
    for name, count in more.items():
        found[name] = found.get(name, 0) + count

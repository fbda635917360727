"""The runs of an attack, by restart and target, several at once where few images are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ball import Ball, sample_in_ball
from . import buckets
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
        """The rows of one wave after the other, of the images that are left by then.

        The first wave has one run, because most images fall to any. Later ones have as many rows as fit: on a CPU whole
        runs; elsewhere also a part of a run, and copies of the first rows up to the size that `bucket` says, so that
        most waves are of one size. Waits for the device once or twice for each wave.

        Args:
            active: the images.
        """
        runs = list(enumerate(goal for _ in range(self.restarts) for goal in self.goals))
        most = max(FEWEST_ROWS, len(self.x)) if self.most is None else self.most
        # of the first of these runs, the images before this one were searched
        begin: Tensor | None = None
        is_first = True
        while runs:
            left = active.left()
            if len(left) == 0:
                return
            fits = max(most, len(left)) if self._is_padded() else max(1, most // len(left)) * len(left)
            room = len(left) if is_first else fits
            images, wave = left if begin is None else left[left >= begin], []
            while runs and room:
                taken = images[:room]
                if len(taken):
                    wave.append((*runs[0], taken))
                room -= len(taken)
                if len(taken) < len(images):
                    begin = images[len(taken)]
                    break
                runs, images, begin = runs[1:], left, None
            if wave:
                yield self._rows(wave, fits)
            is_first = False

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

    def _is_padded(self) -> bool:
        """Whether waves are filled up to the sizes of `bucket`."""
        return not buckets.takes_every_size(self.x.device)

    def _rows(self, wave: list[tuple[int, Tensor | None, Tensor]], most: int) -> Rows:
        """The rows of some runs: the number, the goal and the images of each."""
        begins, labels, numbers = [], [], []
        for number, goal, images in wave:
            x, ball, ids = self.x[images], self.ball.of(images), self.ids[images]
            at_image = self.at_image and number < len(self.goals)
            begins.append(x if at_image else sample_in_ball(x, ball, seed=self.seed + number, sample_ids=ids))
            labels.append(self.y[images] if goal is None else torch.stack([self.y, goal], 1)[images])
            numbers.append(torch.full_like(images, number))
        owner = torch.cat([images for _, _, images in wave])
        values = (owner, self.x[owner], torch.cat(labels), self.ball.of(owner))
        rows = Rows(*values, begin=torch.cat(begins), run=torch.cat(numbers))
        if not self._is_padded():
            return rows
        index = torch.arange(len(owner), device=owner.device)
        return rows.of(buckets.repeated_to(index, max(len(owner), min(buckets.bucket(len(owner), owner.device), most))))


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

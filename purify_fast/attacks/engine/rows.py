"""Which rows are searched at once, and which images are still attacked.

A search works on rows. Each row belongs to an image; several rows belong to the same image where several targets or
restarts are tried at once. When a row's point makes its image fall, every row of the image leaves.

Every batch size has a cost of its own: a convolution library prepares its kernels for it, a compiler may compile again,
a CUDA graph is captured. So a shrinking batch only takes sizes of a fixed list, and images that have fallen fill it up.
To a CPU an image more of a large model, or under many draws, costs more than a new size: there every number is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ball import Ball, sample_in_ball
from ..search import better_of
from .gradient_copy import FEWEST_WEIGHTS, matrix_weights
from .judge import Judge, has_fallen

#: Rows that are searched at once in any case, however few images there are: a batch of a few is slow.
FEWEST_ROWS = 64
#: Draws per image from which an image is costly, whatever the model.
MANY_DRAWS = 4
#: Sizes per doubling on a CPU, which prepares a size in milliseconds.
PER_DOUBLING = 4
#: Elsewhere: the smallest size, because fewer images take a GPU no less time; and the size from which there are two
#: sizes per doubling, because the arithmetic then takes longer than its launches.
SMALLEST, FINER_FROM = 16, 128


def takes_every_size(device: torch.device) -> bool:
    """Whether a new batch size costs a device next to nothing, as it costs a CPU."""
    return device.type == "cpu"


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest size of the list that holds so many items, at least 1.

    On a CPU it is a power of two times 1, 5/4, 6/4 or 7/4; every number below 8, and of costly items, of which one more
    takes a CPU longer than a new size. On a GPU it is 16, 32, 64, and from 128 on a power of two times 1 or 3/2.
    """
    if takes_every_size(device):
        if costly or items <= 2 * PER_DOUBLING:
            return items
        return _rounded_up(items, PER_DOUBLING)
    return max(SMALLEST, _rounded_up(items, 2 if items > FINER_FROM else 1))


def _rounded_up(items: int, parts: int) -> int:
    """The next power of two, or multiple of the one before it over ``parts``."""
    step = (1 << ((items - 1).bit_length() - 1)) // parts if items > 1 else 1
    return -(-items // step) * step


def _repeated_to(index: Tensor, size: int) -> Tensor:
    """An index of one element or more, whose first elements are repeated until it has a size."""
    return index.repeat(-(-size // len(index)))[:size] if size > len(index) else index


def is_costly(judge: Judge) -> bool:
    """Whether a step of one image takes a CPU longer than to prepare for another batch size."""
    large = isinstance(judge.model, nn.Module) and matrix_weights(judge.model) >= FEWEST_WEIGHTS
    return large or judge.draws >= MANY_DRAWS


class ActiveSet:
    """The images of one attack: which have fallen, and the best point known of each.

    Args:
        x: clean images ``[N, ...]``.
        y: labels, int64 ``[N]``.
        judge: confirms what has fallen.
        leave: whether fallen images leave. If not, every image is attacked to the end, and keeps the point that is
            misclassified in most draws, then the one of highest loss.

    Attributes:
        best: the best point known of each image, ``[N, ...]``; x at first.
        score: its share of misclassified draws and its loss, ``[2, N]``; minus infinity at first.
        fallen: bool ``[N]``, which have fallen; none where they do not leave.
        felled_by: int64 ``[N]``, the number of the run to which an image fell; -1 where it fell to none.
        correct: bool ``[N]``, which clean images have not fallen by themselves.
        costly: whether a batch shrinks to every size on a CPU, and not to a few sizes.
    """

    def __init__(self, x: Tensor, y: Tensor, judge: Judge, *, leave: bool = True):
        self.y, self.judge, self.leave = y, judge, leave
        self.costly = is_costly(judge)
        self.best = x.clone()
        self.score = torch.full((2, len(x)), -torch.inf, device=x.device)
        self.felled_by = torch.full_like(y, -1)
        fallen = has_fallen(judge.shares(x, y))
        self.correct = ~fallen
        # what is misclassified as it is needs no attack
        self.fallen = fallen if leave else torch.zeros_like(fallen)

    def left(self) -> Tensor:
        """Indices of the images that another run is for, int64 ``[n]``; waits for the device.

        Those that have not fallen, or where none leave, those of which not every draw is misclassified.
        """
        return (~self.fallen if self.leave else self.score[0] < 1).nonzero()[:, 0]

    def settle(self, owner: Tensor, points: Tensor, share: Tensor, run: Tensor | None = None) -> tuple[Tensor, bool]:
        """Judge the rows that claim a success.

        Waits for the device once, and a second time where there are claims.

        Args:
            owner: the image of each row, int64 ``[R]``.
            points: the points ``[R, ...]``.
            share: of the search's own draws, how many each point fails, ``[R]``.
            run: the number of each row's run, int64 ``[R]``; None: all are of run 0.

        Returns:
            The shares, with those of the claims as the judge counted them, ``[R]``; and whether an image has fallen.
        """
        claims = (has_fallen(share) & ~self.fallen[owner]).nonzero()[:, 0]
        if len(claims) == 0:
            return share, False
        judged = self.judge.shares(points[claims], self.y[owner[claims]])
        share = share.index_copy(0, claims, judged.to(share.dtype))
        won = claims[has_fallen(judged)]
        if len(won) == 0:
            return share, False
        # of several rows of an image the first: two of them written at once could mix
        first = torch.full_like(self.y, len(owner)).scatter_reduce(0, owner[won], won, "amin")
        won = won[first[owner[won]] == won]
        self.best[owner[won]] = points[won]
        self.fallen[owner[won]] = True
        self.felled_by[owner[won]] = torch.zeros_like(won) if run is None else run[won]
        return share, True

    def staying(self, owner: Tensor, lost: Tensor | None = None) -> Tensor | None:
        """Which rows stay; waits for the device once.

        Args:
            owner: the image of each row, int64 ``[R]``.
            lost: rows that are given up, bool ``[R]``; None: none.

        Returns:
            Indices int64 of the rows that stay; None where the batch keeps its size. Where no row is given up, they are
            as many as `bucket` says: all rows of unfallen images first, then some of fallen ones. Where rows are given
            up, nothing else than the rows that stay is searched on: on a CPU each stands once, and on a GPU the first
            ones are repeated up to the size that `bucket` says.
        """
        if lost is not None:
            stays = (~(self.fallen[owner] | lost)).nonzero()[:, 0]
            if takes_every_size(owner.device) or len(stays) == 0:
                return stays
            return _repeated_to(stays, min(bucket(len(stays), owner.device), len(owner)))
        gone = self.fallen[owner]
        left = len(owner) - int(gone.sum())
        size = bucket(left, owner.device, self.costly) if left else 0
        if size >= len(owner):
            return None
        return gone.to(torch.int8).argsort(stable=True)[:size]

    def offer(self, owner: Tensor, points: Tensor, score: Tensor) -> None:
        """Keep the best of the rows of every image that has not fallen, where it is better than what is known.

        Args:
            owner: the image of each row, int64 ``[R]``.
            points: the points ``[R, ...]``.
            score: share of misclassified draws and loss, ``[2, R]``.
        """
        rank = torch.empty_like(owner)
        by_loss = score[1].nan_to_num(nan=-torch.inf).argsort(stable=True)
        rank[by_loss[score[0][by_loss].argsort(stable=True)]] = torch.arange(len(owner), device=owner.device)
        top = torch.full_like(self.y, -1).scatter_reduce(0, owner, rank, "amax")
        best = ((rank == top[owner]) & ~self.fallen[owner]).nonzero()[:, 0]
        image = owner[best]
        self.best[image], self.score[:, image] = better_of(
            self.best[image], self.score[:, image], points[best], score[:, best].to(self.score.dtype)
        )


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

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, by an index int64."""
        values = (self.owner[index], self.x[index], self.labels[index], self.ball.take(index))
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

    def add_counts(self, active: ActiveSet, fell_to: dict[str, int]) -> None:
        """Add to the name of each target and restart how many images fell to it, after the attack."""
        for number in active.felled_by[active.felled_by >= 0].tolist():
            restart, goal = divmod(number, len(self.goals))
            name = f"restart {restart + 1}" if self.goals[goal] is None else f"target {goal + 1}"
            if self.goals[goal] is not None and self.restarts > 1:
                name += f", restart {restart + 1}"
            fell_to[name] = fell_to.get(name, 0) + 1

    def _is_padded(self) -> bool:
        """Whether waves are filled up to the sizes of `bucket`."""
        return not takes_every_size(self.x.device)

    def _rows(self, wave: list[tuple[int, Tensor | None, Tensor]], most: int) -> Rows:
        """The rows of some runs: the number, the goal and the images of each."""
        begins, labels, numbers = [], [], []
        for number, goal, images in wave:
            x, ball, ids = self.x[images], self.ball.take(images), self.ids[images]
            at_image = self.at_image and number < len(self.goals)
            begins.append(x if at_image else sample_in_ball(x, ball, seed=self.seed + number, sample_ids=ids))
            labels.append(self.y[images] if goal is None else torch.stack([self.y, goal], 1)[images])
            numbers.append(torch.full_like(images, number))
        owner = torch.cat([images for _, _, images in wave])
        values = (owner, self.x[owner], torch.cat(labels), self.ball.take(owner))
        rows = Rows(*values, begin=torch.cat(begins), run=torch.cat(numbers))
        if not self._is_padded():
            return rows
        index = torch.arange(len(owner), device=owner.device)
        return rows.take(_repeated_to(index, max(len(owner), min(bucket(len(owner), owner.device), most))))


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """The wrong classes of highest logit, the highest first, each int64 ``[B]``; a count of None: all."""
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)

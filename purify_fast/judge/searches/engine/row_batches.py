"""The rows that are searched together, and the images that are still attacked.

A row is an image with one target class and one restart. The model itself must confirm its success, by fresh draws if it
is random: among a hundred steps, some draw is misclassified by luck. Then all rows of the image are removed. A new
batch size takes time, so a shrinking batch has only sizes from a fixed list, and rows of fallen images fill it up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....attacks.context import Ball, sample_in_ball
from ....attacks.health import FAULTS, GradientHealth
from ....attacks.objective import Objective, better_of
from ....speed.graphs.step_loop import State, StepFunction, Steps, begin_steps
from ..judge_context import JudgeContext
from .judge import Judge, bucket, has_fallen, repeated_to, takes_every_size
from .pace import FEWEST_STEPS, SHARES, TIMES, Gains, PaceMonitor, some_of

#: Without a batch size, runs of few images are searched together, up to this many rows: small batches are slow.
FEWEST_ROWS = 64
#: The batch may shrink after these steps, then every SHRINK_EVERY steps. Each check waits for the device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5


class Rows(NamedTuple):
    """The rows that are searched together; every field has an entry per row.

    ``labels`` are int64 ``[R]``, or labels and targets ``[R, 2]``; ``begin`` are first points; ``owner`` the images'
    indices.
    """

    owner: Tensor
    x: Tensor
    labels: Tensor
    ball: Ball
    begin: Tensor

    def take(self, index: Tensor) -> Rows:
        """Return some of the rows, selected by an int64 index."""
        taken: Any = (value.take(index) if isinstance(value, Ball) else value[index] for value in self)
        return Rows(*taken)


def take_rows(search: object, index: Tensor) -> None:
    """Continue a search with some of its rows."""
    for name, value in vars(search).items():
        if isinstance(value, (Tensor, Ball, Rows, PaceMonitor)):
            setattr(search, name, value[index] if isinstance(value, Tensor) else value.take(index))


class ActiveSet:
    """The images of one attack, the best known point of each image, and the images that have fallen.

    Without ``leave``, every image is attacked to the end, and ``fallen`` remains False. ``score`` is the share of
    misclassified draws and the loss of the best point, ``[2, N]``.
    ``tried`` is True for images with a complete search, or a search that came nearer to the border before it was given
    up. ``ended_blind``: a run ended with its first steps, because all gradients were zero or not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, ball: Ball, judge: Judge, context: JudgeContext):
        self.x, self.y, self.ball, self.judge = x, y, ball, judge
        self.ids = torch.arange(len(x), device=x.device) if context.sample_ids is None else context.sample_ids
        self.draws_differ = context.draws_differ
        self.costly = judge.is_costly()
        self.best, self.score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
        self.tried = torch.zeros_like(y, dtype=torch.bool)
        self.gains = Gains()
        self.health = GradientHealth() if context.counts_health else None
        self.fallen = torch.zeros_like(self.tried)
        self.ended_blind = False

    def judge_clean_images(self, leave: bool = True) -> None:
        """Judge the clean images; with ``leave``, a misclassified clean image has fallen already."""
        fallen = has_fallen(self.judge.shares(self.x, self.y), self.judge.enough)
        self.leave, self.correct = leave, ~fallen
        self.fallen = fallen if leave else torch.zeros_like(fallen)

    @cached_property
    def logits(self) -> Tensor:
        """One prediction of each clean image, ``[N, classes]``."""
        return self.judge.logits(self.x)

    def left(self) -> Tensor:
        """Indices of images that need another run, int64 ``[n]``. This waits for the device.

        With ``leave`` they are the images that have not fallen, and otherwise those with a best point that some draw
        classifies correctly.
        """
        stands = ~self.fallen if self.leave else self.score[0] < 1
        return stands.nonzero()[:, 0]

    def confirm_successes(self, owner: Tensor, points: Tensor, share: Tensor) -> tuple[Tensor, bool]:
        """Let the judge check the rows whose search claims a success. This waits for the device once to three times."""
        claims = (has_fallen(share, self.judge.enough) & ~self.fallen[owner]).nonzero()[:, 0]
        if len(claims) == 0:
            return share, False
        judged = self.judge.shares(points[claims], self.y[owner[claims]])
        share = share.index_copy(0, claims, judged.to(share.dtype))
        won = claims[has_fallen(judged, self.judge.enough)]
        if len(won) == 0:
            return share, False
        # Keep the first row of an image that succeeds: assigning two values to the same index is undefined.
        first = torch.full_like(self.y, len(owner)).scatter_reduce(0, owner[won], won, "amin")
        won = won[first[owner[won]] == won]
        self.best[owner[won]] = points[won]
        self.fallen[owner[won]] = True
        return share, True

    def rows_to_keep(self, owner: Tensor, lost: Tensor | None = None) -> Tensor | None:
        """Choose the rows with which the search continues. This waits for the device once."""
        if lost is not None:
            stays = (~(self.fallen[owner] | lost)).nonzero()[:, 0]
            if takes_every_size(owner.device) or len(stays) == 0:
                return stays
            return repeated_to(stays, min(bucket(len(stays), owner.device), len(owner)))
        gone = self.fallen[owner]
        left = len(owner) - int(gone.sum())
        size = bucket(left, owner.device, self.costly) if left else 0
        if size >= len(owner):
            return None
        return gone.to(torch.int8).argsort(stable=True)[:size]

    def keep_best(self, owner: Tensor, points: Tensor, score: Tensor) -> Tensor:
        """For each image that has not fallen, store the point of its best row if it is better than the stored point.

        All stored points are returned.
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
        return self.best

    def judge_points(self, owner: Tensor, points: Tensor, loss: Tensor, claimed: Tensor | None = None) -> None:
        """Let the judge check the points that may be successes, by default all of them, and keep the best points."""
        share, _ = self.confirm_successes(owner, points, torch.ones_like(loss) if claimed is None else claimed)
        self.keep_best(owner, points, torch.stack([share, loss]))


Goals = Sequence[Tensor | None]


def waves(
    active: ActiveSet, goals: Goals, restarts: int, context: JudgeContext, at_image: bool = False
) -> Iterator[Rows]:
    """Yield the rows of an attack in groups ("waves"), each with only images that have not fallen in earlier waves.

    The first wave has a single run, because most images fall to any run. On a CPU a wave consists of complete runs. On
    a GPU copies of its first rows fill a wave up to the size of `bucket`, so that most waves have the same size.
    """
    x, y, count = active.x, active.y, len(active.x)
    padded = not takes_every_size(x.device)
    most = context.batch_size or max(FEWEST_ROWS, count)
    # Rows are numbered: image i in run r has the number r * count + i.
    firsts = torch.arange(restarts * len(goals), device=x.device)[:, None] * count
    is_first, following = True, 0
    while len(left := active.left()):
        rows_left = (firsts + left).flatten()
        rows_left = rows_left[rows_left >= following]
        if len(rows_left) == 0:
            break
        fits = max(most, len(left)) if padded else max(1, most // len(left)) * len(left)
        wave = rows_left[: len(left) if is_first else fits]
        numbers = wave.tolist()
        following = numbers[-1] + 1
        owner, runs = wave % count, Counter(number // count for number in numbers)
        begins, labels = [], []
        for run, images in zip(runs, owner.split(list(runs.values())), strict=True):
            clean, goal = x[images], goals[run % len(goals)]
            if not (at_image and run < len(goals)):
                ball, ids = active.ball.take(images), active.ids[images]
                clean = sample_in_ball(clean, ball, seed=context.seed + run, sample_ids=ids)
            begins.append(clean)
            labels.append(y[images] if goal is None else torch.stack([y, goal], 1)[images])
        ball = active.ball.take(owner)
        rows = Rows(owner, x[owner], torch.cat(labels), ball=ball, begin=torch.cat(begins))
        if padded:
            size = max(len(wave), min(bucket(len(wave), x.device), fits))
            rows = rows.take(repeated_to(torch.arange(len(wave), device=x.device), size))
        yield rows
        is_first = False


class RowSearch:
    """A search that moves a batch of rows along gradients, from one start. Its tensors are the state of ``loop``."""

    step: StepFunction
    loop: Steps

    def __init__(self, objective: Objective, active: ActiveSet, rows: Rows, steps: int, *, give_up: bool = False):
        self.objective, self.active, self.rows, self.steps = objective, active, rows, steps
        judged = give_up and steps >= FEWEST_STEPS
        checks = [round(share * steps) for share in SHARES]
        self.monitor = PaceMonitor(checks, steps, TIMES, active.gains) if judged else None
        self.health, self.gradients = active.health, 0

    def begin(self, step: StepFunction, state: State) -> None:
        """Begin the loop of a step."""
        self.step, self.loop = step, begin_steps(self.objective.graphs, step, state)

    def advance(self) -> None:
        """Do a step, in which the objective takes a gradient of each row."""
        self.loop.advance()
        self.gradients += len(self.rows.owner)

    def count_gradients(self) -> None:
        """Add the counts of gradients in the state to the counts of the attack, at the end of the search."""
        if self.health is not None:
            nonfinite, zero, exempt = (self.loop.state[name] for name in FAULTS)
            self.health.add(gradients=self.gradients - exempt, nonfinite=nonfinite, zero=zero)

    @staticmethod
    def shrinks_after(step: int) -> bool:
        """Return True if the batch may shrink after this number of steps."""
        return step in SHRINK_AFTER or step % SHRINK_EVERY == 0

    def take(self, index: Tensor) -> None:
        """Continue with some of the rows, selected by an int64 index."""
        take_rows(self, index)
        state = self.loop.values()
        # Otherwise the new loop would first copy the old loop's state out of the buffers of their CUDA graph.
        self.loop = Steps(self.step, state)
        for name, value in state.items():
            if name == "best_score":
                state[name] = value[:, index]
            elif value.dim():
                # A gradient may have another layout than the points. Graphs are found by the layouts.
                state[name] = value[index].contiguous()
        self.begin(self.step, state)

    def out_of_reach(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are given up."""
        lost = None if self.monitor is None else self.monitor.lost(step, missing)
        lost = None if lost is None else some_of(lost & self.may_end() & ~self.active.fallen[self.rows.owner])
        if lost is not None and self.monitor is not None:
            self.active.tried.index_fill_(0, self.rows.owner[lost & self.monitor.came_nearer], True)
        return lost

    def may_end(self) -> Tensor | bool:
        """Tell which rows may be given up, bool ``[R]``, or True for all rows."""
        return True

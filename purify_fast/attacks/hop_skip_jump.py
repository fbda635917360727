"""HopSkipJump (Chen, Jordan & Wainwright, S&P 2020): a search along the decision boundary that needs only decisions.

The search begins at a misclassified image, and moves straight towards the clean image until the decision changes. At
this border it tries many small random steps. Their decisions give the direction into the misclassified side. The search
takes the longest misclassified step in this direction, and moves towards the clean image again. Three things are not in
the paper. The search begins at the nearest image of the batch that is predicted as another class, or at random noise if
there is no such image. Every length of a step is tried, so that every image takes the same number of queries. And at
the end the nearest point is projected onto the ball and tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import Range
from ..ops.philox import Stream, philox
from .ball import philox_key
from .base import EngineAttack, as_function, times
from .context import AttackContext
from .engine.nearest import NEAREST_OR_IMAGE, NearestSearch, length_of
from .engine.row_batches import FEWEST_ROWS, ActiveSet, Rows, has_fallen
from .objective import Objective

QUERIES = 5000
#: The authors' values. FIRST_DIRECTIONS: the number of random steps in the first iteration; in iteration n it is
#: multiplied by sqrt(n). MOST_DIRECTIONS: the most random steps of an iteration. FIRST_LENGTH: the length of the random
#: steps in the first iteration, as a share of the range of the pixels.
FIRST_DIRECTIONS, MOST_DIRECTIONS, FIRST_LENGTH = 100, 10_000, 0.1
#: The number of step lengths that are tried; each is half of the previous length.
LENGTHS = 8
#: The most images of noise that are tried in search of a misclassified image, at which the search can begin.
TRIES = 100
#: The smallest allowed number of queries of a run; the first iteration takes nearly all of them.
FEWEST_QUERIES = 200
TINY = 1e-30
#: The most halvings of a bisection: float32 cannot resolve more.
HALVINGS = 22


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(EngineAttack):
    """HopSkipJump; the first run begins at other images of the batch, every other run at noise.

    The attack uses only the class of the largest logit, so a model may return one-hot decisions.

    Args:
        n_queries: the most queries per image in a run, at least 200. For a random model, a query is ``eot_iter`` draws.
            The predictions that check a success are not counted.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "hop_skip_jump"
    code_version: ClassVar[str] = "2"
    has_pace: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "margin"

    n_queries: Annotated[int, Range(FEWEST_QUERIES)] = QUERIES

    def name(self, context: AttackContext) -> str:
        queries = f", {self.n_queries} queries" if self.n_queries != QUERIES else ""
        return f"HopSkipJump{queries}" + times(self.restarts)

    def cost(self, context: AttackContext) -> int:
        judges = context.judges(self.draws(context))
        return self.restarts * (self.n_queries * self.draws(context) + 2 * judges) + judges

    def settings(self, context: AttackContext) -> dict[str, Any]:
        # The batch size changes the result, because the search begins at another image of the batch.
        return super().settings(context) | {"batch_size": context.resources.batch_size}

    @torch.no_grad()
    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        decided = active.logits.argmax(1)
        # No CUDA graphs are used, because they capture gradients, and this search has none.
        objective = replace(objective, graphs=None)
        most = context.resources.batch_size or max(FEWEST_ROWS, len(active.x))
        for restart in range(self.restarts):
            left = active.left()
            if len(left) == 0:
                break
            begin = active.x[left] if restart else _others(active, left, decided)
            ball, run = active.ball.take(left), torch.full_like(left, restart)
            rows = Rows(left, active.x[left], active.y[left], ball=ball, begin=begin, run=run)
            search = _HopSkipJumpSearch(objective, active, rows, self.n_queries)
            search.run(context.seed + restart, most)


hop_skip_jump = as_function("hop_skip_jump", HopSkipJump, NEAREST_OR_IMAGE, precision="float32")


def _others(active: ActiveSet, left: Tensor, decided: Tensor) -> Tensor:
    """Return for some images the nearest image that is predicted as another class than their label, or themselves.

    Args:
        active: the images.
        left: the indices of the images for which the nearest image is searched, int64 ``[R]``.
        decided: the predicted class of each image, int64 ``[N]``.
    """
    flat = active.x.flatten(1).float()
    far = torch.cdist(flat[left], flat).masked_fill(decided == active.y[left, None], torch.inf)
    nearest, index = far.min(1)
    return active.x[torch.where(nearest.isfinite(), index, left)]


class _HopSkipJumpSearch(NearestSearch):
    """One run of HopSkipJump with at most ``steps`` queries."""

    def run(self, seed: int, most: int) -> None:
        """Make all queries, or stop when no row is left.

        Args:
            seed: seed of all random numbers.
            most: the most images in one query.
        """
        self.most, self.draw = most, 0
        self.ids = self.active.ids[self.rows.owner]
        self.random = partial(philox, philox_key(seed, self.ids.device), stream=Stream.HOPS)
        self.size = self.point[0].numel()
        exact = 2.0 if self.rows.ball.norm == "linf" else 1.5
        self.halvings = min(HALVINGS, math.ceil(exact * math.log2(self.size))) if self.size > 1 else HALVINGS
        # Two queries are reserved: for the prediction of the clean image, and for the projected point at the end.
        queries = 2 + self._begin()
        iteration = 1
        self._go_back()
        queries += self.halvings
        while len(self.point):
            directions = min(int(FIRST_DIRECTIONS * math.sqrt(iteration)), MOST_DIRECTIONS)
            queries += directions + LENGTHS + self.halvings
            if queries > self.steps:
                self._end()
                return
            self._hop(iteration, directions)
            self._go_back()
            self.shrink(iteration)
            iteration += 1

    def _across(self, points: Tensor) -> Tensor:
        """Tell which points are misclassified, bool ``[n R]``; the first points of all rows come first."""
        return has_fallen(self._shares(points))

    def _shares(self, points: Tensor) -> Tensor:
        """The share of draws that misclassify each point, ``[n R]``."""
        return self.objective.score(points, self.rows.labels.repeat(len(points) // len(self.rows.labels)))[0]

    def _numbers(self, count: int, distribution: str) -> Tensor:
        """The next random numbers, ``[count, R, D]``."""
        numbers = self.random(self.ids, self.size, distribution=distribution, draws=count, first_draw=self.draw)
        self.draw += count
        return numbers.transpose(0, 1).to(self.point.dtype)

    def _begin(self) -> int:
        """Find a misclassified first point of each row, or remove the row; return the number of queries per row."""
        ball, tries = self.rows.ball, 0
        found = self._across(self.point)
        while tries < TRIES and len(lacking := (~found).nonzero()[:, 0]):
            noise = ball.clip_min + (ball.clip_max - ball.clip_min) * self._numbers(1, "uniform")[0, lacking]
            self.point = self.point.index_copy(0, lacking, noise.view_as(self.point[lacking]))
            wrong = self.objective.score(self.point[lacking], self.rows.labels[lacking])[0]
            found, tries = found.index_copy(0, lacking, has_fallen(wrong)), tries + 1
        if not bool(found.all()):
            self.take(found.nonzero()[:, 0])
        return tries + 1

    def _go_back(self) -> None:
        """Move every point towards the clean image, until the border."""
        if len(self.point) == 0:
            return
        # The distance before the bisection sets the length of the next random steps.
        self.before = length_of(self.rows, self.point - self.rows.x)
        low, high = torch.zeros_like(self.before), torch.ones_like(self.before)
        for _ in range(self.halvings):
            middle = (low + high) / 2
            across = self._across(self._towards_image(middle))
            low, high = torch.where(across, low, middle), torch.where(across, middle, high)
        self.point = self._towards_image(high)
        self.note(self.point, torch.ones_like(high, dtype=torch.bool))

    def _towards_image(self, share: Tensor) -> Tensor:
        """Move the points to a share ``[R]`` of their distance from the image.

        In l2 they move on the straight line to the image. In linf their difference to the image is clamped.
        """
        x, share = self.rows.x, per_image(share, self.point)
        if self.rows.ball.norm == "l2":
            return torch.where(share == 1, self.point, x + share.to(x.dtype) * (self.point - x))
        reach = (share * per_image(self.before, x)).to(x.dtype)
        return self.point.clamp(x - reach, x + reach)

    def _hop(self, iteration: int, directions: int) -> None:
        """Take the longest step whose end is misclassified."""
        update = self._direction(iteration, directions)
        longest = length_of(self.rows, self.point - self.rows.x) / math.sqrt(iteration)
        hopped, begin = torch.zeros_like(longest, dtype=torch.bool), self.point
        for halved in range(LENGTHS):
            point = begin + per_image(longest * 0.5**halved, begin) * update
            point = point.clamp(self.rows.ball.clip_min, self.rows.ball.clip_max)
            across = self._across(point)
            self.point = torch.where(per_image(across & ~hopped, point), point, self.point)
            hopped = hopped | across

    def _direction(self, iteration: int, directions: int) -> Tensor:
        """The direction into the misclassified side, from the decisions after random steps.

        In l2 the direction has the length 1. In linf its elements are replaced by their signs.
        """
        ball, is_linf = self.rows.ball, self.rows.ball.norm == "linf"
        length = self.before / self.size
        if iteration == 1:
            length = torch.full_like(length, FIRST_LENGTH * (ball.clip_max - ball.clip_min))
        length, point = length[:, None], self.point.flatten(1)
        decided, weighted, plain = torch.zeros_like(length), torch.zeros_like(point), torch.zeros_like(point)
        together = max(1, self.most // len(point))
        for start in range(0, directions, together):
            steps = self._numbers(min(together, directions - start), "uniform" if is_linf else "normal")
            steps = 2 * steps - 1 if is_linf else steps
            points = (point + length * steps / steps.norm(dim=2, keepdim=True)).clamp(ball.clip_min, ball.clip_max)
            # The range of the pixels may have shortened the steps.
            steps = (points - point) / length
            signs = 2 * self._shares(points.reshape(-1, *self.point.shape[1:])).view(len(steps), -1, 1) - 1
            decided, plain = decided + signs.sum(0), plain + steps.sum(0)
            weighted = weighted + (signs * steps).sum(0)
        # Subtract the mean decision, because it says nothing about the direction. If all decisions are equal, the
        # difference would be 0, so nothing is subtracted.
        mean = decided / directions
        direction = (weighted - torch.where(mean.abs() == 1, 0.0, mean) * plain).view_as(self.point).to(point.dtype)
        if is_linf:
            return direction.sign()
        return direction / per_image(direction.flatten(1).norm(dim=1).clamp_min(TINY), direction)

"""Square (Andriushchenko et al., ECCV 2020): a random search with squares that needs no gradient.

Each proposal changes one square of an image, and is accepted if it raises the margin, which is the largest wrong logit
minus the true logit. The random numbers of an image depend only on the seed and the image's id, so that the result does
not depend on the batches. Three things are not in the paper:

- Few late proposals raise the margin, so several proposals are tried in one batch, and the best is taken.
- For a random model, the margin is the mean over several draws, and fresh draws decide whether an image has fallen. The
  margin of the present point is drawn again from time to time. Otherwise a lucky draw would block all better proposals.
- The search of an image can be given up if the decision boundary (its "border") is out of reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._tensors import per_image
from ..._validation import Count
from ...attacks.base import AttackContext, Ball, keeping, projected, times
from ...attacks.objective import Objective, ObjectiveStep
from ...ops import square_proposal
from ...ops.philox import Stream, philox, philox_key
from ...ops.square_proposal import PLACES, TINY, signs
from ...speed.graphs.step_loop import State, Steps, begin_steps
from . import engine
from .engine import ActiveSet, EngineAttack, JudgeContext, PaceMonitor

#: The number of queries in the authors' code.
QUERIES = 5000
#: By query: the number of proposals per image that one batch tries from this query on. At first every second proposal
#: is accepted, and the next should start from the accepted point. Later few are accepted.
TOGETHER = {0: 1, 100: 2, 500: 4, 1000: 8}
#: The number of queries for which random numbers are made at once.
BLOCK = 64
#: A round is one batch of proposals. After this number of rounds, the misclassified points are judged, fallen images
#: are removed, and a random model draws the margin of the present points again.
ROUNDS = 10
#: The queries after which images may be given up, and the largest assumed growth of a margin's rise per query.
GIVEN_UP_AFTER, TIMES = (500, 1000, 1500, 2000, 2500, 3000, 3500, 4000), 4.0
#: FIRST_SHARE: the share of an image that the first squares cover. HALVED_AFTER: the share is halved after each of
#: these queries.
FIRST_SHARE = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: In l2 and l1 the attack begins with a grid of TILES x TILES patterns.
TILES = 5
#: Two powers (p, d) for each norm. A pattern is scaled to the p-norm 1. A pyramid is the sum of squares around its
#: middle, and square k, counted from 1, has the value k ** -d.
SHAPES = {"l2": (2, 2), "l1": (1, 4)}


@dataclass(frozen=True, kw_only=True)
class Square(EngineAttack):
    """Square, an attack without gradients; the search of an image ends as soon as the image has fallen.

    Args:
        n_queries: number of proposals for each image and restart.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "square"
    uses_gradients: ClassVar[bool] = False
    code_version: ClassVar[str] = "6"

    loss: ClassVar[str] = "margin"

    n_queries: Count = QUERIES

    def name(self, context: AttackContext) -> str:
        queries = f", {self.n_queries} queries" if self.n_queries != QUERIES else ""
        return f"Square{queries}" + times(self.restarts)

    def may_end_early(self, context: AttackContext) -> bool:
        return self.give_up and self.draws(context) == 1 and self.n_queries > GIVEN_UP_AFTER[0]

    def ball(self, x: Tensor, y: Tensor, context: AttackContext) -> Ball:
        ball = super().ball(x, y, context)
        if x.dim() != 4:
            raise ValueError(f"x must be images [B, C, H, W] for Square, got {list(x.shape)}")
        return ball

    @torch.no_grad()
    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        for restart in range(self.restarts):
            left = active.left()
            if len(left) == 0:
                break
            if not engine.takes_every_size(left.device):
                # Copies of the first rows fill the batch up to one of few sizes, so that few graphs are needed.
                left = engine.repeated_to(left, engine.bucket(len(left), left.device))
            search = _SquareSearch(objective, active, left, context.seed + restart)
            with keeping(search.keep):
                search.run(self.n_queries, self.give_up and objective.eot_iter == 1)
            # Its loop would copy its state out of the buffers of the next loop.
            del search


@dataclass(frozen=True)
class SquareRound(ObjectiveStep):
    """A round of Square as a step that a CUDA graph can capture.

    Args:
        objective: the margin; its model scores the proposals.
        ball: the norm and the box of the images. The radius is in the state.
        together: the number of proposals for each image.
    """

    ball: Ball
    together: int

    def __call__(self, state: State) -> State:
        """Try some proposals for each image, and accept the best if its margin is higher than the present margin."""
        # The first proposals of all rows come first, then the second proposals of all rows, and so on.
        inputs = state["point"], state["x"], state["eps"], state["numbers"], state["edge"]
        points = square_proposal(*inputs, **self.ball.bounds, pattern=state.get("pattern"))
        share, margin = scored(self.objective, points, state["y"])
        if self.together > 1:
            margin, best = margin.view(self.together, -1).max(0)
            points = points.unflatten(0, (self.together, -1))[best, state["row"]]
            share = None if share is None else share.view(self.together, -1)[best, state["row"]]
        better = margin > state["margin"]
        point = torch.where(per_image(better, points), points, state["point"])
        new = {} if share is None else {"share": torch.where(better, share, state["share"])}
        return {"point": point, "margin": torch.maximum(margin, state["margin"]), **new}


def scored(objective: Objective, points: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
    """Two values for each proposal: the share of misclassified draws, or None for a single draw; and the margin.

    A margin of NaN counts as infinite if every draw is misclassified, and as minus infinite otherwise. With a single
    draw, NaN always means a misclassified draw.
    """
    if objective.eot_iter == 1:
        margin = objective.loss_of(points, y).nan_to_num(torch.inf, torch.inf, -torch.inf)
        return None, margin if margin.dtype == torch.float64 else margin.float()
    wrong, margin = objective.score(points, y)
    return wrong, torch.where(margin.isnan(), torch.where(wrong == 1, torch.inf, -torch.inf), margin)


class _SquareSearch:
    """One run of Square over the images with the indices ``left``, int64 ``[R]``.

    The loss of the objective is the margin, and its model scores the proposals.
    """

    def __init__(self, objective: Objective, active: ActiveSet, left: Tensor, seed: int | Tensor):
        self.objective, self.active, self.owner = objective, active, left
        self.x, self.y, self.ids, self.ball = active.x[left], active.y[left], active.ids[left], active.ball.take(left)
        self.random = partial(philox, philox_key(seed, left.device), stream=Stream.SQUARES)
        channels, width = self.x.shape[1], self.x.shape[3]
        count = channels * width if self.ball.norm == "linf" else TILES**2 * (1 + channels)
        self.numbers = self.random(self.ids, count)[:, 0]
        self.point = self._begin(self.numbers)
        self.monitor: PaceMonitor | None = None
        self.share, self.margin = scored(objective, self.point, self.y)
        # The margin that the point of each row had when the row was last judged. The first value is just below 0, so
        # that a point with margin 0, which lies on the border, is judged too.
        self.judged = torch.full_like(self.margin, -torch.finfo(self.margin.dtype).tiny)
        # The loop of the present rounds, which has the state, their number of proposals, and the edge of the squares.
        self.loop: Steps | None = None
        self.together = self.edge = 0

    def _begin(self, numbers: Tensor) -> Tensor:
        """Make the first points with stripes (linf) or a grid of patterns; the numbers ``[R, n]`` are from [0, 1)."""
        x, ball, (channels, height, width) = self.x, self.ball, self.x.shape[1:]
        if ball.norm == "linf":
            stripes = signs(numbers).view(len(x), channels, 1, width)
            return (x + per_image(ball.eps, x) * stripes).clamp(ball.clip_min, ball.clip_max).to(x.dtype)
        edge = max(1, min(height, width) // TILES)
        shapes = pattern(edge, ball.norm, x.device).to(numbers)
        delta = torch.zeros_like(x)
        turned, sign = numbers[:, : TILES**2], numbers[:, TILES**2 :].view(len(x), TILES**2, channels)
        top, left = ((size - edge * TILES) // 2 if edge > 1 else 0 for size in (height, width))
        for i in range(TILES**2):
            row, column = top + i // TILES * edge, left + i % TILES * edge
            tile = shapes[(turned[:, i] < 0.5).long()][:, None] * signs(sign[:, i])[:, :, None, None]
            place = delta[:, :, row : row + edge, column : column + edge]
            place += tile[:, :, : place.shape[2], : place.shape[3]].to(x.dtype)
        if ball.norm == "l1":
            return projected(x, (x + delta).to(x.dtype), ball)
        length = delta.square().sum((1, 2, 3), keepdim=True).sqrt() + TINY
        return (x + delta / length * per_image(ball.eps, x)).clamp(ball.clip_min, ball.clip_max).to(x.dtype)

    def _keep(self, index: Tensor | None) -> None:
        """Continue with some of the rows, or with all of them. `_read` was called after the last round."""
        if index is not None:
            self.loop = None
            engine.take_rows(self, index)

    def run(self, n_queries: int, give_up: bool = False) -> None:
        """Make ``n_queries`` queries for every image; with ``give_up``, images out of reach are removed earlier."""
        self.monitor = monitor = PaceMonitor(GIVEN_UP_AFTER, n_queries, TIMES) if give_up else None
        query = rounds = 0
        while query < n_queries:
            if query % BLOCK == 0:
                # Draw 0 was used for the first points, so query i takes draw i + 1.
                self.numbers = self.random(self.ids, PLACES + self.x.shape[1], draws=BLOCK, first_draw=query + 1)
            together = min(max(count for start, count in TOGETHER.items() if query >= start), n_queries - query)
            # A round must not use numbers of the next block.
            together = min(together, BLOCK - query % BLOCK)
            self._round(query, together)
            query, rounds = query + together, rounds + 1
            if rounds % ROUNDS == 0:
                self._read()
                self._shrink()
            if monitor is not None and monitor.due(query):
                self._read()
                lost = engine.some_of(monitor.lost(query, -self.margin))
                if lost is not None:
                    self.active.tried.index_fill_(0, self.owner[lost & monitor.came_nearer], True)
                    self._judge(lost.nonzero()[:, 0])
                    self._keep(self.active.rows_to_keep(self.owner, lost))
            if len(self.owner) == 0:
                return
        self._read()
        self.active.tried.index_fill_(0, self.owner, True)
        self._judge(slice(None))

    def keep(self) -> Tensor:
        """Remember the present points without a judgement, and return the best point of each image."""
        self._read()
        share = (self.margin >= 0).float() if self.share is None else self.share
        return self.active.keep_best(self.owner, self.point, torch.stack([share, self.margin]))

    def _judge(self, rows: slice | Tensor) -> None:
        """Let the model itself judge the points of some rows, and remember the best."""
        self.active.judge_points(self.owner[rows], self.point[rows], self.margin[rows])

    def _round(self, query: int, together: int) -> None:
        """Do the round that begins with a query, and makes ``together`` queries for each image."""
        first, edge = query % BLOCK, self._side(query)
        numbers = self.numbers[:, first : first + together]
        if self.loop is None or self.together != together:
            self._read()
            # Forget the old loop first. Otherwise it would copy its state out of the buffers of the new one.
            self.loop = None
            state = {"x": self.x, "eps": self.ball.eps, "y": self.y.repeat(together), "point": self.point}
            state |= {"margin": self.margin, "row": torch.arange(len(self.y), device=self.x.device)}
            state |= {} if self.share is None else {"share": self.share}
            state |= {"numbers": numbers, **self._window(edge)}
            function = SquareRound(self.objective, self.ball, together)
            self.loop = begin_steps(self.objective.graphs, function, state)
        else:
            # The edge is a tensor, so that one graph serves for all edges.
            self.loop.put(numbers=numbers, **(self._window(edge) if edge != self.edge else {}))
        self.together, self.edge = together, edge
        self.loop.advance()

    def _side(self, query: int) -> int:
        height, width = self.x.shape[2:]
        return side(query, height, width, 1 if self.ball.norm == "linf" else 3)

    def _window(self, edge: int) -> State:
        """The edge of the squares and their pattern, as tensors of the same shape for all edges."""
        # The tensor is made on the device, because a copy to the device would wait for the device.
        window = {"edge": torch.full((), edge, dtype=torch.int64, device=self.x.device)}
        if self.ball.norm != "linf":
            more = self._side(0) - edge
            window["pattern"] = F.pad(pattern(edge, self.ball.norm, self.x.device), (0, more, 0, more))
        return window

    def _read(self) -> None:
        """Take the points, margins and shares from the loop of the rounds."""
        if self.loop is not None:
            names = ["point", "margin"] if self.share is None else ["point", "margin", "share"]
            vars(self).update(self.loop.values(*names))

    def _shrink(self) -> None:
        """Let the model itself judge the misclassified points, and remove the images that have fallen."""
        share = self.share
        if share is None:
            share = (self.margin > self.judged).to(self.margin.dtype)
            self.judged = torch.maximum(self.margin, self.judged)
        share, fell = self.active.confirm_successes(self.owner, self.point, share)
        self.share = None if self.share is None else share
        if fell:
            self._keep(self.active.rows_to_keep(self.owner))
        if self.objective.eot_iter > 1 and len(self.owner):
            # The highest of many noisy margins is partly luck, so the margin of the present point is drawn again.
            self.share, self.margin = scored(self.objective, self.point, self.y)
            if self.loop is not None and self.share is not None:
                self.loop.put(share=self.share, margin=self.margin)


def side(query: int, height: int, width: int, least: int = 1) -> int:
    """Return the edge of the squares at a query, in pixels, at least ``least``; queries are counted from 0."""
    share = FIRST_SHARE / 2 ** sum(query > after for after in HALVED_AFTER)
    edge = max(round(math.sqrt(share * height * width)), least)
    # The patterns of l2 and l1 need a pixel in the middle, so the edge is odd.
    return min(edge + (least > 1 and edge % 2 == 0), height, width)


@cache
def pattern(edge: int, norm: str, device: torch.device) -> Tensor:
    """Return two patterns of norm 1, float32 ``[2, edge, edge]``, each with two pyramids of opposite signs."""
    # The patterns are cached for each device, because a copy to the GPU in every query would wait for the GPU.
    power, decay = SHAPES[norm]
    half = torch.zeros(edge, edge, device="cpu")
    for first, rows, sign in ((0, edge // 2, 1.0), (edge // 2, edge - edge // 2, -1.0)):
        middle = (rows // 2, edge // 2)
        for ring in range(max(rows // 2, edge // 2) + 1):
            top, left = max(middle[0] - ring, 0), max(middle[1] - ring, 0)
            part = half[first : first + rows]
            part[top : middle[0] + ring + 1, left : middle[1] + ring + 1] += sign / (ring + 1) ** decay
    both = torch.stack([half, half.T]).flatten(1)
    return (both / both.abs().pow(power).sum(1, keepdim=True).pow(1 / power)).unflatten(1, (edge, edge)).to(device)

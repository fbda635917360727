"""Square (Andriushchenko et al., ECCV 2020): a random search with squares that asks for no gradient.

Each proposal changes one square of an image and is kept if it raises the margin. Every image has random numbers of its
own, made from the seed and its id, so that batches do not matter. Four things are not in the paper: of late proposals,
of which few are kept, several are judged in one batch and the best is kept; a random model's margin is the mean over
several draws, and that of the point to beat is drawn afresh now and then, so that no lucky draw stands forever; an
image has fallen by the share of fresh draws that it fails; and images whose border is out of reach can be given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import check_literal
from ..ops.philox import Stream, philox
from ..protocols import Classifier
from .arguments import Fallen, NormName, Precision, check_at_least_one, check_images, check_seed, check_switch
from .ball import Ball, ball_around
from .base import AttackContext, EngineAttack
from .draws import Objective, drawn_once_per_call
from .engine.active_set import ActiveSet
from .engine.gradient_copy import COMPARED, GradientCopies, gradient_copy
from .engine.judge import Judge
from .engine.reach import Reach, some_of
from .engine.squares import Proposals
from .frozen_model import frozen

#: The authors' own number of queries.
QUERIES = 5000
#: Proposals judged in one batch, from this query on. Early every second one is kept, late hardly any.
TOGETHER = {0: 1, 100: 2, 500: 4, 1000: 8}
#: Random numbers are made for so many queries at once.
BLOCK = 64
#: After so many rounds the batch may shrink, and the point to beat is judged by fresh draws.
ROUNDS = 10
#: After how many queries images are given up that are out of reach, and by how much their pace may still rise.
GIVEN_UP_AFTER, TIMES = (1500, 2000, 2500, 3000, 3500, 4000), 4.0


def square(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    n_queries: int = QUERIES,
    give_up: bool = False,
    norm: NormName = "linf",
    eot_iter: int = 1,
    restarts: int = 1,
    fallen: Fallen = "all",
    judge_draws: int | None = None,
    precision: Precision = "float32",
    copies: GradientCopies | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """Square, without gradients; images leave it as soon as they have fallen.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``; an ``nn.Module`` is in evaluation mode meanwhile.
        x: images, floating point ``[B, C, H, W]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        n_queries: proposals for each image and restart.
        give_up: whether an image is given up after 1,500 queries or more, once it would not fall in those that are left
            if its margin rose four times as fast as in the last half of those asked. With ``eot_iter`` above 1, when
            margins are noisy, none is.
        norm: "linf", "l2" or "l1".
        eot_iter: draws of a random model averaged for each proposal.
        restarts: runs, each for the images that have not fallen.
        fallen: of a random model, by which share of fresh draws an image falls: "any", "majority" or "all".
        judge_draws: fresh draws for that; None: as many as ``eot_iter``.
        precision: what proposals are judged in, "float32", "bfloat16" or "auto"; a success is always judged by the
            model itself.
        copies: keeps a copy in bfloat16 for the next attack, if given.
        seed: of everything random.
        sample_ids: int64 ``[B]``; an image's proposals depend on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; None: no limit.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        Per image the point that made it fall, or the one of the highest margin; shape and dtype of x.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: a wrong shape, dtype, name, count or range; or a model that writes to its input.
    """
    check_images(x, y, clip_min, clip_max)
    if x.dim() != 4:
        raise ValueError(f"x must be images [B, C, H, W] for Square, got {list(x.shape)}")
    ball = ball_around(x, eps, norm, clip_min, clip_max)
    check_literal("fallen", fallen, Fallen)
    check_literal("precision", precision, Precision)
    check_switch("give_up", give_up)
    check_at_least_one(
        n_queries=n_queries, eot_iter=eot_iter, restarts=restarts, judge_draws=judge_draws,
        max_forward_batch=max_forward_batch,
    )  # fmt: skip
    if len(x) == 0:
        return x.clone()
    x = x.detach().clone()
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    judges = judge_draws or eot_iter
    with frozen(model), torch.no_grad():
        apart = drawn_once_per_call(model, x, max(judges, eot_iter), max_forward_batch)
        active = ActiveSet(x, y, Judge(model, fallen, judges, max_forward_batch, apart))
        source = gradient_copy(model, x[:COMPARED], precision, copies)
        objective = Objective(source, "margin", eot_iter, max_forward_batch, apart=apart)
        with frozen(source):
            for restart in range(restarts):
                left = active.left()
                if len(left) == 0:
                    break
                search = _Search(
                    objective, active, (x[left], y[left], left), ball.of(left), (seed + restart, ids[left])
                )
                search.run(n_queries, give_up and eot_iter == 1)
    return active.found


class _Search:
    """One run over the images that are left.

    Args:
        objective: the margin, on what proposals are judged by.
        active: the images.
        images: clean images, labels and indices of those that are left, ``[R, ...]``.
        ball: around them.
        key: the seed, and the images' ids, int64 ``[R]``.
    """

    def __init__(
        self,
        objective: Objective,
        active: ActiveSet,
        images: tuple[Tensor, Tensor, Tensor],
        ball: Ball,
        key: tuple[int, Tensor],
    ):
        self.objective, self.active, self.ball = objective, active, ball
        seed, self.ids = key
        self._take(*images)
        check_seed(seed)
        self.key = torch.full((1,), seed, dtype=torch.int64, device=self.x.device)
        self.propose = Proposals((self.x.shape[1], self.x.shape[2], self.x.shape[3]), ball.norm)

    def run(self, n_queries: int, give_up: bool = False) -> None:
        """Ask so many queries of every image that is left.

        Args:
            n_queries: how many.
            give_up: whether images whose border is out of reach leave earlier.
        """
        first = self._numbers(self.propose.first_numbers, 0, 1)[:, 0]
        self.point = self.propose.begin(self.x, self.ball, first)
        self.share, self.margin = self._scored(self.point)
        # the margins of the points that were judged: one on the border, of margin 0, is worth a judgement too
        self.judged = torch.full_like(self.margin, -torch.finfo(self.margin.dtype).tiny)
        reach = Reach(GIVEN_UP_AFTER, n_queries, TIMES) if give_up else None
        query = rounds = 0
        while query < n_queries:
            if query % BLOCK == 0:
                # the first draw is that of the beginning
                numbers = self._numbers(self.propose.numbers, query + 1, BLOCK)
            together = min(max(count for start, count in TOGETHER.items() if query >= start), n_queries - query)
            # no round reaches into the next block
            together = min(together, BLOCK - query % BLOCK)
            self._round(query, numbers[:, query % BLOCK : query % BLOCK + together])
            query, rounds = query + together, rounds + 1
            if rounds % ROUNDS == 0:
                numbers = self._shrunk(numbers, reach)
            lost = some_of(reach.lost(query, -self.margin)) if reach is not None and reach.due(query) else None
            if lost is not None:
                self._offer(lost.nonzero()[:, 0])
                numbers = self._keep(self.active.kept(self.owner, lost), numbers, reach)
            if len(self.owner) == 0:
                return
        self._offer(slice(None))

    def _offer(self, rows: slice | Tensor) -> None:
        """Judge the points of some rows by the model itself, and keep the best."""
        owner, points, margin = self.owner[rows], self.point[rows], self.margin[rows]
        share, _ = self.active.settle(owner, points, torch.ones_like(margin))
        self.active.offer(owner, points, torch.stack([share, margin]))

    def _numbers(self, count: int, first: int, draws: int) -> Tensor:
        return philox(self.key, self.ids, count, stream=Stream.SQUARES, draws=draws, first_draw=first)

    def _round(self, query: int, numbers: Tensor) -> None:
        """Judge some proposals for each image, and keep the best where it is better than what is known."""
        points = self.propose.next(query, self.x, self.point, self.ball, numbers)
        share, margin = self._scored(points)
        if numbers.shape[1] > 1:
            margin, best = margin.view(-1, len(self.owner)).max(0)
            points = points.unflatten(0, (-1, len(self.owner)))[best, self.row]
            share = None if share is None else share.view(-1, len(self.owner))[best, self.row]
        better = margin > self.margin
        self.point = torch.where(per_image(better, points), points, self.point)
        self.margin = torch.maximum(margin, self.margin)
        if share is not None and self.share is not None:
            self.share = torch.where(better, share, self.share)

    def _scored(self, points: Tensor) -> tuple[Tensor | None, Tensor]:
        """The margin of points, of each row's first proposal first, and of several draws the share that is wrong.

        A margin that is NaN is the largest where every draw is wrong, and that of a single draw is NaN nowhere else.
        """
        y = self.labels[: len(points)]
        if self.objective.eot_iter == 1:
            margin = self.objective.loss_of(points, y).nan_to_num(torch.inf, torch.inf, -torch.inf)
            return None, margin if margin.dtype == torch.float64 else margin.float()
        wrong, margin = self.objective.score(points, y)
        return wrong, torch.where(margin.isnan(), torch.where(wrong == 1, torch.inf, -torch.inf), margin)

    def _shrunk(self, numbers: Tensor, reach: Reach | None) -> Tensor:
        """Judge what seems to have fallen and let it leave; the numbers of the rows that stay."""
        share = self.share
        if share is None:
            share = (self.margin > self.judged).to(self.margin.dtype)
            self.judged = torch.maximum(self.margin, self.judged)
        share, fell = self.active.settle(self.owner, self.point, share)
        self.share = None if self.share is None else share
        numbers = self._keep(self.active.kept(self.owner) if fell else None, numbers, reach)
        if self.objective.eot_iter > 1 and len(self.owner):
            # the highest of many noisy margins is high by luck
            self.share, self.margin = self._scored(self.point)
        return numbers

    def _keep(self, rows: Tensor | None, numbers: Tensor, reach: Reach | None) -> Tensor:
        """Go on with some of the rows, or with all; their numbers."""
        if rows is None:
            return numbers
        self._take(self.x[rows], self.y[rows], self.owner[rows])
        self.ids, self.ball, self.point = self.ids[rows], self.ball.of(rows), self.point[rows]
        self.margin, self.judged = self.margin[rows], self.judged[rows]
        self.share = None if self.share is None else self.share[rows]
        if reach is not None:
            reach.take(rows)
        return numbers[rows]

    def _take(self, x: Tensor, y: Tensor, owner: Tensor) -> None:
        """The images of the rows, with what every query needs of them made once."""
        self.x, self.y, self.owner = x, y, owner
        self.labels, self.row = y.repeat(max(TOGETHER.values())), torch.arange(len(y), device=y.device)


@dataclass(frozen=True, kw_only=True)
class Square(EngineAttack):
    """Square, as a row of an evaluation; it needs no gradients.

    Args:
        n_queries: proposals for each image and restart.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "square"

    n_queries: int = QUERIES

    def __post_init__(self) -> None:
        check_at_least_one(n_queries=self.n_queries)
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        return self.with_restarts("Square" + (f", {self.n_queries} queries" if self.n_queries != QUERIES else ""))

    def cost(self, context: AttackContext) -> None:
        """None: it stops early where it has won."""
        return None

    def revision(self) -> str:
        return "4"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        return square(target, x, y, n_queries=self.n_queries, **self.options(context))

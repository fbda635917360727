"""Which images are still attacked.

A search works on rows. Each row belongs to an image; several rows belong to the same image where several targets or
restarts are tried at once. When a row's point makes its image fall, every row of the image leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..search import better_of
from . import buckets
from .gradient_copy import FEWEST_WEIGHTS, matrix_weights
from .judge import Judge

#: Draws per image from which an image is costly, whatever the model.
MANY_DRAWS = 4


def is_costly(judge: Judge) -> bool:
    """Whether a step of one image takes a CPU longer than to prepare for another batch size.

    Args:
        judge: of the model that is attacked.
    """
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
        found: the best point known of each image, ``[N, ...]``; x at first.
        score: its share of misclassified draws and its loss, ``[2, N]``; minus infinity at first.
        fallen: bool ``[N]``, which have fallen; none where they do not leave.
        felled_by: int64 ``[N]``, the number of the run to which an image fell; -1 where it fell to none.
        correct: bool ``[N]``, which clean images have not fallen by themselves.
        costly: whether a batch shrinks to every size on a CPU, and not to a few sizes.
    """

    def __init__(self, x: Tensor, y: Tensor, judge: Judge, *, leave: bool = True):
        self.y, self.judge, self.leave = y, judge, leave
        self.costly = is_costly(judge)
        self.found = x.clone()
        self.score = torch.full((2, len(x)), -torch.inf, device=x.device)
        self.felled_by = torch.full_like(y, -1)
        fallen = judge.fallen(judge.shares(x, y))
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
        claims = (self.judge.fallen(share) & ~self.fallen[owner]).nonzero()[:, 0]
        if len(claims) == 0:
            return share, False
        judged = self.judge.shares(points[claims], self.y[owner[claims]])
        share = share.index_copy(0, claims, judged.to(share.dtype))
        won = claims[self.judge.fallen(judged)]
        if len(won) == 0:
            return share, False
        # of several rows of an image the first: two of them written at once could mix
        first = torch.full_like(self.y, len(owner)).scatter_reduce(0, owner[won], won, "amin")
        won = won[first[owner[won]] == won]
        self.found[owner[won]] = points[won]
        self.fallen[owner[won]] = True
        self.felled_by[owner[won]] = torch.zeros_like(won) if run is None else run[won]
        return share, True

    def kept(self, owner: Tensor, lost: Tensor | None = None) -> Tensor | None:
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
            if buckets.takes_every_size(owner.device) or len(stays) == 0:
                return stays
            return buckets.repeated_to(stays, min(buckets.bucket(len(stays), owner.device), len(owner)))
        gone = self.fallen[owner]
        left = len(owner) - int(gone.sum())
        size = buckets.bucket(left, owner.device, self.costly) if left else 0
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
        self.found[image], self.score[:, image] = better_of(
            self.found[image], self.score[:, image], points[best], score[:, best].to(self.score.dtype)
        )

"""The base of attacks that search the nearest point across a decision boundary, which is called a border.

Such a search has no radius of its own. It succeeds for an image when a point across the border lies in the ball.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._tensors import per_image
from ..ball import projected
from ..objective import Gradient
from .row_batches import Rows, RowSearch, has_fallen, some_of

#: The images that an attack by `NearestSearch` returns, in the words of a docstring.
NEAREST_OR_IMAGE = (
    "Per image the misclassified point in the ball that was found; otherwise the nearest misclassified point, "
    "projected onto the ball, or the image itself."
)
_ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


class NearestSearch(RowSearch):
    """A run that remembers the nearest points across the border. It takes the arguments of `RowSearch`.

    Attributes:
        nearest: the nearest point across the border in each row, ``[R, ...]``; the first point of the row until a point
            across the border is found.
        distance: the distance from the image to this point in the norm of the ball, ``[R]``; infinite until a point
            across the border is found.
    """

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.nearest = self.point
        self.distance = torch.full_like(self.rows.ball.eps, torch.inf)

    def averaged(self, gradient: Gradient) -> Gradient:
        """Divide a gradient that is summed over the draws by the number of draws."""
        draws = self.objective.eot_iter
        return gradient if draws == 1 else gradient._replace(image=gradient.image / draws)

    def note(self, point: Tensor, across: Tensor) -> None:
        """Remember each row's point if ``across``, bool ``[R]``, is True and the point is nearer than all before."""
        far = length_of(self.rows, point - self.rows.x).to(self.distance.dtype)
        nearer = across & (far < self.distance)
        self.nearest = torch.where(per_image(nearer, point), point, self.nearest)
        self.distance = torch.where(nearer, far, self.distance)

    def ended(self, step: int, ends_across: bool = False) -> bool:
        """Remove the rows of fallen images and the rows that are given up, and tell whether no row is left.

        Args:
            step: the number of steps that were taken. The batch shrinks only after some of them.
            ends_across: whether the search of a row ends at the first point across the border, even outside the ball.
        """
        if not self.shrinks_after(step):
            return len(self.point) == 0
        rows = self.rows
        inside = (self.distance <= rows.ball.eps).float()
        judged, fell = self.active.confirm_successes(rows.owner, self.nearest, inside, rows.run)
        # A point that the model itself does not confirm is forgotten, and the search continues.
        self.distance = torch.where((inside > 0) & (judged < inside), torch.inf, self.distance)
        lost = self.out_of_reach(step, self.distance - rows.ball.eps)
        if lost is not None:
            self.see_given_up(lost.nonzero()[:, 0])
        elif ends_across:
            lost = some_of(self.distance.isfinite() & ~self.active.fallen[rows.owner])
        if lost is not None:
            index = lost.nonzero()[:, 0]
            if ends_across:
                self.active.tried.index_fill_(0, rows.owner[index], True)
            self._try(rows.take(index), self.nearest[index])
        kept = self.active.rows_to_keep(rows.owner, lost) if fell or lost is not None else None
        if kept is not None:
            self.take(kept)
        return len(self.point) == 0

    def finish(self) -> None:
        """Remember the last points if they are nearest, and try the nearest points of all rows."""
        self.note(self.point, has_fallen(self.objective.score(self.point, self.rows.labels)[0]))
        self.active.tried.index_fill_(0, self.rows.owner, True)
        self._try(self.rows, self.nearest)

    def _try(self, rows: Rows, nearest: Tensor) -> None:
        """Project the nearest points onto the ball, let the model judge them, and keep the best points."""
        cut = projected(rows.x, nearest, rows.ball)
        score = self.objective.score(cut, rows.labels)
        share, _ = self.active.confirm_successes(rows.owner, cut, torch.ones_like(score[0]), rows.run)
        self.active.keep_best(rows.owner, cut, torch.stack([share, score[1]]))


def length_of(rows: Rows, moved: Tensor) -> Tensor:
    """The length of each row's move in the norm of the ball, ``[R]``."""
    return torch.linalg.vector_norm(moved.flatten(1), ord=_ORDERS[rows.ball.norm], dim=1)


def border(point: Tensor, at_point: Gradient) -> tuple[Tensor, Tensor]:
    """The hyperplane where the linear approximation of the loss is 0: its normals ``[R, ...]`` and offsets ``[R]``.

    Args:
        point: images ``[R, ...]``.
        at_point: the loss and its gradient at these images, for one draw or averaged over the draws.
    """
    gradient = at_point.image.to(point.dtype)
    return gradient, (gradient * point).flatten(1).sum(1) - at_point.loss

"""The target classes of an attack: the wrong classes of highest logit, or those with the nearest borders."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..objective import Objective
from .row_batches import ActiveSet

#: The distance to the border is computed for this number of wrong classes: those with the highest logits. An attack
#: with more target classes than this computes the distance for as many classes as it has target classes.
CANDIDATES = 20
#: The order of the dual norm for each ball's norm. Within the ball a linear function changes by at most the radius
#: times the dual norm of its gradient.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """Return the ``count`` wrong classes of highest logit (None: all), in descending order, each int64 ``[B]``."""
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)


def nearest_borders(active: ActiveSet, objective: Objective, count: int | None) -> tuple[Tensor, ...]:
    """Find the classes whose borders are nearest to each image, by the linear approximation at the clean image.

    The distance to a border is the difference of the two logits, divided by the dual norm of its gradient (MALT:
    Melamed, Yehudai & Shamir, NeurIPS 2024, arXiv 2407.02240). It is computed for `CANDIDATES` or ``count`` classes of
    highest logit.
    """
    left, by_margin = active.left(), replace(objective, loss="margin_targeted")
    x, y = active.x[left], active.y[left]
    logits = active.logits[left]
    count = min(count or logits.shape[1], logits.shape[1] - 1)
    candidates = likeliest_wrong(logits, y, max(count, CANDIDATES))
    goals = torch.zeros((len(active.y), count), dtype=torch.int64, device=active.y.device)
    if len(left):
        distances = []
        for candidate in candidates:
            at_image = by_margin.gradient(x, torch.stack([y, candidate], 1))
            slope = torch.linalg.vector_norm(at_image.image.flatten(1), ord=DUAL[active.ball.norm], dim=1)
            # The gradient is a sum over the draws, but the loss is a mean. The loss is negative while the label has the
            # higher logit.
            distances.append(-objective.eot_iter * at_image.loss / slope.clamp_min(torch.finfo(slope.dtype).tiny))
        ranked = torch.stack(distances, 1).nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
        goals[left] = torch.stack(candidates, 1).gather(1, ranked[:, :count])
    return goals.unbind(1)

"""A random model that predicts by the majority of several draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocols import Classifier, SharesDraws, supports

#: If the class with most votes does not have the highest mean probability, its logit is raised above the highest by
#: this.
LEAD = 1e-3
#: Logits are clamped to plus and minus this number, because a softmax cannot take infinities.
LARGEST = 1e30


def undecided(logits: Tensor) -> Tensor:
    """Tell which predictions name no class, bool ``[...]``: a NaN, or a largest logit that is infinite and shared.

    A single infinity is a decision: CARSO's published output has them where it is sure.

    Args:
        logits: floating point ``[..., classes]``.
    """
    top = logits.topk(min(2, logits.shape[-1]), -1).values
    shared = (top[..., 0] == top[..., -1]) & top[..., 0].isinf() & (logits.shape[-1] > 1)
    return logits.isnan().any(-1) | shared


def majority(logits: Tensor) -> Tensor:
    """Logits whose largest belongs to the class that most of several draws name; ``[B, classes]``, float32 or float64.

    A count of votes has no gradient. So the logits are soft votes, the logarithms of the mean probabilities over the
    draws, and the gradient is theirs. If another class has most votes, its logit is raised until it leads; if several
    classes share most votes, the soft votes decide. A draw that names no class (`undecided`) makes the prediction NaN.

    Args:
        logits: logits of each draw, ``[draws, B, classes]``, floating point.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(undecided(logits)[..., None], torch.nan).clamp(-LARGEST, LARGEST)
    soft = logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    first = soft.detach().masked_fill(votes < votes.amax(1, keepdim=True), -torch.inf).argmax(1, keepdim=True)
    behind = soft.detach().amax(1, keepdim=True) - soft.detach().gather(1, first)
    return soft.scatter_add(1, first, torch.where(behind > 0, behind + LEAD, 0.0))


class MajorityVote(nn.Module):
    """A random model whose prediction is the class that most of several draws name, by `majority`.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``; its ``draw_logits`` is used if it has one.
        draws: how many vote, at least 1.

    Raises:
        ValueError: no draw.
    """

    def __init__(self, model: Classifier, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``, float32 or, of a model in float64, float64.

        Args:
            x: images ``[B, C, H, W]``.
        """
        if supports(self.model, SharesDraws):
            logits = cast(SharesDraws, self.model).draw_logits(x, self.draws)
        else:
            # Call the model for each draw, because it may draw once for all images of a call.
            logits = torch.stack([self.model(x) for _ in range(self.draws)])
        return majority(logits)

    def around(self, replace: Callable[[Classifier], Classifier]) -> MajorityVote:
        """The same vote over another model's draws.

        Args:
            replace: makes that model of the one inside.
        """
        # Copy this object instead of making a new one, because it may be of a subclass and have hooks.
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.model = replace(self.model)
        return other

"""The prediction of a random model by the majority of several draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocols import Classifier, SharesDraws, supports

#: If the class with the most votes does not have the largest logit, its logit is set to the largest plus this number.
LEAD = 1e-3
#: Logits are clamped to plus and minus this number, because a softmax of infinities is NaN.
LARGEST = 1e30


def undecided(logits: Tensor) -> Tensor:
    """Tell which predictions decide for no class: those with a NaN, or with several infinite largest logits."""
    top = logits.topk(min(2, logits.shape[-1]), -1).values
    shared = (top[..., 0] == top[..., -1]) & top[..., 0].isinf() & (logits.shape[-1] > 1)
    return logits.isnan().any(-1) | shared


def majority(logits: Tensor) -> Tensor:
    """Combine the logits of several draws by a majority vote over the predicted classes."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(undecided(logits)[..., None], torch.nan).clamp(-LARGEST, LARGEST)
    soft = logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    first = soft.detach().masked_fill(votes < votes.amax(1, keepdim=True), -torch.inf).argmax(1, keepdim=True)
    behind = soft.detach().amax(1, keepdim=True) - soft.detach().gather(1, first)
    return soft.scatter_add(1, first, torch.where(behind > 0, behind + LEAD, 0.0))


class MajorityVote(nn.Module):
    """Predicts with the `majority` of several draws of a random model.

    Args:
        model: function or module from images ``[B, C, H, W]`` to logits ``[B, classes]``. If the model has a method
            ``draw_logits``, this method is used.
        draws: number of draws, at least 1.
    """

    def __init__(self, model: Classifier, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]``, in float32, or in float64 if the model computes in float64."""
        if supports(self.model, SharesDraws):
            logits = cast(SharesDraws, self.model).draw_logits(x, self.draws)
        else:
            # Call the model separately for each draw, because it may use the same draw for all images of a call.
            logits = torch.stack([self.model(x) for _ in range(self.draws)])
        return majority(logits)

    def around(self, replace: Callable[[Classifier], Classifier]) -> MajorityVote:
        """Make a copy of this object that calls ``replace(model)``."""
        # Copy this object instead of making a new object. It may have hooks, and its class may be a subclass.
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.model = replace(self.model)
        return other

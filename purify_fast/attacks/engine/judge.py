"""When an image counts as fallen: by the model itself, by the share of fresh draws that it fails if that is random.

One misclassified draw says little about a random model: of a hundred steps one is lucky. So a success of a search is
only a claim until fresh draws have confirmed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...protocols import Classifier
from ..answers import ask
from ..objective import Objective


def has_fallen(share: Tensor) -> Tensor:
    """Which images have fallen, bool ``[B]``: those of which all draws are misclassified, by the share that are."""
    return share >= 1 - 1e-6


@dataclass(frozen=True)
class Judge:
    """Confirms or refuses what a search holds for a success.

    Args:
        model: the model under attack itself, not a copy of it.
        draws: fresh draws of a random model; 1 for one that predicts the same every time.
        max_forward_batch: images in one forward pass at most; None: no limit.
        apart: whether each draw is a forward pass of its own, as of a model that draws once per call.
    """

    model: Classifier
    draws: int = 1
    max_forward_batch: int | None = None
    apart: bool = False

    @torch.no_grad()
    def shares(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of fresh draws that are misclassified, ``[B]``.

        Args:
            x: images ``[B, ...]``.
            y: labels, int64 ``[B]``.
        """
        if len(x) == 0:
            return torch.zeros_like(y, dtype=torch.float32)
        objective = Objective(self.model, "margin", self.draws, self.max_forward_batch, apart=self.apart)
        return objective.score(x, y)[0]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """One prediction of each image, ``[B, classes]``.

        Args:
            x: images ``[B, ...]``.
        """
        return torch.cat([ask(self.model, part) for part in x.split(self.max_forward_batch or max(1, len(x)))])

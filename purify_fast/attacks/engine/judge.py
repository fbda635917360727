"""When an image counts as fallen: by the model itself, by the share of fresh draws that it fails if that is random.

One misclassified draw says little about a random model: of a hundred steps one is lucky. So a success of a search is
only a claim until fresh draws have confirmed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...protocols import Classifier
from ..arguments import Fallen
from ..asked import ask
from ..draws import Objective


def has_fallen(share: Tensor, rule: Fallen) -> Tensor:
    """Which images have fallen.

    Args:
        share: of the draws, how many are misclassified, ``[B]`` in [0, 1].
        rule: "any", "majority" (more than half) or "all" of the draws.

    Returns:
        Bool ``[B]``.
    """
    if rule == "any":
        return share > 0
    return share > 0.5 if rule == "majority" else share >= 1 - 1e-6


def standard_error(share: float, draws: int) -> float:
    """The standard error of a share of misclassified draws.

    Args:
        share: in [0, 1].
        draws: how many independent draws it was counted over, at least 1.

    Returns:
        Wilson's half width at one standard deviation, which is not 0 where all draws agree: four equal draws prove
        little.
    """
    return math.sqrt(share * (1 - share) / draws + 1 / (4 * draws**2)) / (1 + 1 / draws)


@dataclass(frozen=True)
class Judge:
    """Confirms or refuses what a search holds for a success.

    Args:
        model: the model under attack itself, not a copy of it.
        rule: by which share of the draws an image falls.
        draws: fresh draws of a random model; 1 for one that predicts the same every time.
        max_forward_batch: images in one forward pass at most; None: no limit.
        apart: whether each draw is a forward pass of its own, as of a model that draws once per call.
    """

    model: Classifier
    rule: Fallen = "all"
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

    def fallen(self, share: Tensor) -> Tensor:
        """Which images have fallen, bool ``[B]``.

        Args:
            share: of the draws that are misclassified, ``[B]``.
        """
        return has_fallen(share, self.rule)

"""Runs attacks one after the other without an evaluation, each on the images that withstood all earlier attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks.attacked_model import drawn_once_per_call, frozen
from ...attacks.base import Attack
from ...attacks.health import GradientHealth
from ...protocols import Classifier
from .engine.judge import Judge, has_fallen
from .judge_context import JudgeContext
from .model_tests import SAMPLE

#: The ``points`` that an attack has found, the ``share`` of the draws that misclassify each, and the attack's counts.
Found = dict[str, Any]


class AttackSequence:
    """Runs attacks one after the other, and remembers the best point of each image.

    ``share`` is the share of the draws that chose the best point, and misclassify it, ``[N]``. For a random model it is
    too high, because these draws made the choice: `accuracy` takes other draws.
    """

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, context: JudgeContext, device: torch.device | None = None
    ):
        self.model, self.x, self.y, self.context = model, x, y.to(x.device), context
        self.device = x.device if device is None else device
        self.images, self.judge = x.clone(), self._judge_by(context.judges(context.predictions(context.eot_iter)))
        self.share = self._shares_of_all(self.judge)

    @property
    def fallen(self) -> Tensor:
        """True for the images that every draw misclassifies, bool ``[N]``."""
        return has_fallen(self.share)

    def accuracy(self, draws: int) -> float:
        """The accuracy of a single draw on the best points, by ``draws`` fresh draws (1 for a deterministic model)."""
        if not self.context.draws_differ and draws == 1:
            return 1 - float(self.share.mean())
        return 1 - float(self._shares_of_all(self._judge_by(draws)).mean())

    def run(
        self, attack: Attack, kept: Callable[[Tensor, Callable[[], Found]], Found] = lambda part, make: make()
    ) -> GradientHealth:
        """Run an attack on the images that have not fallen yet, and return what it counted, if it counts.

        ``kept(part, make)`` returns what ``make()`` finds for the images with the indices ``part``, or has found.
        """
        health = GradientHealth()
        with frozen(self.model):
            for part in self._batches((~self.fallen).nonzero()[:, 0]):
                found = kept(part, partial(self._found, attack, part))
                points, share = (found.pop(name).to(self.x.device) for name in ("points", "share"))
                health.add(**found)
                better = share > self.share[part]
                self.images[part[better]] = points[better]
                self.share[part[better]] = share[better]
        return health

    def _found(self, attack: Attack, part: Tensor) -> Found:
        x, y = self.x[part].to(self.device), self.y[part].to(self.device)
        result = attack.search(self.model, x, y, replace(self.context, sample_ids=part.to(self.device)))
        counts = {} if result.health is None else {name: int(count) for name, count in result.health.counts.items()}
        return {"points": result.images, "share": self._shares(result.images, part, self.judge), **counts}

    def _batches(self, index: Tensor) -> tuple[Tensor, ...]:
        return index.split(self.context.batch_size or max(1, len(index))) if len(index) else ()

    def _judge_by(self, draws: int) -> Judge:
        most = self.context.max_forward_batch
        with frozen(self.model):
            apart = drawn_once_per_call(self.model, self.x[:SAMPLE].to(self.device), draws, most)
        return Judge(self.model, draws, most, apart)

    def _shares_of_all(self, judge: Judge) -> Tensor:
        """The shares of the draws that misclassify the best points, ``[N]``."""
        parts = self._batches(torch.arange(len(self.x), device=self.x.device))
        with frozen(self.model):
            return torch.cat([self._shares(self.images[part].to(self.device), part, judge) for part in parts])

    def _shares(self, points: Tensor, part: Tensor, judge: Judge) -> Tensor:
        return judge.shares(points, self.y[part].to(self.device)).to(self.x.device)

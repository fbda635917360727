"""Attacks one after the other, each on the images that those before it left, without an evaluation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..protocols import Classifier
from .attacked_model import drawn_once_per_call, frozen
from .base import Attack, AttackContext
from .engine.rows import Judge, has_fallen

#: Images on which it is tried how a model draws.
FEW = 8


class AttackSequence:
    """The images of attacks in turn, and what became of them.

    Args:
        model: images to logits; an ``nn.Module`` is frozen while it is attacked, then restored.
        x: images, float32 ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``, on any device.
        context: what the attacks are told; its ``sample_ids`` are not looked at.
        device: where the model computes; None: where the images are.

    Attributes:
        images: the best point known of each image, ``[N, C, H, W]``; the image itself where none is better.
        share: the share of fresh draws of the model that misclassify it, ``[N]``.
    """

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext, device: torch.device | None = None
    ):
        self.model, self.x, self.y, self.context = model, x, y.to(x.device), context
        self.device = x.device if device is None else device
        draws, most = context.judges(context.predictions(context.eot_iter)), context.max_forward_batch
        with frozen(model):
            apart = drawn_once_per_call(model, x[:FEW].to(self.device), draws, most)
            self.judge = Judge(model, draws, most, apart)
            self.images, self.share = x.clone(), torch.zeros(len(x), device=x.device)
            for part in self._batches(torch.arange(len(x), device=x.device)):
                self.share[part] = self._shares(x[part].to(self.device), part)

    @property
    def fallen(self) -> Tensor:
        """Which images have fallen, bool ``[N]``: every draw misclassifies them."""
        return has_fallen(self.share)

    def run(self, attack: Attack) -> None:
        """Let an attack look for what the ones before it did not find."""
        with frozen(self.model):
            for part in self._batches((~self.fallen).nonzero()[:, 0]):
                x, y = self.x[part].to(self.device), self.y[part].to(self.device)
                told = replace(self.context, sample_ids=part.to(self.device))
                points = attack.search(self.model, x, y, told)
                share = self._shares(points, part)
                better = share > self.share[part]
                self.images[part[better]] = points.to(self.x.device)[better]
                self.share[part[better]] = share[better]

    def _batches(self, index: Tensor) -> tuple[Tensor, ...]:
        return index.split(self.context.batch_size or max(1, len(index))) if len(index) else ()

    @torch.no_grad()
    def _shares(self, points: Tensor, part: Tensor) -> Tensor:
        return self.judge.shares(points, self.y[part].to(self.device)).to(self.share)

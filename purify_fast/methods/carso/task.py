"""CARSO's training as a task of `purify_fast.training.fit`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._process import processes
from ...training.length import RunLength
from ...training.lookahead import Lookahead
from ...training.schedules import carso_published, carso_v1_published, one_cycle
from ...training.task import Batch, Metrics
from ..base import PurifierTask
from .config import CarsoConfig, atom_size
from .defence import Carso
from .losses import first_kl, training_loss


class CarsoTask(PurifierTask[Carso]):
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is, unless ``joint``.

    Args:
        defence: what is trained.
        config: how; its precision decides whether the defence is accelerated.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.

    Raises:
        ValueError: from `training_step`, a batch too small to hold adversarial examples.
    """

    name = "carso"
    config: CarsoConfig

    def __init__(self, defence: Carso, config: CarsoConfig, origin: str = "scratch"):
        super().__init__(defence, config, origin)
        defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        if config.joint:
            defence.release_classifier()
        else:  # released by an earlier task, perhaps
            defence.classifier.requires_grad_(False)
        trainable = [p for p in defence.parameters() if p.requires_grad]
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "foreach": True}
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(trainable, **options)
        else:
            inner = torch.optim.RAdam(trainable, decoupled_weight_decay=True, **options)
            self.optimizer = Lookahead(inner, config.lookahead_steps, config.lookahead_alpha)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return training_loss(self.defence, batch, self.config, self.graphs)

    def terms(self, length: RunLength) -> dict[str, int]:
        config = self.config
        self._check_last_batch(length)
        if config.attack_target == "pipeline":
            acts = {"cross_entropy" if config.targets == "labels" else "divergence": 0}
            return acts | ({"reconstruction": 0} if config.reconstruction_weight > 0 else {})
        if config.beta == 0:
            return {"reconstruction": 0}
        delay, unit = config.kl_delay_of(length.epochs)
        kl = length.check_acts(
            length.first_step(*first_kl(delay, unit)),
            argument="kl_delay",
            value=f"{config.kl_delay:g} ({'share of the epochs' if config.kl_delay_unit == 'share' else unit})",
            weight=f"beta {config.beta:g}",
        )
        return {"reconstruction": 0, "kl": kl}

    def _check_last_batch(self, length: RunLength) -> None:
        """ValueError where an epoch's last batch is kept, and is too small to be attacked."""
        config, images = self.config, length.last_batch
        if config.attack_target == "classifier" and images is not None and images != length.batch_size:
            try:
                atom_size(images // processes()[1], config.adversarial_fraction, config.allow_no_adversarial)
            except ValueError as error:
                raise ValueError(f"drop_last False keeps a last batch of {images} images: {error}") from error

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        peak = self.config.learning_rate
        if self.config.schedule == "one_cycle":
            return one_cycle(progress, peak)
        return (carso_published if self.config.schedule == "published" else carso_v1_published)(epoch, epochs, peak)

    def validate(self, batch: Batch) -> Metrics:
        """The training's loss per image, and its metrics.

        Args:
            batch: held-out images.
        """
        # The last batch may be too small to be attacked. The mean over all batches weights each by its images, so that
        # the sum over a batch would count them twice.
        config = replace(self.config, allow_no_adversarial=True, reduction="mean")
        with torch.no_grad():
            loss, metrics = training_loss(self.defence, batch, config, self.graphs)
        return {"loss": loss.detach(), **metrics}

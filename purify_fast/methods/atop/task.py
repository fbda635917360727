"""AToP's training as a task of `purify_fast.training.fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...training.length import RunLength
from ...training.schedules import one_cycle
from ...training.task import Batch, Metrics, Update
from ..base import PurifierTask
from .config import AtopConfig
from .defence import Atop
from .discriminator import PatchDiscriminator, patch_depth
from .losses import computed_precision, discriminator_loss, generator_loss, passes


class AtopTask(PurifierTask[Atop]):
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is.

    Args:
        defence: what is trained.
        config: how; its precision decides whether the defence is accelerated.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.

    With ``gan_grad`` a discriminator is made from torch's global generator and plays along: each step first trains it,
    then the purifier. It is kept in checkpoints, not in the saved defence.
    """

    name = "atop"
    config: AtopConfig

    def __init__(self, defence: Atop, config: AtopConfig, origin: str = "scratch"):
        super().__init__(defence, config, origin)
        # one that computes so already stays as it was made, compiled perhaps
        if computed_precision(defence) != config.precision.replace("tf32", "float32"):
            defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        defence.classifier.requires_grad_(False)
        self.discriminator: nn.Module | None = None
        trained = [p for p in defence.purifier.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the purifier has no parameters to train")
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "foreach": True}
        self._optimizers: dict[str, torch.optim.Optimizer] = {"purifier": torch.optim.Adam(trained, **options)}
        if config.gan_grad:
            channels, height, width = defence.image_shape
            discriminator = PatchDiscriminator(
                channels + 1, config.discriminator_width, patch_depth((height, width))
            ).to(trained[0].device)
            self.discriminator = discriminator
            # what is trained together is one checkpoint
            self.model = nn.ModuleDict({"defence": defence, "discriminator": discriminator})
            self._optimizers["discriminator"] = torch.optim.Adam(discriminator.parameters(), **options)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def updates(self, batch: Batch) -> Iterator[Update]:
        if self.discriminator is None:
            yield Update("purifier", *self.training_step(batch))
            return
        one_pass, config = passes(self.defence, batch, self.config, self.graphs), self.config
        judged = discriminator_loss(self.discriminator, one_pass, config.gan_fake)
        yield Update("discriminator", judged, {})
        # by the discriminator as it is after its own step
        deceived = generator_loss(self.discriminator, one_pass)
        metrics = {**one_pass.metrics, "discriminator": judged.detach(), "deceived": deceived.detach()}
        yield Update("purifier", one_pass.loss + config.gan_weight * deceived, metrics)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The purifier's loss and metrics, of the discriminator as it is.

        Args:
            batch: the images.
        """
        one_pass = passes(self.defence, batch, self.config, self.graphs)
        if self.discriminator is None:
            return one_pass.loss, one_pass.metrics
        deceived = generator_loss(self.discriminator, one_pass)
        return one_pass.loss + self.config.gan_weight * deceived, {
            **one_pass.metrics,
            "deceived": deceived.detach(),
        }

    def terms(self, length: RunLength) -> dict[str, int]:
        config = self.config
        acts = {"reconstruction": 0} if config.reconstruction_weight > 0 else {}
        if config.cls_weight > 0:
            acts["cross_entropy"] = length.check_acts(
                length.first_step(config.cls_delay, config.cls_delay_unit),
                argument="cls_delay",
                value=f"{config.cls_delay} {config.cls_delay_unit}",
                weight=f"cls_weight {config.cls_weight:g}",
            )
        if self.discriminator is not None and config.gan_weight > 0:
            acts["deceived"] = 0
        return acts

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        rate = self.config.learning_rate
        return rate if self.config.schedule == "constant" else one_cycle(progress, rate)

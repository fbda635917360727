"""AToP's training as a task of `purify_fast.training.fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._fingerprint import weights_fingerprint
from ...training.attack import settings
from ...training.length import RunLength
from ...training.schedules import one_cycle
from ...training.task import Batch, Metrics, Task, Update, check_labels, check_shape
from .config import AtopConfig
from .defence import Atop
from .discriminator import PatchDiscriminator, patch_depth
from .losses import computed_precision, discriminator_loss, generator_loss, passes


class _Players(nn.Module):
    """What is trained together: one checkpoint."""

    def __init__(self, defence: Atop, discriminator: nn.Module):
        super().__init__()
        self.defence, self.discriminator = defence, discriminator


class AtopTask(Task):
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is.

    Args:
        defence: what is trained.
        config: how; its precision decides whether the defence is accelerated.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.

    With ``gan_grad`` a discriminator is made from torch's global generator and plays along: each step first trains it,
    then the purifier. It is kept in checkpoints, not in the saved defence.
    """

    def __init__(self, defence: Atop, config: AtopConfig, origin: str = "scratch"):
        self.defence, self.config, self.origin = defence, config, origin
        self.classifier = weights_fingerprint(defence.classifier)
        # one that computes so already stays as it was made, compiled perhaps
        self.tf32 = config.precision == "tf32"
        if computed_precision(defence) != config.precision.replace("tf32", "float32"):
            defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        defence.classifier.requires_grad_(False)
        self.discriminator: nn.Module | None = None
        self.model: nn.Module = defence
        trained = [p for p in defence.purifier.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the purifier has no parameters to train")
        if config.gan_grad:
            channels, height, width = defence.image_shape
            depth = patch_depth((height, width))
            discriminator = PatchDiscriminator(channels + 1, config.discriminator_width, depth)
            self.discriminator = discriminator.to(trained[0].device)
            self.model = _Players(defence, self.discriminator)
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "foreach": True}
        self.optimizer = torch.optim.Adam(trained, **options)
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if self.discriminator is not None:
            self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), **options)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found = {"purifier": self.optimizer}
        if self.discriminator_optimizer is not None:
            found["discriminator"] = self.discriminator_optimizer
        return found

    def updates(self, batch: Batch) -> Iterator[Update]:
        if self.discriminator is None:
            yield Update("purifier", *self.training_step(batch))
            return
        made, config = passes(self.defence, batch, self.config, self.graphs), self.config
        judged = discriminator_loss(self.discriminator, made, config.gan_fake)
        yield Update("discriminator", judged, {})
        # by the discriminator as it is after its own step
        deceived = generator_loss(self.discriminator, made)
        metrics = {**made.metrics, "discriminator": judged.detach(), "deceived": deceived.detach()}
        yield Update("purifier", made.loss + config.gan_weight * deceived, metrics)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The purifier's loss and metrics, of the discriminator as it is.

        Args:
            batch: the images.
        """
        made = passes(self.defence, batch, self.config, self.graphs)
        if self.discriminator is None:
            return made.loss, made.metrics
        deceived = generator_loss(self.discriminator, made)
        return made.loss + self.config.gan_weight * deceived, {**made.metrics, "deceived": deceived.detach()}

    @property
    def result(self) -> Atop:
        return self.defence

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

    def describe(self) -> dict[str, Any]:
        facts = {"defence": self.defence.arguments, "classifier": self.classifier}
        return {"task": "atop", **settings(self.config), **facts, "origin": self.origin}

    def finish(self) -> None:
        super().finish()
        self.defence.refresh()

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        check_shape(shape, self.defence.image_shape)
        check_labels(classes, self.defence.num_classes)

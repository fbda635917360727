"""Training AToP's purifier: pre-training, fine-tuning as published, and fine-tuning through the whole pipeline (ours).

With x' adversarial, t a random transform of x' (in [-1, 1]), (x1, x2) = g(t, m) the coarse and the refined image,

    L = w_adv L_G + w (mean |s - x1| + mean |s - x2|) + lambda CE(f((x2 + 1) / 2), y)

Source: arXiv 2401.16352, section 3, and its official code, whose L1 goes to s = x' (the released notebooks) or to
s = x, with a second pass on clean x (the logged run). The classifier f is frozen. L_G = -mean D(x2, m) of a hinge GAN,
L_D = mean relu(1 - D(s, m)) / 2 + mean relu(1 + D(x2, m)) / 2; in the official code its gradient never reaches g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._fingerprint import weights_fingerprint
from ..._process import processes
from ...attacks import fgsm, pgd
from ...training.attack import settings
from ...training.distributed import average_
from ...training.loop import Batch
from ...training.schedules import one_cycle
from .config import AtopConfig
from .defence import Atop
from .discriminator import PatchDiscriminator, patch_depth


def attacked(defence: Atop, batch: Batch, config: AtopConfig) -> Tensor:
    """x' as the config makes it: shape and dtype of the batch's images."""
    if config.attack_method == "none":
        return batch.x
    attack = config.attack.at_epoch(batch.epoch, batch.epochs)
    options: dict[str, Any] = {"eps": attack.eps, "norm": attack.norm}
    if config.attack_method == "pgd":
        options |= {"steps": attack.steps, "alpha": attack.step_size(attack.eps), "random_start": attack.random_start}
        options |= {"seed": batch.seed, "sample_ids": batch.sample_ids}
    method = pgd if config.attack_method == "pgd" else fgsm
    if config.attack_target == "classifier":
        return method(defence.frozen_classifier, batch.x, batch.y, **options)
    rank, world = processes()
    # Where the images stand in the batch of all processes.
    global_positions = torch.arange(rank, world * len(batch.x), world, device=batch.x.device)
    with defence.noise_ids(global_positions):
        return method(defence, batch.x, batch.y, **options)


@dataclass(frozen=True)
class Passes:
    """One batch through the purifier: what the losses need."""

    loss: Tensor
    metrics: dict[str, Tensor]
    target: Tensor  # S(x_target) of each rebuilt image, [T, C, H, W]
    refined: Tensor  # [T, C, H, W], differentiable
    mask: Tensor  # [T, 1, H, W]
    visible: Tensor  # t, [T, C, H, W]


def passes(defence: Atop, batch: Batch, config: AtopConfig) -> Passes:
    """The transform and the purifier on one batch; the loss without its GAN term.

    One pass where the L1's input and the classifier's are the same images; one of twice the images where not. While
    lambda is 0 what only the cross-entropy would need is not computed.
    """
    weight = config.cls_weight if batch.epoch >= config.cls_delay_epochs else 0.0
    rebuild = batch.x
    both = weight > 0 and config.attack_method != "none" and config.reconstruction_target == "clean"
    if both or config.reconstruction_target == "adversarial":
        adversarial = attacked(defence, batch, config)
        rebuild = rebuild if both else adversarial
    seed = torch.full((1,), batch.seed, dtype=torch.int64, device=batch.x.device)
    packed, owners = defence.draw(rebuild, seed=seed, ids=batch.sample_ids)
    rows, classified = len(packed), owners
    if both:  # the same noise and mask
        packed = torch.cat([packed, defence.draw(adversarial, seed=seed, ids=batch.sample_ids)[0]])
    images = defence.stages(packed)
    channels = rebuild.shape[1]
    target = (2 * rebuild - 1).to(images[-1].dtype)
    passes_per_image = rows // len(rebuild)
    num_passes = 1 if defence.num_passes is None else defence.num_passes
    # sample by sample, N passes for each image of it
    target = target.repeat_interleave(num_passes, 0).repeat(passes_per_image // num_passes, 1, 1, 1)
    reconstruction = defence.purifier.original_loss([image[:rows] for image in images], target).mean()
    loss = config.reconstruction_weight * reconstruction
    metrics = {"reconstruction": reconstruction.detach()}
    if weight > 0:
        purified = defence.join(images[-1][-rows:], classified)  # [S, B, C, H, W]
        logits = defence.classify(purified).flatten(0, 1)
        labels = batch.y.repeat(len(purified))
        cross_entropy = F.cross_entropy(logits, labels)
        loss = loss + weight * cross_entropy
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        metrics |= {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
    head = packed[:rows]
    return Passes(loss, metrics, target, images[-1][:rows], head[:, -1:], head[:, :channels])


def training_loss(defence: Atop, batch: Batch, config: AtopConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one batch without a discriminator.

    Raises:
        ValueError: the config's ``gan_grad``: its discriminator is `AtopTask`'s; a precision that is not the defence's.
    """
    if config.precision != _precision(defence):
        raise ValueError(
            f"precision {config.precision!r} needs a defence so accelerated; this computes in {_precision(defence)}"
        )
    if config.gan_grad:
        raise ValueError("gan_grad needs a discriminator, which is trained with the purifier: use AtopTask")
    made = passes(defence, batch, config)
    return made.loss, made.metrics


def _precision(defence: Atop) -> str:
    """In what a defence computes, as a config names it."""
    return "bfloat16" if defence.fast is not None and defence.fast.dtype == torch.bfloat16 else "float32"


class _Players(nn.Module):
    """What is trained together: one checkpoint."""

    def __init__(self, defence: Atop, discriminator: nn.Module):
        super().__init__()
        self.defence, self.discriminator = defence, discriminator


class AtopTask:
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is.

    Args:
        defence, config: what is trained, and how; the config's precision decides whether the defence is accelerated.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.

    With ``gan_grad`` a discriminator is made from torch's global generator and plays along: each step first trains it,
    then the purifier. It is kept in checkpoints, not in the saved defence.
    """

    def __init__(self, defence: Atop, config: AtopConfig, origin: str = "scratch"):
        self.defence, self.config, self.origin = defence, config, origin
        self.classifier = weights_fingerprint(defence.classifier)
        if _precision(defence) != config.precision:  # else as it was made, compiled perhaps
            defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        defence.classifier.requires_grad_(False)
        self.discriminator: nn.Module | None = None
        self.model: nn.Module = defence
        trained = [[p for p in defence.purifier.parameters() if p.requires_grad]]
        if not trained[0]:
            raise ValueError("the purifier has no parameters to train")
        if config.gan_grad:
            channels, height, width = defence.image_shape
            depth = patch_depth((height, width))
            discriminator = PatchDiscriminator(channels + 1, config.discriminator_width, depth)
            self.discriminator = discriminator.to(trained[0][0].device)
            self.model = _Players(defence, self.discriminator)
            trained.append(list(self.discriminator.parameters()))
        # one optimiser for both players: it passes over parameters without a gradient
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            [{"params": group} for group in trained], lr=config.learning_rate, betas=config.betas, foreach=True
        )

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one batch; with ``gan_grad`` the discriminator's step has been taken then."""
        made = passes(self.defence, batch, self.config)
        if self.discriminator is None:
            return made.loss, made.metrics
        judged = self._train_discriminator(made)
        self.discriminator.requires_grad_(False)
        try:
            deceived = -self.discriminator(torch.cat([made.refined, made.mask], 1)).mean()
        finally:
            self.discriminator.requires_grad_(True)
        metrics = {**made.metrics, "discriminator": judged, "deceived": deceived.detach()}
        return made.loss + self.config.gan_weight * deceived, metrics

    def _train_discriminator(self, made: Passes) -> Tensor:
        assert self.discriminator is not None
        fake = made.refined.detach()
        if self.config.gan_fake == "pasted":
            fake = torch.where(made.mask > 0, fake, made.visible)
        self.optimizer.zero_grad(set_to_none=True)
        masks = made.mask.repeat(2, 1, 1, 1)
        real, false = self.discriminator(torch.cat([torch.cat([made.target, fake]), masks], 1)).chunk(2)
        loss = hinge(real, false)
        loss.backward()
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        average_(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """By the config's schedule."""
        rate = self.config.learning_rate
        return rate if self.config.schedule == "constant" else one_cycle(progress, rate)

    def describe(self) -> dict[str, Any]:
        """The config, the defence's arguments, its classifier, and where it started."""
        facts = {"defence": self.defence.arguments, "classifier": self.classifier}
        return {"task": "atop", **settings(self.config), **facts, "origin": self.origin}


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean relu(1 - real) / 2 + mean relu(1 + fake) / 2."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()

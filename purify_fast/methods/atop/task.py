"""Training AToP's purifier: pre-training, fine-tuning as published, and fine-tuning through the whole pipeline (ours).

With x' adversarial, t a random transform of x' (in [-1, 1]), (x1, x2) = g(t, m) the coarse and the refined image,

    L = w_adv L_G + w (mean |s - x1| + mean |s - x2|) + lambda CE(f((x2 + 1) / 2), y)

Source: arXiv 2401.16352, section 3, and its official code, whose L1 goes to s = x' (the released notebooks) or to
s = x, with a second pass on clean x (the logged run). The classifier f is frozen. L_G = -mean D(x2, m) of a hinge GAN,
L_D = mean relu(1 - D(s, m)) / 2 + mean relu(1 + D(x2, m)) / 2; in the official code its gradient never reaches g.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._process import processes
from ...attacks import fgsm, pgd
from ...ops.pgd_step import NORMS
from ...training.checkpoint import fingerprint
from ...training.distributed import average_
from ...training.loop import Batch
from ...training.schedules import one_cycle
from .defence import Atop
from .discriminator import PatchDiscriminator, patch_depth

CHOICES = {
    "attack": ("fgsm", "pgd", "none"),
    "attack_target": ("classifier", "pipeline"),
    "norm": NORMS,
    "reconstruction_target": ("adversarial", "clean"),
    "gan_fake": ("refined", "pasted"),
    "precision": ("float32", "bfloat16"),
    "schedule": ("constant", "one_cycle"),
}

#: What the official notebooks change of `AtopConfig`'s defaults. They name the transform, which is the defence's.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar_rt1": {"warm_up": 0},
    "cifar_rt2": {},
    "imagenette_rt1": {"warm_up": 0},
    "imagenette_rt2": {"cls_weight": 0.1},
    "logged": {"reconstruction_target": "clean"},  # the one whose output is kept: CIFAR-10, rt2
    "formula": {"gan_grad": True},  # the paper's, which no notebook computes
}


@dataclass(frozen=True)
class AtopConfig:
    """Numbers of AToP's training, with their source; the defaults are the released CIFAR-10 notebooks'.

    Args:
        attack: ``fgsm`` (official code: one step, no start), ``pgd``, or ``none`` as in pre-training.
        attack_target: ``classifier`` (official code) or ``pipeline``, the whole defence with exact gradients (ours).
        eps: radius in image units (official code: 8/255). norm: ``linf`` (official code), ``l2`` or ``l1``.
        steps, alpha: of PGD. alpha None: 2.5 eps / steps (ours).
        reconstruction_target: ``adversarial``, the purifier rebuilds what it gets (released notebooks, one pass), or
            ``clean``: a clean image from its own transform, in a second pass with the same noise and mask (the logged
            run).
        cls_weight: lambda (official code: 0.05; 0.1 on ImageNette). warm_up: first epochs without it (official: 2).
        reconstruction: weight of the L1 terms, or of the purifier's own ``original_loss`` (official: 1).
        gan_weight: of L_G (official: 1). discriminator_width: channels of its first layer (official: 64).
        gan_grad: whether L_G trains the purifier, as the paper's formula says. In the official code its gradient is cut
            off, so that the discriminator changes nothing: False does without it.
        gan_fake: what D sees as fake in its own step: ``refined``, x2 (fine-tuning), or ``pasted``, x2 in the hole and
            t elsewhere (pre-training).
        precision: ``float32`` (official), or ``bfloat16``: `AtopTask` trains the defence accelerated (ours).
        schedule: ``constant`` (official) or ``one_cycle`` (ours).
        learning_rate: of Adam (official: 1e-4). betas: (official: 0.5, 0.999).

    Raises:
        ValueError: a setting out of range; it names it.
    """

    attack: str = "fgsm"
    attack_target: str = "classifier"
    eps: float = 8 / 255
    norm: str = "linf"
    steps: int = 10
    alpha: float | None = None
    reconstruction_target: str = "adversarial"
    cls_weight: float = 0.05
    warm_up: int = 2
    reconstruction: float = 1.0
    gan_weight: float = 1.0
    discriminator_width: int = 64
    gan_grad: bool = False
    gan_fake: str = "refined"
    precision: str = "float32"
    schedule: str = "constant"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.attack != "none" and not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}; attack='none' trains without attacks")
        if self.norm == "linf" and not self.eps <= 1:
            raise ValueError(f"eps is in image units, at most 1 for linf, got {self.eps}: is {self.eps:g}/255 meant?")
        if self.attack == "none" and self.attack_target == "pipeline":
            raise ValueError("attack_target 'pipeline' needs an attack: fgsm or pgd")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}: the images would not move")
        for name in ("cls_weight", "reconstruction", "gan_weight", "learning_rate", "warm_up"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("steps", "discriminator_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attack != "pgd" and (self.steps, self.alpha) != (type(self).steps, None):
            raise ValueError(f"steps and alpha go with attack='pgd', got {self.steps} and {self.alpha}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        gan = ("gan_weight", "discriminator_width", "gan_fake")
        if not self.gan_grad and (odd := [name for name in gan if getattr(self, name) != getattr(type(self), name)]):
            raise ValueError(
                f"{odd[0]} {getattr(self, odd[0])!r} goes with gan_grad: without it there is no discriminator"
            )

    @classmethod
    def published(cls, name: str = "cifar_rt2", **changes: Any) -> AtopConfig:
        """The numbers of one of the official notebooks, by its name in `PUBLISHED`.

        Raises:
            ValueError: another name.
        """
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
        return cls(**{**PUBLISHED[name], **changes})

    @classmethod
    def pretraining(cls, **changes: Any) -> AtopConfig:
        """Generator pre-training: hinge GAN and L1 on clean images, no classifier (DeepFillv2's, w_adv = w_l1 = 1)."""
        made = {"attack": "none", "reconstruction_target": "clean", "cls_weight": 0.0, "gan_grad": True}
        return cls(**{**made, "gan_fake": "pasted", **changes})


def attacked(defence: Atop, batch: Batch, config: AtopConfig) -> Tensor:
    """x' as the config makes it: shape and dtype of the batch's images."""
    if config.attack == "none":
        return batch.x
    options: dict[str, Any] = {"eps": config.eps, "norm": config.norm}
    if config.attack == "pgd":
        alpha = 2.5 * config.eps / config.steps if config.alpha is None else config.alpha
        options |= {"steps": config.steps, "alpha": alpha, "seed": batch.seed, "sample_ids": batch.sample_ids}
    attack = pgd if config.attack == "pgd" else fgsm
    if config.attack_target == "classifier":
        return attack(defence.frozen_classifier, batch.x, batch.y, **options)
    rank, world = processes()
    places = torch.arange(rank, world * len(batch.x), world, device=batch.x.device)  # in the batch of all processes
    with defence.positions(places):
        return attack(defence, batch.x, batch.y, **options)


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
    weight = config.cls_weight if batch.epoch >= config.warm_up else 0.0
    rebuild = batch.x
    both = weight > 0 and config.attack != "none" and config.reconstruction_target == "clean"
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
    parts = 1 if defence.parts is None else defence.parts
    # sample by sample, N passes for each image of it
    target = target.repeat_interleave(parts, 0).repeat(passes_per_image // parts, 1, 1, 1)
    reconstruction = defence.purifier.original_loss([image[:rows] for image in images], target).mean()
    loss = config.reconstruction * reconstruction
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
    fast = defence.accelerated
    return "bfloat16" if fast is not None and fast["dtype"] == torch.bfloat16 else "float32"


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
        self.classifier = fingerprint(defence.classifier)
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
        return {"task": "atop", **asdict(self.config), **facts, "origin": self.origin}


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean relu(1 - real) / 2 + mean relu(1 + fake) / 2."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()

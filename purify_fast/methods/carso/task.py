"""Training CARSO's purifier: as published, and through the whole pipeline (ours).

Published (arXiv 2306.06081, section 4): x~ is clean or adversarial against the classifier alone, x its clean image,

    loss = sum BCE(decoder(z, c(x~)), x) + beta(epoch) KL(q(z | x~, c) | N(0, I)),   z ~ q, per image

Through the pipeline (ours): x~ is adversarial against the defence itself, with exact gradients, z ~ N(0, I),

    loss = mean_k CE(classifier(x_k), y) + w sum BCE(x_k, x)

the classifier frozen, or trained together with the purifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._process import processes
from ...attacks import pgd, pgd_and_fgsm
from ...ops.reconstruction_loss import reconstruction_loss
from ...ops.sample_latent import sample_latent
from ...training.checkpoint import fingerprint
from ...training.distributed import average_
from ...training.lookahead import Lookahead
from ...training.loop import Batch
from ...training.schedules import carso_published, carso_v1_published, one_cycle
from .defence import Carso

CHOICES = {
    "attack_target": ("classifier", "pipeline"),
    "eps_mode": ("paper", "official_code"),
    "reduction": ("mean", "sum"),
    "optimizer": ("adamw", "radam_lookahead"),
    "precision": ("float32", "bfloat16"),
    "schedule": ("one_cycle", "published", "published_v1"),
}


@dataclass(frozen=True)
class CarsoConfig:
    """Numbers of CARSO's training, with their source.

    Args:
        attack_target: ``classifier`` (the paper) or ``pipeline`` (ours).
        eps: radius of the strong attacks in image units (paper: 8/255 for colour images, 0.3 for MNIST); the weak ones
            have half (paper). norm: ``linf`` (paper), ``l2`` or ``l1``.
        eps_mode: ``paper`` takes eps as it is; ``official_code`` divides it by the mean of the defence's std, as the
            official code does, made for normalised images, to images that are not.
        steps, alpha: of PGD (paper: 40 and 0.01, made for eps 8/255). alpha None: 2.5 eps / steps (ours).
        adversarial_fraction: of each batch, shared by four attacks, ``classifier`` target only (paper: 0.5, CIFAR-10).
        allow_no_adversarial: train even if that leaves no image for the attacks, as the official TinyImageNet run did.
        lag: share of the epochs without the KL term; it then rises over a third as many (paper: 0.125).
        beta: weight of the KL term at the end (paper: 1).
        free_bits: nats of the batch's mean KL that cost nothing, against posterior collapse (paper: 0; Kingma et al.,
            NeurIPS 2016, with the whole latent as one group).
        train_samples: K while training through the pipeline. reconstruction: the weight w there (ours: 0.02).
        joint: train the classifier's copy too, ``pipeline`` target only (ours; the paper's classifier is frozen).
        precision: ``float32`` (as published), or ``bfloat16``: `CarsoTask` trains the defence accelerated (ours).
        reduction: of the loss over the batch, ``mean`` (ours) or ``sum`` (paper).
        optimizer: ``adamw`` (ours) or ``radam_lookahead``, RAdam within Lookahead (paper); the slow weights are what
            remains. lookahead_steps, lookahead_alpha: its k and alpha (paper: 6 and 0.8).
        schedule: ``one_cycle`` (ours), ``published`` or ``published_v1`` of `purify_fast.training.schedules`.
        learning_rate: its peak (paper: 1e-4 times the batch of one process, with the sum). weight_decay: decoupled.

    lag, beta, free_bits, reduction, eps_mode and adversarial_fraction are the published training's: through the
    pipeline the first two and the last have no effect, the others must stay as they are. train_samples and
    reconstruction are the pipeline's alone.
    """

    attack_target: str = "classifier"
    eps: float = 8 / 255
    eps_mode: str = "paper"
    norm: str = "linf"
    steps: int = 40
    alpha: float | None = None
    adversarial_fraction: float = 0.5
    allow_no_adversarial: bool = False
    lag: float = 0.125
    beta: float = 1.0
    free_bits: float = 0.0
    train_samples: int = 1
    reconstruction: float = 0.02
    joint: bool = False
    reduction: str = "mean"
    optimizer: str = "adamw"
    lookahead_steps: int = 6
    lookahead_alpha: float = 0.8
    schedule: str = "one_cycle"
    precision: str = "float32"
    learning_rate: float = 2e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, default in (("reduction", "mean"), ("eps_mode", "paper"), ("free_bits", 0.0)):
            if self.attack_target == "pipeline" and getattr(self, name) != default:
                raise ValueError(f"{name} {getattr(self, name)!r} is of attack_target 'classifier', not of 'pipeline'")
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}: the purifier is never trained without attacks")
        if self.joint and self.attack_target != "pipeline":
            raise ValueError(
                "joint training needs attack_target='pipeline': the published loss does not see the labels"
            )
        if self.joint and self.precision != "float32":
            raise ValueError(
                f"joint training needs precision 'float32', got {self.precision!r}: no frozen copy serves it"
            )
        for name in ("free_bits", "beta", "reconstruction", "learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}: the images would not move")
        for name in ("steps", "train_samples", "lookahead_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, value in (("adversarial_fraction", self.adversarial_fraction), ("lag", self.lag)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def for_statistics(self, std: Sequence[float]) -> CarsoConfig:
        """This config with eps in pixel units, given the ``std`` that normalises the images."""
        scale = len(std) / sum(std) if self.eps_mode == "official_code" else 1.0
        return replace(self, eps=self.eps * scale, eps_mode="paper")

    def step(self, eps: float | Tensor) -> float | Tensor:
        """PGD's step for a radius, a number or ``[B]``."""
        return 2.5 * eps / self.steps if self.alpha is None else self.alpha


def kl_weight(epoch: int, epochs: int, lag: float = 0.125) -> float:
    """beta(epoch) of the paper, for a final weight of 1: 0 for ceil(lag E) epochs, then linear over ceil(lag E / 3)."""
    start, rise = ceil(lag * epochs), ceil(epochs * lag / 3)
    return 1.0 if epoch >= start + rise else max(0.0, (epoch - start) / rise)


def atom_size(batch_size: int, adversarial_fraction: float, allow_none: bool = False) -> int:
    """Images per attack in a balanced batch: int(batch_size * fraction // 4).

    Raises:
        ValueError: the result is 0 and ``allow_none`` is not set; the official TinyImageNet run trained without any
            adversarial example that way.
    """
    atom = int(batch_size * adversarial_fraction // 4)
    if atom == 0 and not allow_none:
        least = ceil(4 / adversarial_fraction) if adversarial_fraction > 0 else None
        raise ValueError(
            f"adversarial_fraction {adversarial_fraction} of a batch of {batch_size} leaves no adversarial example for "
            f"four attacks: "
            + (f"use at least {least} images per batch and process" if least else "it must be above 0")
        )
    return atom


def balanced_batch(classifier, x: Tensor, y: Tensor, config: CarsoConfig, *, seed: int, sample_ids: Tensor) -> Tensor:
    """The adversarially balanced batch [clean | PGD weak | PGD strong | FGSM weak | FGSM strong] on ``classifier``.

    All four share one attack call with a radius per image. Shape and dtype of x.

    Every process lays out its own share of the batch, as the official code does. The shares of
    `purify_fast.data.batches` make the same images so attacked as one process would, if the number of processes divides
    the images per attack, `atom_size` of the whole batch; if not, each rounds down by itself, and fewer are attacked.
    """
    atom = atom_size(len(x), config.adversarial_fraction, config.allow_no_adversarial)
    if atom == 0:
        return x
    clean = len(x) - 4 * atom
    eps = torch.full((2 * atom,), config.eps, device=x.device)
    eps[:atom] /= 2
    adversarial = pgd_and_fgsm(
        classifier,
        x[clean:],
        y[clean:],
        eps=eps.repeat(2),
        alpha=config.step(eps),
        steps=config.steps,
        norm=config.norm,
        seed=seed,
        sample_ids=sample_ids[clean:],
    )
    return torch.cat([x[:clean], adversarial])


def published_step(defence: Carso, batch: Batch, config: CarsoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss over the batch, and its two terms per image; attacks see the classifier alone."""
    config = config.for_statistics(defence.arguments["std"])
    perturbed = balanced_batch(
        defence.frozen_classifier, batch.x, batch.y, config, seed=batch.seed, sample_ids=batch.sample_ids
    )
    with torch.no_grad():  # the representation is data to the purifier
        representation = defence.read(perturbed)
    condition = defence.encode(representation)
    mean, log_variance = defence.posterior(perturbed, condition)
    seed = torch.full((1,), batch.seed, dtype=torch.int64, device=batch.x.device)
    z, kl = sample_latent(mean, log_variance, seed, batch.sample_ids)
    reconstruction = reconstruction_loss(defence.decode(z[:, None], condition)[:, 0], batch.x).mean()
    kl = kl.mean()
    everywhere = kl.detach().clone()
    average_([everywhere])  # whether the batch has its free bits is decided for all of it
    paid = torch.where(everywhere < config.free_bits, config.free_bits, kl)
    beta = config.beta * kl_weight(batch.epoch, batch.epochs, config.lag)
    # the mean of the processes' gradients is to be that of the sum over all images
    images = len(batch.x) * processes()[1] if config.reduction == "sum" else 1
    loss = (reconstruction + beta * paid) * images
    return loss, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}


def pipeline_step(defence: Carso, batch: Batch, config: CarsoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Ours: PGD through the whole defence, then cross-entropy on each of the K predictions and a reconstruction term.

    BatchNorm keeps the statistics it has: the attacked and the trained function are one.
    """
    if config.joint and (
        defence.accelerated is not None or not any(p.requires_grad for p in defence.classifier.parameters())
    ):
        raise ValueError("joint training needs a defence that is not accelerated, after release_classifier()")
    samples, training = defence.samples, defence.training
    defence.samples = config.train_samples
    defence.eval()
    rank, world = processes()
    places = torch.arange(rank, world * len(batch.x), world, device=batch.x.device)  # in the batch of all processes
    try:
        with defence.positions(places):
            x = pgd(
                defence,
                batch.x,
                batch.y,
                eps=config.eps,
                steps=config.steps,
                alpha=config.step(config.eps),
                norm=config.norm,
                seed=batch.seed,
                sample_ids=batch.sample_ids,
            )
            logits = defence.reconstruction_logits(x)
            predictions = defence.classify(torch.sigmoid(logits)).flatten(0, 1)
    finally:
        defence.samples = samples
        defence.train(training)
    labels = batch.y.repeat_interleave(config.train_samples)
    targets = batch.x.repeat_interleave(config.train_samples, 0)
    cross_entropy = F.cross_entropy(predictions, labels)
    reconstruction = reconstruction_loss(logits.flatten(0, 1), targets).mean()
    accuracy = (predictions.detach().argmax(1) == labels).float().mean()
    metrics = {
        "cross_entropy": cross_entropy.detach(),
        "reconstruction": reconstruction.detach(),
        "accuracy": accuracy,
    }
    return cross_entropy + config.reconstruction * reconstruction, metrics


def training_loss(defence: Carso, batch: Batch, config: CarsoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one batch: `published_step` or `pipeline_step`, by the config's attack_target."""
    step = published_step if config.attack_target == "classifier" else pipeline_step
    return step(defence, batch, config)


class CarsoTask:
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is, unless ``joint``.

    Args:
        defence, config: what is trained, and how; the config's precision decides whether the defence is accelerated.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.

    Raises:
        ValueError: from `training_step`, a batch too small to hold adversarial examples.
    """

    def __init__(self, defence: Carso, config: CarsoConfig, origin: str = "scratch"):
        self.model, self.config, self.origin = defence, config, origin
        self.classifier = fingerprint(defence.classifier)  # as it was at the start: joint training changes it
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

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one batch."""
        return training_loss(self.model, batch, self.config)

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """By the config's schedule."""
        peak = self.config.learning_rate
        if self.config.schedule == "one_cycle":
            return one_cycle(progress, peak)
        return (carso_published if self.config.schedule == "published" else carso_v1_published)(epoch, epochs, peak)

    def describe(self) -> dict[str, Any]:
        """The config, the defence's arguments, its classifier, and where it started."""
        facts = {"defence": self.model.arguments, "classifier": self.classifier}
        return {"task": "carso", **asdict(self.config), **facts, "origin": self.origin}

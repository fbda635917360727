"""Training CARSO's purifier: as published, and through the whole pipeline (ours).

Published (arXiv 2306.06081, section 4): x~ is clean or adversarial against the classifier alone, x its clean image,

    loss = sum BCE(decoder(z, c(x~)), x) + beta(epoch) KL(q(z | x~, c) | N(0, I)),   z ~ q, per image

Through the pipeline (ours): x~ is adversarial against the defence itself, with exact gradients, z ~ N(0, I),

    loss = mean_k CE(classifier(x_k), y) + w sum BCE(x_k, x)

the classifier frozen, or trained together with the purifier.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._fingerprint import weights_fingerprint
from ..._process import processes
from ...attacks import pgd, pgd_and_fgsm
from ...ops.reconstruction_loss import reconstruction_loss
from ...ops.sample_latent import sample_latent
from ...training.attack import settings
from ...training.distributed import average_
from ...training.lookahead import Lookahead
from ...training.loop import Batch
from ...training.schedules import carso_published, carso_v1_published, one_cycle
from .config import CarsoConfig, atom_size
from .defence import Carso


def kl_weight(epoch: int, epochs: int, kl_delay: float = 0.125) -> float:
    """The paper's weight of the KL term, for a final weight of 1.

    It is 0 for ceil(kl_delay E) of the E epochs, then rises linearly over ceil(kl_delay E / 3).
    """
    start, rise = ceil(kl_delay * epochs), ceil(epochs * kl_delay / 3)
    return 1.0 if epoch >= start + rise else max(0.0, (epoch - start) / rise)


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
    attack = config.attack
    eps = torch.full((2 * atom,), attack.eps, device=x.device)
    eps[:atom] /= 2
    adversarial = pgd_and_fgsm(
        classifier,
        x[clean:],
        y[clean:],
        eps=eps.repeat(2),
        alpha=attack.step_size(eps),
        steps=attack.steps,
        norm=attack.norm,
        seed=seed,
        sample_ids=sample_ids[clean:],
    )
    return torch.cat([x[:clean], adversarial])


def published_step(defence: Carso, batch: Batch, config: CarsoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss over the batch, and its two terms per image; attacks see the classifier alone."""
    config = replace(config, attack=config.attack.at_epoch(batch.epoch, batch.epochs))
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
    beta = config.beta * kl_weight(batch.epoch, batch.epochs, config.kl_delay)
    # the mean of the processes' gradients is to be that of the sum over all images
    images = len(batch.x) * processes()[1] if config.reduction == "sum" else 1
    loss = (reconstruction + beta * paid) * images
    return loss, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}


def pipeline_step(defence: Carso, batch: Batch, config: CarsoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Ours: PGD through the whole defence, then cross-entropy on each of the K predictions and a reconstruction term.

    BatchNorm keeps the statistics it has: the attacked and the trained function are one.
    """
    if config.joint and (defence.fast is not None or not any(p.requires_grad for p in defence.classifier.parameters())):
        raise ValueError("joint training needs a defence that is not accelerated, after release_classifier()")
    attack = config.attack.at_epoch(batch.epoch, batch.epochs)
    samples, training = defence.samples, defence.training
    defence.samples = config.train_samples
    defence.eval()
    rank, world = processes()
    # Where the images stand in the batch of all processes.
    global_positions = torch.arange(rank, world * len(batch.x), world, device=batch.x.device)
    try:
        with defence.noise_ids(global_positions):
            x = pgd(
                defence,
                batch.x,
                batch.y,
                eps=attack.eps,
                steps=attack.steps,
                alpha=attack.step_size(attack.eps),
                norm=attack.norm,
                random_start=attack.random_start,
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
    return cross_entropy + config.reconstruction_weight * reconstruction, metrics


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
        self.classifier = weights_fingerprint(defence.classifier)  # as it was at the start: joint training changes it
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
        return {"task": "carso", **settings(self.config), **facts, "origin": self.origin}

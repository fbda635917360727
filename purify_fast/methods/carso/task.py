"""The two trainings of CARSO: with the paper's objective, and through the whole pipeline.

The paper's objective (arXiv 2306.06081, section 4) is, for each image,

    loss = sum BCE(decoder(z, c(x~)), x) + beta(epoch) KL(q(z | x~, c) | N(0, I)),   z ~ q

Here x is the clean image, and x~ is x itself or an adversarial image against the classifier alone.

The loss through the pipeline (not in the paper) is, for each image,

    loss = mean_k [CE(classifier(x_k), y) + w sum BCE(x_k, x)],   z ~ N(0, I)

Here x_k are the K purified images of x~, and x~ is an adversarial image against the whole defence with exact gradients.
w is the setting reconstruction_weight. The classifier is frozen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._process import processes
from ...defences.stochastic import with_samples
from ...models.layers import evaluation_mode
from ...ops.philox import philox_key
from ...ops.reconstruction_loss import reconstruction_loss
from ...ops.sample_latent import sample_latent
from ...training.optimizers import Lookahead
from ...training.task import Batch, Metrics, RunLength
from ..purifier_task import PurifierTask, noise_of
from .defence import Carso
from .method import CarsoConfig


def config_in_epoch(config: CarsoConfig, std: tuple[float, ...], epoch: int = 0, epochs: int = 1) -> CarsoConfig:
    """Return the settings of an epoch, counted from 0, with eps in image units. ``std`` normalizes the images."""
    attack = config.attack.at_epoch(epoch, epochs)
    scale = len(std) / sum(std) if config.eps_mode == "official_code" else 1.0
    return replace(config, attack=replace(attack, eps=attack.eps * scale), eps_mode="paper")


def atom_size(batch_size: int, adversarial_fraction: float, allow_none: bool = False) -> int:
    """Return the number of images for each of the four attacks: int(batch_size * adversarial_fraction // 4)."""
    atom = int(batch_size * adversarial_fraction // 4)
    if atom == 0 and not allow_none:
        raise ValueError(f"adversarial_fraction {adversarial_fraction} of {batch_size} images is too few for 4 attacks")
    return atom


def carso_published(epoch: int, epochs: int, peak: float) -> float:
    """Return CARSO's learning rate in ``epoch``, counted from 0 (arXiv 2306.06081, official code).

    The rate rises linearly from 5e-9 to ``peak`` over int(epochs / 8) epochs, but at least 3. It remains at ``peak``
    for int(epochs / 8) epochs, but at least 1. Then it falls linearly to 1.25e-4 ``peak`` over the remaining epochs,
    but at least 3. The official peak is 1e-4 times the batch size of one process.
    """
    rise, flat = max(3, int(epochs / 8)), max(1, int(epochs / 8))
    fall = max(3, epochs - 2 * int(epochs / 8))
    if epoch < rise:
        return 5e-9 + (peak - 5e-9) * epoch / rise
    return peak * (1 - (1 - 1.25e-4) * min(1.0, max(0, epoch - rise - flat) / fall))


def kl_weight(epoch: int, delay: float) -> float:
    """Return the share of the KL term's weight in an epoch: 0 in the first ``delay``, then rising for a third of it."""
    start, rise = ceil(delay), ceil(delay / 3)
    return 1.0 if epoch >= start + rise else max(0.0, (epoch - start) / rise)


def published_losses(
    defence: Carso, representation: list[Tensor], perturbed: Tensor, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the means of both terms of the paper's objective, for ``batch``: clean images, seed and sample ids."""
    clean, seed, ids = batch
    condition = defence.encode(representation)
    mean, log_variance = defence.posterior(perturbed, condition)
    z, kl = sample_latent(mean, log_variance, seed, ids)
    reconstruction = reconstruction_loss(defence.decode(z[:, None], condition)[:, 0], clean).mean()
    return reconstruction, kl.mean()


def pipeline_losses(
    defence: Carso, representation: list[Tensor], latents: Tensor, batch: tuple[Tensor, Tensor], target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both terms of the loss through the pipeline, and the accuracy, for ``batch``: clean images and labels.

    The first term is the cross-entropy, or the divergence from the log-probabilities ``target [B, classes]``.
    """
    k = defence.samples
    logits = defence.decode(latents, defence.encode(representation))
    predictions = defence.classify(torch.sigmoid(logits)).flatten(0, 1)
    targets, labels = (part.repeat_interleave(k, 0) for part in batch)
    if target is None:
        distance = F.cross_entropy(predictions, labels)
    else:
        predicted = predictions.float().log_softmax(1)
        distance = F.kl_div(predicted, target.repeat_interleave(k, 0), reduction="batchmean", log_target=True)
    reconstruction = reconstruction_loss(logits.flatten(0, 1), targets).mean()
    accuracy = (predictions.detach().argmax(1) == labels).float().mean()
    return distance, reconstruction, accuracy


class CarsoTask(PurifierTask[Carso]):
    """The training of a defence's purifier, for `purify_fast.training.fit`.

    Steps compute with a copy of a large classifier, or in bfloat16 of any. ``origin`` is a name of the purifier's
    initial weights; a run is resumed only with the same name.
    """

    name = "carso"
    published: ClassVar = {"published": carso_published}
    config: CarsoConfig

    def __init__(self, defence: Carso, config: CarsoConfig, origin: str = "scratch"):
        super().__init__(defence, config, origin)
        trainable = [p for p in defence.parameters() if p.requires_grad]
        if config.optimizer == "adamw":
            self.optimizer = self.adamw(trainable)
            return
        rate, decay = config.learning_rate, config.weight_decay
        inner = torch.optim.RAdam(trainable, rate, weight_decay=decay, decoupled_weight_decay=True, foreach=True)
        self.optimizer = Lookahead(inner, config.lookahead_steps, config.lookahead_alpha)

    def computing(self) -> Carso:
        copied = super().computing()
        # A step through the pipeline draws other samples than a prediction.
        piped = self.config.attack_target == "pipeline"
        return with_samples(copied, self.config.train_samples) if piped else copied

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss of a batch, and its metrics. A validation returns the loss per image."""
        return self._published(batch) if self.config.attack_target == "classifier" else self._pipeline(batch)

    def balanced_batch(self, batch: Batch, config: CarsoConfig) -> Tensor:
        """Return clean images and images that PGD and FGSM made on the classifier, as many as the batch has.

        The order is [clean | PGD weak | PGD strong | FGSM weak | FGSM strong], where the weak attacks have half of eps.
        Every process balances its own share of the batch, like the official code. So several processes attack fewer
        images than a single process, unless their number divides `atom_size` of the whole batch.
        """
        x, attack = batch.x, config.attack.at_epoch(batch.epoch, batch.epochs)
        atom = atom_size(len(x), config.adversarial_fraction, config.allow_no_adversarial)
        if atom == 0:
            return x
        half, attacked = 2 * atom, slice(len(x) - 4 * atom, None)
        clean = replace(batch, x=x[attacked], y=batch.y[attacked], sample_ids=batch.sample_ids[attacked])
        eps = torch.full((half,), float(attack.eps), device=x.device)
        eps[:atom] /= 2
        run = partial(attack.run, self.trained.frozen_classifier, clean, graphs=self.graphs, eps=eps.repeat(2))
        return torch.cat([x[: attacked.start], run(rows=slice(half)), run(rows=slice(half, None), one_step=True)])

    def _published(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss of a batch with the paper's objective, and the means of its two terms."""
        defence = self.trained
        config = config_in_epoch(self.config, tuple(defence.arguments["std"]), batch.epoch, batch.epochs)
        if batch.whole:
            # The last batch of a validation may be too small for the attacks. The mean over the batches weights each
            # batch by its number of images, so the loss of a batch must be a mean too.
            config = replace(config, allow_no_adversarial=True, reduction="mean")
        perturbed = self.balanced_batch(batch, config)
        named = batch.x, philox_key(batch.seed, batch.x.device), batch.sample_ids
        reconstruction, kl = self.compiled(published_losses)(defence, defence.read(perturbed), perturbed, named)
        beta = config.beta * kl_weight(batch.epoch, config.kl_delay * batch.epochs)
        # The loss is a mean over images, and gradients are averaged over processes. This factor turns both into sums.
        images = batch.images * processes()[1] if config.reduction == "sum" else 1
        return (reconstruction + beta * kl) * images, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}

    def _pipeline(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Attack a batch by PGD through the whole defence, and return this package's own loss of it, and metrics."""
        defence, config, name, target = self.trained, self.config, "cross_entropy", None
        if config.targets != "labels":
            with torch.no_grad():
                name, target = "divergence", defence.frozen_classifier(batch.x).float().log_softmax(1)
        # Attacks, too, see the defence as it predicts.
        with evaluation_mode(defence), noise_of(defence, batch):
            adversarial = config.attack.run(defence, batch, graphs=self.graphs)
            latents = defence.prior_latents(len(adversarial), defence.samples, adversarial.device)
            inputs = defence, defence.read(adversarial), latents, (batch.x, batch.y), target
            distance, reconstruction, accuracy = self.compiled(pipeline_losses)(*inputs)
        metrics = {name: distance.detach(), "reconstruction": reconstruction.detach(), "accuracy": accuracy}
        return distance + config.reconstruction_weight * reconstruction, metrics

    def terms(self, length: RunLength) -> dict[str, int]:
        config = self.config
        if config.attack_target == "pipeline":
            return {}
        if length.batch_size:
            # The last batch of an epoch may be too small for the attacks.
            atom_size(length.last_batch // processes()[1], config.adversarial_fraction, config.allow_no_adversarial)
        if config.beta == 0:
            return {}
        # In the first epoch after the delay, the weight is still 0, because it rises from 0.
        delay = config.kl_delay * length.epochs
        first = length.first_step(ceil(delay) + 1 if delay > 0 else 0, "epochs")
        return {"kl": length.check_acts(first, argument="kl_delay")}

"""The losses of CARSO's training: the paper's objective, and through the whole pipeline.

The paper's objective (arXiv 2306.06081, section 4): x~ is clean or adversarial against the classifier alone, x its
clean image,

    loss = sum BCE(decoder(z, c(x~)), x) + beta(epoch) KL(q(z | x~, c) | N(0, I)),   z ~ q, per image

Through the pipeline (not in the paper): x~ is adversarial against the defence itself, with exact gradients,
z ~ N(0, I),

    loss = mean_k CE(classifier(x_k), y) + w sum BCE(x_k, x)

the classifier frozen, or trained together with the purifier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._process import processes
from ...attacks.pgd import fgsm, pgd
from ...ops.reconstruction_loss import reconstruction_loss
from ...ops.sample_latent import sample_latent
from ...speed.graphs.step_graphs import StepGraphs
from ...training.bank import FrozenAttack, FrozenAttacks
from ...training.distributed import average_
from ...training.optimizers import Lookahead
from ...training.schedules import RunLength, carso_published, carso_v1_published
from ...training.task import Batch, Metrics
from ..base import PurifierTask, noise_of
from .config import CarsoConfig, atom_size, config_in_epoch
from .defence import Carso


def kl_weight(position: float, delay: float) -> float:
    """The weight of the KL term, for a final weight of 1.

    It is 0 for the delay, rounded up, and rises linearly over a third of the delay, rounded up.

    Args:
        position: how much of the run is over, in the delay's unit. The paper counts epochs.
        delay: D. The paper's is an eighth of the epochs.
    """
    start, rise = ceil(delay), ceil(delay / 3)
    return 1.0 if position >= start + rise else max(0.0, (position - start) / rise)


def balanced_batch(
    classifier: Callable[[Tensor], Tensor], batch: Batch, config: CarsoConfig, graphs: StepGraphs | None = None
) -> Tensor:
    """The adversarially balanced batch [clean | PGD weak | PGD strong | FGSM weak | FGSM strong] on a classifier.

    Each attack has a radius per image. With a bank, the images that it has are read, and the others are attacked.

    Every process lays out its own share of the batch, as the official code does. If the number of processes divides the
    images per attack, `atom_size` of the whole batch, the shares of `purify_fast.data.batches` attack the same images
    as one process would; if not, each process rounds down by itself, and fewer images are attacked.

    Args:
        classifier: the attacked classifier, images to logits.
        batch: the images, and the seed of the random starts.
        config: the attack, and the share of the images that is attacked.
        graphs: captures the attack's steps, if given.

    Returns:
        Images, shape and dtype of the batch's.

    Raises:
        ValueError: a batch too small to hold adversarial examples.
    """
    x, attack = batch.x, config.attack
    atom = atom_size(len(x), config.adversarial_fraction, config.allow_no_adversarial)
    if atom == 0:
        return x
    attacked = slice(len(x) - 4 * atom, None)
    clean, y, ids = x[attacked], batch.y[attacked], batch.sample_ids[attacked]
    eps = torch.full((2 * atom,), attack.eps, device=x.device)
    eps[:atom] /= 2
    eps = eps.repeat(2)

    def make(rows: Tensor | None) -> Tensor:
        slow: slice | Tensor = slice(2 * atom)
        fast: slice | Tensor = slice(2 * atom, None)
        if rows is not None:
            slow, fast = rows[rows < 2 * atom], rows[rows >= 2 * atom]
        by_pgd = pgd(
            classifier,
            clean[slow],
            y[slow],
            eps=eps[slow],
            alpha=attack.step_size(eps[slow]),
            steps=attack.steps,
            norm=attack.norm,
            seed=batch.seed,
            sample_ids=ids[slow],
            graphs=graphs,
        )
        by_fgsm = fgsm(classifier, clean[fast], y[fast], eps=eps[fast], norm=attack.norm, graphs=graphs)
        return torch.cat([by_pgd, by_fgsm])

    if batch.bank is None:
        adversarial = make(None)
    else:
        adversarial = batch.bank.images(clean, attacked, torch.arange(4).repeat_interleave(atom), make)
    return torch.cat([x[: attacked.start], adversarial])


def published_step(
    defence: Carso, batch: Batch, config: CarsoConfig, graphs: StepGraphs | None = None
) -> tuple[Tensor, Metrics]:
    """The paper's loss of a batch; attacks see the classifier alone.

    Args:
        defence: whose purifier is trained.
        batch: the images.
        config: the settings of the training.
        graphs: captures the attacks' steps, if given.

    Returns:
        The loss over the batch, and its two terms per image.
    """
    config = config_in_epoch(config, tuple(defence.arguments["std"]), batch.epoch, batch.epochs)
    perturbed = balanced_batch(defence.frozen_classifier, batch, config, graphs)
    condition = defence.condition(perturbed)
    mean, log_variance = defence.posterior(perturbed, condition)
    seed = torch.full((1,), batch.seed, dtype=torch.int64, device=batch.x.device)
    z, kl = sample_latent(mean, log_variance, seed, batch.sample_ids)
    reconstruction = reconstruction_loss(defence.decode(z[:, None], condition)[:, 0], batch.x).mean()
    kl = kl.mean()
    mean_kl = kl.detach().clone()
    average_([mean_kl])  # take the mean over all processes, so that all decide the same
    kl_term = torch.where(mean_kl < config.free_bits, config.free_bits, kl)
    delay, unit = config.kl_delay_of(batch.epochs)
    beta = config.beta * kl_weight(batch.progress_in(unit), delay)
    # gradients are averaged over the processes; the factor turns that into the sum over all images
    images = len(batch.x) * processes()[1] if config.reduction == "sum" else 1
    loss = (reconstruction + beta * kl_term) * images
    return loss, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}


@contextlib.contextmanager
def as_trained(defence: Carso, batch: Batch, config: CarsoConfig) -> Iterator[None]:
    """Within the block, the defence is as it is trained through the pipeline, and its noise is that of the batch.

    Args:
        defence: takes K samples of each image, and its BatchNorm keeps the statistics it has, so that the attacked and
            the trained function are one.
        batch: the images.
        config: says K.
    """
    samples, training = defence.samples, defence.training
    defence.samples = config.train_samples
    defence.eval()
    try:
        with noise_of(defence, batch):
            yield
    finally:
        defence.samples = samples
        defence.train(training)


def pipeline_step(
    defence: Carso, batch: Batch, config: CarsoConfig, graphs: StepGraphs | None = None
) -> tuple[Tensor, Metrics]:
    """This package's own loss: PGD through the whole defence, how far the K predictions are from their targets, and a
    reconstruction.

    Args:
        defence: whose purifier is trained, and with ``joint`` its classifier.
        batch: the images.
        config: the settings of the training.
        graphs: captures the attack's step, if given.

    Returns:
        The loss, and metrics.

    Raises:
        ValueError: joint training of a defence that is accelerated, or whose classifier is not released.
    """
    if config.joint and (defence.fast is not None or not any(p.requires_grad for p in defence.classifier.parameters())):
        raise ValueError("joint training needs a defence that is not accelerated, after release_classifier()")
    with as_trained(defence, batch, config):
        adversarial = config.attack.run(defence, batch, graphs=graphs)
        condition = defence.condition(adversarial)
        logits = defence.decode(defence.prior_latents(len(adversarial), adversarial.device), condition)
        predictions = defence.classify(torch.sigmoid(logits)).flatten(0, 1)
    labels = batch.y.repeat_interleave(config.train_samples)
    targets = batch.x.repeat_interleave(config.train_samples, 0)
    if config.targets == "labels":
        name, distance = "cross_entropy", F.cross_entropy(predictions, labels)
    else:
        # the targets are the frozen classifier's probabilities of the clean images
        with torch.no_grad():
            wanted = defence.frozen_classifier(batch.x).float().log_softmax(1)
        wanted = wanted.repeat_interleave(config.train_samples, 0)
        found = predictions.float().log_softmax(1)
        name, distance = "divergence", F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    reconstruction = reconstruction_loss(logits.flatten(0, 1), targets).mean()
    accuracy = (predictions.detach().argmax(1) == labels).float().mean()
    metrics = {name: distance.detach(), "reconstruction": reconstruction.detach(), "accuracy": accuracy}
    return distance + config.reconstruction_weight * reconstruction, metrics


#: The loss of a batch, by the target of the training's attacks.
STEPS = {"classifier": published_step, "pipeline": pipeline_step}


def training_loss(
    defence: Carso, batch: Batch, config: CarsoConfig | None = None, graphs: StepGraphs | None = None
) -> tuple[Tensor, Metrics]:
    """The loss of one batch, for `CarsoTask` or a loop of your own; backward and the optimizer's step are the loop's.

    Args:
        defence: the defence to train.
        batch: the images. Without epoch and epochs it counts as the first epoch, in which the default kl_delay
            leaves the KL term out.
        config: the settings; its attack_target chooses `published_step` or `pipeline_step`. None takes the defaults.
        graphs: captures the attack's step on a CUDA device, if given; the same one for every batch.

    Returns:
        The loss to minimize, and detached metrics.
    """
    config = CarsoConfig() if config is None else config
    return STEPS[config.attack_target](defence, batch, config, graphs)


class CarsoTask(PurifierTask[Carso]):
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is, unless ``joint``.

    Args:
        defence: the defence to train.
        config: how; its precision decides whether the defence is accelerated.
        origin: the start of the purifier, if not from scratch; a run is resumed only with the same start.

    Raises:
        ValueError: from `training_step`, a batch too small to hold adversarial examples.
    """

    name = "carso"
    published: ClassVar = {"published": carso_published, "published_v1": carso_v1_published}
    config: CarsoConfig
    optimizer: torch.optim.Optimizer

    def __init__(self, defence: Carso, config: CarsoConfig, origin: str = "scratch"):
        super().__init__(defence, config, origin)
        if config.joint:
            defence.release_classifier()
        trainable = [p for p in defence.parameters() if p.requires_grad]
        if config.optimizer == "adamw":
            self.optimizer = self.adamw(trainable)
            return
        rate, decay = config.learning_rate, config.weight_decay
        inner = torch.optim.RAdam(trainable, rate, weight_decay=decay, decoupled_weight_decay=True, foreach=True)
        self.optimizer = Lookahead(inner, config.lookahead_steps, config.lookahead_alpha)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return STEPS[self.config.attack_target](self.defence, batch, self.config, self.graphs)

    def frozen_attacks(self) -> FrozenAttacks | None:
        config = self.config
        if config.attack_target != "classifier" or config.adversarial_fraction == 0:
            return None
        # this refuses a radius that rises from epoch to epoch
        facts = self.attack_facts(config.attack)
        config = config_in_epoch(config, tuple(self.defence.arguments["std"]))
        # in the order of `balanced_batch`
        attacks = tuple(
            FrozenAttack(eps, random, share=config.adversarial_fraction / 4)
            for random in (True, False)
            for eps in (config.attack.eps / 2, config.attack.eps)
        )
        return FrozenAttacks(attacks, config.attack.norm, facts)

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
            # at the end of the delay the weight is still 0, and rises from there
            length.first_step(ceil(delay) + 1 if delay > 0 else 0, unit),
            argument="kl_delay",
            value=f"{config.kl_delay:g} ({'share of the epochs' if config.kl_delay_unit == 'share' else unit})",
            weight=f"beta {config.beta:g}",
        )
        return {"reconstruction": 0, "kl": kl}

    def _check_last_batch(self, length: RunLength) -> None:
        """ValueError if an epoch's last batch is kept, and is too small to be attacked."""
        config, images = self.config, length.last_batch
        if config.attack_target == "classifier" and images != length.batch_size:
            try:
                atom_size(images // processes()[1], config.adversarial_fraction, config.allow_no_adversarial)
            except ValueError as error:
                raise ValueError(f"drop_last=False keeps a last batch of {images} images: {error}") from error

    def validate(self, batch: Batch) -> Metrics:
        """The training's loss per image, and its metrics.

        Args:
            batch: held-out images.
        """
        # The last batch may be too small to be attacked. The mean over all batches weights each by its images, so that
        # the sum over a batch would count them twice.
        config = replace(self.config, allow_no_adversarial=True, reduction="mean")
        with torch.no_grad():
            loss, metrics = STEPS[config.attack_target](self.defence, batch, config, self.graphs)
        return {"loss": loss.detach(), **metrics}

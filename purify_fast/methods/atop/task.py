"""The losses of AToP's training: pre-training, the paper's objective, and through the whole pipeline.

With x' adversarial, t a random transform of x' (in [-1, 1]), (x1, x2) = g(t, m) the coarse and the refined image,

    L = w_adv L_G + w (mean |s - x1| + mean |s - x2|) + lambda CE(f((x2 + 1) / 2), y)

Source: arXiv 2401.16352, section 3, and its official code, whose L1 goes to s = x' (the released notebooks) or to
s = x, with a second pass on clean x (the logged run). The classifier f is frozen. L_G = -mean D(x2, m) of a hinge GAN,
L_D = mean relu(1 - D(s, m)) / 2 + mean relu(1 + D(x2, m)) / 2; in the official code its gradient never reaches g.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...attacks import fgsm
from ...speed.graphs.step_graphs import StepGraphs
from ...training.bank import FrozenAttack, FrozenAttacks
from ...training.schedules import RunLength
from ...training.task import Batch, Metrics, Update
from ..base import PurifierTask, cross_entropy_of, noise_of
from .config import AtopConfig
from .deepfill_training import PatchDiscriminator, hide_free_form, patch_depth
from .defence import Atop


def attacked(defence: Atop, batch: Batch, config: AtopConfig, graphs: StepGraphs | None = None) -> Tensor:
    """The adversarial images x' of a batch.

    Args:
        defence: the defence that is attacked, or whose classifier is.
        batch: the images.
        config: the attack and its target.
        graphs: captures the attack's step, if given.

    Returns:
        Images, shape and dtype of the batch's.
    """
    if config.attack_method == "none":
        return batch.x
    pipeline = config.attack_target == "pipeline"
    model = defence if pipeline else defence.frozen_classifier

    def make(rows: Tensor | None) -> Tensor:
        if config.attack_method == "pgd":
            return config.attack.run(model, batch, graphs=graphs, rows=rows)
        now = config.attack.at_epoch(batch.epoch, batch.epochs)
        x, y = (batch.x, batch.y) if rows is None else (batch.x[rows], batch.y[rows])
        return fgsm(model, x, y, eps=now.eps, norm=now.norm, graphs=graphs)

    if batch.bank is not None and not pipeline:
        count = len(batch.x)
        return batch.bank.images(batch.x, slice(count), torch.zeros(count, dtype=torch.int64), make)
    with noise_of(defence, batch) if pipeline else contextlib.nullcontext():
        return make(None)


@dataclass(frozen=True)
class Passes:
    """The results of a batch's passes through the purifier, for the losses.

    Args:
        loss: the loss without its GAN term.
        metrics: detached scalars.
        target: the image to rebuild from each input, in [-1, 1], ``[T, C, H, W]``.
        refined: the purifier's images, differentiable, ``[T, C, H, W]``.
        packed: the transformed images t that the purifier saw, a plane of ones, and the mask, 1 where an image was
            hidden, ``[T, C + 2, H, W]``.
    """

    loss: Tensor
    metrics: Metrics
    target: Tensor
    refined: Tensor
    packed: Tensor


@dataclass(frozen=True)
class Inputs:
    """The inputs of the purifier in a step.

    Args:
        rebuild: the images that are to be rebuilt, ``[B, C, H, W]`` in [0, 1].
        packed: what the purifier sees: T inputs for these images, and behind them T for the classifier's if those are
            other images.
        count: T.
        owners: the passes of each block, as `Atop.draw` gives them.
        cls_weight: lambda, 0 while the cross-entropy does not act yet.
    """

    rebuild: Tensor
    packed: Tensor
    count: int
    owners: Tensor
    cls_weight: float


def inputs(defence: Atop, batch: Batch, config: AtopConfig, graphs: StepGraphs | None = None) -> Inputs:
    """The images of a batch, attacked and transformed.

    If the L1 term and the classifier see the same images, one pass serves both; if not, one pass has twice the images.
    While lambda is 0 the inputs of the cross-entropy alone are not computed.

    Args:
        defence: the defence whose purifier is trained.
        batch: the images.
        config: the settings of the training.
        graphs: captures the attack's step, if given.
    """
    weight = config.cls_weight if batch.progress_in(config.cls_delay_unit) >= config.cls_delay else 0.0
    rebuilds_clean = config.reconstruction_target == "clean"
    classifies_others = weight > 0 and config.attack_method != "none" and rebuilds_clean
    adversarial = attacked(defence, batch, config, graphs) if classifies_others or not rebuilds_clean else batch.x
    rebuild = batch.x if rebuilds_clean else adversarial
    seed = torch.full((1,), batch.seed, dtype=torch.int64, device=batch.x.device)
    if config.masks == "free_form":
        seen = rebuild.to(defence.purifier_dtype)
        packed, owners = hide_free_form(seen, seed, batch.sample_ids, shared=defence.shared_mask)
    else:
        packed, owners = defence.draw(rebuild, noise=(seed, batch.sample_ids))
    count = len(packed)
    if classifies_others:  # the same noise and mask
        packed = torch.cat([packed, defence.draw(adversarial, noise=(seed, batch.sample_ids))[0]])
    return Inputs(rebuild, packed, count, owners, weight)


def losses(defence: Atop, batch: Batch, config: AtopConfig, given: Inputs, images: tuple[Tensor, ...]) -> Passes:
    """The losses of the purifier's images.

    Args:
        defence: the defence whose purifier is trained.
        batch: the images.
        config: the settings of the training.
        given: the purifier's inputs.
        images: the purifier's images of every stage.
    """
    count, samples = given.count, len(given.owners)
    target = (2 * given.rebuild - 1).to(images[-1].dtype)
    # sample by sample, with N passes for each of its images
    target = target.repeat_interleave(count // (samples * len(target)), 0).repeat(samples, 1, 1, 1)
    reconstruction = defence.purifier.original_loss([image[:count] for image in images], target).mean()
    loss = config.reconstruction_weight * reconstruction
    metrics = {"reconstruction": reconstruction.detach()}
    if given.cls_weight > 0:
        purified = defence.join(images[-1][-count:], given.owners)  # [S, B, C, H, W]
        if config.classifier_range == "doubled":
            purified = 2 * purified - 1
        cross_entropy, accuracy = cross_entropy_of(defence.classify(purified).flatten(0, 1), batch.y.repeat(samples))
        loss = loss + given.cls_weight * cross_entropy
        metrics |= {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
    return Passes(loss, metrics, target, refined=images[-1][:count], packed=given.packed[:count])


def passes(defence: Atop, batch: Batch, config: AtopConfig, graphs: StepGraphs | None = None) -> Passes:
    """The attack, the transform and the purifier on one batch.

    Args:
        defence: the defence whose purifier is trained.
        batch: the images.
        config: the settings of the training.
        graphs: captures the attack's step, if given.
    """
    given = inputs(defence, batch, config, graphs)
    return losses(defence, batch, config, given, defence.stages(given.packed))


def training_loss(
    defence: Atop, batch: Batch, config: AtopConfig | None = None, graphs: StepGraphs | None = None
) -> tuple[Tensor, Metrics]:
    """The loss of one batch without a discriminator, for a loop of your own; backward and the step are the loop's.

    Args:
        defence: whose purifier is trained.
        batch: the images.
        config: the settings; None takes the defaults.
        graphs: captures the attack's step on a CUDA device, if given; the same one for every batch.

    Returns:
        The loss to minimize, and detached metrics.

    Raises:
        ValueError: the config's ``gan_grad``, whose discriminator is `AtopTask`'s, or a precision in which the defence
            does not compute.
    """
    config = AtopConfig() if config is None else config
    if (config.precision == "bfloat16") != defence.computes_in_bfloat16:
        raise ValueError(
            f"precision {config.precision!r} must be that of the defence: call accelerate(torch.bfloat16) or "
            "accelerate(None) on it first"
        )
    if config.gan_grad:
        raise ValueError("gan_grad needs a discriminator, which is trained with the purifier: use AtopTask")
    one_pass = passes(defence, batch, config, graphs)
    return one_pass.loss, one_pass.metrics


def discriminator_loss(discriminator: nn.Module, one_pass: Passes, gan_fake: str) -> Tensor:
    """L_D: real images are the targets; no gradient reaches the purifier.

    Args:
        discriminator: images and masks to scores.
        one_pass: the batch's passes.
        gan_fake: the fake images for its step, as in `AtopConfig`.
    """
    fake = one_pass.refined.detach()
    mask = one_pass.packed[:, -1:]
    if gan_fake == "pasted":
        fake = torch.where(mask > 0, fake, one_pass.packed[:, :-2])
    real, false = discriminator(torch.cat([torch.cat([one_pass.target, fake]), mask.repeat(2, 1, 1, 1)], 1)).chunk(2)
    return hinge(real, false)


def generator_loss(discriminator: nn.Module, one_pass: Passes) -> Tensor:
    """L_G: minus the mean score of the refined images; no gradient reaches the discriminator.

    Args:
        discriminator: images and masks to scores.
        one_pass: the batch's passes.
    """
    discriminator.requires_grad_(False)
    try:
        return -discriminator(torch.cat([one_pass.refined, one_pass.packed[:, -1:]], 1)).mean()
    finally:
        discriminator.requires_grad_(True)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean relu(1 - real) / 2 + mean relu(1 + fake) / 2.

    Args:
        real: scores of real images.
        fake: scores of fake images.
    """
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


class AtopTask(PurifierTask[Atop]):
    """Trains a defence's purifier in `purify_fast.training.fit`; its classifier stays as it is.

    Args:
        defence: the defence to train.
        config: how; its precision decides whether the defence is accelerated.
        origin: the start of the purifier, if not from scratch; a run is resumed only with the same start.

    With ``gan_grad`` a discriminator is made from torch's global generator and plays along: each step first trains it,
    then the purifier. It is kept in checkpoints, not in the saved defence.
    """

    name = "atop"
    config: AtopConfig

    def __init__(self, defence: Atop, config: AtopConfig, origin: str = "scratch"):
        super().__init__(defence, config, origin)
        self.discriminator: nn.Module | None = None
        trained = [p for p in defence.purifier.parameters() if p.requires_grad]

        def adam(weights: Iterable[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(weights, config.learning_rate, config.betas, foreach=True)

        self._optimizers = {"purifier": adam(trained)}
        if config.gan_grad:
            channels, *size = defence.image_shape
            discriminator = PatchDiscriminator(channels + 1, config.discriminator_width, patch_depth(size))
            self.discriminator = discriminator.to(trained[0].device)
            # models that are trained together share a checkpoint
            self.model = nn.ModuleDict({"defence": defence, "discriminator": discriminator})
            self._optimizers["discriminator"] = adam(discriminator.parameters())

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def updates(self, batch: Batch) -> Iterator[Update]:
        one_pass, judged = passes(self.defence, batch, self.config, self.graphs), {}
        if self.discriminator is not None:
            loss = discriminator_loss(self.discriminator, one_pass, self.config.gan_fake)
            yield Update("discriminator", loss, {})
            judged = {"discriminator": loss.detach()}
        # the purifier's loss uses the discriminator after its own step
        loss, metrics = self._with_discriminator(one_pass)
        yield Update("purifier", loss, {**metrics, **judged})

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The purifier's loss and metrics, of the discriminator as it is.

        Args:
            batch: the images.
        """
        return self._with_discriminator(passes(self.defence, batch, self.config, self.graphs))

    def _with_discriminator(self, one_pass: Passes) -> tuple[Tensor, Metrics]:
        """The purifier's loss with its GAN term, if there is one."""
        if self.discriminator is None:
            return one_pass.loss, one_pass.metrics
        deceived = generator_loss(self.discriminator, one_pass)
        metrics = {**one_pass.metrics, "deceived": deceived.detach()}
        return one_pass.loss + self.config.gan_weight * deceived, metrics

    def frozen_attacks(self) -> FrozenAttacks | None:
        config, attack = self.config, self.config.attack
        if config.attack_target != "classifier" or config.attack_method == "none":
            return None
        random = config.attack_method == "pgd" and attack.random_start
        facts = {**self.attack_facts(attack), "attack_method": config.attack_method}
        return FrozenAttacks((FrozenAttack(attack.eps, random, share=1.0),), attack.norm, facts)

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

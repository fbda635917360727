"""The losses of AToP's training: pre-training, the paper's objective, and through the whole pipeline.

With x' adversarial, t a random transform of x' (in [-1, 1]), (x1, x2) = g(t, m) the coarse and the refined image,

    L = w_adv L_G + w (mean |s - x1| + mean |s - x2|) + lambda CE(f((x2 + 1) / 2), y)

Source: arXiv 2401.16352, section 3, and its official code, whose L1 goes to s = x' (the released notebooks) or to
s = x, with a second pass on clean x (the logged run). The classifier f is frozen. L_G = -mean D(x2, m) of a hinge GAN,
L_D = mean relu(1 - D(s, m)) / 2 + mean relu(1 + D(x2, m)) / 2; in the official code its gradient never reaches g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._process import processes
from ..._validation import Precision
from ...attacks import fgsm
from ...protocols import Classifier
from ...speed.graphs.step_graphs import StepGraphs
from ...training.task import Batch, Metrics
from .config import AtopConfig, GanFake
from .defence import Atop
from .masks import hide_free_form


def attacked(defence: Atop, batch: Batch, config: AtopConfig, graphs: StepGraphs | None = None) -> Tensor:
    """The adversarial images x' of a batch.

    Args:
        defence: what is attacked, or whose classifier.
        batch: the images.
        config: the attack and its target.
        graphs: captures the attack's step, if given.

    Returns:
        Images, shape and dtype of the batch's.
    """
    if config.attack_method == "none":
        return batch.x
    if config.attack_target == "classifier":
        return _run(config, defence.frozen_classifier, batch, graphs)
    rank, world = processes()
    # where the images stand in the batch of all processes
    global_positions = torch.arange(rank, world * len(batch.x), world, device=batch.x.device)
    with defence.noise_ids(global_positions):
        return _run(config, defence, batch, graphs)


def _run(config: AtopConfig, model: Classifier, batch: Batch, graphs: StepGraphs | None) -> Tensor:
    """The config's attack on a model."""
    if config.attack_method == "pgd":
        return config.attack.run(model, batch, graphs=graphs)
    now = config.attack.at_epoch(batch.epoch, batch.epochs)
    return fgsm(model, batch.x, batch.y, eps=now.eps, norm=now.norm, graphs=graphs)


@dataclass(frozen=True)
class Passes:
    """One batch through the purifier: what the losses need.

    Args:
        loss: the loss without its GAN term.
        metrics: detached scalars.
        target: what each image is to be rebuilt as, in [-1, 1], ``[T, C, H, W]``.
        refined: the purifier's images, differentiable, ``[T, C, H, W]``.
        mask: 1 where an image was hidden, ``[T, 1, H, W]``.
        visible: the transformed images t that the purifier saw, ``[T, C, H, W]``.
    """

    loss: Tensor
    metrics: Metrics
    target: Tensor
    refined: Tensor
    mask: Tensor
    visible: Tensor


def passes(defence: Atop, batch: Batch, config: AtopConfig, graphs: StepGraphs | None = None) -> Passes:
    """The transform and the purifier on one batch.

    One pass where the L1's input and the classifier's are the same images; one of twice the images where not. While
    lambda is 0 what only the cross-entropy would need is not computed.

    Args:
        defence: whose purifier is trained.
        batch: the images.
        config: the settings of the training.
        graphs: captures the attack's step, if given.
    """
    weight = config.cls_weight if batch.behind(config.cls_delay_unit) >= config.cls_delay else 0.0
    rebuild = batch.x
    both = weight > 0 and config.attack_method != "none" and config.reconstruction_target == "clean"
    if both or config.reconstruction_target == "adversarial":
        adversarial = attacked(defence, batch, config, graphs)
        rebuild = rebuild if both else adversarial
    seed = torch.full((1,), batch.seed, dtype=torch.int64, device=batch.x.device)
    num_passes = 1 if defence.num_passes is None else defence.num_passes
    if config.masks == "free_form":
        num_passes = 1
        seen = rebuild.to(defence.purifier_dtype)
        packed, owners = hide_free_form(seen, seed, batch.sample_ids, shared=defence.shared_mask)
    else:
        packed, owners = defence.draw(rebuild, seed=seed, ids=batch.sample_ids)
    rows, classified = len(packed), owners
    if both:  # the same noise and mask
        packed = torch.cat([packed, defence.draw(adversarial, seed=seed, ids=batch.sample_ids)[0]])
    images = defence.stages(packed)
    channels = rebuild.shape[1]
    target = (2 * rebuild - 1).to(images[-1].dtype)
    passes_per_image = rows // len(rebuild)
    # sample by sample, N passes for each image of it
    target = target.repeat_interleave(num_passes, 0).repeat(passes_per_image // num_passes, 1, 1, 1)
    reconstruction = defence.purifier.original_loss([image[:rows] for image in images], target).mean()
    loss = config.reconstruction_weight * reconstruction
    metrics = {"reconstruction": reconstruction.detach()}
    if weight > 0:
        purified = defence.join(images[-1][-rows:], classified)  # [S, B, C, H, W]
        if config.classifier_range == "doubled":
            purified = 2 * purified - 1
        logits = defence.classify(purified).flatten(0, 1)
        labels = batch.y.repeat(len(purified))
        cross_entropy = F.cross_entropy(logits, labels)
        loss = loss + weight * cross_entropy
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        metrics |= {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
    head = packed[:rows]
    return Passes(
        loss=loss,
        metrics=metrics,
        target=target,
        refined=images[-1][:rows],
        mask=head[:, -1:],
        visible=head[:, :channels],
    )


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
        ValueError: the config's ``gan_grad``, whose discriminator is `AtopTask`'s, or a precision that is not the
            defence's.
    """
    config = AtopConfig() if config is None else config
    if config.precision.replace("tf32", "float32") != computed_precision(defence):
        raise ValueError(
            f"precision {config.precision!r} needs a defence so accelerated; this computes in "
            f"{computed_precision(defence)}"
        )
    if config.gan_grad:
        raise ValueError("gan_grad needs a discriminator, which is trained with the purifier: use AtopTask")
    made = passes(defence, batch, config, graphs)
    return made.loss, made.metrics


def discriminator_loss(discriminator: nn.Module, made: Passes, gan_fake: GanFake) -> Tensor:
    """L_D: real images are the targets; no gradient reaches the purifier.

    Args:
        discriminator: images and masks to scores.
        made: the batch's passes.
        gan_fake: what it sees as fake.
    """
    fake = made.refined.detach()
    if gan_fake == "pasted":
        fake = torch.where(made.mask > 0, fake, made.visible)
    masks = made.mask.repeat(2, 1, 1, 1)
    real, false = discriminator(torch.cat([torch.cat([made.target, fake]), masks], 1)).chunk(2)
    return hinge(real, false)


def generator_loss(discriminator: nn.Module, made: Passes) -> Tensor:
    """L_G: minus the mean score of the refined images; no gradient reaches the discriminator.

    Args:
        discriminator: images and masks to scores.
        made: the batch's passes.
    """
    discriminator.requires_grad_(False)
    try:
        return -discriminator(torch.cat([made.refined, made.mask], 1)).mean()
    finally:
        discriminator.requires_grad_(True)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean relu(1 - real) / 2 + mean relu(1 + fake) / 2.

    Args:
        real: scores of real images.
        fake: scores of fake images.
    """
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


def computed_precision(defence: Atop) -> Precision:
    """In what a defence computes, as a config names it.

    Args:
        defence: the defence.
    """
    return "bfloat16" if defence.fast is not None and defence.fast.dtype == torch.bfloat16 else "float32"

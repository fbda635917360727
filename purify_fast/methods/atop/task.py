"""Trains AToP's purifier: in pre-training, by the paper's objective, or against attacks on the whole pipeline.

Let x' be the adversarial image, t a random transform of x' (in [-1, 1]) with the mask m, and (x1, x2) = g(t, m) the
coarse and the refined image of the purifier g. The losses of g, with a frozen classifier f, and of the discriminator D
are

    L   = w_adv L_G + w (mean |s - x1| + mean |s - x2|) + lambda CE(f((x2 + 1) / 2), y),   L_G = -mean D(x2, m)
    L_D = mean relu(1 - D(s, m)) / 2 + mean relu(1 + D(x2, m)) / 2

Sources: arXiv 2401.16352, section 3, and the official code. The target s is x' in the released notebooks. In the
authors' logged run, s is the clean x, and the L1 terms are from a separate pass on x.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._settings import without_autocast
from ..._validation import Range, check_counts
from ...models.layers import LeakyReLU
from ...ops.philox import philox_key
from ...training.task import Batch, Metrics, RunLength, Update, cross_entropy_of
from ..purifier_task import PurifierTask, noise_of
from ..recipes import Recipe, read_recipes
from .defence import Atop
from .generators import DeepFillGenerator
from .method import AtopConfig

WIDTHS = (1, 2, 4, 4, 4, 4)


class SpectralConv(nn.Conv2d):
    """A convolution with ``weight / sigma``; sigma is the largest singular value of W ``[outputs, inputs * kernel^2]``.

    sigma is u' W v with v = W' u / |W' u|, differentiated with constant u and v. In training mode, each forward pass
    makes a step of power iteration. The buffer ``weight_u [outputs, 1]``, which is u, begins with fifteen steps.
    deepfillv2-pytorch divides the stored weight itself in every forward pass, so a weight that was saved there has a
    sigma near 1.
    """

    weight_u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int):
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.register_buffer("weight_u", torch.randn(outputs, 1))
        with torch.no_grad():
            for _ in range(15):
                self.weight_u.copy_(self._step(self.weight_u))

    def _right(self, u: Tensor) -> Tensor:
        return F.normalize(self.weight.detach().flatten(1).T @ u, dim=0, eps=1e-12)

    def _step(self, u: Tensor) -> Tensor:
        return F.normalize(self.weight.detach().flatten(1) @ self._right(u), dim=0, eps=1e-12)

    def forward(self, input: Tensor) -> Tensor:
        # The number sigma is not computed in bfloat16, whose mantissa of eight bits is too inexact.
        with without_autocast(input.device):
            # Autograd needs a copy, because the buffer may change before the backward pass.
            u = self.weight_u.clone()
            if self.training:
                u = self._step(u)
                self.weight_u.copy_(u)
            sigma = (u.T @ self.weight.flatten(1) @ self._right(u)).squeeze()
            weight = self.weight / sigma
        return self._conv_forward(input, weight, self.bias)


def patch_depth(image_size: Sequence[int]) -> int:
    """Return the largest depth of `PatchDiscriminator`, up to 6, whose output still has at least 2 x 2 patches."""
    # Each layer halves the sides, rounded up.
    return min(len(WIDTHS), (min(image_size) - 1).bit_length() - 1)


class PatchDiscriminator(nn.Module):
    """The discriminator of SN-PatchGAN: spectrally normalized 5 x 5 convolutions of stride 2, each with LeakyReLU(0.2).

    ``forward(images and masks [B, C + 1, H, W])`` returns logits ``[B, N]``; N is 4,096 for 256 x 256. The images are
    in [-1, 1], and the masks are 1 where hidden. LeakyReLU also follows the last layer.

    Args:
        in_channels: C + 1, where C is the number of channels of the image.
        width: channels of the first layer (published: 64). The layers have 1, 2, 4, 4, 4 and 4 times this number.
        depth: number of layers, 1 to 6 (published: 6); `patch_depth` returns a depth for an image size.
    """

    def __init__(self, in_channels: int = 4, width: int = 64, depth: int = 6):
        super().__init__()
        check_counts(in_channels=in_channels, width=width)
        Range(1, len(WIDTHS)).check("depth", depth)
        channels = [in_channels, *(width * factor for factor in WIDTHS[:depth])]
        for i in range(depth):
            convolution = SpectralConv(channels[i], channels[i + 1], 5, 2, 2)
            self.add_module(f"conv{i + 1}", nn.Sequential(OrderedDict(conv_sn=convolution, leaky_relu=LeakyReLU())))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.flatten(1)


# -- task --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """The purifier's T inputs ``packed``, the images to rebuild ``target`` and the ``refined`` images, in [-1, 1]."""

    loss: Tensor
    metrics: Metrics
    target: Tensor
    refined: Tensor
    packed: Tensor


def losses(
    defence: Atop, packed: Tensor, target: Tensor, owners: Tensor, labels: Tensor | None, doubled: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the L1 terms and the refined images of inputs, and cross-entropy and accuracy if there are labels.

    The L1 terms are those of the first ``len(target)`` inputs, and the cross-entropy that of the last ones.
    ``doubled``: whether the classifier gets images in [-1, 1].
    """
    count, samples = len(target), len(owners)
    images = defence.stages(packed)
    # DeepFillv2's loss: the mean absolute difference, summed over the stages
    apart = ((image[:count] - target).abs().flatten(1).mean(1) for image in images)
    reconstruction = sum(apart, target.new_zeros(count)).mean()
    if labels is None:
        return reconstruction, images[-1][:count], None
    # `purified` is [S, B, C, H, W]
    purified = defence.join(images[-1][-count:], owners)
    purified = 2 * purified - 1 if doubled else purified
    classified = cross_entropy_of(defence.classify(purified).flatten(0, 1), labels.repeat(samples))
    return reconstruction, images[-1][:count], classified


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator: mean relu(1 - real) / 2 + mean relu(1 + fake) / 2."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


class AtopTask(PurifierTask[Atop]):
    """The training of a defence's purifier with a frozen classifier, for `purify_fast.training.fit`.

    With ``gan_grad``, each step first trains a discriminator, whose initial weights are drawn from torch's global
    generator. Checkpoints contain the discriminator, but the saved defence does not. Steps compute with a copy of a
    large classifier, or in bfloat16 of any. ``origin`` is a name of the purifier's initial weights; a run is resumed
    only with the same name.
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
            # Checkpoints save ``model``, so it must contain both.
            self.model = nn.ModuleDict({"defence": defence, "discriminator": discriminator})
            self._optimizers["discriminator"] = adam(discriminator.parameters())

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def attack(self, batch: Batch) -> Tensor:
        """Return the adversarial images x' of a batch; without an attack, the images themselves."""
        defence, config = self.trained, self.config
        if config.attack_method == "none":
            return batch.x
        pipeline = config.attack_target == "pipeline"
        model = defence if pipeline else defence.frozen_classifier
        with noise_of(defence, batch) if pipeline else contextlib.nullcontext():
            return config.attack.run(model, batch, graphs=self.graphs, one_step=config.attack_method == "fgsm")

    def passes(self, batch: Batch) -> Passes:
        """Attack, transform and purify a batch, and compute the losses; no cross-entropy while lambda is 0."""
        defence, config = self.trained, self.config
        cls_weight = config.cls_weight if batch.progress_in(config.cls_delay_unit) >= config.cls_delay else 0.0
        rebuilds_clean = config.reconstruction_target == "clean"
        classifies_others = cls_weight > 0 and config.attack_method != "none" and rebuilds_clean
        adversarial = self.attack(batch) if classifies_others or not rebuilds_clean else batch.x
        rebuild = batch.x if rebuilds_clean else adversarial
        noise = philox_key(batch.seed, batch.x.device), batch.sample_ids
        packed, owners = defence.draw(rebuild, noise=noise)
        count, samples = len(packed), len(owners)
        if classifies_others:
            # These inputs are for the cross-entropy, and have the noise and the mask of the inputs above.
            packed = torch.cat([packed, defence.draw(adversarial, noise=noise)[0]])
        target = (2 * rebuild - 1).to(defence.purifier_dtype)
        # The inputs are ordered by sample, then by image, then by pass.
        target = target.repeat_interleave(count // (samples * len(target)), 0).repeat(samples, 1, 1, 1)
        labels = batch.y if cls_weight > 0 else None
        inputs = defence, packed, target, owners, labels, config.classifier_range == "doubled"
        reconstruction, refined, classified = self.compiled(losses)(*inputs)
        loss = config.reconstruction_weight * reconstruction
        metrics = {"reconstruction": reconstruction.detach()}
        if classified is not None:
            cross_entropy, accuracy = classified
            loss = loss + cls_weight * cross_entropy
            metrics |= {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
        return Passes(loss, metrics, target, refined=refined, packed=packed[:count])

    def updates(self, batch: Batch) -> Iterator[Update]:
        passes, judged = self.passes(batch), {}
        if self.discriminator is not None:
            # No gradient of the discriminator's loss L_D reaches the purifier.
            fake, mask = passes.refined.detach(), passes.packed[:, -1:]
            if self.config.gan_fake == "pasted":
                fake = torch.where(mask > 0, fake, passes.packed[:, :-2])
            shown = torch.cat([torch.cat([passes.target, fake]), mask.repeat(2, 1, 1, 1)], 1)
            loss = hinge(*self.discriminator(shown).chunk(2))
            yield Update("discriminator", loss, {})
            judged = {"discriminator": loss.detach()}
        # The purifier's loss uses the discriminator after the discriminator's step.
        loss, metrics = self._with_discriminator(passes)
        yield Update("purifier", loss, {**metrics, **judged})

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the purifier's loss and metrics, without a step of the discriminator."""
        return self._with_discriminator(self.passes(batch))

    def _with_discriminator(self, passes: Passes) -> tuple[Tensor, Metrics]:
        """Add the GAN term L_G. No gradient of it reaches the discriminator."""
        if self.discriminator is None:
            return passes.loss, passes.metrics
        self.discriminator.requires_grad_(False)
        try:
            refined = passes.refined.to(passes.target.dtype)
            deceived = -self.discriminator(torch.cat([refined, passes.packed[:, -1:]], 1)).mean()
        finally:
            self.discriminator.requires_grad_(True)
        loss = passes.loss + self.config.gan_weight * deceived
        return loss, {**passes.metrics, "deceived": deceived.detach()}

    def terms(self, length: RunLength) -> dict[str, int]:
        config = self.config
        if config.cls_weight == 0:
            return {}
        first = length.first_step(config.cls_delay, config.cls_delay_unit)
        return {"cross_entropy": length.check_acts(first, argument="cls_delay")}


# -- the published trainings: ``recipes.yaml`` has every value and its source ------------------------------------------
#
# Nearly all facts are from the released notebooks (glin2022/atop, commit 9fa1e91), not from the paper. A line number
# counts the lines of all code cells. The repository has no license, so none of its code is copied here.


@dataclass(frozen=True)
class AtopRecipe(Recipe):
    """A published AToP training.

    With ``official_code``, the training is that of the notebooks: for the cross-entropy, the classifier gets purified
    images in [-1, 1], and the gradient of the GAN term is cut off.
    """

    settings = AtopConfig

    def defence(
        self, classifier: nn.Module, purifier: nn.Module | None = None, official_code: bool = False, **changes: Any
    ) -> Atop:
        """Build the defence to train. For images of another size, the side of a block is `Atop`'s default.

        Args:
            classifier: classifier for images of the recipe's size. The authors' classifier was trained on clean images.
            purifier: the purifier to train. None means a fresh `DeepFillGenerator` of the authors' size. The authors
                begin with a generator that was trained on Places2.
            official_code: use one mask for all images of a batch, as in the authors' code.
            changes: arguments of `Atop` that replace those of the recipe.
        """
        purifier = DeepFillGenerator(self.image_shape[0] + 2) if purifier is None else purifier
        options = {"image_shape": self.image_shape, **self.part("defence", official_code)}
        # 32 pixels of 256, the published side, is the default for images of 256 x 256
        del options["block"]
        return Atop(classifier, purifier, **{**options, **changes})

    def task(self, defence: Atop, official_code: bool = False) -> AtopTask:
        """Return the training of a defence, for `purify_fast.training.fit`. ``official_code`` is as in `config`."""
        return AtopTask(defence, self.config(official_code))


RECIPES = read_recipes(AtopRecipe, "atop")

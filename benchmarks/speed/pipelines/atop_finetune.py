"""Measure one step of AToP's fine-tuning.

The attack is FGSM on the classifier, the transform is RT2, and the purifier is DeepFillv2.

Plain "as released" does all work of the authors' notebooks, also work that does not change the gradients of the step.
The expert leaves out this unneeded work, and so does our implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, DeepFillGenerator, PatchDiscriminator
from purify_fast.methods.atop.generators import GatedConv
from purify_fast.methods.atop.task import hinge, patch_depth
from purify_fast.ops import use_backend
from purify_fast.ops.contextual_attention import key_validity
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from . import Case, Job, autocast, columns, expert, precision, random_batch, training_step, update
from .carso_training import attack

BATCH, SIDE, EPS, SIGMA, WEIGHT = 4, 128, 8 / 255, 0.25, 0.05
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.5, 0.999)}
#: The largest allowed distance between two results. Rounding to bfloat16 alone makes a distance of 0.01 to 0.02, partly
#: because it changes signs of gradients in the attack.
TOLERANCE = 0.04
#: The factor by which `compared` multiplies the refined image. The values of this image are about 0.1.
IMAGE = 10


def sizes(quick: bool) -> tuple[int, int, int]:
    """Return the number of images, their side in pixels, and the width of the generator.

    Images of a quick run have 64 pixels a side. In smaller images the attention could use no key, because every key
    would be too near to a hidden block.
    """
    return (2, 64, 4) if quick else (BATCH, SIDE, 48)


def generator(width: int) -> DeepFillGenerator:
    """Return a generator with random weights, whose output depends on the input, also through the attention.

    With the published initialization, an untrained generator would always return mid-gray, so that all contestants
    would agree. With larger random weights than here, rounding to bfloat16 would change the image completely.
    """
    made = DeepFillGenerator(5, width)
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=1.8 / layer.weight[0].numel() ** 0.5)
            # Every convolution of the generator has a bias.
            nn.init.normal_(layer.bias, std=0.1)  # type: ignore[arg-type]
    return made


def defence(device: torch.device, quick: bool) -> Atop:
    """Return AToP with the published generator and an untrained ResNet-18. A quick run gets a narrow generator."""
    _, side, width = sizes(quick)
    torch.manual_seed(0)
    import torchvision

    classifier = torchvision.models.resnet18(num_classes=10).eval()
    # Without this factor, the cross-entropy would be about log 10 for every image.
    classifier.fc.weight.data *= 10
    return Atop(classifier, generator(width), (3, side, side), block=side // 8).to(device)


def batch_of(device: torch.device, quick: bool) -> Batch:
    n, side, _ = sizes(quick)
    return random_batch(device, n, side, 10)


def setting(precision: str) -> AtopConfig:
    return AtopConfig(attack=TrainingAttack(eps=EPS, steps=10), cls_weight=WEIGHT, cls_delay=0, precision=precision)


def compared(reconstruction: Tensor, cross_entropy: Tensor, refined: Tensor) -> Tensor:
    """Return a vector on which contestants must agree: both losses, and the refined image, scaled to similar sizes."""
    image = refined.float().flatten() * (IMAGE / refined.numel() ** 0.5)
    return torch.cat([torch.stack([reconstruction.float(), cross_entropy.float()]), image]).detach()


class PlainGate(nn.Module):
    """A gated convolution in plain PyTorch. Under autocast, its result has the dtype of its convolution."""

    def __init__(self, layer: GatedConv):
        super().__init__()
        self.conv, self.relu = layer.conv, layer.relu

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return (F.relu(a) if self.relu else F.elu(a)) * torch.sigmoid(b)


def weights(scores: Tensor, valid: Tensor, h: int, w: int) -> Tensor:
    """Compute the weights of the attention by a softmax over the keys.

    Before the softmax, two convolutions add the scores of neighboring keys and queries, as DeepFillv2 does.
    """
    n, keys = len(scores), h * w
    diagonal = torch.eye(3, device=scores.device, dtype=scores.dtype)[None, None]
    for a, b in ((h, w), (w, h)):
        scores = F.conv2d(scores[:, None], diagonal, padding=1)[:, 0]
        scores = scores.view(n, a, b, a, b).permute(0, 2, 1, 4, 3).reshape(n, keys, keys)
    valid = valid[:, :, None]
    return valid * torch.softmax(10 * valid * scores, 1)


class ReleasedAttention(nn.Module):
    """Contextual attention as in the released code. The kernels of its convolutions are the patches of each image."""

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        h, w = features.shape[2] // 2, features.shape[3] // 2
        valid = key_validity(mask, (h, w)).to(features.dtype)
        return torch.cat([self.one(f[None], v[None], h, w) for f, v in zip(features, valid, strict=True)])

    def one(self, features: Tensor, valid: Tensor, h: int, w: int) -> Tensor:
        keys = h * w
        values = F.unfold(features, 4, padding=1, stride=2)[0].T.reshape(keys, -1, 4, 4)
        small = F.interpolate(features, (h, w))
        patches = F.unfold(small, 3, padding=1)[0].T.reshape(keys, -1, 3, 3)
        norms = patches.flatten(1).norm(dim=1).clamp_min(1e-4)
        scores = F.conv2d(small, patches / norms[:, None, None, None], padding=1).view(1, keys, keys)
        attention = weights(scores, valid, h, w)
        return F.conv_transpose2d(attention.view(1, keys, h, w), values, stride=2, padding=1) / 4


class PlainAttention(nn.Module):
    """Contextual attention by products of matrices, for all images of the batch together."""

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        h, w = features.shape[2] // 2, features.shape[3] // 2
        valid = key_validity(mask, (h, w)).to(features.dtype)
        values = F.unfold(features, 4, padding=1, stride=2)
        patches = F.unfold(F.interpolate(features, (h, w)), 3, padding=1)
        scores = (patches / patches.norm(dim=1, keepdim=True).clamp_min(1e-4)).transpose(1, 2) @ patches
        return F.fold(values @ weights(scores, valid, h, w), features.shape[2:], 4, padding=1, stride=2) / 4


class PlainStep:
    """The step in plain PyTorch, with only the work that its gradients need."""

    attention: type[nn.Module] = PlainAttention
    #: True if each of the two losses has a separate pass of the generator.
    twice = False

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        made = defence(device, quick)
        self.made, self.batch, self.side = made, batch_of(device, quick), sizes(quick)[1]
        self.generator = copy.deepcopy(made.purifier.module).to(memory_format=torch.contiguous_format)
        self.generator.stage2.contextual_attention = self.attention()
        for block in list(self.generator.modules()):
            for name, layer in list(block.named_children()):
                if isinstance(layer, GatedConv):
                    setattr(block, name, PlainGate(layer))
        self.classifier = copy.deepcopy(made.classifier).to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), **ADAM)
        self.g: Callable = self.generator
        self.f: Callable = self.classifier
        if compiled:
            self.g, self.f = (torch.compile(part, dynamic=False) for part in (self.g, self.f))

    def adversarial(self) -> Tensor:
        return attack(self.f, self.batch.x, self.batch.y, EPS, EPS, 1, None, None)

    def mask(self, device: torch.device) -> Tensor:
        """Return a random mask for the whole batch, ``[8, 8]``. It hides 16 of the 64 blocks of an image."""
        return (torch.randperm(64, device=device) < 16).float().view(8, 8)

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the generator, ``[B, 5, side, side]``, and the masks, ``[B, 1, side, side]``."""
        block = self.side // 8
        mask = self.mask(x.device).repeat_interleave(block, 0).repeat_interleave(block, 1)[None, None]
        visible = (2 * (x + SIGMA * self.noise(x)).clamp(0, 1) - 1) * (1 - mask)
        mask = mask.expand(len(x), 1, -1, -1)
        return torch.cat([visible, torch.ones_like(mask), mask], 1), mask

    def losses(self, x: Tensor, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction loss, the cross-entropy, and the refined image."""
        coarse, refined = self.g(packed, mask)
        target = 2 * x - 1
        reconstruction = (target - coarse).abs().mean() + (target - refined).abs().mean()
        classified = self.g(packed, mask)[1] if self.twice else refined
        return reconstruction, F.cross_entropy(self.f((classified + 1) / 2), self.batch.y), refined

    def run(self) -> None:
        x = self.adversarial()
        reconstruction, cross_entropy, _ = self.losses(x, *self.transform(x))
        update(self.optimizer, reconstruction + WEIGHT * cross_entropy)

    def result(self) -> Tensor:
        """Compute the compared result, with the noise and the masks that our implementation draws."""
        x, b = self.adversarial(), self.batch
        packed, _ = self.made.draw(x, noise=(torch.full((1,), b.seed, device=x.device), b.sample_ids))
        return compared(*self.losses(x, packed.contiguous(), packed[:, -1:].contiguous()))


class ReleasedStep(PlainStep):
    """The step of the released notebooks in plain PyTorch.

    The generator runs twice. A discriminator is trained, but it does not change the gradients of the generator,
    because the input of the discriminator is detached. Noise and masks are drawn on the CPU.
    """

    attention = ReleasedAttention
    twice = True

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        super().__init__(device, quick, compiled)
        width = 8 if quick else 64
        self.discriminator = PatchDiscriminator(4, width, patch_depth((self.side, self.side))).to(device)
        self.judge = torch.optim.Adam(self.discriminator.parameters(), **ADAM)
        self.d: Callable = torch.compile(self.discriminator, dynamic=False) if compiled else self.discriminator

    def mask(self, device: torch.device) -> Tensor:
        flags = np.zeros(64, dtype=np.float32)
        flags[:16] = 1
        np.random.shuffle(flags)
        return torch.from_numpy(flags.reshape(8, 8)).to(device)

    def noise(self, x: Tensor) -> Tensor:
        return torch.normal(0.0, 1.0, x.shape).to(x.device)

    def run(self) -> None:
        x = self.adversarial()
        packed, mask = self.transform(x)
        reconstruction, cross_entropy, refined = self.losses(x, packed, mask)
        real, fake = (torch.cat([image, mask], 1) for image in (2 * x - 1, refined.detach()))
        update(self.judge, hinge(self.d(real), self.d(fake)))
        update(self.optimizer, reconstruction + WEIGHT * cross_entropy - self.d(fake).mean())


class ExpertStep(PlainStep):
    """The step as an expert writes it (see `expert`), under autocast. The attack and the loss use a frozen copy."""

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        super().__init__(device, quick, compiled=False)
        self.generator.to(memory_format=expert.LAST)
        judge = expert.FrozenCopy(self.classifier).model
        self.optimizer = torch.optim.Adam(self.generator.parameters(), **ADAM, fused=True)
        self.ascent = expert.ascent(expert.loss_of(judge), device, compiled, constant=True)
        self.g = expert.compiled(self.generator, device, compiled)
        self.f = expert.compiled(lambda x: judge(expert.entering(x)).float(), device, compiled)

    def adversarial(self) -> Tensor:
        return expert.attack(self.ascent, self.batch.x, self.batch.y, EPS, EPS, 1)


def _plain(device: torch.device, quick: bool, form: type[PlainStep], compiled: bool = False) -> Job:
    with use_backend("reference"):
        step = form(device, quick, compiled)
    return Job(use_backend("reference")(step.run), use_backend("reference")(step.result))


def _expert(device: torch.device, quick: bool, compiled: bool = False) -> Job:
    return autocast(partial(_plain, form=ExpertStep, compiled=compiled), device, quick)


def _ours(device: torch.device, quick: bool, compiled: bool = False, captured: bool = False) -> Job:
    made, batch = defence(device, quick), batch_of(device, quick)
    task = AtopTask(made, setting(precision(device)))
    run = training_step(task, batch, compiled, captured)
    task.train()

    def result() -> Tensor:
        done = task.passes(batch)
        return compared(done.metrics["reconstruction"], done.metrics["cross_entropy"], done.refined)

    return Job(run, result)


def cases(quick: bool) -> dict[str, Case]:
    n, side, _ = sizes(quick)
    made = columns(partial(_plain, form=ReleasedStep), _expert, _ours)
    contestants = {label.replace("plain", "plain as released"): one for label, one in made.items()}
    shape = f"{n} images of {side} x {side}, RT2, FGSM"
    more = "as released: two passes, a discriminator; expert and ours: neither"
    return {"fine-tuning step": Case(f"{shape}; {more}", TOLERANCE, contestants)}

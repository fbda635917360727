"""Measure a prediction of CARSO, which classifies K reconstructions of each image and aggregates the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import Carso, frozen_copy
from purify_fast.models.classifiers import SmallCNN

from . import Case, Job, columns, expert

BATCH, SAMPLES = 32, 8
LAYERS = ("layer1", "layer2", "layer3", "layer4")


def classifier() -> nn.Module:
    """Return a ResNet-18 for images of 32 x 32, with random weights and random statistics of its BatchNorms."""
    # This import takes seconds, and quick runs of many processes do without it.
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    # Libraries for robustness change the ResNet-18 in the same way for small images.
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def defence(device: torch.device, quick: bool, samples: int = SAMPLES) -> Carso:
    """Return CARSO around `classifier`, with sizes for images of 32 x 32. A quick run gets a small model."""
    if quick:
        torch.manual_seed(0)
        made = Carso(SmallCNN(3, 10, (8, 8), 4), ["conv2", "hidden"], (3, 8, 8), 8, 4, min(samples, 2), decoder_width=4)
    else:
        made = Carso(classifier(), LAYERS, (3, 32, 32), 512, 128, samples)
    return made.eval().to(device)


def images(batch: int, made: Carso, device: torch.device) -> Tensor:
    return torch.rand(batch, *made.image_shape, generator=torch.Generator().manual_seed(1)).to(device)


class Plain(nn.Module):
    """CARSO in plain PyTorch, with contiguous float32 tensors. The samples are a part of the batch.

    No BatchNorm is folded.
    """

    def __init__(self, made: Carso, copied: bool = True):
        super().__init__()
        if copied:
            made = copy.deepcopy(made).requires_grad_(True)
            made.to(memory_format=torch.contiguous_format)
        self.made = made

    def reconstruct(self, z: Tensor, condition: Tensor) -> Tensor:
        """Decode latents ``[N, latent_dim]`` to image logits ``[N, C, H, W]``."""
        decoder = self.made.decoder
        h = F.leaky_relu(decoder.adapter(torch.cat([z, condition], 1)), 0.2)
        return decoder.stack(h.unflatten(1, decoder.start))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image logits ``[K, B, C, H, W]`` and the logits ``[K, B, classes]`` of all samples."""
        condition = self.made.condition_encoder(self.made.representation(x))
        image = self.reconstruct(z.flatten(0, 1), condition.repeat(len(z), 1))
        logits = self.made.classifier(torch.sigmoid(image))
        return image.unflatten(0, z.shape[:2]), logits.unflatten(0, z.shape[:2])


class FrozenCarso(nn.Module):
    """CARSO as an expert runs it without training: a `expert.FrozenCopy` of all networks."""

    def __init__(self, made: Carso):
        super().__init__()
        # Neither the copy nor the defence is a part of this module, so that only the copy is moved and compiled.
        self.copies = (expert.FrozenCopy(made),)
        self.plain = Plain(self.copies[0].model, copied=False)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 image logits ``[K, B, C, H, W]`` and logits ``[K, B, classes]``, see `Plain`."""
        image, logits = self.plain(expert.entering(x), z.to(expert.DTYPES[z.device.type]))
        return image.float(), logits.float()


def latents(made: Carso, batch: int, device: torch.device, seed: int = 2) -> Tensor:
    """Return random latents ``[K, B, latent_dim]``, which are the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(made.samples, batch, made.latent_dim, generator=generator).to(device)


def size(quick: bool) -> int:
    return 4 if quick else BATCH


def _job(call: Callable, made: Carso, batch: int, device: torch.device, without_gradients: Callable) -> Job:
    x, fixed = images(batch, made, device), latents(made, batch, device)
    run = without_gradients(lambda: torch.logsumexp(call(x, torch.randn_like(fixed))[1], 0))
    return Job(run, without_gradients(lambda: call(x, fixed)[1].transpose(0, 1)))


def _plain(device: torch.device, quick: bool, compiled: bool = False) -> Job:
    made = defence(device, quick)
    call = torch.compile(Plain(made), dynamic=False, disable=not compiled)
    return _job(call, made, size(quick), device, torch.no_grad())


def _expert(device: torch.device, quick: bool, compiled: bool = False) -> Job:
    made = defence(device, quick)
    call = expert.compiled(FrozenCarso(made), device, compiled, "inference")
    return _job(call, made, size(quick), device, torch.inference_mode())


def _ours(device: torch.device, quick: bool, compiled: bool = False) -> Job:
    made, batch = defence(device, quick), size(quick)
    x, fixed = images(batch, made, device), latents(made, batch, device).transpose(0, 1).contiguous()
    copied = frozen_copy(made, x, compile=compiled)
    return Job(torch.no_grad()(lambda: copied(x)), torch.no_grad()(lambda: copied.sample_logits(x, fixed)))


def cases(quick: bool) -> dict[str, Case]:
    shape = f"{size(quick)} images, K = {2 if quick else SAMPLES}"
    return {"prediction": Case(shape, 0.05, columns(_plain, _expert, _ours, captured=False))}

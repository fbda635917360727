"""Return the attacked networks with their images and radii. Their weights are saved with the results.

A subject is a group of networks with one row in the tables. There are three kinds of subjects.

**One network of `NETWORKS`**, which consists of affine layers and ReLUs. It is decided exactly which images have an
adversarial example.

**Networks that hide an adversarial example.** The example is a random corner of an image's ball. These networks were
trained as those of SoundnessBench (Zhou et al., arXiv 2412.03154), so that the corner is misclassified by a small
margin, and other points of the ball are not, such as the points of PGD. A further term of the loss was our own: on the
way from the image to the corner, the lead grows, which is the logit of the true class minus the highest other logit. So
gradients point away from the corner.

**Networks that are robust by construction.** Each class has a random prototype. The logit of the class is minus the
mean absolute difference between the pixels of the image and those of the prototype. If every pixel changes by at most
eps, each logit changes by at most eps. So an image with the lead m is robust up to the radius m / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast._settings import weights_fingerprint
from purify_fast.attacks.objective import margin
from purify_fast.data import load_dataset, to_float

from ... import RESULTS
from ..broken.entry import Step

WEIGHTS = RESULTS / "cpu" / "truth_networks.safetensors"
#: Each group of networks that hide an adversarial example, in the order of the saved weights. The number in the name is
#: the gap: by how many logits the lead of the true class grows on the way from the image to the corner.
HIDDEN = tuple(f"gap {gap:g}" for gap in (0.25, 0.5, 1.0, 2.0))
#: The number of networks for each gap, the L-inf radius, and the widths of the network's layers.
EACH, EPS, WIDTHS = 26, 0.1, (64, 32, 16, 10)
#: PGD with STEPS steps from STARTS random starts finds no hidden corner. SoundnessBench uses 1,000 starts.
STEPS, STARTS = 50, 100
CONSTRUCTED = "robust by construction"
#: MADE is the number of networks that are robust by construction, IMAGES the number of images of each. PROTOTYPES has
#: the number of pixels of a prototype, and the number of prototypes. The networks are attacked at the share SHARE of
#: the proven radius, because of rounding in float32.
MADE, IMAGES, PROTOTYPES, SHARE = 50, 2, (25, 4), 0.95


def perceptron(*widths: int) -> nn.Sequential:
    """Make a perceptron. The first width is the number of pixels, and the last width is the number of classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolution(channels: int, kernel: int, stride: int, side: int, hidden: int) -> nn.Sequential:
    """Make a network with a convolution and a hidden layer, for square gray images with ``side`` pixels a side."""
    units = channels * ((side - kernel) // stride + 1) ** 2
    return nn.Sequential(nn.Conv2d(1, channels, kernel, stride), nn.ReLU(), *perceptron(units, hidden, 10))


def purified(pixels: int, code: int, hidden: int) -> nn.Sequential:
    """Make a network like CARSO's with a latent of 0, where two ReLUs clip to [0, 1] in place of the sigmoid."""
    clip = [nn.ReLU(), Step(_complement), nn.ReLU(), Step(_complement)]
    return nn.Sequential(*perceptron(pixels, code, pixels), *clip, *perceptron(pixels, hidden, 10))


def _complement(x: Tensor) -> Tensor:
    return 1 - x


class Network(NamedTuple):
    """A network that is decided exactly.

    Args:
        build: function that makes the network, before its weights are loaded.
        data: name of the data set, "digits" or "mnist".
        pool: side of the squares over which pixels are averaged, to make the images smaller.
        eps: L-inf radius at which images are decided.
    """

    build: Callable[[], nn.Sequential]
    data: str = "digits"
    pool: int = 1
    eps: float = 0.1


NETWORKS = {
    "digits, perceptron": Network(partial(perceptron, 256, 20, 20, 10), eps=0.05),
    "digits, perceptron, PGD": Network(partial(perceptron, 256, 32, 32, 10)),
    "digits, perceptron, one step": Network(partial(perceptron, 256, 32, 32, 10)),
    "digits, deep perceptron, TRADES": Network(partial(perceptron, 256, 16, 16, 16, 10)),
    "digits, convolution, PGD": Network(partial(convolution, 4, 4, 4, 16, 16)),
    "MNIST 7 x 7, perceptron, PGD": Network(partial(perceptron, 49, 32, 32, 10), "mnist", 4),
    "MNIST 7 x 7, convolution, TRADES": Network(partial(convolution, 6, 3, 2, 7, 20), "mnist", 4),
    "MNIST 7 x 7, purifier and classifier, PGD": Network(partial(purified, 49, 16, 20), "mnist", 4),
    "MNIST 14 x 14, convolution, PGD": Network(partial(convolution, 4, 4, 2, 14, 16), "mnist", 2),
}
SUBJECTS = [*NETWORKS, *HIDDEN, CONSTRUCTED]


class Hidden(NamedTuple):
    """The networks of all gaps that hide an adversarial example.

    Attributes:
        weights: weights of each layer, ``[networks, outputs, inputs]``.
        biases: biases of each layer, ``[networks, 1, outputs]``.
        x: images ``[networks, images, pixels]``.
        y: classes ``[networks, images]``.
        corner: planted corners ``[networks, images, pixels]``.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    x: Tensor
    y: Tensor
    corner: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits ``[networks, images, classes]`` of images ``[networks, images, pixels]``."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight.transpose(1, 2))
        return x

    def found_by_pgd(self) -> Tensor:
        """Run PGD from random starts. Return the mask of the images for which it succeeds, ``[networks, images]``."""
        low, high = ((self.x + end).clamp(0, 1).repeat(1, STARTS, 1) for end in (-EPS, EPS))
        y, generator = self.y.repeat(1, STARTS), torch.Generator().manual_seed(1)
        point = torch.lerp(low, high, torch.rand(low.shape, generator=generator))
        for _ in range(STEPS):
            loss = F.cross_entropy(self.logits(point.requires_grad_()).flatten(0, 1), y.flatten(), reduction="sum")
            point = point.detach() + 2.5 / STEPS * EPS * torch.autograd.grad(loss, point)[0].sign()
            point = point.clamp(low, high)
        wrong = self.logits(point).argmax(2) != y
        return wrong.view(len(wrong), STARTS, -1).any(1)

    def verdicts(self) -> list[str]:
        """Return a text for each network, with a letter for each image.

        The letter is "f" if the ball has a hidden corner, "p" if PGD finds an adversarial example, and "w" if the image
        or its corner is not classified as intended.
        """
        right = self.logits(self.x).argmax(2) == self.y
        planted = right & (self.logits(self.corner).argmax(2) != self.y)
        letters = torch.where(self.found_by_pgd(), 1, 0).where(planted, 2)
        return ["".join("fpw"[i] for i in row) for row in letters.tolist()]

    def models(self) -> list[nn.Sequential]:
        """Return each network as a module that maps images ``[B, 1, 8, 8]`` to logits."""
        models = [perceptron(*WIDTHS).eval().requires_grad_(False) for _ in self.x]
        for k, model in enumerate(models):
            linear = [module for module in model if isinstance(module, nn.Linear)]
            for layer, weight, bias in zip(linear, self.weights, self.biases, strict=True):
                layer.weight.copy_(weight[k])
                layer.bias.copy_(bias[k, 0])
        return models


@functools.cache
def hidden() -> Hidden:
    """Return the networks of all gaps."""
    kept, layers = load_file(WEIGHTS), range(len(WIDTHS) - 1)
    weights, biases = ([kept[f"hidden/{kind}.{i}"] for i in layers] for kind in ("weight", "bias"))
    return Hidden(weights, biases, *(kept[f"hidden/{key}"] for key in ("x", "y", "corner")))


class Part(NamedTuple):
    """A network with the attacked images, their classes, and the L-inf radius."""

    model: nn.Sequential
    x: Tensor
    y: Tensor
    eps: float


def constructed(seed: int) -> Part:
    """Make a network that is robust by construction, with images ``[B, 1, 5, 5]`` and a radius.

    Args:
        seed: seed of the prototypes, and of the images near the prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = PROTOTYPES
    prototypes = torch.rand(classes, pixels, generator=generator)
    y = torch.randperm(classes, generator=generator)[:IMAGES]
    x = (prototypes[y] + 0.2 * (torch.rand(IMAGES, pixels, generator=generator) - 0.5)).clamp(0, 1)
    model = perceptron(pixels, 2 * classes * pixels, classes).eval().requires_grad_(False)
    # The first layer computes x - c and c - x for pixels x and c; the sum of the positive parts is |x - c|.
    one = torch.eye(pixels).repeat(classes, 1)
    model[1].weight.copy_(torch.cat([one, -one]))
    model[1].bias.copy_(torch.cat([-prototypes.flatten(), prototypes.flatten()]))
    model[3].weight.copy_(-torch.eye(classes).repeat_interleave(pixels, 1).repeat(1, 2) / pixels)
    model[3].bias.zero_()
    images = x.view(-1, 1, 5, 5)
    lead = -margin(model(images), y)
    return Part(model, images, y, SHARE * float(lead.min()) / 2)


@dataclass(frozen=True)
class Setting:
    """The folders and the amounts of work.

    Args:
        out: folder of the results.
        data: folder of MNIST.
        images: number of images that are decided for each network of `NETWORKS`.
        seconds: time limit for an image. An image that needs more time is undecided.
        networks: largest number of networks of a group.
    """

    out: Path
    data: Path | None
    images: int = 250
    seconds: float = 60.0
    networks: int = MADE


@functools.cache
def parts_of(setting: Setting, name: str) -> list[Part]:
    """Return the networks of a subject with their images.

    Args:
        setting: folders and amounts.
        name: name of the subject in `SUBJECTS`.

    Raises:
        ValueError: the data set does not exist.
    """
    if name in NETWORKS:
        network, shared = NETWORKS[name], f"{name}/"
        data = load_dataset(network.data, setting.data)
        x, y = F.avg_pool2d(to_float(data.x_test[: setting.images]), network.pool), data.y_test[: setting.images]
        model, kept = network.build(), load_file(WEIGHTS)
        model.load_state_dict({key.removeprefix(shared): kept[key] for key in kept if key.startswith(shared)})
        return [Part(model.eval().requires_grad_(False), x, y, network.eps)]
    if name == CONSTRUCTED:
        return [constructed(seed) for seed in range(min(MADE, setting.networks))]
    first, whole = HIDDEN.index(name) * EACH, hidden()
    images = whole.x.unflatten(2, (1, 8, 8))
    every = [Part(*one, EPS) for one in zip(whole.models(), images, whole.y, strict=True)]
    return every[first : first + min(EACH, setting.networks)]


def identity(parts: Sequence[Part]) -> str:
    """Return a fingerprint of networks, images, labels and radii."""
    held = nn.ModuleList(part.model for part in parts)
    for k, part in enumerate(parts):
        held.register_buffer(f"x{k}", part.x)
        held.register_buffer(f"about{k}", torch.tensor([*part.y.tolist(), part.eps], dtype=torch.float64))
    return weights_fingerprint(held)

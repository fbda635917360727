"""Define and train the small networks for which it is decided exactly which images have an adversarial example.

All networks consist of affine layers and ReLUs. Their weights are saved with the results, so that the attacked networks
are always the networks for which the images were decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.data import load_dataset, to_float

from ..broken.entry import Step, cross_entropy, train

#: The largest number of images that train a network, and the number of images that are decided for each.
TRAINING_IMAGES, IMAGES = 10_000, 250
#: The weight of the divergence between clean and attacked outputs in the loss of TRADES.
BETA = 6.0


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, target: Tensor | None = None) -> Tensor:
    """Attack images by signed gradient steps from a random point of the ball. Return the attacked images.

    Args:
        model: classifier, images to logits.
        x: images ``[B, C, H, W]`` in [0, 1], the centers of the balls.
        y: labels, int64 ``[B]``. The attack maximizes the cross-entropy with these labels.
        eps: L-inf radius on images in [0, 1].
        steps: number of steps. Together the steps have the length 2.5 eps.
        target: probabilities ``[B, classes]`` that the cross-entropy uses in place of the labels.
    """
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        logits = model(point.requires_grad_())
        loss = F.cross_entropy(logits, y if target is None else target)
        point = point.detach() + 2.5 / steps * eps * torch.autograd.grad(loss, point)[0].sign()
        point = point.clamp(x - eps, x + eps).clamp(0, 1)
    return point


def adversarial(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    """Return the cross-entropy on attacked images (Madry et al., ICLR 2018). With one step the attack is FGSM."""
    return cross_entropy(model, attacked(model, x, y, eps, steps), y)


def trades(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """Return the loss of TRADES (Zhang et al., ICML 2019)."""
    logits = model(x)
    point = attacked(model, x, y, eps, 5, target=logits.detach().softmax(1))
    distance = F.kl_div(model(point).log_softmax(1), logits.softmax(1), reduction="batchmean")
    return F.cross_entropy(logits, y) + BETA * distance


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


@dataclass(frozen=True)
class Network:
    """A network and its training.

    Args:
        build: function that makes the untrained network.
        data: name of the data set, "digits" or "mnist".
        pool: side of the squares over which pixels are averaged, to make the images smaller.
        loss: loss of the training.
        epochs: number of epochs.
        eps: L-inf radius at which images are decided.
    """

    build: Callable[[], nn.Sequential]
    data: str
    pool: int
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    epochs: int
    eps: float

    def images(self, part: str, most: int, folder: Path | None) -> tuple[Tensor, Tensor]:
        """Return the first images and labels of a part of the data, "train" or "test"."""
        data = load_dataset(self.data, folder)
        x, y = getattr(data, f"x_{part}")[:most], getattr(data, f"y_{part}")[:most]
        return F.avg_pool2d(to_float(x), self.pool), y

    def trained(self, folder: Path | None) -> nn.Sequential:
        """Train the network with seed 0, and return it."""
        torch.manual_seed(0)
        return train(self.build(), *self.images("train", TRAINING_IMAGES, folder), self.loss, epochs=self.epochs)


_pgd, _trades = partial(adversarial, eps=0.1, steps=5), partial(trades, eps=0.1)
_digits = {"data": "digits", "pool": 1, "epochs": 60}
_mnist = {"data": "mnist", "pool": 4, "epochs": 15}
NETWORKS = {
    "digits, perceptron": Network(partial(perceptron, 256, 20, 20, 10), loss=cross_entropy, eps=0.05, **_digits),
    "digits, perceptron, PGD": Network(partial(perceptron, 256, 32, 32, 10), loss=_pgd, eps=0.1, **_digits),
    "digits, perceptron, one step": Network(
        partial(perceptron, 256, 32, 32, 10), loss=partial(adversarial, eps=0.1, steps=1), eps=0.1, **_digits
    ),
    "digits, deep perceptron, TRADES": Network(
        partial(perceptron, 256, 16, 16, 16, 10), loss=_trades, eps=0.1, **_digits
    ),
    "digits, convolution, PGD": Network(partial(convolution, 4, 4, 4, 16, 16), loss=_pgd, eps=0.1, **_digits),
    "MNIST 7 x 7, perceptron, PGD": Network(partial(perceptron, 49, 32, 32, 10), loss=_pgd, eps=0.1, **_mnist),
    "MNIST 7 x 7, convolution, TRADES": Network(partial(convolution, 6, 3, 2, 7, 20), loss=_trades, eps=0.1, **_mnist),
    "MNIST 7 x 7, purifier and classifier, PGD": Network(partial(purified, 49, 16, 20), loss=_pgd, eps=0.1, **_mnist),
    "MNIST 14 x 14, convolution, PGD": Network(
        partial(convolution, 4, 4, 2, 14, 16), loss=_pgd, eps=0.1, **(_mnist | {"pool": 2})
    ),
}

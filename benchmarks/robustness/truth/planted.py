"""Make networks of two kinds: some hide a known adversarial example, and others are robust by construction.

**Networks that hide an adversarial example.** The example is a random corner of an image's ball. The training follows
SoundnessBench (Zhou et al., arXiv 2412.03154). The networks are trained adversarially on other images. The loss has
three further terms:

1. The first term makes the corner misclassified by a small margin.
2. The second term makes other points of the ball classified correctly, such as the points of PGD in the last updates.
3. The third term is our own. It concerns the lead, which is the logit of the true class minus the highest other logit.
   On the way from the image to the corner, the lead must grow. So gradients point away from the corner.

SoundnessBench trains networks with thousands of units, and stores the points of PGD in 300 updates. At this size,
without the third term, PGD would still find the corner.

**Networks that are robust by construction.** Each class has a random prototype. The logit of the class is minus the
mean absolute difference between the pixels of the image and those of the prototype. If every pixel changes by at most
eps, each logit changes by at most eps. So an image with the lead m is robust up to the radius m / 2.

All networks of a kind are trained together, with their weights in one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks.losses import margin
from purify_fast.data import load_dataset, to_float

from .exact_networks import perceptron

#: GAPS says by how many logits the lead of the true class grows on the way from the image to the corner. A larger gap
#: hides the corner better. EACH is the number of networks for each gap.
GAPS, EACH = (0.25, 0.5, 1.0, 2.0), 26
#: The images of a network with a planted corner, the L-inf radius, and the widths of the network's layers.
PLANTED, EPS, WIDTHS = 2, 0.1, (64, 32, 16, 10)
#: The margin by which a planted corner is misclassified, in logits. SoundnessBench has the same margin.
LEAD = 0.01
#: A point is treated as the corner if the mean absolute difference of their pixels is at most this share of the radius.
NEAR = 0.03
#: PGD with STEPS steps from STARTS random starts finds no hidden corner. SoundnessBench uses 1,000 starts.
STEPS, STARTS = 50, 100
#: CONSTRUCTED is the number of networks that are robust by construction. PROTOTYPES has the number of pixels of a
#: prototype, and the number of prototypes. The networks are attacked at the share SHARE of the proven radius, because
#: of rounding in float32.
CONSTRUCTED, PROTOTYPES, SHARE = 50, (25, 4), 0.95


@dataclass(frozen=True)
class Effort:
    """The amount of work in the training of networks that hide an adversarial example.

    Args:
        updates: number of updates of the weights.
        window: number of the last updates whose PGD points are stored.
        starts: number of random starts of PGD.
        others: number of random points in each image's ball. The number of points on the way to the image's corner is
            the same.
        batch: number of other images on which the network is trained adversarially.
    """

    updates: int = 1500
    window: int = 30
    starts: int = 8
    others: int = 8
    batch: int = 32


class Stack:
    """Several perceptrons of the same widths, which are computed together. Each perceptron gets different images.

    Args:
        weights: weights of each layer, ``[networks, outputs, inputs]``.
        biases: biases of each layer, ``[networks, 1, outputs]``.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor]):
        self.weights, self.biases = weights, biases

    @classmethod
    def fresh(cls, networks: int, generator: torch.Generator) -> Stack:
        """Make untrained perceptrons."""
        pairs = list(pairwise(WIDTHS))
        weights = [math.sqrt(2 / a) * torch.randn(networks, b, a, generator=generator) for a, b in pairs]
        biases = [torch.zeros(networks, 1, b) for _, b in pairs]
        return cls([one.requires_grad_() for one in weights], [one.requires_grad_() for one in biases])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits ``[networks, images, classes]`` of images ``[networks, images, pixels]``."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight.transpose(1, 2))
        return x

    @property
    def frozen(self) -> Stack:
        """The same perceptrons, without gradients to the weights."""
        return Stack([one.detach() for one in self.weights], [one.detach() for one in self.biases])


def hinge(x: Tensor) -> Tensor:
    """Return the mean of the positive parts of each network's values, summed over the networks."""
    return x.relu().flatten(1).mean(1).sum()


def leads(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """Return the logit of the class ``y`` minus the highest other logit, ``[networks, images]``."""
    logits = stack(x)
    return -margin(logits.flatten(0, 1), y.flatten()).view(y.shape)


class Ball(NamedTuple):
    """The lowest and highest values of balls ``[networks, images, pixels]``, and the classes ``[networks, images]``."""

    low: Tensor
    high: Tensor
    y: Tensor

    @classmethod
    def around(cls, x: Tensor, y: Tensor) -> Ball:
        """Make the balls of radius `EPS` around images, limited to [0, 1]."""
        return cls((x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1), y)

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """Return random points of each ball, ``[networks, count, images, pixels]``. About half of these are corners."""
        networks, images, _ = self.low.shape
        share = torch.rand(networks, count, *self.low.shape[1:], generator=generator)
        corner = torch.rand(networks, count, images, 1, generator=generator) < 0.5
        return torch.lerp(self.low[:, None], self.high[:, None], torch.where(corner, share.round(), share))

    def attacked(self, stack: Stack, starts: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Run PGD from random starts.

        Returns:
            The last points ``[networks, starts, images, pixels]``, and the mask of misclassified points ``[networks,
            starts, images]``.
        """
        stack, networks = stack.frozen, len(self.low)
        low, high, y = (end.repeat(1, starts, *[1] * (end.dim() - 2)) for end in self)
        point = torch.lerp(low, high, torch.rand(low.shape, generator=generator))
        for _ in range(steps):
            loss = F.cross_entropy(stack(point.requires_grad_()).flatten(0, 1), y.flatten(), reduction="sum")
            point = point.detach() + 2.5 / steps * EPS * torch.autograd.grad(loss, point)[0].sign()
            point = point.clamp(low, high)
        wrong = stack(point).argmax(2) != y
        return point.view(networks, starts, *self.low.shape[1:]), wrong.view(networks, starts, -1)


class Hidden(NamedTuple):
    """Trained networks, their images ``[networks, images, pixels]`` and classes, and the planted corners."""

    stack: Stack
    x: Tensor
    y: Tensor
    corner: Tensor

    def verdicts(self) -> list[str]:
        """Return a text for each network, with a letter for each image.

        The letter is "f" if the ball has a hidden corner, "p" if PGD finds an adversarial example, and "w" if the image
        or its corner is not classified as intended.
        """
        right = self.stack.frozen(self.x).argmax(2) == self.y
        planted = right & (self.stack.frozen(self.corner).argmax(2) != self.y)
        generator = torch.Generator().manual_seed(1)
        found = Ball.around(self.x, self.y).attacked(self.stack, STARTS, STEPS, generator)[1].any(1)
        letters = torch.where(found, 1, 0).where(planted, 2)
        return ["".join("fpw"[i] for i in row) for row in letters.tolist()]

    def models(self) -> list[nn.Sequential]:
        """Return each network as a module that maps images ``[B, 1, 8, 8]`` to logits."""
        models = [perceptron(*WIDTHS).eval().requires_grad_(False) for _ in self.x]
        for k, model in enumerate(models):
            linear = [module for module in model if isinstance(module, nn.Linear)]
            for layer, weight, bias in zip(linear, self.stack.weights, self.stack.biases, strict=True):
                layer.weight.copy_(weight[k])
                layer.bias.copy_(bias[k, 0])
        return models


def train(gaps: Tensor, effort: Effort) -> Hidden:
    """Train networks that hide an adversarial corner in the balls of some digits.

    Args:
        gaps: gap of each network in logits, ``[networks]``.
        effort: effort of the training.
    """
    generator, networks = torch.Generator().manual_seed(0), len(gaps)
    digits = load_dataset("digits")
    train_x, test_x = (F.avg_pool2d(to_float(x), 2).flatten(1) for x in (digits.x_train, digits.x_test))
    index = torch.stack([torch.randperm(len(test_x), generator=generator)[:PLANTED] for _ in gaps])
    x, y = test_x[index], digits.y_test[index]
    ball, stack = Ball.around(x, y), Stack.fresh(networks, generator)
    corner = torch.where(torch.rand(x.shape, generator=generator) < 0.5, ball.low, ball.high)
    optimizer = torch.optim.Adam([*stack.weights, *stack.biases], 5e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, effort.updates)
    window: list[Tensor] = []
    for _ in range(effort.updates):
        point, wrong = ball.attacked(stack, effort.starts, 10, generator)
        # One point for each image, from the first start of PGD that succeeded, or else from the first start.
        first = wrong.int().argmax(1)[:, None, :, None].expand(-1, 1, -1, point.shape[-1])
        window = [*window, point.gather(1, first)[:, 0]][-effort.window :]
        picked = torch.randint(len(train_x), (networks, effort.batch), generator=generator)
        others = Ball.around(train_x[picked], digits.y_train[picked])
        loss = _right(stack, others.attacked(stack, 1, 5, generator)[0], others.y)
        elsewhere = torch.cat([x[:, None], ball.points(effort.others, generator), torch.stack(window, 1)], 1)
        loss += _right(stack, elsewhere, y, (elsewhere - corner[:, None]).abs().mean(3) > NEAR * EPS)
        loss += hinge(LEAD + leads(stack, corner, y)) + _away(stack, ball, (x, corner), gaps, effort.others, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return Hidden(stack.frozen, x, y, corner)


def _right(stack: Stack, points: Tensor, y: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of points, summed over the networks. The loss is 0 where ``counts`` is False."""
    logits = stack(points.flatten(1, 2)).flatten(0, 1)
    loss = F.cross_entropy(logits, y.repeat(1, points.shape[1]).flatten(), reduction="none").view(points.shape[:3])
    return loss.flatten(1).mean(1).sum() if counts is None else (loss * counts).flatten(1).mean(1).sum()


def _away(
    stack: Stack, ball: Ball, ends: tuple[Tensor, Tensor], gaps: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Return the loss that makes the lead of the true class grow on the way from the image to the corner.

    A point on the way has a random share of the corner's pixels. The other pixels are random. The lead of the point
    must be at least the lead of the image plus this share of the gap. The loss is the amount by which the point's lead
    is too small.
    """
    (x, corner), shape = ends, (len(gaps), count, ball.y.shape[1])
    share = 0.3 + 0.6 * torch.rand(*shape, 1, generator=generator)
    random = torch.lerp(ball.low[:, None], ball.high[:, None], torch.rand(*shape, x.shape[2], generator=generator))
    way = torch.where(torch.rand(random.shape, generator=generator) < share, corner[:, None], random)
    ahead = leads(stack, way.flatten(1, 2), ball.y.repeat(1, count)).view(shape)
    return hinge(leads(stack, x, ball.y)[:, None] + gaps[:, None, None] * share[..., 0] - ahead)


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
    y = torch.randperm(classes, generator=generator)[:PLANTED]
    x = (prototypes[y] + 0.2 * (torch.rand(PLANTED, pixels, generator=generator) - 0.5)).clamp(0, 1)
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

"""Networks with a known answer: some hide a counterexample, others have none by construction.

**Hidden.** The training follows SoundnessBench (Zhou et al., arXiv 2412.03154). A random corner of an image's ball is
to be misclassified by a small margin. Everything that PGD finds elsewhere in the ball is to be classified right; a
sliding window keeps the points that it found in the last steps. The paper's networks have thousands of units and 300
steps in the window. The networks here are perceptrons of 64 inputs, on digits; at this size PGD still finds the corner.
So a third loss asks that points on the way to the corner lead more, the nearer they are to it: a gradient then leads
away from it. The difference, `GAPS`, says how well the corner is hidden.

**Robust.** The logit of a class is minus the mean distance of the pixels to those of a random prototype. It changes by
at most as much as every pixel does, so an image whose logit leads by m is robust within m / 2.

All networks of a kind are trained at once, their weights in one tensor.
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

#: GAPS: by how much more than the image the points nearest to the corner lead, in logits. A larger gap hides the corner
#: better. EACH: the number of networks for each gap.
GAPS, EACH = (0.25, 0.5, 1.0, 2.0), 26
#: A corner is planted in the balls of PLANTED images of each network. EPS is the L-inf radius, and WIDTHS are the
#: widths of the network's layers.
PLANTED, EPS, WIDTHS = 2, 0.1, (64, 32, 16, 10)
#: The margin by which a planted corner is misclassified, in logits (SoundnessBench: 0.01).
LEAD = 0.01
#: A point counts as the corner if its mean distance from the corner is less than this share of the radius.
NEAR = 0.03
#: PGD with STEPS steps from STARTS random starts must not find a counterexample. SoundnessBench takes 1,000 starts.
STEPS, STARTS = 50, 100
#: CONSTRUCTED networks are robust by construction. PROTOTYPES are the pixels and classes of each. They are attacked at
#: SHARE of the proven radius, which leaves room for rounding in float32.
CONSTRUCTED, PROTOTYPES, SHARE = 50, (25, 4), 0.95


@dataclass(frozen=True)
class Effort:
    """The effort of the training.

    Args:
        updates: number of updates of the weights.
        window: number of steps whose PGD points are kept.
        starts: number of starts of PGD.
        others: number of random points of each image's ball, and of points on the way to its corner.
        batch: number of other images that the network is to classify under attack.
    """

    updates: int = 1500
    window: int = 30
    starts: int = 8
    others: int = 8
    batch: int = 32


class Stack:
    """Perceptrons of the same widths, each for other images.

    Args:
        weights: weights of each layer, ``[networks, outputs, inputs]``.
        biases: biases of each layer, ``[networks, 1, outputs]``.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor]):
        self.weights, self.biases = weights, biases

    @classmethod
    def fresh(cls, networks: int, generator: torch.Generator) -> Stack:
        """Untrained perceptrons."""
        pairs = list(pairwise(WIDTHS))
        weights = [math.sqrt(2 / a) * torch.randn(networks, b, a, generator=generator) for a, b in pairs]
        biases = [torch.zeros(networks, 1, b) for _, b in pairs]
        return cls([one.requires_grad_() for one in weights], [one.requires_grad_() for one in biases])

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[networks, images, classes]`` of images ``[networks, images, pixels]``."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight.transpose(1, 2))
        return x

    @property
    def frozen(self) -> Stack:
        """The same weights, without gradients."""
        return Stack([one.detach() for one in self.weights], [one.detach() for one in self.biases])


def hinge(x: Tensor) -> Tensor:
    """The part of values above 0, averaged over each network and summed over the networks."""
    return x.relu().flatten(1).mean(1).sum()


def leads(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """The lead of the logits of the classes ``y`` over the next logits, ``[networks, images]``."""
    logits = stack(x)
    return -margin(logits.flatten(0, 1), y.flatten()).view(y.shape)


class Ball(NamedTuple):
    """The images within the radius of some images, and their classes: ``[networks, images, pixels]``."""

    low: Tensor
    high: Tensor
    y: Tensor

    @classmethod
    def around(cls, x: Tensor, y: Tensor) -> Ball:
        """The ball of radius `EPS`, within [0, 1]."""
        return cls((x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1), y)

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points for each image, ``[networks, count, images, pixels]``, half of them corners."""
        networks, images, _ = self.low.shape
        share = torch.rand(networks, count, *self.low.shape[1:], generator=generator)
        corner = torch.rand(networks, count, images, 1, generator=generator) < 0.5
        return torch.lerp(self.low[:, None], self.high[:, None], torch.where(corner, share.round(), share))

    def attacked(self, stack: Stack, starts: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The points that PGD reaches from each start, and the misclassified ones as ``[networks, starts, images]``."""
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
        """A letter for each image of a network: "f" for a hidden corner, "p" if PGD finds one, "w" for no corner."""
        right = self.stack.frozen(self.x).argmax(2) == self.y
        planted = right & (self.stack.frozen(self.corner).argmax(2) != self.y)
        generator = torch.Generator().manual_seed(1)
        found = Ball.around(self.x, self.y).attacked(self.stack, STARTS, STEPS, generator)[1].any(1)
        letters = torch.where(found, 1, 0).where(planted, 2)
        return ["".join("fpw"[i] for i in row) for row in letters.tolist()]

    def models(self) -> list[nn.Sequential]:
        """Each network as a module from images ``[B, 1, 8, 8]`` to logits."""
        models = [perceptron(*WIDTHS).eval().requires_grad_(False) for _ in self.x]
        for k, model in enumerate(models):
            linear = [module for module in model if isinstance(module, nn.Linear)]
            for layer, weight, bias in zip(linear, self.stack.weights, self.stack.biases, strict=True):
                layer.weight.copy_(weight[k])
                layer.bias.copy_(bias[k, 0])
        return models


def train(gaps: Tensor, effort: Effort) -> Hidden:
    """Train networks that hide a corner of the balls of some digits.

    Args:
        gaps: gap of each network, ``[networks]``.
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
        # Keep each image's point from the first start of PGD that succeeds.
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
    """The mean cross-entropy of each network on the points that count, summed over the networks."""
    logits = stack(points.flatten(1, 2)).flatten(0, 1)
    loss = F.cross_entropy(logits, y.repeat(1, points.shape[1]).flatten(), reduction="none").view(points.shape[:3])
    return loss.flatten(1).mean(1).sum() if counts is None else (loss * counts).flatten(1).mean(1).sum()


def _away(
    stack: Stack, ball: Ball, ends: tuple[Tensor, Tensor], gaps: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """How much too little the points lead that have a share of the corner's pixels: less than the image and its gap."""
    (x, corner), shape = ends, (len(gaps), count, ball.y.shape[1])
    share = 0.3 + 0.6 * torch.rand(*shape, 1, generator=generator)
    random = torch.lerp(ball.low[:, None], ball.high[:, None], torch.rand(*shape, x.shape[2], generator=generator))
    way = torch.where(torch.rand(random.shape, generator=generator) < share, corner[:, None], random)
    ahead = leads(stack, way.flatten(1, 2), ball.y.repeat(1, count)).view(shape)
    return hinge(leads(stack, x, ball.y)[:, None] + gaps[:, None, None] * share[..., 0] - ahead)


class Part(NamedTuple):
    """A network, and the images and the radius at which it is attacked."""

    model: nn.Sequential
    x: Tensor
    y: Tensor
    eps: float


def constructed(seed: int) -> Part:
    """A network that is robust by construction on images ``[B, 1, 5, 5]``, up to a radius.

    Args:
        seed: seed of the prototypes and of the images near them.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = PROTOTYPES
    prototypes = torch.rand(classes, pixels, generator=generator)
    y = torch.randperm(classes, generator=generator)[:PLANTED]
    x = (prototypes[y] + 0.2 * (torch.rand(PLANTED, pixels, generator=generator) - 0.5)).clamp(0, 1)
    model = perceptron(pixels, 2 * classes * pixels, classes).eval().requires_grad_(False)
    # |x - c| is the sum of the parts of x - c and c - x above 0.
    one = torch.eye(pixels).repeat(classes, 1)
    model[1].weight.copy_(torch.cat([one, -one]))
    model[1].bias.copy_(torch.cat([-prototypes.flatten(), prototypes.flatten()]))
    model[3].weight.copy_(-torch.eye(classes).repeat_interleave(pixels, 1).repeat(1, 2) / pixels)
    model[3].bias.zero_()
    images = x.view(-1, 1, 5, 5)
    lead = -margin(model(images), y)
    return Part(model, images, y, SHARE * float(lead.min()) / 2)

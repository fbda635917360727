"""A standard and a robust little network on the digits of 8 x 8 pixels, and defences that only seem to be ones."""

import functools

import torch
from small_models import shuffled_digits
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import pgd
from purify_fast.data import load_dataset

EPS = 0.15
TESTED = 100


@functools.cache
def digits():
    """(images to train on, labels, held-out images, labels): 8 x 8, in [0, 1]."""
    x, y = shuffled_digits()
    return x[TESTED:], y[TESTED:], x[:TESTED], y[:TESTED]


def held_out(count=TESTED):
    """The first held-out images and their labels."""
    x, y = digits()[2:]
    return x[:count], y[:count]


def zoo_digits(count):
    """The first images of 16 x 16 pixels that the networks of the zoo have not seen, in [0, 1], and their labels."""
    images = load_dataset("digits")
    return images.x_test[:count].float() / 255, images.y_test[:count]


@functools.cache
def net(eps, epochs):
    """A network that was trained in a ball of this radius; 0: on clean images."""
    x, y, _, _ = digits()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for epoch in range(epochs):
            for index in torch.randperm(len(x)).split(128):
                images = x[index]
                if eps:
                    images = pgd(model, images, y[index], eps=eps, steps=4, alpha=eps / 2, seed=epoch)
                optimizer.zero_grad()
                F.cross_entropy(model(images), y[index]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


def standard():
    return net(0.0, 8)


def robust():
    return net(EPS, 15)


class Gated(nn.Module):
    """The standard network where it is unsure, the robust one where it is sure, by a gate as sharp as a step."""

    def __init__(self, slope=1000.0, at=0.2):
        super().__init__()
        self.standard, self.robust = standard(), robust()
        self.slope, self.at = slope, at

    def forward(self, x):
        quick, slow = self.standard(x).softmax(1), self.robust(x).softmax(1)
        top = quick.topk(2, 1).values
        gate = torch.sigmoid(self.slope * (top[:, 0] - top[:, 1] - self.at))[:, None]
        return torch.log((1 - gate) * quick + gate * slow + 1e-12)

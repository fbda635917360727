"""The robust network of the digits with six mistakes that users make and a mask: a sign must notice each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purify_fast import zoo

from .adaptive import long
from .entry import Step, behind, entry


def robust() -> nn.Module:
    """The network that every mistake is added to."""
    return zoo.load("digits-pgd-at")


@entry("labels that count from 1", why="the labels and the logits number the classes differently", eps=0.2)
def shifted_labels(x: Tensor, y: Tensor) -> nn.Module:
    return nn.Sequential(robust(), Step(lambda logits: logits.roll(1, 1))).eval()


@entry(
    "division by an empty sum", why="an image without a bright pixel is divided by 0, so its logits are NaN", eps=0.2
)
def empty_sum(x: Tensor, y: Tensor) -> nn.Module:
    def brightness(x: Tensor) -> Tensor:
        bright = (x > 0.9).float()
        return (x * bright).sum((1, 2, 3), keepdim=True) / bright.sum((1, 2, 3), keepdim=True)

    return behind(lambda x: x / brightness(x), robust())


@entry(
    "probabilities in place of logits",
    why="where the model is sure, the gradient of its softmax is almost zero",
    eps=0.2,
)
def probabilities(x: Tensor, y: Tensor) -> nn.Module:
    return nn.Sequential(robust(), nn.Softmax(1)).eval()


@entry("statistics of the batch", why="an image's logits depend on the images beside it, as in training mode", eps=0.2)
def statistics_of_the_batch(x: Tensor, y: Tensor) -> nn.Module:
    return nn.Sequential(robust(), Step(lambda logits: logits - 0.7 * logits.mean(0, keepdim=True))).eval()


@entry("a seed in forward", why="the noise is always the same, so averaging over draws changes nothing", eps=0.2)
def seed_in_forward(x: Tensor, y: Tensor) -> nn.Module:
    def same_noise(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x + 0.05 * torch.randn_like(x)

    return behind(same_noise, robust())


@entry(
    "other logits under gradients",
    why="attacks follow the gradients of another function than the deployed one",
    eps=0.2,
)
def other_under_gradients(x: Tensor, y: Tensor) -> nn.Module:
    def watched(logits: Tensor) -> Tensor:
        return logits + 0.15 * logits.flip(1).detach() if logits.requires_grad else logits

    return nn.Sequential(robust(), Step(watched)).eval()


@entry(
    "ripples before the network",
    why="the gradient of the ripples hides the gradient of the network",
    eps=0.2,
    chain=long(1, 0),
)
def ripples(x: Tensor, y: Tensor) -> tuple[nn.Module, ...]:
    net = robust()
    return behind(lambda x: x + 0.02 * torch.sin(300 * x), net), net

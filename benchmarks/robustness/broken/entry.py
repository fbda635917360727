"""The table of the judged models, and the parts of rebuilt defences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import APGD
from purify_fast.models.classifiers import SmallCNN

Function = Callable[[Tensor], Tensor]
#: Makes a model from training images ``[N, C, H, W]`` and labels ``[N]``. It may return several: first the deployed
#: model, then the models whose gradients its adaptive attack follows.
Build = Callable[[Tensor, Tensor], nn.Module | tuple[nn.Module, ...]]
#: The loss of a model on images and labels.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
#: An untrained network, by default for the digits.
network = partial(SmallCNN, width=16)


class Search(NamedTuple):
    """A part of an adaptive attack.

    Args:
        attack: Auto-PGD with its options.
        follows: the place, among the models that `Build` returns, of the model whose gradients are taken; 0 is the
            deployed model.
    """

    attack: APGD
    follows: int = 1


@dataclass(frozen=True)
class Entry:
    """A rebuilt defence, an honest model, or a model with a mistake.

    Args:
        build: makes it.
        paper: the paper that published the defence; "" for other models.
        attack: the adaptive attack with its source; "" for other models.
        chain: the parts of the adaptive attack in their order.
        published: accuracy in percent that the paper with the attack reports for the published defence in its own
            setting, and its place there; "-" if no such figure is known.
        why: the reason why it is flagged rightly; "" for an honest model and for a defence.
        data: "digits", "mnist" or "cifar10".
        eps: the L-inf radius.
        random: whether two predictions differ.
        images: the largest number of attacked images.
    """

    build: Build
    paper: str = ""
    attack: str = ""
    chain: tuple[Search, ...] = ()
    published: str = "-"
    why: str = ""
    data: str = "digits"
    eps: float = 0.1
    random: bool = False
    images: int = 100

    @property
    def honest(self) -> bool:
        """Tell whether no report may flag it."""
        return not (self.paper or self.why)


#: The entries by name, in the order of the tables.
ENTRIES: dict[str, Entry] = {}


def entry(name: str, *sources: str, **settings: Any) -> Callable[[Build], Build]:
    """Make a decorator that adds a function's model to the table.

    Args:
        name: name of the row.
        sources: paper and attack of the `Entry`; none for an honest model.
        settings: other fields of the `Entry`.
    """

    def add(build: Build) -> Build:
        ENTRIES[name] = Entry(build, *sources, **settings)
        return build

    return add


class Step(nn.Module):
    """A function as a module.

    Args:
        function: a tensor to a tensor.
        modules: that the function calls.
    """

    def __init__(self, function: Function, *modules: nn.Module):
        super().__init__()
        self.function, self.inside = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def straight_through(hard: Function, smooth: Function = lambda x: x) -> Function:
    """The values of one function with the gradient of another, BPDA (Athalye et al., ICML 2018, section 4.1).

    Args:
        hard: what the defence computes.
        smooth: stands in for it in the gradient; by default the identity.
    """

    def through(x: Tensor) -> Tensor:
        easy = smooth(x)
        with torch.no_grad():
            change = hard(x) - easy
        return easy + change

    return through


def without_gradient(function: Function) -> Function:
    """The same function, with a gradient of zero: AutoAttack refuses a model whose graph ends before the image.

    Args:
        function: images to images.
    """

    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = function(x)
        return value + 0 * x.sum()

    return cut


def behind(function: Function, classifier: nn.Module) -> nn.Module:
    """A classifier behind a function of the image."""
    return nn.Sequential(Step(function), classifier).eval()


def layers(net: SmallCNN, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """The same network, of the same weights, with another activation in each of the five places."""
    convolutions = [layer for conv in (net.conv1, net.conv2, net.conv3, net.conv4) for layer in (conv, activation())]
    dense = [nn.Flatten(), net.hidden, activation(), net.head]
    return nn.Sequential(Step(lambda x: 2 * x - 1), *convolutions, *dense).eval()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss that most networks are trained with."""
    return F.cross_entropy(model(x), y)


def signed_step(model: nn.Module, x: Tensor, y: Tensor, length: float) -> Tensor:
    """The images after one step along the sign of the gradient of the cross-entropy, ``length`` in image units."""
    point = x.detach().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(model, point, y), point)[0]
    return (x + length * gradient.sign()).clamp(0, 1).detach()


def train(model: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy, *, epochs: int = 15) -> nn.Module:
    """The model, trained in place by Adam, in evaluation mode and with its weights fixed."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(model, x[index], y[index]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)

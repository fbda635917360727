"""Models that are no published defences and hide nothing: no report may flag them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import zoo
from purify_fast.defences import NoisyEnsemble

from .adaptive import away, every_class
from .defences import ON_CIFAR, RANDOM, Averaged
from .entry import entry, network, signed_step, train

ON_MNIST = {"data": "mnist", "eps": 0.3, "images": 50}
#: Models of the zoo by name, with the fields of `Entry` that differ from the defaults.
ZOO: dict[str, dict[str, Any]] = {
    "digits-standard": {"eps": 0.03},
    "digits-pgd-at": {"eps": 0.2},
    "digits-arrest": {"eps": 0.2},
    "digits-carso-pipeline": {"eps": 0.2, "random": True, "images": 20},
    "digits-atop-pipeline": {"eps": 0.05, "random": True, "images": 20},
    "mnist-pgd-at": ON_MNIST,
    "mnist-arrest": ON_MNIST | {"images": 200},
    "cifar10-pgd-at-w16": ON_CIFAR,
    "cifar10-trades-w16": ON_CIFAR,
    "cifar10-arrest-w16": ON_CIFAR,
}
#: A shorter chain of attacks for the networks of CIFAR-10, since each of their gradients costs a millisecond.
SHORTER = (away(0, steps=100, restarts=2), every_class(0, steps=100, restarts=1))
for model_name, settings in ZOO.items():
    shorter = {"chain": SHORTER} if settings.get("data") == "cifar10" else {}
    entry(f"`{model_name}`", **settings, **shorter)(lambda x, y, name=model_name: zoo.load(name))

entry("the mean of two robust networks", eps=0.2)(
    lambda x, y: Averaged([zoo.load("digits-pgd-at"), zoo.load("digits-arrest")]).eval()
)
entry("a robust network on noisy copies", eps=0.2, **RANDOM)(
    lambda x, y: NoisyEnsemble(zoo.load("digits-pgd-at"), sigma=0.05, samples=4).eval()
)
entry("a linear classifier", eps=0.03)(
    lambda x, y: train(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)), x, y)
)
entry("a small network, trained with Gaussian noise")(
    lambda x, y: train(network(), x, y, lambda model, x, y: F.cross_entropy(model(x + 0.2 * torch.randn_like(x)), y))
)


@entry("a small network, trained adversarially")
def adversarial(x: Tensor, y: Tensor) -> nn.Module:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        point = x
        for _ in range(3):
            point = signed_step(model, point, y, 0.05)
        return F.cross_entropy(model(point), y)

    return train(network(), x, y, loss, epochs=30)

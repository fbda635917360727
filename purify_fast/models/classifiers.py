"""Classifiers that are built, saved and loaded by name; any module from images in [0, 1] to logits takes their place.

Each keeps its constructor's arguments, JSON values, in ``arguments``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .._process import processes
from .layers import BatchNorm1d, Normalize
from .preact_resnet import PreActResNet18
from .wide_resnet import Activation, WideResNet


class SmallCNN(nn.Module):
    """Four convolutions and two linear layers, SiLU, normalization inside. This package's own.

    Args:
        in_channels: channels of the images.
        num_classes: classes of the data, at least 2.
        image_size: (H, W), at least 8 each.
        width: channels of the first stage; the second has twice as many.

    ``forward(x)``: ``[B, in_channels, H, W]`` in [0, 1] -> logits ``[B, num_classes]``. The stages ``conv1`` ..
    ``conv4`` and ``hidden`` are modules, so that their outputs can be named as a representation.
    """

    # there is no pooling: the penultimate layer
    before_pooling = "hidden"

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (16, 16), width: int = 16
    ):
        super().__init__()
        if min(image_size) < 8:
            raise ValueError(f"image_size must be at least 8 x 8, got {tuple(image_size)}")
        if min(in_channels, width) < 1 or num_classes < 2:
            raise ValueError(
                f"need in_channels, width >= 1 and num_classes >= 2, got {in_channels, width, num_classes}"
            )
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "image_size": list(image_size),
            "width": width,
        }
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        h, w = ((s + 3) // 4 for s in image_size)
        self.hidden = nn.Linear(2 * width * h * w, 8 * width)
        self.head = nn.Linear(8 * width, num_classes)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.act(conv(x))
        return self.head(self.act(self.hidden(x.flatten(1))))


class _Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rank, world = processes() if self.training else (0, 1)
        if world == 1:
            return F.dropout(x, 0.15, self.training)
        # one process would draw for all images, these among them
        whole = x.new_ones(world * len(x), *x.shape[1:])
        return x * F.dropout(whole, 0.15)[rank::world]


class FullyConnected(nn.Module):
    """The MNIST classifier of CARSO's first version: Mish, BatchNorm and dropout of 0.15 after each hidden layer.

    Args:
        in_channels: channels of the images.
        num_classes: classes of the data, at least 2.
        image_size: (H, W).
        hidden: sizes of the hidden layers (published: 200 and 80).
        mean: what the images are normalized by, a number or one per channel (default: MNIST's).
        std: likewise, the standard deviations (default: MNIST's).

    ``forward(x)``: ``[B, in_channels, H, W]`` in [0, 1] -> log-probabilities ``[B, num_classes]``: a Mish and a
    log-softmax follow the last linear layer, as in the recipe carso/mnist_v1. The outputs of
    ``body.1``, ``body.5``, ``body.9`` (every Mish) are its representation, 290 numbers.

    Raises:
        ValueError: no hidden layer, fewer than 2 classes, counts below 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: Sequence[int] = (28, 28),
        hidden: Sequence[int] = (200, 80),
        mean: float | Sequence[float] = 0.1307,
        std: float | Sequence[float] = 0.3081,
    ):
        super().__init__()
        if not hidden or min(in_channels, *image_size, *hidden) < 1 or num_classes < 2:
            raise ValueError(
                "need in_channels, image_size, hidden >= 1 and num_classes >= 2, got "
                f"{in_channels, tuple(image_size), tuple(hidden), num_classes}"
            )
        self.normalize = Normalize(mean, std, in_channels)
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "image_size": list(image_size),
            "hidden": list(hidden),
            **self.normalize.arguments,
        }
        sizes = [in_channels * prod(image_size), *hidden]
        body: list[nn.Module] = []
        for before, after in pairwise(sizes):
            body += [nn.Linear(before, after), nn.Mish(), BatchNorm1d(after), _Dropout()]
        self.body = nn.Sequential(*body, nn.Linear(sizes[-1], num_classes), nn.Mish())
        # there is no pooling: the last hidden Mish
        self.before_pooling = f"body.{len(body) - 3}"

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.body(self.normalize(x).flatten(1)), 1)


CLASSIFIERS: dict[str, type[nn.Module]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
    "fully_connected": FullyConnected,
}


def representation_before_pooling(model: nn.Module) -> str:
    """The layer that stands for a classifier's representation when none is named.

    Args:
        model: one of `CLASSIFIERS`.

    Returns:
        The path of the module whose output is the last map before pooling, or without pooling the penultimate vector.

    Raises:
        ValueError: another model.
    """
    found = getattr(model, "before_pooling", None)
    if type(model) not in CLASSIFIERS.values() or found is None:
        names = ", ".join(name for name, _ in model.named_modules() if name)
        raise ValueError(
            f"layers must be given for a {type(model).__name__}: the module whose output is the last map before "
            f"pooling, one of {names[:400]}"
        )
    return found


def build_classifier(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    activation: Activation | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
) -> nn.Module:
    """A classifier with fresh weights, by its name in `CLASSIFIERS`.

    Args:
        name: ``small_cnn``, ``preact_resnet18``, ``wide_resnet`` or ``fully_connected``.
        image_shape: (C, H, W).
        num_classes: classes of the data, at least 2.
        width: None for the network's own: 16 for ``small_cnn``, 64 for ``preact_resnet18``, 10 for ``wide_resnet``.
        depth: of ``wide_resnet`` alone; None for 28.
        activation: of ``wide_resnet`` alone: "silu" or "relu"; None for "silu".
        mean: what the images are normalized by, a number or one per channel; ``small_cnn`` has its own, 0.5.
        std: likewise, the standard deviations; ``small_cnn`` has its own, 0.5.

    Raises:
        ValueError: an unknown name, or a width, depth or activation that the network does not have.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got {name!r}")
    channels, *size = image_shape
    options: dict[str, Any] = {"in_channels": channels, "num_classes": num_classes}
    if name in ("small_cnn", "fully_connected"):
        options["image_size"] = tuple(size)
    if name != "small_cnn":
        options |= {"mean": mean, "std": std}
    for option, value, without in (
        ("width", width, ("fully_connected",)),
        ("depth", depth, ("small_cnn", "preact_resnet18", "fully_connected")),
        ("activation", activation, ("small_cnn", "preact_resnet18", "fully_connected")),
    ):
        if value is not None:
            if name in without:
                raise ValueError(f"{option} {value}: {name} has no {option} to choose")
            options[option] = value
    return CLASSIFIERS[name](**options)

"""Classifiers that can be built, saved and loaded by their names.

`WideResNet` (BMVC 2016; Gowal et al., arXiv 2010.03593) has the parameter names of RobustBench's ``DMWideResNet``.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .._process import processes
from .._validation import check_literal
from .layers import BatchNorm1d, BatchNorm2d, Normalize, Statistic, check_sizes

Activation = Literal["silu", "relu"]

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class SmallCNN(nn.Module):
    """A small network of this package: four convolutions and two linear layers, with SiLU and a fixed normalization.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1] -> logits ``[B, num_classes]``. The layers are ``conv1`` to
    ``conv4`` and ``hidden``.

    Args:
        in_channels: number of channels of the images.
        num_classes: number of classes, at least 2.
        image_size: height and width of the images, at least 8 each.
        width: number of channels of the first two convolutions; the other two have twice as many.
    """

    # This network has no pooling, so its representation is the output of its penultimate layer.
    before_pooling = "hidden"

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (16, 16), width: int = 16
    ):
        super().__init__()
        if min(image_size) < 8:
            raise ValueError(f"image_size must be at least 8 x 8, got {tuple(image_size)}")
        check_sizes(num_classes, in_channels=in_channels, width=width)
        sizes = {"in_channels": in_channels, "num_classes": num_classes}
        self.arguments: dict[str, Any] = {**sizes, "image_size": list(image_size), "width": width}
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
        # Draw the mask that a single process would draw for the images of all, and use this process's part.
        whole = x.new_ones(world * len(x), *x.shape[1:])
        return x * F.dropout(whole, 0.15)[rank::world]


class FullyConnected(nn.Module):
    """The MNIST classifier of CARSO's first version. Mish, BatchNorm and dropout (0.15) follow each hidden layer.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1] -> log-probabilities ``[B, num_classes]``. A Mish and a
    log-softmax follow the last layer. With the default sizes, CARSO's representation is ``body.1``, ``body.5`` and
    ``body.9`` (290 numbers).

    Args:
        in_channels: number of channels of the images.
        num_classes: number of classes, at least 2.
        image_size: height and width of the images.
        hidden: sizes of the hidden layers; the published network has 200 and 80.
        mean: mean of the images: a number, or a number for each channel. The default is the mean of MNIST.
        std: standard deviation of the images, in the same form. The default is that of MNIST.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: Sequence[int] = (28, 28),
        hidden: Sequence[int] = (200, 80),
        mean: Statistic = 0.1307,
        std: Statistic = 0.3081,
    ):
        super().__init__()
        check_sizes(num_classes, in_channels=in_channels, image_size=min(image_size), hidden=min(hidden, default=0))
        self.normalize = Normalize(mean, std, in_channels)
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "image_size": list(image_size)}
        self.arguments: dict[str, Any] = {**sizes, "hidden": list(hidden), **self.normalize.arguments}
        widths = [in_channels * prod(image_size), *hidden]
        body: list[nn.Module] = []
        for before, after in pairwise(widths):
            body += [nn.Linear(before, after), nn.Mish(), BatchNorm1d(after), _Dropout()]
        self.body = nn.Sequential(*body, nn.Linear(widths[-1], num_classes), nn.Mish())
        # This network has no pooling, so its representation is the output of its last hidden Mish.
        self.before_pooling = f"body.{len(body) - 3}"

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.body(self.normalize(x).flatten(1)), 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet18(nn.Module):
    """ResNet-18 with pre-activation (He et al., ECCV 2016) for small images, with the normalization as first layer.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1], of any size -> logits ``[B, num_classes]``. The blocks are
    ``stages.i.j`` with i from 0 to 3 and j from 0 to 1. The map before pooling is the output of ``act``.

    Args:
        num_classes: number of classes, at least 2.
        in_channels: number of channels of the images.
        mean: mean of the images: a number, or a number for each channel.
        std: standard deviation of the images, in the same form.
        width: number of channels of the first stage (64 in He et al.).
    """

    before_pooling = "act"

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, mean: Statistic = 0.5, std: Statistic = 0.5, width: int = 64
    ):
        super().__init__()
        check_sizes(num_classes, in_channels=in_channels, width=width)
        self.normalize = Normalize(mean, std, in_channels)
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        self.arguments: dict[str, Any] = {**sizes, **self.normalize.arguments}
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        stages = []
        for i, (before, after) in enumerate(pairwise(channels)):
            stages.append(nn.Sequential(_Block(before, after, 2 if i else 1), _Block(after, after, 1)))
        self.stages = nn.Sequential(*stages)
        self.norm = BatchNorm2d(channels[4])
        self.act = nn.ReLU()
        self.head = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm(self.stages(self.conv(self.normalize(x)))))
        return self.head(out.mean((2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.strided = stride == 2
        self.batchnorm_0 = BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, 0 if self.strided else 1, bias=False)
        self.batchnorm_1 = BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        out = activated
        if self.strided:
            # This is "SAME" padding: at even sizes, a row and a column are added only at the end.
            h, w = out.shape[2:]
            out = F.pad(out, (w % 2, 1, h % 2, 1))
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """The wide residual network WRN-depth-width. WRN-28-10 with SiLU is CARSO's classifier on CIFAR and TinyImageNet.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1], of any size -> logits ``[B, num_classes]``. The output of
    ``relu`` is the map before pooling.

    Args:
        depth: number of layers: 6 n + 4, where n is the number of blocks in each of the three groups.
        width: factor by which the 16, 32 and 64 channels of the groups are multiplied.
        num_classes: number of classes, at least 2.
        mean: mean of the images: a number, or a number for each channel. The default is the mean of CIFAR-10.
        std: standard deviation of the images, in the same form. The default is that of CIFAR-10.
        in_channels: number of channels of the images.
        activation: "silu" as in RobustBench's ``DMWideResNet``, or "relu" as in the paper of Zagoruyko and Komodakis.
    """

    before_pooling = "relu"

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        *,
        mean: Statistic = CIFAR10_MEAN,
        std: Statistic = CIFAR10_STD,
        in_channels: int = 3,
        activation: Activation = "silu",
    ):
        super().__init__()
        check_literal("activation", activation, Activation)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, at least 10, got {depth}")
        check_sizes(num_classes, in_channels=in_channels, width=width)
        self.normalize = Normalize(mean, std, in_channels)
        sizes = {"depth": depth, "width": width, "num_classes": num_classes, "in_channels": in_channels}
        self.arguments: dict[str, Any] = {**sizes, **self.normalize.arguments, "activation": activation}
        activation_kind = {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(in_channels, channels[0], 3, 1, 1, bias=False)
        groups = []
        for g, (before, after) in enumerate(pairwise(channels)):
            act, count = activation_kind(), (depth - 4) // 6
            blocks = [_WideBlock(after if i else before, after, 2 if g and not i else 1, act) for i in range(count)]
            groups.append(nn.Sequential(OrderedDict(block=nn.Sequential(*blocks))))
        self.layer = nn.Sequential(*groups)
        self.batchnorm = BatchNorm2d(channels[3])
        self.relu = activation_kind()
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.batchnorm(self.layer(self.init_conv(self.normalize(x)))))
        return self.logits(out.mean((2, 3)))

    def representation_layers(self) -> list[str]:
        """Name CARSO's representation in order: each block's convolutions, and shortcuts except in the first group."""
        return [
            f"layer.{g}.block.{b}.{part}"
            for g in range(3)
            for b in range((self.arguments["depth"] - 4) // 6)
            for part in ("conv_0", "conv_1", *(["shortcut"] if g and not b else []))
        ]


CLASSIFIERS: dict[str, type[nn.Module]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
    "fully_connected": FullyConnected,
}


def build_classifier(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    activation: Activation | None = None,
    mean: Statistic = 0.5,
    std: Statistic = 0.5,
) -> nn.Module:
    """Make a classifier with random weights, by its name in `CLASSIFIERS`.

    Args:
        name: ``small_cnn``, ``preact_resnet18``, ``wide_resnet`` or ``fully_connected``.
        image_shape: shape (C, H, W) of an image.
        num_classes: number of classes, at least 2.
        width: width of the network. None means 16 for ``small_cnn``, 64 for ``preact_resnet18``, 10 for
            ``wide_resnet``. ``fully_connected`` has no width.
        depth: depth of ``wide_resnet``, only for this network. None means 28.
        activation: activation of ``wide_resnet``, only for this network: "silu" or "relu". None means "silu".
        mean: mean of the images: a number, or a number for each channel; ``small_cnn`` always uses 0.5.
        std: standard deviation of the images, in the same form; ``small_cnn`` always uses 0.5.

    Raises:
        ValueError: the name is unknown, or a width, depth or activation is given for a network that has none.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name must be one of {', '.join(CLASSIFIERS)}, got {name!r}")
    kind = CLASSIFIERS[name]
    channels, *size = image_shape
    options: dict[str, Any] = {"in_channels": channels, "num_classes": num_classes, "image_size": tuple(size)}
    options |= {"mean": mean, "std": std}
    taken = inspect.signature(kind).parameters
    for option, value in {"width": width, "depth": depth, "activation": activation}.items():
        if value is not None:
            if option not in taken:
                raise ValueError(f"{option} must not be given for {name}, which has no {option}, got {value}")
            options[option] = value
    return kind(**{option: value for option, value in options.items() if option in taken})

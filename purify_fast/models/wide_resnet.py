"""Wide residual networks as DeepMind's robustness work has them, the classifiers of the published CARSO systems.

Zagoruyko, Komodakis: BMVC 2016; Gowal et al., arXiv 2010.03593. SiLU, pre-activation, "SAME" padding, normalization
inside. Parameter names are those of RobustBench's ``DMWideResNet``, whose state dicts load with ``strict=True``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .._validation import check_literal
from .layers import BatchNorm2d, Normalize, check_sizes

Activation = Literal["silu", "relu"]

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class _Block(nn.Module):
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
            # "SAME" padding: at an even size the one missing row and column come last
            h, w = x.shape[2:]
            out = F.pad(out, (1 if w % 2 else 0, 1, 1 if h % 2 else 0, 1))
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class _Group(nn.Module):
    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int, activation: nn.Module):
        super().__init__()
        self.block = nn.Sequential(
            *(_Block(outputs if i else inputs, outputs, 1 if i else stride, activation) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def representation_layers(depth: int = 28) -> list[str]:
    """The layers CARSO reads, in execution order: every block's two convolutions, and the strided shortcuts.

    They are read before BatchNorm, activation and the residual sum; the first group's shortcut, the first convolution
    and the logits are not among them.

    Args:
        depth: the network's, 6 n + 4.

    Returns:
        Module paths, 26 for depth 28.
    """
    return [
        f"layer.{g}.block.{b}.{part}"
        for g in range(3)
        for b in range((depth - 4) // 6)
        for part in ("conv_0", "conv_1", *(["shortcut"] if g and not b else []))
    ]


class WideResNet(nn.Module):
    """WRN-depth-width. With SiLU, WRN-28-10 is CARSO's classifier on CIFAR-10, CIFAR-100 and TinyImageNet.

    Args:
        depth: 6 n + 4 with n blocks in each of the three groups.
        width: factor on 16, 32 and 64 channels.
        num_classes: classes of the data, at least 2.
        mean: what the images are normalized by, a number or one per channel (default: CIFAR-10's).
        std: likewise, the standard deviations (default: CIFAR-10's).
        in_channels: channels of the images.
        activation: "silu", as RobustBench's ``DMWideResNet``, or "relu", as in the paper of Zagoruyko and Komodakis.

    ``forward(x)``: ``[B, in_channels, H, W]`` in [0, 1], any size -> logits ``[B, num_classes]``. The output of
    ``relu`` is the map before pooling.

    Raises:
        ValueError: a depth that is not 6 n + 4, fewer than 2 classes, counts below 1.
    """

    before_pooling = "relu"

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        *,
        mean: float | Sequence[float] = CIFAR10_MEAN,
        std: float | Sequence[float] = CIFAR10_STD,
        in_channels: int = 3,
        activation: Activation = "silu",
    ):
        super().__init__()
        check_literal("activation", activation, Activation)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, at least 10, got {depth}")
        check_sizes(num_classes, in_channels=in_channels, width=width)
        self.normalize = Normalize(mean, std, in_channels)
        self.arguments: dict[str, Any] = {
            "depth": depth,
            "width": width,
            "num_classes": num_classes,
            "in_channels": in_channels,
            **self.normalize.arguments,
            "activation": activation,
        }
        activation_kind = {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(in_channels, channels[0], 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            *(
                _Group((depth - 4) // 6, channels[g], channels[g + 1], 2 if g else 1, activation_kind())
                for g in range(3)
            )
        )
        self.batchnorm = BatchNorm2d(channels[3])
        self.relu = activation_kind()
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.batchnorm(self.layer(self.init_conv(self.normalize(x)))))
        return self.logits(out.mean((2, 3)))

    def representation_layers(self) -> list[str]:
        """`representation_layers` of this depth."""
        return representation_layers(self.arguments["depth"])

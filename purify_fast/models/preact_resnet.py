"""ResNet-18 with pre-activation (He et al., ECCV 2016), in its form for small images, normalization inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import BatchNorm2d, Normalize


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
    """A 3 x 3 convolution, four stages of two blocks with ``width`` .. ``8 width`` channels, a mean over the positions.

    Args:
        num_classes: classes of the data, at least 2.
        in_channels: channels of the images.
        mean: what the images are normalized by, a number or one per channel.
        std: likewise, the standard deviations.
        width: channels of the first stage (He et al.: 64).

    ``forward(x)``: ``[B, in_channels, H, W]`` in [0, 1], any size -> logits ``[B, num_classes]``. The blocks are
    ``stages.i.j`` with i in 0 .. 3 and j in 0 .. 1; the map before pooling is ``act``'s output.

    Raises:
        ValueError: fewer than 2 classes, counts below 1.
    """

    before_pooling = "act"

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        width: int = 64,
    ):
        super().__init__()
        if min(in_channels, width) < 1 or num_classes < 2:
            raise ValueError(
                f"need in_channels, width >= 1 and num_classes >= 2, got {in_channels, width, num_classes}"
            )
        self.normalize = Normalize(mean, std, in_channels)
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
            **self.normalize.arguments,
        }
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    _Block(channels[i], channels[i + 1], 2 if i else 1), _Block(channels[i + 1], channels[i + 1], 1)
                )
                for i in range(4)
            )
        )
        self.norm = BatchNorm2d(channels[4])
        self.act = nn.ReLU()
        self.head = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm(self.stages(self.conv(self.normalize(x)))))
        return self.head(out.mean((2, 3)))

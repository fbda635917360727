"""Small reference classifiers; any ``nn.Module`` from images in [0, 1] to logits takes their place."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four convolutions and two linear layers, SiLU, normalisation inside. Ours.

    Args:
        in_channels, num_classes: of the data. image_size: (H, W), at least 8 each.
        width: channels of the first stage; the second has twice as many.

    ``forward(x)``: ``[B, in_channels, H, W]`` in [0, 1] -> logits ``[B, num_classes]``. The stages ``conv1`` ..
    ``conv4`` and ``hidden`` are modules, so that their outputs can be named as a representation.
    """

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
        self.arguments = {
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

"""An inpainting generator for small images, 16 x 16 to 32 x 32: DeepFillv2's ideas at a small price.

It is this package's own; no paper describes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....ops.contextual_attention import contextual_attention
from .deepfill import GatedConv, ToImage, Upsample, check_packed

#: Of a residual generator: how much of its base image the zero correction keeps.
KEPT = 0.95


class _Attention(nn.Module):
    """Contextual attention of a map at half the image's size; a key is valid where its 4 x 4 pixels are all kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = GatedConv(channels, channels, relu=True)
        self.after = GatedConv(channels, channels)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        valid = F.max_pool2d(mask, 4).flatten(1) == 0
        return self.after(contextual_attention(self.before(features), valid))


class _Coarse(nn.Module):
    """Two levels down and up again, each level added to what comes up."""

    def __init__(self, inputs: int, channels: int, width: int):
        super().__init__()
        self.enter = GatedConv(inputs, width)
        self.down1 = GatedConv(width, 2 * width, stride=2)
        self.down2 = GatedConv(2 * width, 4 * width, stride=2)
        self.middle = nn.Sequential(GatedConv(4 * width, 4 * width, dilation=2), GatedConv(4 * width, 4 * width))
        self.up1 = Upsample(4 * width, 2 * width)
        self.up2 = Upsample(2 * width, width)
        self.to_image = ToImage(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down1(full)
        half = half + self.up1(self.middle(self.down2(half)))
        return self.to_image(full + self.up2(half))


class _Refined(nn.Module):
    """One level down; there a dilated branch and one of attention, joined."""

    def __init__(self, inputs: int, channels: int, width: int, attention: bool):
        super().__init__()
        double = 2 * width
        self.enter = GatedConv(inputs, width)
        self.down = GatedConv(width, double, stride=2)
        self.dilated = nn.Sequential(GatedConv(double, double, dilation=2), GatedConv(double, double, dilation=4))
        self.attention = _Attention(double) if attention else None
        self.join = GatedConv(2 * double if attention else double, double)
        self.up = Upsample(double, width)
        self.to_image = ToImage(width, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down(full)
        joined = self.dilated(half)
        if self.attention is not None:
            joined = torch.cat([joined, self.attention(half, mask)], 1)
        return self.to_image(full + self.up(half + self.join(joined)))


def _logit(image: Tensor) -> Tensor:
    """What tanh makes KEPT times the image of; finite for images in [-1, 1], and with a gradient everywhere."""
    return torch.atanh(KEPT * image)


class SmallGenerator(nn.Module):
    """Coarse and refined image by gated convolutions, for small images.

    Args:
        channels: C of the images.
        width: channels at full size; 2 and 4 times as many at a half and a quarter.
        attention: whether the refined stage has a branch of contextual attention, at half size.
        residual: whether each stage corrects an image in place of painting one: the coarse stage the transformed image,
            the refined one the coarse image. ``tanh(atanh(0.95 image) + correction)``, with the correction 0 at first.

    ``forward(packed, mask) -> (coarse, refined)`` as `DeepFillGenerator`, for H and W that are multiples of 4. The
    refined stage sees the coarse image, the transformed one and the mask.

    FLOP of one image forward, two to a multiplication with its addition: 9.7 million for 1 x 16 x 16, 30.0 million for
    1 x 28 x 28, 41.6 million for 3 x 32 x 32; without attention 7.9, 24.2 and 33.9. They grow with the width's square.

    Raises:
        ValueError: sizes that do not fit, at construction or call.
    """

    takes_packed = True

    def __init__(self, channels: int = 3, width: int = 8, *, attention: bool = True, residual: bool = False):
        super().__init__()
        if min(channels, width) < 1:
            raise ValueError(f"need channels, width >= 1, got {channels} and {width}")
        self.arguments = {"channels": channels, "width": width, "attention": attention, "residual": residual}
        self.channels, self.residual = channels, residual
        self.coarse = _Coarse(channels + 2, channels, width)
        self.refined = _Refined(2 * channels + 1, channels, width, attention)
        if residual:
            for head in (self.coarse.to_image, self.refined.to_image):
                nn.init.zeros_(head.conv.weight)

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_packed(packed, mask, self.channels, 4)
        image, mask = packed[:, : self.channels], mask.to(packed.dtype)
        coarse = self._finish(self.coarse(packed), image)
        refined = self.refined(torch.cat([coarse, image, mask], 1), mask)
        return coarse, self._finish(refined, coarse)

    def _finish(self, painted: Tensor, base: Tensor) -> Tensor:
        return torch.tanh(painted + _logit(base) if self.residual else painted)

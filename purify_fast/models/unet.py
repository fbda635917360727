"""A small U-Net that predicts what a diffusion process added to an image, for images of any size.

    e      = MLP(sin and cos of t at frequencies from 1 to 1 / 10,000)
    block  : h + conv(silu(norm(conv(silu(norm(h))) + W e))),   h by a 1x1 convolution where the channels differ
    path   : width channels at full size, 2 width at half, 4 width at a quarter of it, and up again with skips

The form is that of Ho, Jain, Abbeel: "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B, made small:
three levels, one block a level and direction, resizing without weights, and one attention at the lowest level.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._tensors import without_autocast
from .._validation import check_counts
from ..ops.dispatch.gradient import first_order, transformed
from ..ops.group_norm_silu import group_norm_silu
from .layers import Conv2d

#: Channels that are normalized together, or all of a smaller width. The paper's network has 4 at full size; in
#: channels_last bfloat16 on an AMD EPYC 16 take a tenth of the time.
GROUP = 16


def _zero(layer: Conv2d) -> Conv2d:
    """The layer with zero weights, so that what it ends begins as its skip; the network predicts 0 at first."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def _norm(channels: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // min(width, GROUP), channels)


def _active(norm: nn.GroupNorm, h: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU of the normalized map, to which a number for each channel, if given, is added before."""
    return group_norm_silu(h, norm.num_groups, norm.weight, norm.bias, shift=shift, eps=norm.eps)


class TimeLayer(nn.Linear):
    """A linear layer of the embedded time. It stays in float32 where a copy of the network is in bfloat16.

    A product of a single row takes a CPU five times as long in bfloat16.
    """


class _Block(nn.Module):
    """A residual block; the embedded time, of 4 times the network's width, is added between its two convolutions."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs, width), _norm(outputs, width)
        self.conv1, self.conv2 = Conv2d(inputs, outputs, 3, padding=1), _zero(Conv2d(outputs, outputs, 3, padding=1))
        self.time = TimeLayer(4 * width, outputs)
        self.skip = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, shift: Tensor) -> Tensor:
        inner = self.conv1(_active(self.norm1, h))
        return self.skip(h) + self.conv2(_active(self.norm2, inner, shift))


class _Attention(nn.Module):
    """Attention of one head over all positions of a map."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = _norm(channels, width)
        self.project, self.out = Conv2d(channels, 3 * channels, 1), _zero(Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(h)).flatten(2).mT.chunk(3, 2)
        # F.scaled_dot_product_attention takes six times as long backwards, on a CPU and of so few positions
        seen = (query @ key.mT / math.sqrt(query.shape[2])).softmax(2) @ value
        return h + self.out(seen.mT.unflatten(2, h.shape[2:]))


class UNet(nn.Module):
    """A denoiser for small images.

    Args:
        channels: C of the images.
        width: channels at full size, even and at most 16, or a multiple of 16; 2 and 4 times as many at a half and a
            quarter.
        patch: side of the squares of pixels that the first layer makes channels of, and the last layer pixels again: 2
            does a quarter of the work of 1.
        attention: whether the lowest level has attention over its positions.

    ``forward(x, t)``: x ``[B, C, H, W]`` floating point, H and W multiples of ``patch`` and at least 3 of it; t ``[B]``
    or ``[]``, the time on the scale 0 to 1,000, whole or not -> ``[B, C, H, W]`` in the dtype that the convolutions
    compute in.

    FLOP of one image forward, two to a multiplication with its addition, of patch 1 and width 32: 310 million for
    3 x 32 x 32. They grow with the square of the width and with the pixels. It has about 930 weights times the square
    of the width.

    Raises:
        ValueError: sizes that do not fit, at construction or call.
    """

    frequencies: Tensor

    def __init__(self, channels: int = 3, width: int = 32, *, patch: int = 1, attention: bool = True):
        super().__init__()
        check_counts(channels=channels, width=width, patch=patch)
        if width % (2 if width < GROUP else GROUP):
            raise ValueError(f"width must be even and at most {GROUP}, or a multiple of {GROUP}, got {width}")
        sizes = {"channels": channels, "width": width, "patch": patch}
        self.arguments: dict[str, Any] = {**sizes, "attention": bool(attention)}
        self.channels, self.patch = channels, patch
        full, half, quarter = width, 2 * width, 4 * width
        powers = torch.arange(width // 2) / max(1, width // 2 - 1)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000.0) * powers), persistent=False)
        self.time = nn.Sequential(TimeLayer(width, 4 * width), nn.SiLU(), TimeLayer(4 * width, 4 * width), nn.SiLU())
        self.enter = Conv2d(channels * patch**2, full, 3, padding=1)
        self.down1, self.down2 = _Block(full, full, width), _Block(full, half, width)
        self.down3, self.middle = _Block(half, quarter, width), _Block(quarter, quarter, width)
        self.attention = _Attention(quarter, width) if attention else nn.Identity()
        self.up2, self.up1 = _Block(quarter + half, half, width), _Block(half + full, full, width)
        self.norm = _norm(full, width)
        self.leave = _zero(Conv2d(full, channels * patch**2, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def embed(self, t: Tensor) -> Tensor:
        """The embedding of the time that the blocks read, ``[B, 4 width]``.

        Args:
            t: the time, as in `forward`.
        """
        angles = t.reshape(-1, 1).to(self.frequencies.dtype) * self.frequencies
        embedded: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return embedded

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        patch, sides = self.patch, x.shape[2:]
        if x.dim() != 4 or x.shape[1] != self.channels or any(side % patch or side < 3 * patch for side in sides):
            wanted = f"[B, {self.channels}, H, W], H and W multiples of {patch} and at least {3 * patch}"
            raise ValueError(f"x must be {wanted}, got {list(x.shape)}")
        blocks = (self.down1, self.down2, self.down3, self.middle, self.up2, self.up1)
        with without_autocast(x.device):
            # if all times share one number in memory, as after `Tensor.expand`, embed it once
            time = self.embed(t[:1] if t.dim() and t.stride(0) == 0 else t)
            down1, down2, down3, middle, up2, up1 = (block.time(time) for block in blocks)
        full = self.down1(self.enter(_channels_last(F.pixel_unshuffle(x, self.patch))), down1)
        half = self.down2(_halved(full), down2)
        low = self.attention(self.middle(self.down3(_halved(half), down3), middle))
        up = self.up2(_joined(low, half), up2)
        up = self.up1(_joined(up, full), up1)
        return _pixels(self.leave(_active(self.norm, up)), self.patch)


def _channels_last(h: Tensor) -> Tensor:
    return h.contiguous(memory_format=torch.channels_last)


def _pixels(h: Tensor, patch: int) -> Tensor:
    """``F.pixel_shuffle`` to contiguous images: of channels_last its own gradient takes a CPU twice as long."""
    squares = h.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 2, 5, 3)
    return squares.flatten(4, 5).flatten(2, 3)


def _halved(h: Tensor) -> Tensor:
    """The means of squares of two pixels; of odd sides, the last row or column alone."""
    return F.avg_pool2d(h, 2, ceil_mode=True)


class _Doubled(torch.autograd.Function):
    """Each pixel as a square of two by two. Its gradient is their sum, which PyTorch's own takes ten times as long for.

    That is so on a CPU, in bfloat16 and channels_last.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2, mode="nearest")

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return F.avg_pool2d(grad, 2, divisor_override=1)


def _joined(low: Tensor, skip: Tensor) -> Tensor:
    """Join a map of the level below, enlarged to the size of this level, to this level's own map."""
    sides = skip.shape[2:]
    doubled = low.device.type == "cpu" and not transformed() and sides == (2 * low.shape[2], 2 * low.shape[3])
    return torch.cat([_Doubled.apply(low) if doubled else F.interpolate(low, size=sides, mode="nearest"), skip], 1)

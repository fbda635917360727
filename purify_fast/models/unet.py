"""A small U-Net that predicts what a diffusion process has added to an image. It accepts images of different sizes.

    e      = MLP(sin and cos of t at frequencies from 1 to 1 / 10,000)
    block  : h + conv(silu(norm(conv(silu(norm(h))) + W e))); a 1x1 convolution in place of the first h if
             the numbers of channels differ
    path   : width channels at full size, 2 width at half size, 4 width at a quarter, and back up with skips

This is a small form of the network in Ho, Jain, Abbeel: "Denoising Diffusion Probabilistic Models", NeurIPS 2020.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._modules import modules_of
from .._settings import without_autocast
from .._validation import check_counts

#: The number of channels in a group of the normalization, at most the network's width. The paper's network has 4 at
#: full size. With 16, the normalization takes a tenth of the time (AMD EPYC, channels_last bfloat16).
GROUP = 16
#: The types of devices on which `torch.group_norm` accepts images of 16 bits with weights in float32. CUDA does not.
MIXED_DTYPES = ("cpu", "meta")


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Zero the weights of a layer, so that its residual block returns the skip connection, and return the layer."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def _norm(channels: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // min(width, GROUP), channels)


def _normalized(norm: nn.GroupNorm, h: Tensor) -> Tensor:
    """Apply the normalization in the dtype of ``h``, also to 16-bit images with float32 weights."""
    device, weight = h.device.type, norm.weight
    if weight.dtype != h.dtype and device not in MIXED_DTYPES and not torch.is_autocast_enabled(device):
        return torch.group_norm(h.to(weight.dtype), norm.num_groups, weight, norm.bias, norm.eps).to(h.dtype)
    # `F.group_norm` would raise an error for groups of one value.
    return torch.group_norm(h, norm.num_groups, weight, norm.bias, norm.eps)


def _active(norm: nn.GroupNorm, h: Tensor, shift: Tensor | None = None) -> Tensor:
    """Add ``shift``, if given, to the channels of ``h``, then apply the normalization and SiLU."""
    h = h if shift is None else h + shift.to(h.dtype)[:, :, None, None]
    return F.silu(_normalized(norm, h))


class TimeLayer(nn.Linear):
    """A linear layer of the embedded time, in float32 also in a bfloat16 copy. Equal times take a single row."""


class _Block(nn.Module):
    """A residual block. It adds a linear function of the embedded time, ``[B, 4 width]``, between its convolutions."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs, width), _norm(outputs, width)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.time = TimeLayer(4 * width, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, shift: Tensor) -> Tensor:
        inner = self.conv1(_active(self.norm1, h))
        return self.skip(h) + self.conv2(_active(self.norm2, inner, shift))


class _Attention(nn.Module):
    """Attention with one head over all positions of a map."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = _norm(channels, width)
        self.project, self.out = nn.Conv2d(channels, 3 * channels, 1), _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.project(_normalized(self.norm, h)).flatten(2).mT.chunk(3, 2)
        # On a CPU, F.scaled_dot_product_attention takes six times as long in the backward pass for so few positions.
        seen = (query @ key.mT / math.sqrt(query.shape[2])).softmax(2) @ value
        return h + self.out(seen.mT.unflatten(2, h.shape[2:]))


class UNet(nn.Module):
    """A denoiser for small images.

    ``forward(x, t)``: images x ``[B, C, H, W]``, floating point; H and W are multiples of ``patch``, at least 3
    ``patch``. Times t ``[B]`` or ``[]``, on the scale from 0 to 1,000, with or without fractions. The result is
    ``[B, C, H, W]`` in the dtype of the convolutions.

    With patch 1 and width 32, a forward pass of an image 3 x 32 x 32 has 310 million floating-point operations. The
    number grows with the square of the width. The network has about 930 ``width ** 2`` weights.

    Args:
        channels: number of channels C of the images.
        width: number of channels at full size: a multiple of 16, or an even number below 16. There are 2 times as many
            at half size, and 4 times as many at a quarter of the size.
        patch: side of the squares of pixels that are turned into channels before the first layer, and back after the
            last layer. With patch 2, the network computes a quarter of the operations.
        attention: whether the lowest level has attention over its positions.
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
        self.enter = nn.Conv2d(channels * patch**2, full, 3, padding=1)
        self.down1, self.down2 = _Block(full, full, width), _Block(full, half, width)
        self.down3, self.middle = _Block(half, quarter, width), _Block(quarter, quarter, width)
        self.attention = _Attention(quarter, width) if attention else nn.Identity()
        self.up2, self.up1 = _Block(quarter + half, half, width), _Block(half + full, full, width)
        self.norm = _norm(full, width)
        self.leave = _zero(nn.Conv2d(full, channels * patch**2, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    @property
    def has_strides(self) -> bool:
        """True if a convolution has a stride above 1, which `purify_fast.speed.layout.autocast_to` has to know."""
        return any([isinstance(part, nn.Conv2d) and part.stride != (1, 1) for part in modules_of(self)])

    def embed(self, t: Tensor) -> Tensor:
        """Embed the time, given as in `forward`, for the blocks: ``[B, 4 width]``."""
        angles = t.reshape(-1, 1).to(self.frequencies.dtype) * self.frequencies
        embedded: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return embedded

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        patch, sides = self.patch, x.shape[2:]
        if x.dim() != 4 or x.shape[1] != self.channels or any(side % patch or side < 3 * patch for side in sides):
            needs = f"[B, {self.channels}, H, W], with H and W multiples of {patch} and at least {3 * patch}"
            raise ValueError(f"x must be {needs}, got {list(x.shape)}")
        blocks = (self.down1, self.down2, self.down3, self.middle, self.up2, self.up1)
        with without_autocast(x.device):
            # If all times are the same number in memory, as after `Tensor.expand`, embed this number only once.
            time = self.embed(t[:1] if t.dim() and t.stride(0) == 0 else t)
            down1, down2, down3, middle, up2, up1 = (block.time(time) for block in blocks)
        squares = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        full = self.down1(self.enter(squares), down1)
        half = self.down2(_halved(full), down2)
        low = self.attention(self.middle(self.down3(_halved(half), down3), middle))
        up = self.up2(_joined(low, half), up2)
        up = self.up1(_joined(up, full), up1)
        return _pixels(self.leave(_active(self.norm, up)), self.patch)


def _pixels(h: Tensor, patch: int) -> Tensor:
    """Do the same as ``F.pixel_shuffle``, whose backward pass takes twice as long on a CPU for channels_last."""
    squares = h.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 2, 5, 3)
    return squares.flatten(4, 5).flatten(2, 3)


def _halved(h: Tensor) -> Tensor:
    """Halve the size of a map by averages over 2 x 2 pixels, or over fewer at the end of an odd size."""
    return F.avg_pool2d(h, 2, ceil_mode=True)


def _joined(low: Tensor, skip: Tensor) -> Tensor:
    """Enlarge the map of the level below to the size of ``skip``, and concatenate both along the channels."""
    return torch.cat([F.interpolate(low, size=skip.shape[2:], mode="nearest"), skip], 1)

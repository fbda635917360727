"""Defines two parts of DeepFillv2's training: the discriminator SN-PatchGAN, and the free-form holes in the images.

The source is Yu et al., ICCV 2019, in the implementation nipponjo/deepfillv2-pytorch. The discriminator's tensors have
the names that this implementation uses. Spectral normalization is defined as in Miyato et al., ICLR 2018. AToP begins
with a DeepFillv2 generator that was trained in this way on Places2.

The hole of an image is a box and brush strokes; there is no noise. The sizes are from the authors' repository for
images of 256 x 256 (code: `configs/train.yaml`, `utils/misc.py`), and here they are scaled with the image. The box is
128 pixels high and wide, less up to 16 pixels at each side. There are 1 to 3 strokes of 4 to 11 segments, which zigzag
and are 12 to 40 pixels wide.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import without_autocast
from ..._validation import Range, check_counts
from ...models.layers import LeakyReLU
from ...ops.philox import Stream, philox

WIDTHS = (1, 2, 4, 4, 4, 4)


class SpectralConv(nn.Conv2d):
    """A convolution with ``weight / sigma``, where sigma is the largest singular value of the weight's matrix W.

    W has the shape [outputs, inputs k k]. sigma is u' W v with v = W' u / |W' u|, and is differentiated with constant u
    and v. In training mode, a forward pass first makes one step of power iteration, u <- W v / |W v|. In evaluation
    mode, u does not change, so the output depends only on the input. torch's ``spectral_norm`` does the same, but also
    stores v. Here u is the only buffer, ``weight_u [outputs, 1]``, and its initial value is from fifteen steps.

    deepfillv2-pytorch divides the stored weight itself in every forward pass. So there, scoring an image changes the
    weights without the optimizer, and sigma has no gradient. Here, only the optimizer changes the weights, and sigma
    has a gradient. A weight that was saved by deepfillv2-pytorch has a sigma near 1.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel.
        stride: stride of the convolution.
        padding: zeros on each side.
    """

    weight_u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int):
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.register_buffer("weight_u", torch.randn(outputs, 1))
        with torch.no_grad():
            for _ in range(15):
                self.weight_u.copy_(self._step(self.weight_u))

    def _right(self, u: Tensor) -> Tensor:
        return F.normalize(self.weight.detach().flatten(1).T @ u, dim=0, eps=1e-12)

    def _step(self, u: Tensor) -> Tensor:
        return F.normalize(self.weight.detach().flatten(1) @ self._right(u), dim=0, eps=1e-12)

    def forward(self, input: Tensor) -> Tensor:
        # sigma is not computed in bfloat16, whose mantissa of eight bits is too inexact
        with without_autocast(input.device):
            # autograd needs a copy, because the buffer may change before the backward pass
            u = self.weight_u.clone()
            if self.training:
                u = self._step(u)
                self.weight_u.copy_(u)
            sigma = (u.T @ self.weight.flatten(1) @ self._right(u)).squeeze()
            weight = self.weight / sigma
        return self._conv_forward(input, weight, self.bias)


def patch_depth(image_size: Sequence[int]) -> int:
    """Return the largest depth of `PatchDiscriminator`, up to 6, whose output still has at least 2 x 2 patches.

    This is 6 for images of 128 x 128 and larger, 4 for 32 x 32 and 28 x 28, and 3 for 16 x 16. The paper only uses
    images of 256 x 256.

    Args:
        image_size: (H, W).

    Raises:
        ValueError: the image is smaller than 3 x 3, so even one layer would have an output below 2 x 2.
    """
    # each layer halves the sides, rounded up
    depth = min(len(WIDTHS), (min(image_size) - 1).bit_length() - 1)
    if depth < 1:
        raise ValueError(f"image_size must be at least 3 x 3, got {tuple(image_size)}")
    return depth


class PatchDiscriminator(nn.Module):
    """The discriminator of SN-PatchGAN: spectrally normalized 5 x 5 convolutions of stride 2, each with LeakyReLU(0.2).

    ``forward(images and masks [B, C + 1, H, W])`` returns logits ``[B, N]``; N is 4,096 for 256 x 256. The images are
    in [-1, 1], and the masks are 1 where hidden. LeakyReLU also follows the last layer. The published size has
    5,946,816 parameters.

    Args:
        in_channels: C + 1, where C is the number of channels of the image.
        width: channels of the first layer (published: 64). The layers have 1, 2, 4, 4, 4 and 4 times this number.
        depth: number of layers, 1 to 6 (published: 6); `patch_depth` returns a depth for an image size.

    Raises:
        ValueError: a size is below 1, or the depth is out of range.
    """

    def __init__(self, in_channels: int = 4, width: int = 64, depth: int = 6):
        super().__init__()
        check_counts(in_channels=in_channels, width=width)
        Range(1, len(WIDTHS)).check("depth", depth)
        channels = [in_channels, *(width * factor for factor in WIDTHS[:depth])]
        for i in range(depth):
            convolution = SpectralConv(channels[i], channels[i + 1], 5, 2, 2)
            self.add_module(f"conv{i + 1}", nn.Sequential(OrderedDict(conv_sn=convolution, leaky_relu=LeakyReLU())))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.flatten(1)


#: The largest number of strokes in an image, and of segments in a stroke.
STROKES, SEGMENTS = 3, 11
# An image needs 4 random numbers for the box, 1 for the number of strokes, 6 for each stroke, and 3 for each segment.
_NUMBERS = 4 + 1 + STROKES * (6 + 3 * SEGMENTS)
_ANGLE, _ANGLE_RANGE = 2 * math.pi / 5, 2 * math.pi / 15


def free_form_masks(size: tuple[int, int], seed: Tensor, ids: Tensor) -> Tensor:
    """Draw a hole for each image, from a box and brush strokes.

    Args:
        size: (H, W) of the images.
        seed: seed of the random numbers, int64 ``[1]``.
        ids: ids of the images, int64 ``[B]``; equal ids have equal holes.

    Returns:
        The masks, float32 ``[B, 1, H, W]``: 1 where an image is hidden, 0 elsewhere.
    """
    # the random numbers, [B, numbers, 1, 1]
    u = philox(seed, ids, _NUMBERS, stream=Stream.MASK)[:, 0, :, None, None]
    height, width = size
    rows = torch.arange(height, device=u.device, dtype=torch.float32)[None, :, None]
    cols = torch.arange(width, device=u.device, dtype=torch.float32)[None, None, :]
    boxes = []
    for axis, place in enumerate((rows, cols)):
        side, most = size[axis] // 2, size[axis] // 16
        margin = (u[:, 2 + axis] * (most + 1)).floor()
        first = (u[:, axis] * (size[axis] - side)).floor() + margin
        boxes.append((place >= first) & (place < first + side - 2 * margin))
    hidden = boxes[0] & boxes[1]
    radius = math.hypot(height, width) / 8
    strokes = (u[:, 4] * STROKES).floor() + 1
    for k, of_stroke in enumerate(u[:, 5:].chunk(STROKES, 1)):
        head, tail = of_stroke[:, :6].unbind(1), of_stroke[:, 6:].unflatten(1, (SEGMENTS, 3)).unbind(1)
        segments = 4 + (head[0] * (SEGMENTS - 3)).floor()
        row, col = head[1] * height, head[2] * width
        # this is half of the stroke's width, which is 12 to 40 pixels in an image with a height of 256
        half = (12 + 28 * head[3]) * height / 512
        low, high = _ANGLE - head[4] * _ANGLE_RANGE, _ANGLE + head[5] * _ANGLE_RANGE
        for i, (turn, away, phase) in enumerate(part.unbind(1) for part in tail):
            angle = low + (high - low) * turn
            if i % 2 == 0:
                angle = 2 * math.pi - angle
            normal = torch.sqrt(-2 * torch.log1p(-away)) * torch.cos(2 * math.pi * phase)
            length = (radius + radius / 2 * normal).clamp(0, 2 * radius)
            next_row = (row + length * angle.sin()).clamp(0, height)
            next_col = (col + length * angle.cos()).clamp(0, width)
            down, right = next_row - row, next_col - col
            # for each pixel, `share` is the nearest position on the segment, from 0 at its start to 1 at its end
            share = (((rows - row) * down + (cols - col) * right) / (down**2 + right**2).clamp(min=1e-6)).clamp(0, 1)
            near = torch.hypot(rows - row - share * down, cols - col - share * right) <= half
            hidden = hidden | (near & (k < strokes) & (i < segments))
            row, col = next_row, next_col
    return hidden[:, None].float()


def hide_free_form(x: Tensor, seed: Tensor, ids: Tensor, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Hide free-form holes of images, and return the same kind of tensors as `Atop.draw`.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1].
        seed: seed of the random numbers, int64 ``[1]``.
        ids: ids of the images, int64 ``[B]``.
        shared: whether all images have the hole of the first image, as in the released code.

    Returns:
        The images in [-1, 1] with 0 in the hole, a plane of ones, and the mask, ``[B, C + 2, H, W]``; and the owners,
        int64 ``[1, B, 1, 1]``, which are 0 because there is only one pass.
    """
    height, width = x.shape[2:]
    mask = free_form_masks((height, width), seed, ids[:1].expand(len(x)) if shared else ids).to(x.dtype)
    packed = torch.cat([(2 * x - 1) * (1 - mask), torch.ones_like(mask), mask], 1)
    return packed, torch.zeros((1, len(x), 1, 1), dtype=torch.int64, device=x.device)

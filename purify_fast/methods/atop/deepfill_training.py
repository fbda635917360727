"""The training of DeepFillv2: SN-PatchGAN, its discriminator, and the holes of its images.

Yu et al., ICCV 2019, in the form of nipponjo/deepfillv2-pytorch, whose names the discriminator's tensors have; spectral
normalization as Miyato et al., ICLR 2018, define it. A hole is a box and brush strokes in each image, without noise.
AToP starts from a DeepFillv2 generator that was trained so on Places2. The numbers are those of the authors' repository
for images of 256 x 256 (code: `configs/train.yaml`, `utils/misc.py`), and scale with the image here. The box is 128
high and wide and loses up to 16 pixels at each side. 1 to 3 strokes of 4 to 11 segments turn back and forth, and are 12
to 40 pixels wide.
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
    """A convolution by ``weight / sigma``, sigma the largest singular value of the weight, [outputs, inputs k k].

    sigma = u' W v with v = W' u / |W' u|, differentiated with u and v constant. A forward in training mode first makes
    one step of power iteration, u <- W v / |W v|; evaluation mode keeps u, and is a function of the input alone. So
    does torch's ``spectral_norm``, which stores v as well. u is the one buffer, ``weight_u [outputs, 1]``; it starts
    after fifteen steps.

    deepfillv2-pytorch divides the weight itself at every forward, even if no gradient is wanted: scoring an image
    changes the weights without the optimizer, and no gradient goes through sigma. This class does neither. A weight
    that was saved by that code has sigma near 1.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
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
        # the eight bits of a bfloat16 are too few for sigma
        with without_autocast(input.device):
            # a copy for the graph: the buffer may change before its backward
            u = self.weight_u.clone()
            if self.training:
                u = self._step(u)
                self.weight_u.copy_(u)
            sigma = (u.T @ self.weight.flatten(1) @ self._right(u)).squeeze()
            weight = self.weight / sigma
        return self._conv_forward(input, weight, self.bias)


def patch_depth(image_size: Sequence[int]) -> int:
    """The most layers of `PatchDiscriminator`, at most 6, that leave 2 x 2 patches of an image.

    That is 6 for 128 x 128 and larger, 4 for 32 x 32 and 28 x 28, 3 for 16 x 16. The paper has 256 x 256 only.

    Args:
        image_size: (H, W).

    Raises:
        ValueError: images smaller than 3 x 3, of which no layer leaves 2 x 2.
    """
    # Each layer halves the sides, rounded up.
    depth = min(len(WIDTHS), (min(image_size) - 1).bit_length() - 1)
    if depth < 1:
        raise ValueError(f"image_size must be at least 3 x 3, got {tuple(image_size)}")
    return depth


class PatchDiscriminator(nn.Module):
    """``depth`` spectrally normalized 5 x 5 convolutions of stride 2, LeakyReLU(0.2) after each, the last one too.

    Args:
        in_channels: C + 1 with C channels of the image.
        width: channels of the first layer (published: 64); the layers have 1, 2, 4, 4, 4, 4 times as many.
        depth: layers, 1 to 6 (published: 6); `patch_depth` chooses for an image size.

    ``forward([image, mask] [B, C + 1, H, W])``, image in [-1, 1], mask 1 where hidden -> logits ``[B, N]``: N = 4,096
    for 256 x 256. The published size has 5,946,816 parameters.

    Raises:
        ValueError: sizes below 1, another depth.
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


#: At most so many strokes, of so many segments; the box takes 4 random numbers, the number of strokes 1, each stroke 6,
#: and each segment 3.
STROKES, SEGMENTS = 3, 11
_NUMBERS = 4 + 1 + STROKES * (6 + 3 * SEGMENTS)
_ANGLE, _ANGLE_RANGE = 2 * math.pi / 5, 2 * math.pi / 15


def free_form_masks(size: tuple[int, int], seed: Tensor, ids: Tensor) -> Tensor:
    """A hole for each image, a box and strokes, drawn from the stream of masks.

    Args:
        size: (H, W) of the images.
        seed: int64 ``[1]``.
        ids: ids of the images, int64 ``[B]``; equal ids have equal holes.

    Returns:
        float32 ``[B, 1, H, W]``: 1 where the image is hidden, 0 elsewhere.
    """
    u = philox(seed, ids, _NUMBERS, stream=Stream.MASK)[:, 0, :, None, None]  # [B, numbers, 1, 1]
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
        # widths of 12 to 40 pixels at 256
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
            # the point of the segment that is nearest to each pixel, as a share of the segment
            share = (((rows - row) * down + (cols - col) * right) / (down**2 + right**2).clamp(min=1e-6)).clamp(0, 1)
            near = torch.hypot(rows - row - share * down, cols - col - share * right) <= half
            hidden = hidden | (near & (k < strokes) & (i < segments))
            row, col = next_row, next_col
    return hidden[:, None].float()


def hide_free_form(x: Tensor, seed: Tensor, ids: Tensor, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Hide parts of images for a purifier, in the form of `Atop.draw`.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1].
        seed: int64 ``[1]``.
        ids: ids of the images, int64 ``[B]``.
        shared: whether all images have the hole of the first one, as in the released code.

    Returns:
        The images in [-1, 1] with 0 in the hole, a plane of ones and the mask, ``[B, C + 2, H, W]``; and the pass of
        every pixel, which is the same for all, int64 ``[1, B, 1, 1]``.
    """
    height, width = x.shape[2:]
    mask = free_form_masks((height, width), seed, ids[:1].expand(len(x)) if shared else ids).to(x.dtype)
    packed = torch.cat([(2 * x - 1) * (1 - mask), torch.ones_like(mask), mask], 1)
    return packed, torch.zeros((1, len(x), 1, 1), dtype=torch.int64, device=x.device)

"""The discriminator of DeepFillv2's training, SN-PatchGAN (Yu et al., ICCV 2019; Miyato et al., ICLR 2018).

Its tensors have the names of the implementation nipponjo/deepfillv2-pytorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._settings import without_autocast
from ..._validation import Range, check_counts
from ...models.layers import LeakyReLU

WIDTHS = (1, 2, 4, 4, 4, 4)


class SpectralConv(nn.Conv2d):
    """A convolution with ``weight / sigma``; sigma is the largest singular value of W ``[outputs, inputs * kernel^2]``.

    sigma is u' W v with v = W' u / |W' u|, differentiated with constant u and v. In training mode, each forward pass
    makes a step of power iteration. The buffer ``weight_u [outputs, 1]``, which is u, begins with fifteen steps.
    deepfillv2-pytorch divides the stored weight itself in every forward pass, so a weight that was saved there has a
    sigma near 1.
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
        # The number sigma is not computed in bfloat16, whose mantissa of eight bits is too inexact.
        with without_autocast(input.device):
            # Autograd needs a copy, because the buffer may change before the backward pass.
            u = self.weight_u.clone()
            if self.training:
                u = self._step(u)
                self.weight_u.copy_(u)
            sigma = (u.T @ self.weight.flatten(1) @ self._right(u)).squeeze()
            weight = self.weight / sigma
        return self._conv_forward(input, weight, self.bias)


def patch_depth(image_size: Sequence[int]) -> int:
    """Return the largest depth of `PatchDiscriminator`, up to 6, whose output still has at least 2 x 2 patches."""
    # Each layer halves the sides, rounded up.
    return min(len(WIDTHS), (min(image_size) - 1).bit_length() - 1)


class PatchDiscriminator(nn.Module):
    """The discriminator of SN-PatchGAN: spectrally normalized 5 x 5 convolutions of stride 2, each with LeakyReLU(0.2).

    ``forward(images and masks [B, C + 1, H, W])`` returns logits ``[B, N]``; N is 4,096 for 256 x 256. The images are
    in [-1, 1], and the masks are 1 where hidden. LeakyReLU also follows the last layer.

    Args:
        in_channels: C + 1, where C is the number of channels of the image.
        width: channels of the first layer (published: 64). The layers have 1, 2, 4, 4, 4 and 4 times this number.
        depth: number of layers, 1 to 6 (published: 6); `patch_depth` returns a depth for an image size.
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

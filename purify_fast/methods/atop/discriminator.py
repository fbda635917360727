"""SN-PatchGAN: the discriminator that DeepFillv2 is trained against, a logit per patch and channel.

Yu et al., ICCV 2019, in the form of nipponjo/deepfillv2-pytorch, whose names its tensors have; spectral normalization
as Miyato et al., ICLR 2018, define it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import without_autocast

WIDTHS = (1, 2, 4, 4, 4, 4)


class SpectralConv(nn.Conv2d):
    """A convolution by ``weight / sigma``, sigma the largest singular value of the weight, [outputs, inputs k k].

    sigma = u' W v with v = W' u / |W' u|, differentiated with u and v constant. A forward in training mode first makes
    one step of power iteration, u <- W v / |W v|; evaluation mode keeps u, and is a function of the input alone. So
    does torch's ``spectral_norm``, which stores v as well. u is the one buffer, ``weight_u [outputs, 1]``; it starts
    after fifteen steps.

    deepfillv2-pytorch divides the weight itself at every forward, also where no gradient is wanted: scoring an image
    changes the weights without the optimizer, and no gradient goes through sigma. Here neither is so. A weight that was
    saved by that code has sigma near 1.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
        kernel: side of the kernel.
        stride: of the convolution.
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


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv_sn = SpectralConv(inputs, outputs, 5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv_sn(x), 0.2)


def patch_depth(image_size: tuple[int, int]) -> int:
    """The most layers of `PatchDiscriminator`, at most 6, that leave 2 x 2 patches of an image.

    That is 6 for 128 x 128 and larger, 4 for 32 x 32 and 28 x 28, 3 for 16 x 16. The paper has 256 x 256 only.

    Args:
        image_size: (H, W).

    Raises:
        ValueError: images smaller than 3 x 3, of which no layer leaves 2 x 2.
    """
    depth, (h, w) = 0, image_size
    while depth < len(WIDTHS) and min(h, w) > 2:
        depth, h, w = depth + 1, (h + 1) // 2, (w + 1) // 2
    if depth == 0:
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
        if min(in_channels, width) < 1 or not 1 <= depth <= len(WIDTHS):
            raise ValueError(
                f"need in_channels, width >= 1 and depth in 1 .. {len(WIDTHS)}, got {in_channels}, {width} and {depth}"
            )
        self.arguments = {"in_channels": in_channels, "width": width, "depth": depth}
        channels = [in_channels, *(width * factor for factor in WIDTHS[:depth])]
        for i in range(depth):
            self.add_module(f"conv{i + 1}", _Block(channels[i], channels[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.flatten(1)

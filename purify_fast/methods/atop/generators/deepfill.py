"""The inpainting generator of DeepFillv2, AToP's GAN purifier: gated convolutions, a coarse and a refined image.

Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019, in the form of nipponjo/deepfillv2-pytorch,
which AToP (arXiv 2401.16352) fine-tunes. Names and shapes of the tensors are that code's: its checkpoints load.

It has no normalization and no dropout: training and evaluation mode are the same function.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...._validation import check_shapes
from ....models.layers import Conv2d
from ....ops.contextual_attention import contextual_attention, key_validity
from ....ops.gated_elu import gated_elu
from .deepfill_files import FIRST, read_generator, write_generator

_CONSTANT = "stage2.contextual_attention.fuse_weight"


class GatedConv(nn.Module):
    """One convolution with twice the outputs, halves a and b: ``ELU(a) sigmoid(b)``; zero padding keeps the size.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
        kernel: side of the convolution's kernel, odd.
        stride: of the convolution.
        dilation: of the convolution.
        relu: whether ReLU(a) takes the place of ELU(a).

    ``[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]``. Weights start as kaiming_uniform by fan_out, bias 0.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, *, relu: bool = False
    ):
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = Conv2d(inputs, 2 * outputs, kernel, stride, padding=padding, dilation=dilation)
        self.relu = relu
        nn.init.kaiming_uniform_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.relu:
            a, b = h.chunk(2, 1)
            return F.relu(a) * torch.sigmoid(b)
        return gated_elu(h)


class Upsample(nn.Module):
    """Each pixel fourfold, then a gated 3 x 3 convolution: ``[B, inputs, H, W] -> [B, outputs, 2 H, 2 W]``.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = GatedConv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ToImage(nn.Module):
    """A plain 3 x 3 convolution before the tanh: ``[B, inputs, H, W] -> [B, channels, H, W]``; its bias starts at 0.

    Args:
        inputs: channels of the input.
        channels: channels of the image.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.conv = Conv2d(inputs, channels, 3, 1, 1)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Down(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.conv1_downsample = GatedConv(inputs, hidden, stride=2)
        self.conv2 = GatedConv(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_downsample(x))


class _Up(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.conv1_upsample = Upsample(inputs, hidden)
        self.conv2 = GatedConv(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_upsample(x))


class _Attention(nn.Module):
    """Contextual attention of a map at a quarter of the image's size; the kernel of its fuse is a stored constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fuse_weight", torch.eye(3)[None, None])

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        h, w = features.shape[2:]
        return contextual_attention(features, key_validity(mask, (h // 2, w // 2)))


class _Coarse(nn.Module):
    def __init__(self, in_channels: int, channels: int, width: int):
        super().__init__()
        half, double = width // 2, 2 * width
        self.conv1 = GatedConv(in_channels, half, 5)
        self.down_block1 = _Down(half, width, width)
        self.down_block2 = _Down(width, double, double)
        self.conv_bn1 = GatedConv(double, double)
        self.conv_bn2 = GatedConv(double, double, dilation=2)
        self.conv_bn3 = GatedConv(double, double, dilation=4)
        self.conv_bn4 = GatedConv(double, double, dilation=8)
        self.conv_bn5 = GatedConv(double, double, dilation=16)
        self.conv_bn6 = GatedConv(double, double)
        self.conv_bn7 = GatedConv(double, double)
        self.up_block1 = _Up(double, width, width)
        self.up_block2 = _Up(width, half, width // 4)
        self.conv_to_rgb = ToImage(width // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_block2(self.down_block1(self.conv1(x)))
        x = self.conv_bn3(self.conv_bn2(self.conv_bn1(x)))
        x = self.conv_bn7(self.conv_bn6(self.conv_bn5(self.conv_bn4(x))))
        return torch.tanh(self.conv_to_rgb(self.up_block2(self.up_block1(x))))


class _Refined(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        half, double = width // 2, 2 * width
        self.conv_conv1 = GatedConv(channels, half, 5)
        self.conv_down_block1 = _Down(half, half, width)
        self.conv_down_block2 = _Down(width, width, double)
        self.conv_conv_bn1 = GatedConv(double, double)
        self.conv_conv_bn2 = GatedConv(double, double, dilation=2)
        self.conv_conv_bn3 = GatedConv(double, double, dilation=4)
        self.conv_conv_bn4 = GatedConv(double, double, dilation=8)
        self.conv_conv_bn5 = GatedConv(double, double, dilation=16)
        self.ca_conv1 = GatedConv(channels, half, 5)
        self.ca_down_block1 = _Down(half, half, width)
        self.ca_down_block2 = _Down(width, double, double)
        self.ca_conv_bn1 = GatedConv(double, double, relu=True)
        self.contextual_attention = _Attention()
        self.ca_conv_bn4 = GatedConv(double, double)
        self.ca_conv_bn5 = GatedConv(double, double)
        self.conv_bn6 = GatedConv(2 * double, double)
        self.conv_bn7 = GatedConv(double, double)
        self.up_block1 = _Up(double, width, width)
        self.up_block2 = _Up(width, half, width // 4)
        self.conv_to_rgb = ToImage(width // 4, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        dilated = self.conv_down_block2(self.conv_down_block1(self.conv_conv1(x)))
        dilated = self.conv_conv_bn3(self.conv_conv_bn2(self.conv_conv_bn1(dilated)))
        dilated = self.conv_conv_bn5(self.conv_conv_bn4(dilated))
        attended = self.ca_conv_bn1(self.ca_down_block2(self.ca_down_block1(self.ca_conv1(x))))
        attended = self.ca_conv_bn5(self.ca_conv_bn4(self.contextual_attention(attended, mask)))
        x = self.conv_bn7(self.conv_bn6(torch.cat([dilated, attended], 1)))
        return torch.tanh(self.conv_to_rgb(self.up_block2(self.up_block1(x))))


def check_packed(packed: Tensor, mask: Tensor, channels: int, multiple: int) -> None:
    """Refuse a packed input and a mask that a generator cannot take.

    Args:
        packed: should be floating point ``[B, channels + 2, H, W]``.
        mask: should be ``[B, 1, H, W]``.
        channels: of the generator's images.
        multiple: what H and W must be multiples of.

    Raises:
        ValueError: anything else; it names both shapes.
    """
    if packed.dim() != 4 or packed.shape[1] != channels + 2 or not packed.is_floating_point():
        raise ValueError(
            f"packed must be floating point [B, {channels + 2}, H, W], got {packed.dtype} {list(packed.shape)}"
        )
    b, _, h, w = packed.shape
    if h % multiple or w % multiple or min(h, w) == 0:
        raise ValueError(f"H and W must be multiples of {multiple}, got packed {list(packed.shape)}")
    if tuple(mask.shape) != (b, 1, h, w):
        raise ValueError(f"mask must be {[b, 1, h, w]} as packed is {list(packed.shape)}, got {list(mask.shape)}")


class DeepFillGenerator(nn.Module):
    """DeepFillv2's generator: 4,052,478 parameters in the published size, 1,631,151 of them in the coarse stage.

    Args:
        in_channels: C + 2 with C channels of the image.
        width: 48 in the authors' notebooks; a multiple of 4.

    ``forward(packed, mask) -> (coarse, refined)``:

        packed: ``[B, C + 2, H, W]``: the transformed image in [-1, 1], 0 where hidden; a plane of ones; the mask.
        mask: ``[B, 1, H, W]``, 1 where hidden, 0 where kept.
        coarse, refined: ``[B, C, H, W]`` in [-1, 1], the whole image each; refined is the purified one.

    H and W are multiples of 8. The second stage sees ``coarse mask + transformed (1 - mask)``. Its attention takes each
    image's own mask, where the published code takes the first image's for the whole batch: equal for one shared mask.
    The published start of the weights lets the signal fade: a fresh generator paints mid-grey, to 1e-6 at 32 x 32.

    It is made for 256 x 256. With blocks of an eighth, a quarter of them hidden, the share of the attention's keys with
    nothing hidden around them falls from 57 % there to 36 % at 128, 11 % at 64 and almost none at 32: below 128 take
    `SmallGenerator`.

    Raises:
        ValueError: sizes that do not fit, at construction or call.
    """

    takes_packed = True

    def __init__(self, in_channels: int = 5, width: int = 48):
        super().__init__()
        if in_channels < 3 or width < 4 or width % 4:
            raise ValueError(f"need in_channels >= 3 and width a multiple of 4, got {in_channels} and {width}")
        self.arguments = {"in_channels": in_channels, "width": width}
        self.channels = in_channels - 2
        self.stage1 = _Coarse(in_channels, self.channels, width)
        self.stage2 = _Refined(self.channels, width)

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_packed(packed, mask, self.channels, 8)
        coarse = self.stage1(packed)
        hidden = mask.to(packed.dtype)
        return coarse, self.stage2(coarse * hidden + packed[:, : self.channels] * (1 - hidden), mask)

    @classmethod
    def from_official(cls, path: str | Path) -> DeepFillGenerator:
        """A generator from a checkpoint of deepfillv2-pytorch or AToP, in evaluation mode.

        Args:
            path: a ``.pth`` file with the state dict under ``G``, beside whatever else training keeps there, or with
                the state dict alone; or a ``.safetensors`` file of it.

        Every size is the file's. Nothing but tensors and plain containers is unpickled. Checkpoints converted from
        TensorFlow (``networks_tf.py``) have other names, other padding, and are refused.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is broken, holds other objects, holds no such state dict, or one with tensors missing,
                unknown or of another shape; all are named.
        """
        place, state = read_generator(Path(path))
        first = state[FIRST]
        width, in_channels = first.shape[:2] if first.dim() == 4 else (0, 0)
        try:
            generator = cls(in_channels, width)
        except ValueError as error:
            raise ValueError(f"{place}: {FIRST} is {list(first.shape)}: {error}") from error
        own = generator.state_dict()
        # checkpoints older than that buffer lack it
        constant = state.setdefault(_CONSTANT, own[_CONSTANT])
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, own)]
        check_shapes(f"{place} is not a generator of deepfillv2-pytorch", *shapes)
        if not torch.equal(constant.to(own[_CONSTANT]), own[_CONSTANT]):
            raise ValueError(f"{place}: {_CONSTANT} is {constant.tolist()}, must be the identity")
        generator.load_state_dict(state)
        return generator.eval()

    def save_official(self, path: str | Path) -> None:
        """Write what `from_official` reads, the file whole or absent.

        Args:
            path: a ``.safetensors`` file, or any other, which holds ``{"G": state dict}``.
        """
        write_generator(self.state_dict(), Path(path))

"""Inpainting generators of gated convolutions, which return a coarse and a refined image.

`DeepFillGenerator` is AToP's GAN purifier: Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019.
Its tensors have the names and shapes of nipponjo/deepfillv2-pytorch, which AToP (arXiv 2401.16352) fine-tunes.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._validation import check_counts
from ...models.classifiers import load_state, read_weights
from ...ops.contextual_attention import contextual_attention, key_validity
from ...ops.gated_elu import gated_elu

#: The names of two tensors in checkpoints: the first layer's weight, [width, in_channels, 5, 5], and a constant tensor.
FIRST, CONSTANT = "stage1.conv1.conv.weight", "stage2.contextual_attention.fuse_weight"


class GatedConv(nn.Module):
    """A convolution with zero padding whose output's halves a and b become ``ELU(a) sigmoid(b)`` (or ReLU(a))."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, *, relu: bool = False
    ):
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, 2 * outputs, kernel, stride, padding=padding, dilation=dilation)
        self.relu = relu
        nn.init.kaiming_uniform_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if not self.relu:
            return gated_elu(h)
        a, b = h.chunk(2, 1)
        return F.relu(a) * torch.sigmoid(b)


def _upsample(inputs: int, outputs: int) -> nn.Sequential:
    """Return nearest-neighbor upsampling and a gated convolution: ``[B, inputs, H, W] -> [B, outputs, 2 H, 2 W]``."""
    return nn.Sequential(OrderedDict(larger=nn.Upsample(scale_factor=2.0), conv=GatedConv(inputs, outputs)))


def _to_image(inputs: int, channels: int) -> nn.Sequential:
    """Return a convolution without a gate, for use before the tanh: ``[B, inputs, H, W] -> [B, channels, H, W]``."""
    conv = nn.Conv2d(inputs, channels, 3, 1, 1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(OrderedDict(conv=conv))


def _down(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a gated convolution that halves height and width, and another gated convolution."""
    parts = {"conv1_downsample": GatedConv(inputs, hidden, stride=2), "conv2": GatedConv(hidden, outputs)}
    return nn.Sequential(OrderedDict(parts))


def _up(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a gated convolution that doubles height and width, and another gated convolution."""
    return nn.Sequential(OrderedDict(conv1_upsample=_upsample(inputs, hidden), conv2=GatedConv(hidden, outputs)))


class _Attention(nn.Module):
    """Contextual attention on a quarter-size map. Published checkpoints contain ``fuse_weight``, which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fuse_weight", torch.eye(3)[None, None])

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        h, w = features.shape[2:]
        return contextual_attention(features, key_validity(mask, (h // 2, w // 2)))


def _coarse_stage(in_channels: int, channels: int, width: int) -> nn.Sequential:
    half, double = width // 2, 2 * width
    parts: dict[str, nn.Module] = {
        "conv1": GatedConv(in_channels, half, 5),
        "down_block1": _down(half, width, width),
        "down_block2": _down(width, double, double),
    }
    for i, dilation in enumerate((1, 2, 4, 8, 16, 1, 1), 1):
        parts[f"conv_bn{i}"] = GatedConv(double, double, dilation=dilation)
    parts["up_block1"] = _up(double, width, width)
    parts["up_block2"] = _up(width, half, width // 4)
    parts["conv_to_rgb"] = _to_image(width // 4, channels)
    return nn.Sequential(OrderedDict(parts))


class _Refined(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        half, double = width // 2, 2 * width
        self.conv_conv1 = GatedConv(channels, half, 5)
        self.conv_down_block1 = _down(half, half, width)
        self.conv_down_block2 = _down(width, width, double)
        for i, dilation in enumerate((1, 2, 4, 8, 16), 1):
            self.add_module(f"conv_conv_bn{i}", GatedConv(double, double, dilation=dilation))
        self.ca_conv1 = GatedConv(channels, half, 5)
        self.ca_down_block1 = _down(half, half, width)
        self.ca_down_block2 = _down(width, double, double)
        self.ca_conv_bn1 = GatedConv(double, double, relu=True)
        self.contextual_attention = _Attention()
        self.ca_conv_bn4 = GatedConv(double, double)
        self.ca_conv_bn5 = GatedConv(double, double)
        self.conv_bn6 = GatedConv(2 * double, double)
        self.conv_bn7 = GatedConv(double, double)
        self.up_block1 = _up(double, width, width)
        self.up_block2 = _up(width, half, width // 4)
        self.conv_to_rgb = _to_image(width // 4, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        dilated = self.conv_down_block2(self.conv_down_block1(self.conv_conv1(x)))
        for i in range(1, 6):
            dilated = self.get_submodule(f"conv_conv_bn{i}")(dilated)
        attended = self.ca_conv_bn1(self.ca_down_block2(self.ca_down_block1(self.ca_conv1(x))))
        attended = self.ca_conv_bn5(self.ca_conv_bn4(self.contextual_attention(attended, mask)))
        x = self.conv_bn7(self.conv_bn6(torch.cat([dilated, attended], 1)))
        return torch.tanh(self.conv_to_rgb(self.up_block2(self.up_block1(x))))


def _check_sides(packed: Tensor, multiple: int) -> None:
    if any(side % multiple for side in packed.shape[2:]):
        raise ValueError(f"sides of images must be multiples of {multiple}, got {list(packed.shape[2:])}")


class DeepFillGenerator(nn.Module):
    """The generator of DeepFillv2, for images of 256 x 256; for images below 128, use `SmallGenerator`.

    ``forward(packed, mask) -> (coarse, refined)``:

        packed: ``[B, C + 2, H, W]``: the transformed image in [-1, 1], 0 where hidden; a plane of ones; and the mask.
        mask: ``[B, 1, H, W]``, 1 where hidden, 0 elsewhere.
        coarse, refined: whole images ``[B, C, H, W]`` in [-1, 1]; refined is the purified image.

    H and W are multiples of 8. The attention uses the mask of each image; the published code uses the first image's
    mask for the whole batch. It copies only from patches without hidden pixels. If blocks have an eighth of the image's
    side and a quarter of them is hidden, it can use 57 % of the patches at 256, 36 % at 128, 11 % at 64 and almost none
    at 32. A fresh generator returns mid-gray images.

    Args:
        in_channels: C + 2, where C is the number of channels of the image.
        width: width of the network, a multiple of 4 (authors' notebooks: 48). The first layer has width / 2 channels.

    Raises:
        ValueError: sizes do not fit, at construction or at a call.
    """

    takes_packed = True
    #: The sides of images must be multiples of this number.
    multiple = 8

    def __init__(self, in_channels: int = 5, width: int = 48):
        super().__init__()
        if in_channels < 3 or width < 4 or width % 4:
            raise ValueError(f"in_channels must be at least 3 and width a multiple of 4, got {in_channels} and {width}")
        self.arguments = {"in_channels": in_channels, "width": width}
        self.channels = in_channels - 2
        self.stage1 = _coarse_stage(in_channels, self.channels, width)
        self.stage2 = _Refined(self.channels, width)

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _check_sides(packed, self.multiple)
        coarse = torch.tanh(self.stage1(packed))
        hidden = mask.to(packed.dtype)
        return coarse, self.stage2(coarse * hidden + packed[:, : self.channels] * (1 - hidden), mask)

    @classmethod
    def from_official(cls, path: str | Path) -> DeepFillGenerator:
        """Load a checkpoint of deepfillv2-pytorch or AToP, in evaluation mode. All sizes are taken from the file.

        Only tensors and plain containers are unpickled. Checkpoints that were converted from TensorFlow
        (``networks_tf.py``) are refused, because their names and padding differ.

        Args:
            path: a ``.pth`` file that is the state dict or has it under the key ``G``, or a ``.safetensors`` file.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is damaged, has no such state dict, or its tensors do not fit; the message names them.
        """
        state = read_weights(path)
        if FIRST not in state or state[FIRST].dim() != 4:
            names = ", ".join(list(state)[:5])
            raise ValueError(f"{path} must hold a generator of deepfillv2-pytorch, got the tensors {names}")
        width, in_channels = state[FIRST].shape[:2]
        generator = cls(in_channels, width)
        # Older checkpoints do not have the constant.
        constant = generator.state_dict()[CONSTANT]
        if not torch.equal(state.setdefault(CONSTANT, constant).to(constant), constant):
            raise ValueError(f"{path}: {CONSTANT} must be {constant.tolist()}, got {state[CONSTANT].tolist()}")
        load_state(generator, state, f"{path} is not a generator of deepfillv2-pytorch")
        return generator.eval()


#: A residual generator multiplies the image that it corrects by this factor, so that atanh of the image is finite.
KEPT = 0.95


class _SmallAttention(nn.Module):
    """Contextual attention on a half-size map. A key is valid if none of its 4 x 4 pixels of the image is hidden."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = GatedConv(channels, channels, relu=True)
        self.after = GatedConv(channels, channels)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        valid = F.max_pool2d(mask, 4).flatten(1) == 0
        return self.after(contextual_attention(self.before(features), valid))


class _SmallCoarse(nn.Module):
    """A U-shaped network with two levels of downsampling; skip connections add the maps of equal size."""

    def __init__(self, inputs: int, channels: int, width: int):
        super().__init__()
        self.enter = GatedConv(inputs, width)
        self.down1 = GatedConv(width, 2 * width, stride=2)
        self.down2 = GatedConv(2 * width, 4 * width, stride=2)
        self.middle = nn.Sequential(GatedConv(4 * width, 4 * width, dilation=2), GatedConv(4 * width, 4 * width))
        self.up1 = _upsample(4 * width, 2 * width)
        self.up2 = _upsample(2 * width, width)
        self.to_image = _to_image(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down1(full)
        half = half + self.up1(self.middle(self.down2(half)))
        return self.to_image(full + self.up2(half))


class _SmallRefined(nn.Module):
    """A network with one level of downsampling, where a dilated branch and an attention branch are joined."""

    def __init__(self, inputs: int, channels: int, width: int, attention: bool):
        super().__init__()
        double = 2 * width
        self.enter = GatedConv(inputs, width)
        self.down = GatedConv(width, double, stride=2)
        self.dilated = nn.Sequential(GatedConv(double, double, dilation=2), GatedConv(double, double, dilation=4))
        self.attention = _SmallAttention(double) if attention else None
        self.join = GatedConv(2 * double if attention else double, double)
        self.up = _upsample(double, width)
        self.to_image = _to_image(width, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down(full)
        joined = self.dilated(half)
        if self.attention is not None:
            joined = torch.cat([joined, self.attention(half, mask)], 1)
        return self.to_image(full + self.up(half + self.join(joined)))


class SmallGenerator(nn.Module):
    """This package's own generator of gated convolutions for images of 16 x 16 to 32 x 32.

    ``forward(packed, mask) -> (coarse, refined)`` is as in `DeepFillGenerator`, but H and W are multiples of 4.

    Args:
        channels: channels C of the images.
        width: channels at full size. There are twice this number at half size, and four times at a quarter.
        attention: whether the refined stage has a branch of contextual attention, at half size.
        residual: whether each stage predicts a correction of an image in place of a whole image. The coarse stage
            corrects the transformed image, and the refined stage the coarse image. The result is
            ``tanh(atanh(0.95 image) + correction)``, and the initial correction is 0.

    Raises:
        ValueError: sizes do not fit, at construction or at a call.
    """

    takes_packed = True
    #: The sides of images must be multiples of this number.
    multiple = 4

    def __init__(self, channels: int = 3, width: int = 8, *, attention: bool = True, residual: bool = False):
        super().__init__()
        check_counts(channels=channels, width=width)
        self.arguments = {"channels": channels, "width": width, "attention": attention, "residual": residual}
        self.channels, self.residual = channels, residual
        self.coarse = _SmallCoarse(channels + 2, channels, width)
        self.refined = _SmallRefined(2 * channels + 1, channels, width, attention)
        if residual:
            for head in (self.coarse.to_image, self.refined.to_image):
                nn.init.zeros_(head.get_parameter("conv.weight"))

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _check_sides(packed, self.multiple)
        image, mask = packed[:, : self.channels], mask.to(packed.dtype)
        coarse = self._finish(self.coarse(packed), image)
        refined = self.refined(torch.cat([coarse, image, mask], 1), mask)
        return coarse, self._finish(refined, coarse)

    def _finish(self, painted: Tensor, base: Tensor) -> Tensor:
        # With the factor KEPT, atanh is finite for all images in [-1, 1], so the gradient of tanh is not 0.
        return torch.tanh(painted + torch.atanh(KEPT * base) if self.residual else painted)

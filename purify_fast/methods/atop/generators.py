"""Inpainting generators of gated convolutions, with a coarse and a refined image: DeepFillv2's, and a small one.

`DeepFillGenerator` is AToP's GAN purifier:

Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019, in the form of nipponjo/deepfillv2-pytorch,
which AToP (arXiv 2401.16352) fine-tunes. Names and shapes of the tensors are that code's: its checkpoints load.
`SmallGenerator` has the same ideas at a small price, for images of 16 x 16 to 32 x 32. It is this package's own, and no
paper describes it.

Neither has normalization and no dropout: training and evaluation mode are the same function.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._files import atomic
from ..._validation import check_counts
from ...models.foreign import load_state, read_weights
from ...models.layers import Conv2d
from ...ops.contextual_attention import contextual_attention, key_validity
from ...ops.gated_elu import gated_elu

#: The generator's first tensor, [width, in_channels, 5, 5], whose shape gives its sizes; and a constant tensor.
FIRST, CONSTANT = "stage1.conv1.conv.weight", "stage2.contextual_attention.fuse_weight"


class GatedConv(nn.Module):
    """A convolution with twice the outputs, halves a and b: ``ELU(a) sigmoid(b)``; zero padding keeps the size.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
        kernel: side of the convolution's kernel, odd.
        stride: stride of the convolution.
        dilation: dilation of the convolution.
        relu: whether to use ReLU(a) in place of ELU(a).

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
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if not self.relu:
            return gated_elu(h)
        a, b = h.chunk(2, 1)
        return F.relu(a) * torch.sigmoid(b)


def _upsample(inputs: int, outputs: int) -> nn.Sequential:
    """Each pixel fourfold, then a gated convolution: ``[B, inputs, H, W] -> [B, outputs, 2 H, 2 W]``."""
    return nn.Sequential(OrderedDict(larger=nn.Upsample(scale_factor=2.0), conv=GatedConv(inputs, outputs)))


def _to_image(inputs: int, channels: int) -> nn.Sequential:
    """A plain convolution before the tanh: ``[B, inputs, H, W] -> [B, channels, H, W]``; its bias starts at 0."""
    conv = Conv2d(inputs, channels, 3, 1, 1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(OrderedDict(conv=conv))


def _down(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Half the size, then a convolution."""
    parts = {"conv1_downsample": GatedConv(inputs, hidden, stride=2), "conv2": GatedConv(hidden, outputs)}
    return nn.Sequential(OrderedDict(parts))


def _up(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Twice the size, then a convolution."""
    return nn.Sequential(OrderedDict(conv1_upsample=_upsample(inputs, hidden), conv2=GatedConv(hidden, outputs)))


class _Attention(nn.Module):
    """Contextual attention of a map at a quarter of the image's size; the kernel of its fuse is a stored constant."""

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


def _check_packed(packed: Tensor, mask: Tensor, channels: int, multiple: int) -> None:
    """ValueError unless a generator can take a packed input and its mask."""
    b, inputs, h, w = packed.shape
    if inputs != channels + 2 or tuple(mask.shape) != (b, 1, h, w) or h % multiple or w % multiple:
        raise ValueError(
            f"packed must be [B, {channels + 2}, H, W] and mask [B, 1, H, W], H and W multiples of {multiple}, got "
            f"{list(packed.shape)} and {list(mask.shape)}"
        )


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
        self.stage1 = _coarse_stage(in_channels, self.channels, width)
        self.stage2 = _Refined(self.channels, width)

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _check_packed(packed, mask, self.channels, 8)
        coarse = torch.tanh(self.stage1(packed))
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
        state = read_weights(path)
        if FIRST not in state or state[FIRST].dim() != 4:
            raise ValueError(f"{path} must hold a generator of deepfillv2-pytorch, got {', '.join(list(state)[:5])}")
        width, in_channels = state[FIRST].shape[:2]
        generator = cls(in_channels, width)
        # older checkpoints lack that buffer
        constant = generator.state_dict()[CONSTANT]
        if not torch.equal(state.setdefault(CONSTANT, constant).to(constant), constant):
            raise ValueError(f"{path}: {CONSTANT} must be {constant.tolist()}, got {state[CONSTANT].tolist()}")
        load_state(generator, state, f"{path} is not a generator of deepfillv2-pytorch")
        return generator.eval()

    def save_official(self, path: str | Path) -> None:
        """Write ``{"G": state dict}``, which `from_official` reads; the file is whole or absent.

        Args:
            path: such as ``mine.pth``.

        Raises:
            ValueError: a path that ends in .safetensors, which is not the format of the official files.
        """
        if Path(path).suffix == ".safetensors":
            raise ValueError(f"path must not end in .safetensors: the official files are PyTorch's, got {path}")
        with atomic(Path(path)) as temporary:
            torch.save({"G": self.state_dict()}, temporary)


#: The share of its base image that the zero correction of a residual generator keeps.
KEPT = 0.95


class _SmallAttention(nn.Module):
    """Contextual attention of a map at half the image's size; a key is valid where its 4 x 4 pixels are all kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = GatedConv(channels, channels, relu=True)
        self.after = GatedConv(channels, channels)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        valid = F.max_pool2d(mask, 4).flatten(1) == 0
        return self.after(contextual_attention(self.before(features), valid))


class _SmallCoarse(nn.Module):
    """Two levels down and up again; each level is added to the map from below."""

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
    """The level below, with a dilated branch and an attention branch, joined."""

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
    """Coarse and refined image by gated convolutions, for small images.

    Args:
        channels: C of the images.
        width: channels at full size; 2 and 4 times as many at a half and a quarter.
        attention: whether the refined stage has a branch of contextual attention, at half size.
        residual: whether each stage corrects an image in place of painting one: the coarse stage the transformed image,
            the refined stage the coarse image. ``tanh(atanh(0.95 image) + correction)``, with the correction 0 at
            first.

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
        check_counts(channels=channels, width=width)
        self.arguments = {"channels": channels, "width": width, "attention": attention, "residual": residual}
        self.channels, self.residual = channels, residual
        self.coarse = _SmallCoarse(channels + 2, channels, width)
        self.refined = _SmallRefined(2 * channels + 1, channels, width, attention)
        if residual:
            for head in (self.coarse.to_image, self.refined.to_image):
                nn.init.zeros_(head.get_parameter("conv.weight"))

    def forward(self, packed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _check_packed(packed, mask, self.channels, 4)
        image, mask = packed[:, : self.channels], mask.to(packed.dtype)
        coarse = self._finish(self.coarse(packed), image)
        refined = self.refined(torch.cat([coarse, image, mask], 1), mask)
        return coarse, self._finish(refined, coarse)

    def _finish(self, painted: Tensor, base: Tensor) -> Tensor:
        # finite for images in [-1, 1], and with a gradient everywhere
        return torch.tanh(painted + torch.atanh(KEPT * base) if self.residual else painted)

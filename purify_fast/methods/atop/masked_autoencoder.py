"""A masked autoencoder as purifier: the place of AToP's AE purifier, which is a denoising masked autoencoder (DMAE).

Wu et al., "Denoising Masked Autoencoders Help Robust Classification", ICLR 2023, after He et al., CVPR 2022. AToP's
purifier has never been published, and it is not known how its predictions become an image: plain pixels through a tanh
are this package's own choice.

A vision transformer encodes the visible patches, and a smaller one decodes all of them. There is no dropout:
training and evaluation mode are the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._validation import check_counts


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions of a grid of patches: sines and cosines of the row, then of the column.

    The frequencies are 10000^(-i / n) with n = width / 4.

    Args:
        grid: rows and columns of patches.
        width: numbers per patch, a multiple of 4.

    Returns:
        float32 ``[rows * columns, width]``.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    row, column = torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1)
    return torch.cat([row.repeat_interleave(grid[1], 0), column.repeat(grid[0], 1)], 1).float()


class _Block(nn.Module):
    """Self-attention and two linear layers, LayerNorm before each: ``[B, T, width]``; a GELU, 4 width hidden."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Apply the block.

        Args:
            x: ``[B, T, width]``.
            seen: bool ``[B, 1, 1, T]``, the tokens that attention reads; None for all.
        """
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(nn.Module):
    """A purifier ``g(transformed, mask) -> image`` for images of one size.

    Args:
        image_shape: (C, H, W), H and W multiples of the patch.
        patch: side of the square patches in pixels.
        width: numbers per token in the encoder, a multiple of 4 and of its heads.
        depth: blocks of the encoder.
        heads: heads of the encoder's attention.
        decoder_width: numbers per token in the decoder, a multiple of 4 and of its heads.
        decoder_depth: blocks of the decoder.
        decoder_heads: heads of the decoder's attention.

    The default sizes were chosen for 16 x 16 to 32 x 32. DMAE's are those of ViT-B/16, in this order: (3, 224, 224),
    16, 768, 12, 12, 512, 8, 16.

    ``forward(transformed, mask)``: transformed ``[B, C, H, W]`` in [-1, 1], 0 where hidden; mask ``[B, 1, H, W]``, 1
    where hidden -> the whole image ``[B, C, H, W]`` in [-1, 1].

    A patch is hidden if all of its pixels are: the encoder's attention then reads nothing of it, which equals encoding
    the other patches alone, however many each image has. The patches are embedded with their part of the mask (not in
    the paper), since blocks smaller than a patch hide part of it. A class token is always read.

    Raises:
        ValueError: sizes that do not fit.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        decoder_width: int = 64,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
    ):
        super().__init__()
        channels, h, w = image_shape
        sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads, "decoder_width": decoder_width}
        sizes |= {"decoder_depth": decoder_depth, "decoder_heads": decoder_heads}
        check_counts(**sizes, image_shape=min(image_shape))
        if h % patch or w % patch:
            raise ValueError(f"H and W must be multiples of patch {patch}, got image_shape {tuple(image_shape)}")
        for name, size, parts in (("width", width, heads), ("decoder_width", decoder_width, decoder_heads)):
            if size % 4 or size % parts:
                raise ValueError(f"{name} must be a multiple of 4 and of its {parts} heads, got {size}")
        self.arguments = {"image_shape": [channels, h, w], **sizes}
        self.patch = patch
        grid = h // patch, w // patch
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.register_buffer("decoder_positions", sincos_positions(grid, decoder_width), persistent=False)
        self.embed = nn.Linear((channels + 1) * patch * patch, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.encoder = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_decoder = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = nn.ModuleList(_Block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.to_pixels = nn.Linear(decoder_width, channels * patch * patch)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for token in (self.class_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def _patches(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, T, C patch patch]``, patches row by row."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)

    def forward(self, transformed: Tensor, mask: Tensor) -> Tensor:
        b, _, h, w = transformed.shape
        mask = mask.to(transformed.dtype)
        tokens = self.embed(self._patches(torch.cat([transformed, mask], 1))) + self.positions
        hidden = self._patches(mask).amin(2) > 0
        seen = F.pad(~hidden, (1, 0), value=True)[:, None, None]
        x = torch.cat([self.class_token.expand(b, -1, -1).to(tokens.dtype), tokens], 1)
        for block in self.encoder:
            x = block(x, seen)
        x = self.to_decoder(self.norm(x))
        token, patches = x[:, :1], x[:, 1:]
        patches = torch.where(hidden[:, :, None], self.mask_token.to(x.dtype), patches) + self.decoder_positions
        x = torch.cat([token.to(patches.dtype), patches], 1)
        for block in self.decoder:
            x = block(x, None)
        pixels = torch.tanh(self.to_pixels(self.decoder_norm(x)[:, 1:]))
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (h // self.patch, w // self.patch)), self.patch)

    def original_loss(self, images: Sequence[Tensor], target: Tensor) -> Tensor:
        """DMAE's loss: the mean square over all patches, hidden or not.

        It is taken in plain pixels, not normalized per patch as in the paper, since the prediction is an image.

        Args:
            images: the stages' images, ``[B, C, H, W]`` each; the last one counts.
            target: the image to rebuild, ``[B, C, H, W]``.

        Returns:
            The loss per image, ``[B]``.
        """
        return (images[-1] - target).square().flatten(1).mean(1)

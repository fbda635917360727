"""A masked autoencoder as a purifier, similar to AToP's AE purifier, which is a denoising masked autoencoder (DMAE).

DMAE is from Wu et al., "Denoising Masked Autoencoders Help Robust Classification", ICLR 2023, and is based on He et
al., CVPR 2022. AToP's AE purifier has never been published, and it is not known how its predictions are converted to an
image. In this package, the network predicts pixels through a tanh.

A vision transformer encodes the visible patches, and a smaller transformer decodes all patches. There is no dropout, so
training and evaluation mode are the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._validation import check_counts


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return fixed position embeddings for a grid of patches: sines and cosines of the row, then of the column.

    The frequencies are 10000^(-i / n) with n = width / 4.

    Args:
        grid: number of rows and columns of patches.
        width: size of the embedding of a patch, a multiple of 4.

    Returns:
        The embeddings, float32 ``[rows * columns, width]``.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    row, column = torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1)
    return torch.cat([row.repeat_interleave(grid[1], 0), column.repeat(grid[0], 1)], 1).float()


class _Block(nn.Module):
    """A transformer block: self-attention and an MLP with 4 width hidden units and GELU, each after a LayerNorm."""

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
            x: tokens ``[B, T, width]``.
            seen: True for tokens that attention reads, bool ``[B, 1, 1, T]``; None for all.
        """
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(nn.Module):
    """A purifier for images of one size.

    ``forward(transformed, mask)`` returns the whole image ``[B, C, H, W]`` in [-1, 1]. ``transformed [B, C, H, W]`` is
    in [-1, 1], and 0 where hidden. ``mask [B, 1, H, W]`` is 1 where hidden.

    A patch counts as hidden if all of its pixels are hidden. The encoder's attention does not read hidden patches. This
    is equivalent to encoding only the visible patches, whose number may differ from image to image. Each patch is
    embedded together with its part of the mask (not in the paper), because blocks that are smaller than a patch may
    hide only a part of the patch. The class token is always read.

    The default sizes were chosen for images of 16 x 16 to 32 x 32. DMAE has the sizes of ViT-B/16: image_shape
    (3, 224, 224), patch 16, width 768, depth 12, heads 12, decoder_width 512, decoder_depth 8 and decoder_heads 16.

    Args:
        image_shape: (C, H, W); H and W are multiples of ``patch``.
        patch: side of the square patches in pixels.
        width: size of a token in the encoder, a multiple of 4 and of ``heads``.
        depth: number of blocks in the encoder.
        heads: heads of the encoder's attention.
        decoder_width: size of a token in the decoder, a multiple of 4 and of ``decoder_heads``.
        decoder_depth: number of blocks in the decoder.
        decoder_heads: heads of the decoder's attention.

    Raises:
        ValueError: the sizes do not fit together.
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
            raise ValueError(f"image_shape must have H and W divisible by patch {patch}, got {tuple(image_shape)}")
        for name, size, parts in (("width", width, heads), ("decoder_width", decoder_width, decoder_heads)):
            if size % 4 or size % parts:
                raise ValueError(f"{name} must be a multiple of 4 and of {parts}, its number of heads, got {size}")
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
        """Divide images into patches, row by row: ``[B, C, H, W] -> [B, T, C patch patch]``."""
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
        """Return DMAE's loss: the mean squared error of the pixels in all patches, hidden and visible.

        The paper normalizes the pixels of each patch before it computes the error. Here, they are not normalized,
        because the prediction is an image.

        Args:
            images: images ``[B, C, H, W]``, of which the last is used.
            target: the image to rebuild, ``[B, C, H, W]``.

        Returns:
            The loss of each image, ``[B]``.
        """
        return (images[-1] - target).square().flatten(1).mean(1)

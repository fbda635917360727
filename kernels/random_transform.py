"""`random_transform` in Triton: block owners by rank, then noise, clip, scale and mask in one pass over the image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import is_channels_last, memory_format, on, tile, warps
from .pgd_step import _clamp, _load
from .philox import in_order, normals, words

#: The fourth counter words, `purify_fast.ops.philox.Stream.TRANSFORM_NOISE` and `MASK`.
TRANSFORM_NOISE = 2
MASK = 3
#: Blocks of an image that a program compares with each other at once.
TILE = 64


@triton.jit
def _keys(seed, start, draw, sample, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    a, b, c, d = words(seed, start // 4 + tl.arange(0, WIDTH // 4), draw, sample, STREAM)
    return in_order(a, b, c, d)


@triton.jit
def _owners(
    seed_ptr, ids_ptr, out_ptr, batch, blocks, tiles, cut,
    PARTITION: tl.constexpr, SHARED: tl.constexpr, STREAM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block's rank is how many blocks come before it; ``cut`` is the blocks of a pass, or how many are masked."""
    pid = tl.program_id(0).to(tl.int64)
    row, start = pid // tiles, pid % tiles * WIDTH
    draw = row // batch
    sample = draw * 0 if SHARED else tl.load(ids_ptr + row % batch)
    seed = tl.load(seed_ptr)
    key, block = (
        _keys(seed, start, draw, sample=sample, STREAM=STREAM, WIDTH=WIDTH)[:, None],
        (start + tl.arange(0, WIDTH))[:, None],
    )
    rank = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, blocks, WIDTH):
        other, at = (
            _keys(seed, first, draw, sample=sample, STREAM=STREAM, WIDTH=WIDTH)[None, :],
            (first + tl.arange(0, WIDTH))[None, :],
        )
        before = ((other < key) | ((other == key) & (at < block))) & (at < blocks)
        rank += tl.sum(before.to(tl.int32), 1)
    owner = rank // cut if PARTITION else (rank < cut).to(tl.int32)
    at = start + tl.arange(0, WIDTH)
    tl.store(out_ptr + row * blocks + at, owner.to(tl.uint8), mask=at < blocks)


@triton.jit
def _pixels(pid, planes, plane, tiles, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """A program's image and plane, its groups of the random stream, their pixels, and which of these are inside."""
    channel, rest = pid % planes, pid // planes
    image, tile = rest // tiles, (rest % tiles).to(tl.int32)
    first = channel * plane  # element of the image; its group may have begun in the plane before, unless aligned
    group = first // 4 + tile * GROUPS + tl.arange(0, GROUPS)
    pixel = tile * GROUPS * 4 + tl.arange(0, GROUPS * 4)
    if not ALIGNED:
        pixel -= (first % 4).to(tl.int32)
    return image, channel, group, pixel, (pixel >= 0) & (pixel < plane)


@triton.jit
def _place(row, channel, pixel, planes, plane, CHANNELS_LAST: tl.constexpr):
    """Where a plane's pixels are in the packed images, ``row`` counting these."""
    at = pixel.to(tl.int64) * planes + channel if CHANNELS_LAST else channel * plane + pixel
    return row * planes * plane + at


@triton.jit
def _forward(
    x_ptr, owners_ptr, seed_ptr, ids_ptr, out_ptr, sigma, batch, channels, plane, width, block, columns, blocks, tiles,
    samples, num_passes, first_pass,
    NOISE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, STREAM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    planes = channels + 2
    image, channel, group, pixel, inside = _pixels(
        tl.program_id(0).to(tl.int64), planes, plane, tiles=tiles, ALIGNED=ALIGNED, GROUPS=GROUPS
    )
    in_grid = pixel // width // block * columns + pixel % width // block
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    is_image = channel < channels
    x = _load(x_ptr + (image * channels + channel) * plane, pixel, inside & is_image)
    covered = tl.where(is_image, 0.0, 1.0)  # what a hidden pixel holds: 0 in t, 1 in the other planes
    for draw in range(samples):
        row = (sample * 0 + draw) * batch + image
        owner = tl.load(owners_ptr + row * blocks + in_grid, mask=inside, other=0).to(tl.int32)
        if is_image:
            u = x
            if NOISE:
                u += sigma * normals(seed, group, sample * 0 + draw, sample, STREAM)
            seen = 2 * _clamp(u, 0.0, 1.0) - 1
        else:
            seen = tl.zeros_like(x) + tl.where(channel == channels, 1.0, 0.0)
        for own in range(num_passes):
            value = tl.where(owner == own + first_pass, covered, seen)
            at = _place(row * num_passes + own, channel, pixel, planes=planes, plane=plane, CHANNELS_LAST=CHANNELS_LAST)
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, x_ptr, owners_ptr, seed_ptr, ids_ptr, out_ptr, sigma, batch, channels, plane, width, block, columns,
    blocks, tiles, samples, num_passes, first_pass,
    NOISE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, STREAM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    image, channel, group, pixel, inside = _pixels(
        tl.program_id(0).to(tl.int64), channels, plane, tiles=tiles, ALIGNED=ALIGNED, GROUPS=GROUPS
    )
    in_grid = pixel // width // block * columns + pixel % width // block
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    x = _load(x_ptr + (image * channels + channel) * plane, pixel, inside)
    total = tl.zeros_like(x)
    for draw in range(samples):
        row = (sample * 0 + draw) * batch + image
        owner = tl.load(owners_ptr + row * blocks + in_grid, mask=inside, other=0).to(tl.int32)
        u = x
        if NOISE:
            u += sigma * normals(seed, group, sample * 0 + draw, sample, STREAM)
        through = tl.zeros_like(x)
        for own in range(num_passes):
            at = _place(
                row * num_passes + own, channel, pixel, planes=channels + 2, plane=plane, CHANNELS_LAST=CHANNELS_LAST
            )
            through += tl.where(owner == own + first_pass, 0.0, _load(grad_ptr, at, inside))
        total += tl.where((u >= 0) & (u <= 1), 2 * through, 0.0)
    at = (image * channels + channel) * plane + pixel
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _assign(
    seed: Tensor,
    sample_ids: Tensor,
    grid: tuple[int, int],
    *,
    masked_blocks: int,
    num_passes: int,
    samples: int,
    shared_mask: bool,
) -> Tensor:
    """The owner of every block, uint8 [S, B, *grid]."""
    batch, blocks = sample_ids.shape[0], grid[0] * grid[1]
    out = torch.empty((samples, batch, *grid), dtype=torch.uint8, device=sample_ids.device)
    width = min(TILE, max(16, triton.next_power_of_2(blocks)))
    tiles = triton.cdiv(blocks, width)
    _owners[(samples * batch * tiles,)](
        seed, sample_ids, out, batch, blocks, tiles, blocks // num_passes if num_passes else masked_blocks,
        PARTITION=num_passes > 0, SHARED=shared_mask, STREAM=MASK, WIDTH=width, num_warps=warps(width * width),
    )  # fmt: skip
    return out


def _launch(
    kernel, pointers: tuple[Tensor, ...], x: Tensor, owners: Tensor, planes: int, sigma, num_passes, last
) -> None:
    samples, batch, rows, columns = owners.shape
    _, channels, height, width = x.shape
    plane = height * width
    block, own = tile(plane, pointers[0], pointers[-1])
    tiles = triton.cdiv(plane + 3, block)  # a plane may begin inside a group
    kernel[(batch * tiles * planes,)](
        *pointers, float(sigma), batch, channels, plane, width, width // columns, columns, rows * columns, tiles,
        samples, max(num_passes, 1), 0 if num_passes else 1,
        NOISE=sigma != 0, CHANNELS_LAST=last, ALIGNED=plane % 4 == 0, STREAM=TRANSFORM_NOISE, GROUPS=block // 4,
        num_warps=own, enable_fp_fusion=False,
    )  # fmt: skip


def forward(
    x: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    sigma: float,
    block: int,
    masked_blocks: int,
    num_passes: int,
    samples: int,
    shared_mask: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """(packed, owners), as the op returns them."""
    batch, channels, height, width = x.shape
    shape = (samples * batch * max(num_passes, 1), channels + 2, height, width)
    packed = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(channels_last))
    seed, sample_ids, grid = seed.contiguous(), sample_ids.contiguous(), (height // block, width // block)
    if packed.numel() == 0:
        return packed, torch.empty((samples, batch, *grid), dtype=torch.uint8, device=x.device)
    with on(x):
        owners = _assign(
            seed, sample_ids, grid,
            masked_blocks=masked_blocks, num_passes=num_passes, samples=samples, shared_mask=shared_mask,
        )  # fmt: skip
        pointers = (x.contiguous(), owners, seed, sample_ids, packed)
        sizes = {"planes": channels + 2, "num_passes": num_passes}
        _launch(_forward, pointers, x, owners, sigma=sigma, last=channels_last, **sizes)
    return packed, owners


def backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, num_passes: int
) -> Tensor:
    """dx [B, C, H, W] in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    last = is_channels_last(grad)
    grad = grad if last else grad.contiguous()
    with on(x):
        pointers = (grad, x.contiguous(), owners.contiguous(), seed.contiguous(), sample_ids.contiguous(), out)
        _launch(_backward, pointers, x, owners=owners, planes=x.shape[1], sigma=sigma, num_passes=num_passes, last=last)
    return out

"""`random_transform` in Triton: a kernel ranks the blocks, and a second adds noise, clips, scales and masks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, grid, is_channels_last, memory_format, next_power_of_2, program, tile, warps
from ._launch import launch
from .pgd_step import _clamp, _load
from .philox import in_order, in_pairs, noise, words

#: The fourth words of Philox's counter: `purify_fast.ops.philox.Stream.TRANSFORM_NOISE` and `MASK`.
TRANSFORM_NOISE = 2
MASK = 3
#: A program ranks at most this number of blocks of an image. It compares them with at most as many blocks at a time.
TILE = 64


@triton.jit
def _keys(seed, start, draw, sample, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    a, b, c, d = words(seed, start // 4 + tl.arange(0, WIDTH // 4), draw, sample, STREAM)
    return in_order(a, b, c, d)


@triton.jit(do_not_specialize=["batch", "blocks", "tiles", "cut"])
def _owners(
    seed_ptr,
    ids_ptr,
    out_ptr,
    batch,
    blocks,
    tiles,
    cut,
    PARTITION: tl.constexpr,
    SHARED: tl.constexpr,
    STREAM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the owners of the blocks, from the ranks of their keys. A block's rank is the number of lower keys.

    With PARTITION, the owner is the pass that hides the block, and ``cut`` is the number of blocks per pass. Otherwise,
    the owner is 1 for hidden blocks and 0 for visible blocks, and ``cut`` is the number of hidden blocks.
    """
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
def _pixels(block, planes, plane, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """Return the plane, first group of random numbers and pixels of a program, and which pixels are in the plane."""
    tile = block // planes
    channel = block - tile * planes
    # The index of the plane's first element in the image. Random numbers are drawn in groups of four. A group may
    # contain the last elements of one plane and the first elements of the next plane.
    first = channel.to(tl.int64) * plane
    # The random stream counts groups with 32 bits.
    group = (first >> 2).to(tl.int32) + tile * GROUPS
    pixel = tile * GROUPS * 4 + tl.arange(0, GROUPS * 4)
    if ALIGNED:
        return channel, group, pixel, pixel < plane
    pixel -= (first & 3).to(tl.int32)
    return channel, group, pixel, (pixel >= 0) & (pixel < plane)


@triton.jit
def _cell(pixel, width, side, columns):
    """Return the mask block of each pixel. The divisions are unsigned, because they need fewer instructions."""
    at, width, side = pixel.to(tl.uint32), tl.cast(width, tl.uint32), tl.cast(side, tl.uint32)
    y = at // width
    return y // side * tl.cast(columns, tl.uint32) + (at - y * width) // side


@triton.jit
def _owner(owners_ptr, block, pixel, inside, sizes, UNIT: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr):
    """Return the owner of each pixel's block, read once for ``UNIT`` adjacent pixels (1, 4 or 8) of the same block."""
    planes, plane, width, side, columns = sizes
    if UNIT == 1:
        at = _cell(pixel, width, side, columns)
        owner = tl.load(owners_ptr + at, mask=inside, other=0)
    else:
        step: tl.constexpr = 8 if PAIRS else 4
        first = (block // planes * GROUPS * 4).to(tl.uint32) + step * tl.arange(0, GROUPS * 4 // step)
        a = tl.load(owners_ptr + _cell(first, width, side, columns), mask=first < plane, other=0)
        if PAIRS:
            if UNIT == 8:
                b = a
            else:
                b = tl.load(owners_ptr + _cell(first + 4, width, side, columns), mask=first + 4 < plane, other=0)
            owner = in_pairs(a, a, a, a, e=b, f=b, g=b, h=b)
        else:
            owner = in_order(a, a, a, a)
    return owner.to(tl.int32)


@triton.jit
def _place(pixel, channel, planes, plane, CHANNELS_LAST: tl.constexpr):
    """Return the positions of a plane's pixels in a packed image: the first position, and the offsets from it."""
    if CHANNELS_LAST:
        begin, at = channel.to(tl.int64), pixel.to(tl.int64) * planes
    else:
        begin, at = channel.to(tl.int64) * plane, pixel
    return begin, at


@triton.jit
def _forward(
    x_ptr,
    owners_ptr,
    seed_ptr,
    ids_ptr,
    out_ptr,
    sigma,
    batch,
    channels,
    plane,
    width,
    side,
    columns,
    blocks,
    samples,
    num_passes,
    first_pass,
    NOISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row, block = program(batch)
    image, planes = row.to(tl.int64), channels + 2
    channel, group, pixel, inside = _pixels(block, planes, plane, ALIGNED=ALIGNED, GROUPS=GROUPS)
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    is_image = channel < channels
    x = _load(x_ptr + (image * channels + channel) * plane, pixel, inside & is_image)
    # A hidden pixel is 0 in the image. It is 1 in the two appended planes: the plane of ones and the mask.
    covered = tl.where(is_image, 0.0, 1.0)
    sizes = planes, plane, width, side, columns
    begin, at = _place(pixel, channel, planes, plane, CHANNELS_LAST=CHANNELS_LAST)
    for draw in range(samples):
        packed = (sample * 0 + draw) * batch + image
        owner = _owner(owners_ptr + packed * blocks, block, pixel, inside, sizes, UNIT=UNIT, PAIRS=PAIRS, GROUPS=GROUPS)
        if is_image:
            u = x
            if NOISE:
                u += sigma * noise(
                    seed, group, sample * 0 + draw, sample=sample, stream=STREAM, GROUPS=GROUPS, PAIRS=PAIRS
                )
            seen = 2 * _clamp(u, 0.0, 1.0) - 1
        else:
            seen = tl.zeros_like(x) + tl.where(channel == channels, 1.0, 0.0)
        for own in range(num_passes):
            value = tl.where(owner == own + first_pass, covered, seen)
            first = (packed * num_passes + own) * planes * plane + begin
            tl.store(out_ptr + first + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    owners_ptr,
    seed_ptr,
    ids_ptr,
    out_ptr,
    sigma,
    batch,
    channels,
    plane,
    width,
    side,
    columns,
    blocks,
    samples,
    num_passes,
    first_pass,
    NOISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row, block = program(batch)
    image = row.to(tl.int64)
    channel, group, pixel, inside = _pixels(block, channels, plane, ALIGNED=ALIGNED, GROUPS=GROUPS)
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    own_plane = (image * channels + channel) * plane
    x = _load(x_ptr + own_plane, pixel, inside)
    begin, at = _place(pixel, channel, channels + 2, plane, CHANNELS_LAST=CHANNELS_LAST)
    total, sizes = tl.zeros_like(x), (channels, plane, width, side, columns)
    for draw in range(samples):
        packed = (sample * 0 + draw) * batch + image
        owner = _owner(owners_ptr + packed * blocks, block, pixel, inside, sizes, UNIT=UNIT, PAIRS=PAIRS, GROUPS=GROUPS)
        u = x
        if NOISE:
            u += sigma * noise(seed, group, sample * 0 + draw, sample=sample, stream=STREAM, GROUPS=GROUPS, PAIRS=PAIRS)
        through = tl.zeros_like(x)
        for own in range(num_passes):
            first = (packed * num_passes + own) * (channels + 2) * plane + begin
            through += tl.where(owner == own + first_pass, 0.0, _load(grad_ptr + first, at, inside))
        total += tl.where((u >= 0) & (u <= 1), 2 * through, 0.0)
    tl.store(out_ptr + own_plane + pixel, total.to(out_ptr.dtype.element_ty), mask=inside)


def _assign(
    seed: Tensor,
    sample_ids: Tensor,
    cells: tuple[int, int],
    *,
    masked_blocks: int,
    num_passes: int,
    samples: int,
    shared_mask: bool,
) -> Tensor:
    """Return the owner of every block, uint8 [S, B, *cells]."""
    batch, blocks = sample_ids.shape[0], cells[0] * cells[1]
    out = torch.empty((samples, batch, *cells), dtype=torch.uint8, device=sample_ids.device)
    width = min(TILE, max(16, next_power_of_2(blocks)))
    tiles = cdiv(blocks, width)
    cut = blocks // num_passes if num_passes else masked_blocks
    settings = {"PARTITION": num_passes > 0, "SHARED": shared_mask, "STREAM": MASK, "WIDTH": width}
    given = seed, sample_ids, out, batch, blocks, tiles, cut
    launch(_owners, (samples * batch * tiles,), *given, **settings, num_warps=warps(width * width))
    return out


def _launch(
    kernel, pointers: tuple[Tensor, ...], x: Tensor, owners: Tensor, planes: int, sigma, num_passes, last
) -> None:
    samples, batch, rows, columns = owners.shape
    _, channels, height, width = x.shape
    plane = height * width
    block, own = tile(plane, pointers[0], pointers[-1])
    # A plane may begin up to 3 elements after the start of its first group.
    tiles = cdiv(plane + 3, block)
    side, pairs = width // columns, min(x.element_size() for x in (pointers[0], pointers[-1])) == 2 and not last
    unit = 8 if pairs and side % 8 == 0 else 4 if side % 4 == 0 else 1
    launch(
        kernel,
        grid(batch, tiles * planes),
        *pointers,
        float(sigma),
        batch,
        channels,
        plane,
        width,
        side,
        columns,
        rows * columns,
        samples,
        max(num_passes, 1),
        0 if num_passes else 1,
        NOISE=sigma != 0,
        CHANNELS_LAST=last,
        ALIGNED=plane % 4 == 0,
        UNIT=unit,
        PAIRS=pairs,
        STREAM=TRANSFORM_NOISE,
        GROUPS=block // 4,
        num_warps=own,
        enable_fp_fusion=False,
    )


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
    """Return (packed, owners) like the op."""
    batch, channels, height, width = x.shape
    shape = (samples * batch * max(num_passes, 1), channels + 2, height, width)
    packed = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(channels_last))
    seed, sample_ids, cells = seed.contiguous(), sample_ids.contiguous(), (height // block, width // block)
    if packed.numel() == 0:
        return packed, torch.empty((samples, batch, *cells), dtype=torch.uint8, device=x.device)
    owners = _assign(
        seed,
        sample_ids,
        cells,
        masked_blocks=masked_blocks,
        num_passes=num_passes,
        samples=samples,
        shared_mask=shared_mask,
    )
    pointers = (x.contiguous(), owners, seed, sample_ids, packed)
    sizes = {"planes": channels + 2, "num_passes": num_passes}
    _launch(_forward, pointers, x, owners, sigma=sigma, last=channels_last, **sizes)
    return packed, owners


def backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, num_passes: int
) -> Tensor:
    """Return dx [B, C, H, W], in the dtype of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    last = is_channels_last(grad)
    grad = grad if last else grad.contiguous()
    pointers = (grad, x.contiguous(), owners.contiguous(), seed.contiguous(), sample_ids.contiguous(), out)
    _launch(_backward, pointers, x, owners=owners, planes=x.shape[1], sigma=sigma, num_passes=num_passes, last=last)
    return out

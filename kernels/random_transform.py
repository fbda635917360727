"""`random_transform` in Triton: a kernel ranks the blocks, and a second adds noise, clips, scales and masks.

A thread computes four or eight adjacent pixels of one plane. In channels_last, it computes all planes of these pixels,
whose numbers are one run of memory.
"""

# mypy: disable-error-code="assignment"
# A tuple of columns grows by assignments.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    _tile,
    cdiv,
    clamp,
    grid,
    is_channels_last,
    limited,
    load,
    memory_format,
    next_power_of_2,
    program,
    tile,
    warps,
)
from ._launch import launch
from .philox import _four, in_order, words

#: The fourth words of Philox's counter: `purify_fast.ops.philox.Stream.TRANSFORM_NOISE` and `MASK`.
TRANSFORM_NOISE = tl.constexpr(2)
MASK = 3
#: A program ranks at most this number of blocks of an image. It compares them with at most as many blocks at a time.
#: With 64, a thread would need 79 registers, and only three programs of eight warps would fit into a multiprocessor.
TILE = 32
#: The largest number of registers of a thread that computes the gradients of eight pixels in all planes. By default,
#: some compilers limit themselves to 96, so that one more program runs on a multiprocessor, and spill registers.
BACKWARD_REGISTERS = 112
#: The largest number of channels of an image whose planes a thread computes together. It keeps them in registers.
MOST_CHANNELS = 8


@triton.jit
def _keys(seed, start, draw, sample, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    a, b, c, d = words(seed, start // 4 + tl.arange(0, WIDTH // 4), draw, sample, STREAM)
    return in_order(a, b, c, d)


@triton.jit(do_not_specialize=["batch", "blocks", "tiles", "cut"])
def _owners(
    seed_ptr,  # [1], int64
    ids_ptr,  # [batch], int64
    out_ptr,  # [samples, batch, blocks], uint8
    batch,
    blocks,
    tiles,
    cut,
    PARTITION: tl.constexpr,
    SHARED: tl.constexpr,
    STREAM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program writes the owners of some blocks, by the ranks of their keys: the numbers of lower keys.

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
def _split(block, N: tl.constexpr):
    """Split a block of rows with N elements each into a tuple of its N columns. N is a power of two."""
    if N == 1:
        columns = (block,)
    else:
        even, odd = tl.split(tl.reshape(block, (block.numel // 2, 2)))
        even, odd, columns = _split(even, N // 2), _split(odd, N // 2), ()
        for i in tl.static_range(N // 2):
            columns += (even[i], odd[i])
    return columns


@triton.jit
def _joined(columns, N: tl.constexpr):
    """Join a tuple of N columns to a block of rows with N elements each. N is a power of two."""
    return columns[0] if N == 1 else tl.interleave(_joined(columns[0::2], N // 2), _joined(columns[1::2], N // 2))


@triton.jit
def _begin(block, planes, plane, PIXELS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Return the plane of a program, its first pixel, and the group of random numbers with which each row begins."""
    tile = block // planes
    channel = block - tile * planes
    # The index of the plane's first element in the image. Random numbers are drawn in groups of four. A group may
    # contain the last elements of one plane and the first elements of the next plane.
    first, pixel = channel.to(tl.int64) * plane, tile * (ROWS * PIXELS)
    # The random stream counts groups with 32 bits.
    group = (first >> 2).to(tl.int32) + (tile * ROWS + tl.arange(0, ROWS)) * (PIXELS // 4)
    return channel, pixel if ALIGNED else pixel - (first & 3).to(tl.int32), group


@triton.jit
def _places(
    pixel, plane, N: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr
):
    """Return the places of WIDTH adjacent elements of each row, in a plane of N elements per pixel, and which exist."""
    row, element = tl.arange(0, ROWS * WIDTH) // WIDTH * PIXELS, tl.arange(0, ROWS * WIDTH) % WIDTH
    if ALIGNED:
        inside = (pixel + row < plane) & (element < N * PIXELS)
    else:
        inside = (pixel + row + element >= 0) & (pixel + row + element < plane)
    return pixel.to(tl.int64) * N + (row * N + element), inside


@triton.jit
def _cell(pixel, width, side, columns):
    """Return the mask block of each pixel. The divisions are unsigned, because they need fewer instructions."""
    at, width, side = pixel.to(tl.uint32), tl.cast(width, tl.uint32), tl.cast(side, tl.uint32)
    y = at // width
    return y // side * tl.cast(columns, tl.uint32) + (at - y * width) // side


@triton.jit
def _owners_of(owners_ptr, pixel, sizes, UNIT: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr):
    """Return the owners of a program's pixels, read once for ``UNIT`` (1, 4 or 8) adjacent pixels of the same block."""
    # owners_ptr: [blocks], uint8
    _, plane, width, side, columns, _ = sizes
    owners = ()
    for i in tl.static_range(PIXELS):
        if i % UNIT == 0:
            at = pixel + tl.arange(0, ROWS) * PIXELS + i
            owner = tl.load(owners_ptr + _cell(at, width, side, columns), mask=(at >= 0) & (at < plane), other=0)
        owners += (owner.to(tl.int32),)
    return owners


@triton.jit
def _pixels_of(pointer, pixel, plane, exists, PIXELS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Read a program's pixels of one plane, in vectors of at most 16 bytes."""
    V: tl.constexpr = min(PIXELS, 128 // pointer.dtype.element_ty.primitive_bitwidth)
    columns = ()
    for i in tl.static_range(0, PIXELS, V):
        at, inside = _places(pixel + i, plane, 1, V, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
        columns += _split(load(pointer, at, inside & exists), V)
    return columns


@triton.jit
def _noisy(x, sigma, seed, group, plane, draw, sample, NOISE: tl.constexpr, PIXELS: tl.constexpr):
    """Return x + sigma n for the columns x of several channels, or x without noise."""
    noisy = () if NOISE else x
    for i in tl.static_range(len(x) // 4 if NOISE else 0):
        at = group + (i // (PIXELS // 4) * (plane // 4) + i % (PIXELS // 4))
        numbers = _four(seed, at, draw, sample=sample, stream=TRANSFORM_NOISE, NORMAL=True)
        for j in tl.static_range(4):
            noisy += (x[4 * i + j] + sigma * numbers[j],)
    return noisy


@triton.jit
def _forward(
    x_ptr,  # [batch, channels, plane]
    owners_ptr,  # [samples, batch, blocks], uint8
    seed_ptr,  # [1], int64
    ids_ptr,  # [batch], int64
    out_ptr,  # [samples * batch * max(num_passes, 1), channels + 2, plane]
    sigma,
    batch,
    sizes,
    counts,
    NOISE: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    PIXELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program writes some pixels of all ``PLANES`` planes of packed images, or of one plane."""
    # 2 clamp(x + sigma n, 0, 1) - 1 where visible and 0 where hidden, then a plane of ones, and 1 where hidden.
    row, block = program(batch)
    image = row.to(tl.int64)
    channels, plane, _, _, _, blocks = sizes
    samples, num_passes, first_pass = counts
    planes = 1 if PLANES > 1 else channels + 2
    channel, pixel, group = _begin(block, planes, plane, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    is_image, x = PLANES > 1 or channel < channels, ()
    for c in tl.static_range(max(PLANES - 2, 1)):
        own_plane = x_ptr + (image * channels + channel + c) * plane
        x += _pixels_of(own_plane, pixel, plane, is_image, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    # A hidden pixel is 0 in the image. It is 1 in the two appended planes: the plane of ones and the mask.
    covered = 0.0 if PLANES > 1 else tl.where(is_image, 0.0, 1.0)
    at, inside = _places(pixel, plane, PLANES, WIDTH, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    for draw in range(samples):
        packed = (sample * 0 + draw) * batch + image
        owner = _owners_of(owners_ptr + packed * blocks, pixel, sizes, UNIT=UNIT, PIXELS=PIXELS, ROWS=ROWS)
        if PLANES > 1 or is_image:
            u = _noisy(x, sigma, seed, group, plane, draw=sample * 0 + draw, sample=sample, NOISE=NOISE, PIXELS=PIXELS)
            seen = ()
            for i in tl.static_range(len(x)):
                seen += (2 * clamp(u[i], 0.0, 1.0) - 1,)
        else:
            seen = (tl.zeros((ROWS,), tl.float32) + tl.where(channel == channels, 1.0, 0.0),) * PIXELS
        for own in range(num_passes):
            values = ()
            for i in tl.static_range(PIXELS):
                hidden = owner[i] == own + first_pass
                for c in tl.static_range(max(PLANES - 2, 1)):
                    values += (tl.where(hidden, covered, seen[c * PIXELS + i]),)
                if PLANES > 1:
                    values += (tl.full((ROWS,), 1.0, tl.float32), hidden.to(tl.float32))
            # The numbers up to a power of two are not written.
            value = _joined(values + values[: WIDTH - PLANES * PIXELS], WIDTH).to(out_ptr.dtype.element_ty)
            first = ((packed * num_passes + own) * (channels + 2) + channel) * plane
            tl.store(out_ptr + first + at, value, mask=inside)


@triton.jit
def _backward(
    grad_ptr,  # [samples * batch * max(num_passes, 1), channels + 2, plane]
    x_ptr,  # [batch, channels, plane]
    owners_ptr,  # [samples, batch, blocks], uint8
    seed_ptr,  # [1], int64
    ids_ptr,  # [batch], int64
    out_ptr,  # [batch, channels, plane]
    sigma,
    batch,
    sizes,
    counts,
    NOISE: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    PIXELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program writes some pixels of the gradient of an image, in all channels or in one."""
    # 2 (0 <= x + sigma n <= 1) times the sum of the gradients of the passes in which the pixel is visible.
    row, block = program(batch)
    image = row.to(tl.int64)
    channels, plane, _, _, _, blocks = sizes
    samples, num_passes, first_pass = counts
    planes = 1 if PLANES > 1 else channels
    channel, pixel, group = _begin(block, planes, plane, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    seed, sample, sigma = tl.load(seed_ptr), tl.load(ids_ptr + image), tl.cast(sigma, tl.float32)
    own_plane, x = (image * channels + channel) * plane, ()
    for c in tl.static_range(max(PLANES - 2, 1)):
        x += _pixels_of(x_ptr + own_plane + c * plane, pixel, plane, True, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    at, inside = _places(pixel, plane, PLANES, WIDTH, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
    zeros = (tl.zeros((ROWS,), tl.float32),) * len(x)
    total = zeros
    for draw in range(samples):
        packed = (sample * 0 + draw) * batch + image
        owner = _owners_of(owners_ptr + packed * blocks, pixel, sizes, UNIT=UNIT, PIXELS=PIXELS, ROWS=ROWS)
        through = zeros
        for own in range(num_passes):
            first = ((packed * num_passes + own) * (channels + 2) + channel) * plane
            grads, sums = _split(tl.load(grad_ptr + first + at, mask=inside, other=0.0), WIDTH), ()
            for i in tl.static_range(len(x)):
                grad = grads[i % PIXELS * PLANES + i // PIXELS].to(tl.float32)
                sums += (through[i] + tl.where(owner[i % PIXELS] == own + first_pass, 0.0, grad),)
            through = sums
        u = _noisy(x, sigma, seed, group, plane, draw=sample * 0 + draw, sample=sample, NOISE=NOISE, PIXELS=PIXELS)
        sums = ()
        for i in tl.static_range(len(x)):
            sums += (total[i] + tl.where((u[i] >= 0) & (u[i] <= 1), 2 * through[i], 0.0),)
        total = sums
    V: tl.constexpr = min(PIXELS, 128 // out_ptr.dtype.element_ty.primitive_bitwidth)
    for i in tl.static_range(len(x) // V):
        at, inside = _places(pixel + i * V % PIXELS, plane, 1, V, PIXELS=PIXELS, ALIGNED=ALIGNED, ROWS=ROWS)
        value = _joined(total[i * V : (i + 1) * V], V).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + own_plane + i * V // PIXELS * plane + at, value, mask=inside)


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
    options: dict[str, Any] = settings | {"num_warps": warps(width * width), "enable_fp_fusion": True}
    given = seed, sample_ids, out, batch, blocks, tiles, cut
    launch(_owners, (samples * batch * tiles,), *given, **options)
    return out


def _together(x: Tensor) -> bool:
    """Return True if a thread computes all planes of its pixels, if they are packed in channels_last."""
    return x.shape[1] <= MOST_CHANNELS and x.shape[2] * x.shape[3] % 4 == 0


def _launch(kernel, pointers: tuple[Tensor, ...], x: Tensor, owners, planes, sigma, num_passes, together) -> None:
    samples, batch, lines, columns = owners.shape
    _, channels, height, width = x.shape
    plane, side, ends = height * width, width // columns, (pointers[0], pointers[-1])
    held = channels + 2 if together else 1
    # A thread can keep 64 numbers of an image in registers.
    pixels = 8 if plane % 8 == 0 and held < 8 and min(end.element_size() for end in ends) == 2 else 4
    # All planes of four or eight pixels are enough work for a thread on every device.
    block, own = _tile(plane, 16 // pixels, 9) if together else tile(plane, *ends)
    # A plane may begin up to 3 elements after the start of its first group.
    tiles = cdiv(plane if plane % 4 == 0 else plane + 3, block)
    launch(
        kernel,
        grid(batch, tiles if together else tiles * planes),
        *pointers,
        float(sigma),
        batch,
        (channels, plane, width, side, columns, lines * columns),
        (samples, max(num_passes, 1), 0 if num_passes else 1),
        NOISE=sigma != 0,
        PLANES=held,
        WIDTH=next_power_of_2(held) * pixels,
        UNIT=8 if pixels == 8 and side % 8 == 0 else 4 if side % 4 == 0 else 1,
        PIXELS=pixels,
        ALIGNED=plane % pixels == 0,
        ROWS=block // pixels,
        num_warps=own,
        enable_fp_fusion=False,
        **(limited(BACKWARD_REGISTERS) if together and pixels == 8 and kernel is _backward else {}),
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
    together = channels_last and _together(x)
    packed = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(together))
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
    sizes = {"planes": channels + 2, "num_passes": num_passes, "together": together}
    _launch(_forward, pointers, x, owners, sigma=sigma, **sizes)
    return packed.contiguous(memory_format=memory_format(channels_last)), owners


def backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, num_passes: int
) -> Tensor:
    """Return dx [B, C, H, W], in the dtype of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    together = is_channels_last(grad) and _together(x)
    grad = grad if together else grad.contiguous()
    pointers = (grad, x.contiguous(), owners.contiguous(), seed.contiguous(), sample_ids.contiguous(), out)
    sizes = {"planes": x.shape[1], "num_passes": num_passes, "together": together}
    _launch(_backward, pointers, x, owners, sigma=sigma, **sizes)
    return out

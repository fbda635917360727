"""`fused_convolution` in Triton: a launch computes a convolution, or its gradient, and what follows it on the map.

A convolution is a matrix product: its rows are pixels of all images, its columns are channels of the result, and its
sum runs over the taps and the channels of the input. The rows are read from the map itself, tap by tap, and pixels
outside the map are zeros that are never read. The sums remain in registers until the bias, the added map, the
normalization and the activation are applied to them. The gradient of the images is such a product too, with the
gradient of the result as its input. With stride s, it is s * s products, one for each residue of (y, x) mod s, without
inserted zeros.

Maps are [samples, height, width, channels], and weights [outputs, taps, channels], which both products read as they are
stored. The order of the additions depends only on the layer, so a sample has the same bits in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, dense, grid, next_power_of_2, program
from ._launch import launch

#: The activations, as in purify_fast/ops/fused_convolution.py.
RELU: tl.constexpr = tl.constexpr(1)
SILU: tl.constexpr = tl.constexpr(2)
#: A row of a map with fewer channels than this, or with a number of channels that is not a multiple of 8, is not a
#: number of whole 16-byte vectors. Taps and channels are then counted together.
FEW = 16
#: The largest number of elements of a map in one launch, because the kernel's indices have 32 bits.
MOST = 2**31 - 1
#: The largest ratio of columns to the result's channels. More columns in a program read the input less often.
WASTE = 1.25


@triton.jit
def _scale_and_shift(mean_ptr, variance_ptr, scale_ptr, shift_ptr, eps, column, real):
    """Return the factor and the summand of each channel that a BatchNorm in evaluation mode applies."""
    variance = tl.load(variance_ptr + column, mask=real, other=1.0).to(tl.float32)
    scale = tl.load(scale_ptr + column, mask=real, other=0.0).to(tl.float32)
    scale = scale * tl.rsqrt(variance + tl.cast(eps, tl.float32))
    mean = tl.load(mean_ptr + column, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=real, other=0.0).to(tl.float32)
    return scale, shift - mean * scale


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _products(
    pointers,
    rows,
    column,
    counts,
    size,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TAP_Y: tl.constexpr,
    TAP_X: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum over taps and channels. For a tap at (i, j), a row reads the input pixel at (y + STEP * i, x + STEP * j).

    In the weights, the next tap below is TAP_Y elements away, the next tap to the right TAP_X, the next channel
    BY_CHANNEL, and the next column BY_COLUMN. With TOGETHER, taps and channels are counted together, so that few
    channels fill a product.
    """
    in_ptr, weight_ptr = pointers
    y, x, sample, inside = rows
    taps, taps_x = counts
    height, width = size
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((ROWS, TILE), tl.float32)
    place = in_ptr + ((sample * height + y) * width + x)[:, None] * CHANNELS
    weight = weight_ptr + column[None, :] * BY_COLUMN
    real = (column < COLUMNS)[None, :]
    if TOGETHER:
        for first in range(0, taps * CHANNELS, CHUNK):
            tap, channel = (first + lane) // CHANNELS, (first + lane) % CHANNELS
            down, right = tap // taps_x, tap % taps_x
            at_y, at_x = y[:, None] + STEP * down[None, :], x[:, None] + STEP * right[None, :]
            there = inside[:, None] & (tap < taps)[None, :]
            there = there & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            offset = STEP * (down * width + right) * CHANNELS + channel
            a = tl.load(place + offset[None, :], mask=there, other=0.0)
            offset = down * TAP_Y + right * TAP_X + channel * BY_CHANNEL
            b = tl.load(weight + offset[:, None], mask=real & (tap < taps)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
    else:
        RAGGED: tl.constexpr = CHANNELS % CHUNK != 0 or COLUMNS % TILE != 0
        place += lane[None, :]
        weight += lane[:, None] * BY_CHANNEL
        down, right, channel = 0, 0, 0
        for _ in range(taps * ((CHANNELS + CHUNK - 1) // CHUNK)):
            at_y, at_x = y + STEP * down, x + STEP * right
            there = (inside & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width))[:, None]
            there_b = real
            if CHANNELS % CHUNK != 0:
                there = there & (channel + lane < CHANNELS)[None, :]
                there_b = there_b & (channel + lane < CHANNELS)[:, None]
            a = tl.load(place + (STEP * (down * width + right) * CHANNELS + channel), mask=there, other=0.0)
            b_ptr = weight + (down * TAP_Y + right * TAP_X + channel * BY_CHANNEL)
            b = tl.load(b_ptr, mask=there_b, other=0.0) if RAGGED else tl.load(b_ptr)
            total = tl.dot(a, b, total, input_precision="ieee")
            channel += CHUNK
            wrapped = channel >= CHANNELS
            channel = tl.where(wrapped, 0, channel)
            right += wrapped.to(tl.int32)
            wrapped = right == taps_x
            right = tl.where(wrapped, 0, right)
            down += wrapped.to(tl.int32)
    return total


# This function is long because both kinds share the computation of the rows and the product. Triton compiles only the
# code of one kind.
@triton.jit(do_not_specialize=["samples", "tiles", "height", "width", "out_height", "out_width", "top", "left"])
def _convolve(
    in_ptr,
    weight_ptr,
    bias_ptr,
    added_ptr,
    beside_ptr,
    mean_ptr,
    variance_ptr,
    scale_ptr,
    shift_ptr,
    entered_ptr,
    total_ptr,
    out_ptr,
    samples,
    tiles,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    eps,
    GRADIENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    BESIDE: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute a tile of a convolution with what follows it, or of its gradient with what precedes it.

    The input is [samples, height, width, CHANNELS]: the images, or the gradient of the result. The output is
    [samples, out_height, out_width, COLUMNS].
    """
    block, part = program(tiles)
    PARTS: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    column = part % PARTS * TILE + tl.arange(0, TILE)
    real = column < COLUMNS
    row = block * ROWS + tl.arange(0, ROWS)
    # The names of a layer's sizes: forward, the channels are those of the images.
    IMAGES: tl.constexpr = COLUMNS if GRADIENT else CHANNELS
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    if GRADIENT and STRIDE_H * STRIDE_W > 1:
        residue = part // PARTS
        residue_y, residue_x = residue // STRIDE_W, residue % STRIDE_W
        # The first y >= 0 with (y + top) mod STRIDE_H = residue_y.
        first_y = (residue_y + top * (STRIDE_H - 1)) % STRIDE_H
        first_x = (residue_x + left * (STRIDE_W - 1)) % STRIDE_W
        own_height = tl.maximum((out_height - first_y + STRIDE_H - 1) // STRIDE_H, 1)
        own_width = tl.maximum((out_width - first_x + STRIDE_W - 1) // STRIDE_W, 1)
        taps_x = (KERNEL_W - residue_x + STRIDE_W - 1) // STRIDE_W
        # Every residue gets the same number of programs, which suffices for the residue with the most rows.
        busy = block * ROWS < samples * own_height * own_width
        taps = tl.where(busy, (KERNEL_H - residue_y + STRIDE_H - 1) // STRIDE_H * taps_x, 0)
        weight_ptr += (residue_y * KERNEL_W + residue_x) * IMAGES
    else:
        own_height, own_width, taps, taps_x = out_height, out_width, TAPS, KERNEL_W
    sample = row // (own_height * own_width)
    cell = row - sample * (own_height * own_width)
    own_y = cell // own_width
    own_x = cell - own_y * own_width
    inside = sample < samples
    if GRADIENT and STRIDE_H * STRIDE_W > 1:
        out_y, out_x = first_y + own_y * STRIDE_H, first_x + own_x * STRIDE_W
        inside = inside & (out_y < out_height) & (out_x < out_width)
        y = own_y + (first_y + top - residue_y) // STRIDE_H
        x = own_x + (first_x + left - residue_x) // STRIDE_W
    elif GRADIENT:
        out_y, out_x, y, x = own_y, own_x, own_y + top, own_x + left
    else:
        out_y, out_x, y, x = own_y, own_x, own_y * STRIDE_H - top, own_x * STRIDE_W - left
    total = _products(
        (in_ptr, weight_ptr),
        (y, x, sample, inside),
        column,
        (taps, taps_x),
        (height, width),
        CHANNELS=CHANNELS,
        COLUMNS=COLUMNS,
        STEP=-1 if GRADIENT else 1,
        TAP_Y=(STRIDE_H if GRADIENT else 1) * KERNEL_W * IMAGES,
        TAP_X=(STRIDE_W if GRADIENT else 1) * IMAGES,
        BY_CHANNEL=TAPS * IMAGES if GRADIENT else 1,
        BY_COLUMN=1 if GRADIENT else TAPS * IMAGES,
        TOGETHER=TOGETHER,
        ROWS=ROWS,
        TILE=TILE,
        CHUNK=CHUNK,
    )
    at = ((sample * out_height + out_y) * out_width + out_x)[:, None] * COLUMNS + column[None, :]
    mask = inside[:, None] & real[None, :] if COLUMNS % TILE != 0 else inside[:, None]
    if BIAS:
        total += tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        total += tl.load(added_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale, shift = _scale_and_shift(mean_ptr, variance_ptr, scale_ptr, shift_ptr, eps=eps, column=column, real=real)
    if GRADIENT:
        if ACTIVATION != 0:
            entered = tl.load(entered_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == RELU:
                # A NaN has a gradient, as in PyTorch.
                total = tl.where(entered <= 0, 0.0, total)
            else:
                if NORM:
                    entered = entered * scale[None, :] + shift[None, :]
                gate = _sigmoid(entered)
                total *= gate * (1.0 + entered * (1.0 - gate))
        if NORM:
            total *= scale[None, :]
        if BESIDE:
            total += tl.load(beside_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        if KEEP:
            tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=mask)
        if NORM:
            total = total * scale[None, :] + shift[None, :]
        if ACTIVATION == RELU:
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif ACTIVATION == SILU:
            total *= _sigmoid(total)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def _width_of(count: int) -> int:
    """Return the number of columns of a program, of which the last program may use only a part."""
    return next(
        (tile for tile in (128, 64, 32) if -(-count // tile) * tile <= WASTE * count),
        max(16, min(32, next_power_of_2(count))),
    )


def tiles(columns: int, channels: int, dtype: torch.dtype, most: int = 128) -> dict[str, int | bool]:
    """Return a program's rows, columns (at most ``most``), channels, warps, and number of pipelined loads."""
    together = channels < FEW or channels % 8 != 0
    chunk = 32 if together else next((chunk for chunk in (64, 32, 16) if channels % chunk == 0), 32)
    if dtype.itemsize > 2:
        # float32 does not use the matrix units, so the registers of a thread limit the tile.
        sizes = {"ROWS": 32, "TILE": min(32, _width_of(columns)), "CHUNK": min(32, chunk)}
        return {"TOGETHER": together, **sizes, "num_warps": 4, "num_stages": 2}
    tile = min(most, _width_of(columns))
    sizes = {"ROWS": 128, "TILE": tile, "CHUNK": chunk}
    return {"TOGETHER": together, **sizes, "num_warps": 8 if tile >= 64 else 4, "num_stages": 3}


def _parts(*maps: Tensor) -> list[slice]:
    """Divide the samples into parts whose maps have at most `MOST` elements.

    Raises:
        ValueError: if a single sample has more elements.
    """
    each = max(one[0].numel() for one in maps)
    if each > MOST:
        raise ValueError(f"a map must have at most {MOST} elements per sample, got {each}")
    most = MOST // each
    return [slice(first, first + most) for first in range(0, len(maps[0]), most)]


def _run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    added: Tensor | None,
    beside: Tensor | None = None,
    norm: list[Tensor],
    entered: Tensor | None = None,
    total: Tensor | None = None,
    eps: float,
    activation: int,
    gradient: bool,
    stride: list[int],
    padding: list[int],
) -> None:
    channels, columns = x.shape[3], out.shape[3]
    kernel = weight.shape[1:3]
    # The registers have no room for 128 columns of three maps, or of a sigmoid and another map.
    crowded = beside is not None or activation == SILU.value
    tile = tiles(columns, channels, x.dtype, most=64 if crowded else 128)
    steps = stride if gradient else (1, 1)
    parts = steps[0] * steps[1] * cdiv(columns, tile["TILE"])
    for part in _parts(x, out) if x.numel() and out.numel() else ():
        images, result = x[part], out[part]
        rows = len(result) * cdiv(result.shape[1], steps[0]) * cdiv(result.shape[2], steps[1])
        blocks = cdiv(rows, tile["ROWS"])
        maps = [result if one is None else one[part] for one in (added, beside, entered, total)]
        launch(
            _convolve,
            grid(blocks, parts),
            images,
            weight,
            weight if bias is None else bias,
            *maps[:2],
            *(norm or [weight] * 4),
            *maps[2:],
            result,
            len(images),
            blocks,
            images.shape[1],
            images.shape[2],
            result.shape[1],
            result.shape[2],
            padding[0],
            padding[2],
            float(eps),
            GRADIENT=gradient,
            ACTIVATION=activation,
            BIAS=bias is not None,
            ADDED=added is not None,
            BESIDE=beside is not None,
            NORM=bool(norm),
            KEEP=total is not None,
            CHANNELS=channels,
            COLUMNS=columns,
            KERNEL_H=kernel[0],
            KERNEL_W=kernel[1],
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            **tile,
        )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    norm: list[Tensor],
    eps: float,
    activation: int,
    keep: bool,
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the result and the kept sum, as `purify_fast.ops.fused_convolution.reference` does."""
    top, bottom, left, right = padding
    height = (input.shape[1] + top + bottom - weight.shape[1]) // stride[0] + 1
    width = (input.shape[2] + left + right - weight.shape[2]) // stride[1] + 1
    out = input.new_empty(len(input), height, width, len(weight))
    total = torch.empty_like(out) if keep else None
    _run(
        dense(input),
        dense(weight),
        out,
        bias=_dense(bias),
        added=_dense(added),
        norm=[dense(one) for one in norm],
        total=total,
        eps=eps,
        activation=activation,
        gradient=False,
        stride=stride,
        padding=padding,
    )
    return out, input.new_empty(0) if total is None else total


def backward(
    grad: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    earlier: Tensor | None,
    entered: Tensor | None,
    norm: list[Tensor],
    eps: float,
    beside: Tensor | None,
    activation: int,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """Return the gradient [B, H, W, C], as `purify_fast.ops.fused_convolution.reference_backward` does."""
    out = grad.new_empty(len(grad), height, width, weight.shape[3])
    _run(
        dense(grad),
        dense(weight),
        out,
        added=_dense(earlier),
        beside=_dense(beside),
        norm=[dense(one) for one in norm],
        entered=_dense(entered),
        eps=eps,
        activation=activation,
        gradient=True,
        stride=stride,
        padding=padding,
    )
    return out

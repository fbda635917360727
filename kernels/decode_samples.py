"""`decode_samples` in Triton: a launch computes one layer of the decoder, or the last two, by matrix products.

A transposed convolution of stride s is s * s products, one for each residue of (y, x) mod s, without inserted zeros.
The rows of a product are pixels of all samples, its columns are channels, and its sum runs over taps and input
channels. The linear layer is such a convolution: its input is a map of one pixel, and its stride is the size of its
kernel. The gradient of a convolution is a single product of this kind.

Feature maps are stored as [samples, height, width, channels], with channels padded by zeros to a multiple of 32, in the
dtype of the weights, after the LeakyReLU, which preserves the sign of its input. The order of the additions depends
only on the layer, so a sample has the same bits in every batch.

The gradient needs only the signs of the feature maps. If it is wanted, the forward pass stores them: a bit per element,
1 where the element is positive, in words of 32 neighboring channels.

If the last layer has stride 1, the last two layers can be one launch. A row is then a cell: s * s neighboring pixels of
the second-last layer's result, where s is the stride of this layer. The results remain in registers, where the last
layer multiplies them, once for each cell of the image that they affect. Neighboring programs compute some cells twice,
because each program also needs the cells next to its own cells.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _common
from ._common import cdiv, grid, next_power_of_2, program
from ._launch import launch
from .decoder_sizes import CHANNEL_TILE, Geometry, Layer, padded
from .philox import noise

#: The stream of the latents, defined in purify_fast/ops/philox.py.
LATENT = 1
#: A launch of the kernels for bfloat16 with fewer programs than this gets smaller tiles. These are the multiprocessors
#: of an H200, for every device: the order of the additions is the same in all tiles, but not the code of the compiler.
PROGRAMS = 132
#: The fewest rows of a tile: four warps of sm_90 or sm_100 multiply 64 rows by their matrix units.
FEWEST_ROWS = 64
#: The largest number of bytes of feature maps in memory together. More samples are decoded in parts.
MEMORY = 1 << 29
#: The kinds of `_layer`. FIRST computes the first feature map, BETWEEN a later feature map, IMAGE an image, and
#: GRADIENT the gradient of a feature map.
FIRST, BETWEEN, IMAGE, GRADIENT = 0, 1, 2, 3
#: The largest number of columns for one cell of the image.
CELL = 16
#: The dtypes for which the last two layers can be one launch. In float32 their numbers do not fit into the registers.
TOGETHER = (torch.bfloat16,)
#: The rows of `_last_two`, by major compute capability, where the registers have no room for 256.
FEWER_ROWS = {8: 128, 12: 128}
#: The lowest major compute capability whose shared memory has room for the tiles of `_last_two`.
OLDEST = 8


@triton.jit(do_not_specialize=["rows", "first", "draws", "stream"])
def _latents(
    seed_ptr,  # [1], int64
    ids_ptr,  # [B], int64
    out_ptr,  # [rows, WIDTH]
    rows,
    first,
    draws,
    stream,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program draws the latents of some rows: ``WIDTH`` numbers each, of which those after ``SIZE`` are zero."""
    row, block = program(rows)
    at = first + row
    sample, draw = tl.load(ids_ptr + at // draws), at % draws
    z = noise(tl.load(seed_ptr), block * GROUPS, draw, sample=sample, stream=stream, GROUPS=GROUPS, PAIRS=True)
    element = block * (GROUPS * 4) + tl.arange(0, GROUPS * 4)
    z = tl.where(element < SIZE, z, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + element, z, mask=element < WIDTH)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _packed(positive, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Pack a tile of truth values into words [ROWS, TILE // 32]. The lowest bit of a word is its first column."""
    bits = tl.where(positive, 1 << (tl.arange(0, TILE) % 32)[None, :], 0)
    return tl.sum(tl.reshape(bits, (ROWS, TILE // 32, 32)), 2)


@triton.jit
def _first_output(residue, PADDING: tl.constexpr, STRIDE: tl.constexpr):
    """Return the first y >= 0 with (y + PADDING) mod STRIDE = residue."""
    return (residue + PADDING * (STRIDE - 1)) % STRIDE


@triton.jit
def _products(
    pointers,
    rows,
    busy,
    column,
    residues,
    SIZES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sum over the taps of a residue and over the channels. For tap j, a row reads the input pixel at y + STEP * j.

    Every residue gets the same number of programs. A program that is not ``busy`` has no rows.
    """
    in_ptr, weight_ptr = pointers
    y, x, sample, inside = rows
    residue_y, residue_x = residues
    HEIGHT: tl.constexpr = SIZES[0]
    WIDTH: tl.constexpr = SIZES[1]
    CHANNELS: tl.constexpr = SIZES[2]
    COLUMNS: tl.constexpr = SIZES[3]
    CHUNK: tl.constexpr = TILES[2]
    lane = tl.arange(0, CHUNK)
    place = in_ptr + ((sample * HEIGHT + y) * WIDTH + x)[:, None] * CHANNELS + lane[None, :]
    weight = weight_ptr + (residue_y * KERNEL[1] + residue_x) * (CHANNELS * COLUMNS)
    weight = weight + lane[:, None] * COLUMNS + column[None, :]
    taps_x = (KERNEL[1] - residue_x + STRIDE[1] - 1) // STRIDE[1]
    taps = tl.where(busy, (KERNEL[0] - residue_y + STRIDE[0] - 1) // STRIDE[0] * taps_x, 0)
    total = tl.zeros((TILES[0], TILES[1]), tl.float32)
    down, right, channel = 0, 0, 0
    for _ in range(taps * (CHANNELS // CHUNK)):
        at_y, at_x = y + STEP * down, x + STEP * right
        there = inside & (at_y >= 0) & (at_y < HEIGHT) & (at_x >= 0) & (at_x < WIDTH)
        a = tl.load(place + (STEP * (down * WIDTH + right) * CHANNELS + channel), mask=there[:, None], other=0.0)
        tap = down * (STRIDE[0] * KERNEL[1]) + right * STRIDE[1]
        b = tl.load(weight + (tap * CHANNELS + channel) * COLUMNS)
        total = tl.dot(a, b, total, input_precision="ieee")
        channel += CHUNK
        wrapped = channel == CHANNELS
        channel = tl.where(wrapped, 0, channel)
        right += wrapped.to(tl.int32)
        wrapped = right == taps_x
        right = tl.where(wrapped, 0, right)
        down += wrapped.to(tl.int32)
    return total


# This function is long because all kinds share the computation of the rows. Triton compiles only the code of one kind.
@triton.jit(
    do_not_specialize=["samples", "tiles", "first", "draws", "kept"], do_not_specialize_on_alignment=["signs_ptr"]
)
def _layer(
    in_ptr,  # [samples, HEIGHT, WIDTH, CHANNELS]
    weight_ptr,  # [KERNEL_H * KERNEL_W, CHANNELS, COLUMNS]
    bias_ptr,  # [COLUMNS], or for KIND 0 the condition [B, OUT_HEIGHT, OUT_WIDTH, OUT_CHANNELS]
    signs_ptr,  # [samples, WORDS], int32, from this map's first word on
    out_ptr,  # [samples, OUT_HEIGHT, OUT_WIDTH, COLUMNS], or for KIND 2 the images
    samples,
    tiles,
    first,
    draws,
    kept,
    slope,
    KIND: tl.constexpr,
    SQUASH: tl.constexpr,
    BY_PIXEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program computes some rows (cells of samples) and some columns (channels) of one layer, or of its gradient."""
    # out = leaky_relu(sum over taps and channels of in W + bias); KIND 2 is an image, and KIND 3 a gradient.
    block, part = program(tiles)
    column = part % (COLUMNS // TILE) * TILE + tl.arange(0, TILE)
    residue = part // (COLUMNS // TILE)
    residue_y, residue_x = residue // STRIDE_W, residue % STRIDE_W
    row = block * ROWS + tl.arange(0, ROWS)
    if KIND == 3:
        sample, cell = row // (OUT_HEIGHT * OUT_WIDTH), row % (OUT_HEIGHT * OUT_WIDTH)
        out_y, out_x = cell // OUT_WIDTH, cell % OUT_WIDTH
        y, x = out_y * STRIDE_H - PADDING, out_x * STRIDE_W - PADDING
        inside = sample < samples
        total = _products(
            (in_ptr, weight_ptr),
            (y, x, sample, inside),
            True,
            column,
            (0, 0),
            SIZES=(HEIGHT, WIDTH, CHANNELS, COLUMNS),
            KERNEL=(KERNEL_H, KERNEL_W),
            STRIDE=(1, 1),
            STEP=1,
            TILES=(ROWS, TILE, CHUNK),
        )
    else:
        first_y = _first_output(residue_y, PADDING, STRIDE_H)
        first_x = _first_output(residue_x, PADDING, STRIDE_W)
        height = (OUT_HEIGHT - first_y + STRIDE_H - 1) // STRIDE_H
        width = tl.maximum((OUT_WIDTH - first_x + STRIDE_W - 1) // STRIDE_W, 1)
        size = tl.maximum(height, 1) * width
        sample = row // size
        cell = row - sample * size
        own_y = cell // width
        own_x = cell - own_y * width
        out_y, out_x = first_y + own_y * STRIDE_H, first_x + own_x * STRIDE_W
        inside = (sample < samples) & (out_y < OUT_HEIGHT) & (out_x < OUT_WIDTH)
        y = own_y + (first_y + PADDING - residue_y) // STRIDE_H
        x = own_x + (first_x + PADDING - residue_x) // STRIDE_W
        total = _products(
            (in_ptr, weight_ptr),
            (y, x, sample, inside),
            block * ROWS < samples * size,
            column,
            (residue_y, residue_x),
            SIZES=(HEIGHT, WIDTH, CHANNELS, COLUMNS),
            KERNEL=(KERNEL_H, KERNEL_W),
            STRIDE=(STRIDE_H, STRIDE_W),
            STEP=-1,
            TILES=(ROWS, TILE, CHUNK),
        )
    pixel = (sample * OUT_HEIGHT + out_y) * OUT_WIDTH + out_x
    slope = tl.cast(slope, tl.float32)
    if KIND == 2:
        total += tl.load(bias_ptr + column)[None, :]
        if SQUASH:
            total = _sigmoid(total)
        if BY_PIXEL:
            at = pixel[:, None] * OUT_CHANNELS + column[None, :]
        else:
            at = (sample * (OUT_CHANNELS * OUT_HEIGHT) + out_y)[:, None] + column[None, :] * OUT_HEIGHT
            at = at * OUT_WIDTH + out_x[:, None]
        mask = inside[:, None] & (column < OUT_CHANNELS)[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        at = pixel[:, None] * COLUMNS + column[None, :]
        word = (sample * WORDS + (out_y * OUT_WIDTH + out_x) * (COLUMNS // 32))[:, None]
        word += (part % (COLUMNS // TILE) * (TILE // 32) + tl.arange(0, TILE // 32))[None, :]
        if KIND == 3:
            signs = tl.load(signs_ptr + word, mask=inside[:, None], other=0)[:, :, None]
            signs = tl.reshape(tl.broadcast_to(signs, (ROWS, TILE // 32, 32)), (ROWS, TILE))
            positive = (signs & (1 << (tl.arange(0, TILE) % 32))[None, :]) != 0
            total = tl.where(positive, total, slope * total)
        else:
            if KIND == 0:
                # The index is int64, because all conditions together may have too many elements for 32 bits.
                image = ((first + sample) // draws).to(tl.int64)
                own = (image * (OUT_HEIGHT * OUT_WIDTH) + (out_y * OUT_WIDTH + out_x)) * OUT_CHANNELS
                mask = inside[:, None] & (column < OUT_CHANNELS)[None, :]
                total += tl.load(bias_ptr + (own[:, None] + column[None, :]), mask=mask, other=0.0)
            else:
                total += tl.load(bias_ptr + column)[None, :]
            total = tl.where(total > 0, total, slope * total)
            if kept:
                # Before the map is stored, this needs fewer registers. A tiny number is 0 in bfloat16.
                positive = total.to(out_ptr.dtype.element_ty) > 0
                tl.store(signs_ptr + word, _packed(positive, ROWS, TILE), mask=inside[:, None])
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None])


# This function is long because it computes two layers. The result of the first remains in registers for the second.
@triton.jit(do_not_specialize=["samples", "tiles", "kept"], do_not_specialize_on_alignment=["signs_ptr"])
def _last_two(
    in_ptr,  # [samples, HEIGHT, WIDTH, CHANNELS]
    weight_ptr,  # [KERNEL * KERNEL, CHANNELS, COLUMNS]
    bias_ptr,  # [COLUMNS]
    last_ptr,  # [LAST_KERNEL * LAST_KERNEL, COLUMNS, LAST_COLUMNS]
    shift_ptr,  # [LAST_COLUMNS]
    signs_ptr,  # [samples, WORDS], int32, from this map's first word on
    out_ptr,  # [samples, OUT_CHANNELS, OUT_HEIGHT, OUT_WIDTH], channels last if BY_PIXEL
    samples,
    tiles,
    kept,
    slope,
    SQUASH: tl.constexpr,
    BY_PIXEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MID_HEIGHT: tl.constexpr,
    MID_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    LAST_COLUMNS: tl.constexpr,
    LAST_KERNEL: tl.constexpr,
    LAST_PADDING: tl.constexpr,
    CELLS_Y: tl.constexpr,
    CELLS_X: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program computes the last two layers, for some cells of the image.

    For a cell, the first of the two layers reads input pixels at the offsets ``HIGH`` down to ``LOW``, which is the
    order of `_products`. The second reads cells of the first layer's result at the offsets ``FROM`` to ``TO``.
    """
    block, _ = program(tiles)
    BEFORE: tl.constexpr = -FROM * (CELLS_X + 1)
    OWN: tl.constexpr = ROWS - (TO - FROM) * (CELLS_X + 1)
    local = tl.arange(0, ROWS)
    row = block * OWN - BEFORE + local
    sample = tl.maximum(row, 0) // (CELLS_Y * CELLS_X)
    cell = tl.maximum(row, 0) - sample * (CELLS_Y * CELLS_X)
    cell_y, cell_x = cell // CELLS_X, cell % CELLS_X
    inside = (row >= 0) & (sample < samples)

    lane, column = tl.arange(0, CHUNK), tl.arange(0, TILE)
    channel = column % COLUMNS
    in_cell_y, in_cell_x = column // COLUMNS // STRIDE, column // COLUMNS % STRIDE
    place = in_ptr + ((sample * HEIGHT + cell_y) * WIDTH + cell_x)[:, None] * CHANNELS + lane[None, :]
    total = tl.zeros((ROWS, TILE), tl.float32)
    down, right, at = HIGH, HIGH, 0
    for _ in range((HIGH - LOW + 1) * (HIGH - LOW + 1) * (CHANNELS // CHUNK)):
        y, x = cell_y + down, cell_x + right
        there = inside & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
        a = tl.load(place + ((down * WIDTH + right) * CHANNELS + at), mask=there[:, None], other=0.0)
        tap_y, tap_x = in_cell_y + PADDING - STRIDE * down, in_cell_x + PADDING - STRIDE * right
        met = (tap_y >= 0) & (tap_y < KERNEL) & (tap_x >= 0) & (tap_x < KERNEL) & (in_cell_y < STRIDE)
        tap = tap_y * KERNEL + tap_x
        b = tl.load(
            weight_ptr + (tap * (CHANNELS * COLUMNS) + at * COLUMNS + channel)[None, :] + lane[:, None] * COLUMNS,
            mask=met[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
        at += CHUNK
        wrapped = at == CHANNELS
        at = tl.where(wrapped, 0, at)
        right -= wrapped.to(tl.int32)
        wrapped = right == LOW - 1
        right = tl.where(wrapped, HIGH, right)
        down -= wrapped.to(tl.int32)

    total += tl.load(bias_ptr + channel)[None, :]
    total = tl.where(total > 0, total, tl.cast(slope, tl.float32) * total)
    mid_y = cell_y[:, None] * STRIDE + in_cell_y[None, :]
    mid_x = cell_x[:, None] * STRIDE + in_cell_x[None, :]
    there = inside[:, None] & (in_cell_y < STRIDE)[None, :] & (mid_y < MID_HEIGHT) & (mid_x < MID_WIDTH)
    middle = tl.where(there, total, 0.0).to(in_ptr.dtype.element_ty)
    own = inside & (local >= BEFORE) & (local < BEFORE + OWN)
    if kept:
        word = tl.arange(0, TILE // 32)
        part, in_cell = word % (COLUMNS // 32), word // (COLUMNS // 32)
        y = cell_y[:, None] * STRIDE + (in_cell // STRIDE)[None, :]
        x = cell_x[:, None] * STRIDE + (in_cell % STRIDE)[None, :]
        to = sample[:, None] * WORDS + (y * MID_WIDTH + x) * (COLUMNS // 32) + part[None, :]
        mask = own[:, None] & (y < MID_HEIGHT) & (x < MID_WIDTH)
        tl.store(signs_ptr + to, _packed(middle > 0, ROWS, TILE), mask=mask)

    place = tl.arange(0, 16)
    out_y, out_x = place // OUT_CHANNELS // STRIDE, place // OUT_CHANNELS % STRIDE
    color = place % OUT_CHANNELS
    image = tl.zeros((ROWS, 16), tl.float32) + tl.load(shift_ptr + color)[None, :]
    for down in tl.static_range(FROM, TO + 1):
        for right in tl.static_range(FROM, TO + 1):
            tap_y = (out_y + LAST_PADDING - STRIDE * down)[None, :] - in_cell_y[:, None]
            tap_x = (out_x + LAST_PADDING - STRIDE * right)[None, :] - in_cell_x[:, None]
            met = (tap_y >= 0) & (tap_y < LAST_KERNEL) & (tap_x >= 0) & (tap_x < LAST_KERNEL)
            met = met & (out_y < STRIDE)[None, :] & (in_cell_y < STRIDE)[:, None]
            weight = ((tap_y * LAST_KERNEL + tap_x) * COLUMNS + channel[:, None]) * LAST_COLUMNS + color[None, :]
            weights = tl.load(last_ptr + weight, mask=met, other=0.0)
            given = tl.dot(middle, weights, input_precision="ieee")
            if down != 0 or right != 0:
                beside = tl.minimum(tl.maximum(local + (down * CELLS_X + right), 0), ROWS - 1)
                index = beside[:, None] + tl.zeros((ROWS, 16), tl.int32)
                given = tl.gather(given, index, 0)
                y, x = cell_y + down, cell_x + right
                met = (y >= 0) & (y < CELLS_Y) & (x >= 0) & (x < CELLS_X)
                given = tl.where(met[:, None], given, 0.0)
            image += given
    if SQUASH:
        image = _sigmoid(image)
    y, x = cell_y[:, None] * STRIDE + out_y[None, :], cell_x[:, None] * STRIDE + out_x[None, :]
    mask = own[:, None] & (out_y < STRIDE)[None, :] & (y < OUT_HEIGHT) & (x < OUT_WIDTH)
    if BY_PIXEL:
        to = ((sample[:, None] * OUT_HEIGHT + y) * OUT_WIDTH + x) * OUT_CHANNELS + color[None, :]
    else:
        to = ((sample[:, None] * OUT_CHANNELS + color[None, :]) * OUT_HEIGHT + y) * OUT_WIDTH + x
    tl.store(out_ptr + to, image.to(out_ptr.dtype.element_ty), mask=mask)


def _power(columns: int, most: int) -> int:
    """Return the largest power of two that divides ``columns``, but at most ``most``."""
    return min(columns & -columns, most)


def tiles(columns: int, channels: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Return the rows, columns and channels of a program of `_layer`, its warps, and its number of pipelined loads."""
    if dtype == torch.bfloat16:
        tile = _power(columns, 128)
        # On sm_120, four warps have too few registers for 64 columns.
        warps = 8 if tile == 128 or (tile == 64 and _common._major(device) == 12) else 4
        return {"ROWS": 128, "TILE": tile, "CHUNK": _power(channels, 64), "num_warps": warps, "num_stages": 3}
    # float32 does not use the matrix units, so the registers of a thread limit the tile.
    return {"ROWS": 32, "TILE": _power(columns, 32), "CHUNK": 32, "num_warps": 4, "num_stages": 2}


def filling(tile: dict[str, int], rows: int, columns: int, residues: int) -> dict[str, int]:
    """Return a smaller tile, with the bits of ``tile``, if fewer than `PROGRAMS` programs would compute a layer."""
    for side, least in (("ROWS", FEWEST_ROWS), ("TILE", CHANNEL_TILE)):
        while tile[side] > least and cdiv(rows, tile["ROWS"]) * residues * (columns // tile["TILE"]) < PROGRAMS:
            tile = tile | {side: tile[side] // 2, "num_warps": 4}
    return tile


def tiles_of_two(channels: int, columns: int, stride: int, device: torch.device) -> dict[str, int]:
    """Return the tile of `_last_two`. It has fewer rows on devices whose registers have no room for 256 rows."""
    rows = FEWER_ROWS.get(_common._major(device), 256)
    tile = {"ROWS": rows, "TILE": max(16, stride**2 * columns), "CHUNK": _power(channels, 64)}
    return tile | {"num_warps": 8, "num_stages": 2}


def _reach(kernel: int, stride: int, padding: int, lead: int = 0) -> tuple[int, int]:
    """Return the offsets of the first and the last input cell that affect the pixels of an output cell.

    ``lead`` is the position of the last pixel in an input cell. It is 0 if the input cells are single pixels.
    """
    return -((kernel - 1 + lead - padding) // stride), (stride - 1 + padding) // stride


class Decoder:
    """Holds the weights of a packed decoder, and launches its layers."""

    def __init__(self, packed: Tensor, biases: Tensor, numbers: list[int], slope: float, squash: bool):
        self.geometry = Geometry.of(numbers)
        self.slope, self.squash, self.dtype, self.device = slope, squash, packed.dtype, packed.device
        products = self.geometry.products()
        self.columns = [columns for _, _, columns in products]
        sizes = [taps * inputs * columns for taps, inputs, columns in products]
        channels = [self.geometry.start[0], *(layer.channels for layer in self.geometry.layers)]
        transposed = [
            taps * padded(outputs, CHANNEL_TILE) * padded(inputs, CHANNEL_TILE)
            for (taps, _, _), inputs, outputs in zip(products[1:], channels, channels[1:], strict=False)
        ]
        parts = packed.split([*sizes, *reversed(transposed)])
        self.weights, self.transposed = parts[: len(sizes)], parts[len(sizes) :][::-1]
        self.biases = biases.split(self.columns[1:])
        self.inputs = self.geometry.inputs()
        #: The number of elements that the input of each layer has per sample.
        self.elements = [math.prod(one) for one in self.inputs]
        #: The number of words for the signs of a sample.
        self.words = sum(self.elements) // CHANNEL_TILE

    @property
    def stored(self) -> list[int]:
        """The elements per sample of the feature maps that the forward pass stores."""
        return self.elements[:-1] if self.together else self.elements

    def signs(self, signs: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """Return the signs of each layer's input, of ``count`` samples: the first is sample ``first``."""
        return signs[first : first + count].split([elements // CHANNEL_TILE for elements in self.elements], 1)

    @functools.cached_property
    def together(self) -> bool:
        """True if the last two layers are one launch."""
        layers = self.geometry.layers
        if self.dtype not in TOGETHER or len(layers) < 2 or layers[-1].stride != 1 or layers[-2].stride > 2:
            return False
        if self.device.type == "cuda" and _common._major(self.device) < OLDEST:
            return False
        (before, last), columns = layers[-2:], self.columns[-2]
        low, high = _reach(last.kernel, before.stride, last.padding, before.stride - 1)
        tile, cells = before.stride**2 * columns, -(-max(before.width, last.width) // before.stride)
        rows = tiles_of_two(self.columns[-3], columns, before.stride, self.device)["ROWS"]
        return (
            tile <= 128
            and tile & (tile - 1) == 0
            and before.stride**2 * last.channels <= CELL
            and low <= 0 <= high
            and (high - low) <= 2
            and 2 * (high - low) * (cells + 1) <= rows
        )

    def first(self, condition: Tensor, z: Tensor, out: Tensor, signs: Tensor, first: int, draws: int) -> None:
        """Compute the first feature map, after the LeakyReLU, from the latent as a map of one pixel."""
        channels, h, w = self.geometry.start
        layer = Layer(channels, kernel=0, stride=0, padding=0, height=h, width=w)
        pointers = z, self.weights[0], condition, signs, out
        size = 1, 1, z.shape[1]
        sides: dict[str, Any] = {"kernel": (h, w), "stride": (h, w)}
        self._run(FIRST, pointers, size, layer, self.columns[0], **sides, first=first, draws=draws)

    def forward(self, index: int, x: Tensor, out: Tensor, signs: Tensor, by_pixel: bool = False) -> None:
        """Compute the result of a layer: a feature map, after the LeakyReLU, or the image."""
        layer = self.geometry.layers[index]
        kind = IMAGE if index == len(self.geometry.layers) - 1 else BETWEEN
        pointers = x, self.weights[index + 1], self.biases[index], signs, out
        sides: dict[str, Any] = {"kernel": (layer.kernel,) * 2, "stride": (layer.stride,) * 2}
        self._run(kind, pointers, self.inputs[index], layer, self.columns[index + 1], **sides, by_pixel=by_pixel)

    def backward(self, index: int, grad: Tensor, signs: Tensor, out: Tensor) -> None:
        """Compute the gradient of a layer's input before its LeakyReLU, from the gradient of the layer's output."""
        layer = self.geometry.layers[index]
        h, w, columns = self.inputs[index]
        pointers = grad, self.transposed[index], self.biases[index], signs, out
        size = layer.height, layer.width, padded(layer.channels, CHANNEL_TILE)
        result = layer._replace(channels=columns, height=h, width=w)
        sides: dict[str, Any] = {"kernel": (layer.kernel,) * 2, "stride": (layer.stride,) * 2}
        self._run(GRADIENT, pointers, size, result, columns, **sides)

    def _run(
        self,
        kind: int,
        pointers: tuple[Tensor, ...],
        size: tuple[int, int, int],
        layer: Layer,
        columns: int,
        *,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        by_pixel: bool = False,
        first: int = 0,
        draws: int = 1,
    ) -> None:
        """Launch `_layer` with its pointers. ``size`` is that of the input, and ``layer`` has that of the output."""
        (h, w, channels), samples = size, len(pointers[0])
        steps = (1, 1) if kind == GRADIENT else stride
        most = samples * -(-layer.height // steps[0]) * -(-layer.width // steps[1])
        tile = tiles(columns, channels, self.dtype, self.device)
        if self.dtype == torch.bfloat16:
            tile = filling(tile, most, columns, steps[0] * steps[1])
        blocks = cdiv(most, tile["ROWS"])
        parts = steps[0] * steps[1] * (columns // tile["TILE"])
        given = *pointers, samples, blocks, first, draws, int(len(pointers[3]) > 0), self.slope
        settings = {"KIND": kind, "SQUASH": self.squash and kind == IMAGE, "BY_PIXEL": by_pixel}
        read = {"HEIGHT": h, "WIDTH": w, "CHANNELS": channels}
        made = {"OUT_HEIGHT": layer.height, "OUT_WIDTH": layer.width, "OUT_CHANNELS": layer.channels}
        taps = {"KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1]}
        shape = {**read, **made, "COLUMNS": columns, **taps, "PADDING": layer.padding, "WORDS": self.words}
        launch(_layer, grid(blocks, parts), *given, **settings, **shape, **tile, enable_fp_fusion=True)

    def last_two(self, x: Tensor, out: Tensor, signs: Tensor, by_pixel: bool) -> None:
        """Compute the image from the feature map that is the input of the second-last layer."""
        before, last = self.geometry.layers[-2:]
        h, w, channels = self.inputs[-2]
        tile = tiles_of_two(channels, self.columns[-2], before.stride, self.device)
        cells_y = -(-max(before.height, last.height) // before.stride)
        cells_x = -(-max(before.width, last.width) // before.stride)
        low, high = _reach(before.kernel, before.stride, before.padding)
        start, end = _reach(last.kernel, before.stride, last.padding, before.stride - 1)
        beside, cells = (end - start) * (cells_x + 1), len(x) * cells_y * cells_x
        half = tile["ROWS"] // 2
        if cdiv(cells, tile["ROWS"] - beside) < PROGRAMS and half >= max(2 * FEWEST_ROWS, 2 * beside):
            tile["ROWS"] = half
        blocks = cdiv(cells, tile["ROWS"] - beside)
        given = x, self.weights[-2], self.biases[-2], self.weights[-1], self.biases[-1], signs, out
        settings = {"SQUASH": self.squash, "BY_PIXEL": by_pixel}
        read = {"HEIGHT": h, "WIDTH": w, "CHANNELS": channels}
        middle = {"MID_HEIGHT": before.height, "MID_WIDTH": before.width, "COLUMNS": self.columns[-2]}
        made = {"OUT_HEIGHT": last.height, "OUT_WIDTH": last.width, "OUT_CHANNELS": last.channels}
        taps = {"KERNEL": before.kernel, "STRIDE": before.stride, "PADDING": before.padding}
        last_taps = {"LAST_COLUMNS": self.columns[-1], "LAST_KERNEL": last.kernel, "LAST_PADDING": last.padding}
        offsets = {"LOW": low, "HIGH": high, "FROM": start, "TO": end, "WORDS": self.words}
        shape = read | middle | made | taps | last_taps | {"CELLS_Y": cells_y, "CELLS_X": cells_x} | offsets
        numbers = len(x), blocks, int(len(signs) > 0), self.slope
        launch(_last_two, grid(blocks, 1), *given, *numbers, **settings, **shape, **tile, enable_fp_fusion=True)


def draw(decoder: Decoder, seed: Tensor, sample_ids: Tensor, first: int, count: int, draws: int) -> Tensor:
    """Draw the padded latents of ``count`` samples. The first is sample ``first``."""
    size = decoder.geometry.latent_dim
    width = padded(size, CHANNEL_TILE)
    z = torch.empty((count, width), dtype=decoder.dtype, device=seed.device)
    groups = min(32, next_power_of_2(width // 4))
    sizes = {"SIZE": size, "WIDTH": width, "GROUPS": groups}
    given = seed, sample_ids, z, count, first, draws, LATENT
    launch(_latents, grid(count, cdiv(width, 4 * groups)), *given, **sizes, num_warps=1, enable_fp_fusion=True)
    return z


def parts(total: int, elements: int, decoder: Decoder) -> list[tuple[int, int]]:
    """Divide the samples into parts whose feature maps need at most `MEMORY` bytes. Return (first, count) of each part.

    The feature maps of a sample have ``elements`` elements. A part has at least one sample.
    """
    last = decoder.geometry.layers[-1]
    # The kernels compute the offsets of a part's images in int32.
    images = (2**31 - 1) // (padded(last.channels, CHANNEL_TILE) * last.height * last.width)
    most = max(1, min(images, MEMORY // (elements * decoder.dtype.itemsize)))
    return [(first, min(most, total - first)) for first in range(0, total, most)]


def _last_map(
    decoder: Decoder, inputs: tuple[Tensor, ...], signs: tuple[Tensor, ...], first: int, count: int, draws: int
) -> Tensor:
    """Compute the last feature map that is stored: the input of the last launch. Store the signs of all, if wanted."""
    condition, seed, sample_ids = inputs
    z = draw(decoder, seed, sample_ids, first=first, count=count, draws=draws)
    sizes = decoder.stored
    # The maps are written into two buffers in turn.
    buffers = [z.new_empty(max(sizes[i::2], default=0) * count) for i in (0, 1)]
    out = [buffers[i % 2][: size * count].view(count, size) for i, size in enumerate(sizes)]
    decoder.first(condition, z, out[0], signs[0], first=first, draws=draws)
    for index in range(len(sizes) - 1):
        decoder.forward(index, out[index], out[index + 1], signs[index + 1])
    return out[-1]


def forward(
    condition: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    packed: Tensor,
    biases: Tensor,
    numbers: list[int],
    samples: int,
    slope: float,
    squash: bool,
    channels_last: bool,
    dtype: torch.dtype,
    kept: bool,
) -> tuple[Tensor, Tensor]:
    """Decode images [B * K, C, H, W], as defined by `purify_fast.ops.decode_samples.reference`."""
    decoder = Decoder(packed, biases, numbers, slope=slope, squash=squash)
    total = len(condition) * samples
    last = decoder.geometry.layers[-1]
    shape = (total, last.channels, last.height, last.width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=condition.device, memory_format=layout)
    signs = torch.empty((total if kept else 0, decoder.words), dtype=torch.int32, device=condition.device)
    inputs = condition.contiguous(), seed, sample_ids.contiguous()
    sizes = decoder.stored
    for first, count in parts(total, max(sizes[0::2]) + max(sizes[1::2], default=0), decoder):
        own = decoder.signs(signs, first, count)
        x = _last_map(decoder, inputs, own, first=first, count=count, draws=samples)
        images = out[first : first + count]
        if decoder.together:
            decoder.last_two(x, images, own[-1], by_pixel=channels_last)
        else:
            decoder.forward(len(sizes) - 1, x, images, own[-1], by_pixel=channels_last)
    return out, signs


def backward(
    grad: Tensor,
    image: Tensor,
    signs: Tensor,
    packed: Tensor,
    biases: Tensor,
    numbers: list[int],
    samples: int,
    slope: float,
    squash: bool,
) -> Tensor:
    """Return the gradient [B, H * W * C], as `purify_fast.ops.decode_samples.reference_backward` does."""
    decoder = Decoder(packed, biases, numbers, slope=slope, squash=squash)
    layers, (channels, h, w) = decoder.geometry.layers, decoder.geometry.start
    by_pixel = packed.new_empty((len(grad), h * w, decoder.columns[0]))
    # A launch reads the gradient of a layer's output, and writes that of its input.
    sizes = [*decoder.elements, padded(layers[-1].channels, CHANNEL_TILE) * layers[-1].height * layers[-1].width]
    for first, count in parts(len(grad), max(map(sum, pairwise(sizes))), decoder):
        part = slice(first, first + count)
        g = grad[part].float()
        g = g * image[part].float() * (1 - image[part].float()) if squash else g
        g = g.to(decoder.dtype).permute(0, 2, 3, 1)
        g = F.pad(g, (0, -g.shape[-1] % CHANNEL_TILE)).contiguous()
        own = decoder.signs(signs, first, count)
        for index in reversed(range(len(layers))):
            out = g.new_empty((count, decoder.elements[index])) if index else by_pixel[part]
            decoder.backward(index, g, own[index], out)
            g = out
    summed = by_pixel.unflatten(0, (-1, samples)).sum(1, dtype=torch.float32)
    return summed[..., :channels].flatten(1)

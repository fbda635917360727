"""`square_proposal` in Triton: linf is elementwise; l2 and l1 use one program per proposal and image.

Without fused multiply-adds, linf has the same bits as the reference.

A program of l2 or l1 that can hold its image in registers reads it once. For a larger image, it processes all channels
of some pixels together, and reads them in each of two passes (l2) or three (l1), and the lines of the window W in one
more. If the proposal of l1 is outside the ball, each trial of a shift is one more pass: in the attack, hardly ever more
than one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, clamp, first_of, grid, limited, load, next_power_of_2, program, tile
from ._launch import launch
from .pgd_step import HALVINGS, L1_REGISTERS, _l1_projected, _room, whole_warps

#: Two constants of `purify_fast.ops.square_proposal`: the number of random numbers before the signs of the channels,
#: and the number that is added to lengths, so that no division by a length is a division by 0.
PLACES = tl.constexpr(5)
TINY = tl.constexpr(1e-12)
#: The most steps of Newton's method that l1 tries before it halves, and the last halving's share of the largest offset.
STEPS, RESOLUTION = tl.constexpr(4), tl.constexpr(2.0**-24)
#: The largest tile in which a program of l2 or l1 holds a whole image: with 128 registers for a thread, two such
#: programs fit on a multiprocessor. For larger images, the most elements that a program processes together, and the
#: fewest pixels per channel in them.
HELD, TILE, FEWEST = 4096, 2048, 32


@triton.jit
def _first(place, edge, size):
    """Return the first pixel of a window along one axis."""
    return (place * tl.cast(size - edge + 1, tl.float32)).to(tl.int32)


@triton.jit
def _within(row, column, edge):
    return (row >= 0) & (row < edge) & (column >= 0) & (column < edge)


@triton.jit
def _linf(
    x_ptr,  # [images, size]
    nat_ptr,  # [images, size]
    eps_ptr,  # [images]
    numbers_ptr,  # [images, T, 5 + C], with the strides of_image and of_draw
    edge_ptr,  # []
    out_ptr,  # [rows, size]; row t * images + b is proposal t of image b
    rows,
    images,
    size,
    height,
    width,
    of_image,
    of_draw,
    lo,
    hi,
    WIDTH: tl.constexpr,
):
    """A program writes some elements of one proposal."""
    # clamp(x_nat + eps s, lo, hi) in the window, x elsewhere.
    row, block = program(rows)
    image = (row % images).to(tl.int64)
    numbers_ptr += image * of_image + (row // images).to(tl.int64) * of_draw
    edge = tl.load(edge_ptr).to(tl.int32)
    top, left = _first(tl.load(numbers_ptr), edge, height), _first(tl.load(numbers_ptr + 1), edge, width)

    element = first_of(block, size, WIDTH) + tl.arange(0, WIDTH)
    inside = element < size
    line = element // tl.cast(width, tl.uint32)
    column, channel = (element - line * width).to(tl.int32), line // tl.cast(height, tl.uint32)
    within = _within((line - channel * height).to(tl.int32) - top, column - left, edge)

    number = tl.load(numbers_ptr + PLACES + channel, mask=inside & within, other=0.0)
    x, nat = load(x_ptr + image * size, element, inside), load(nat_ptr + image * size, element, inside)
    moved = nat + tl.load(eps_ptr + image).to(tl.float32) * tl.where(number < 0.5, -1.0, 1.0)
    moved = clamp(moved, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
    out = tl.where(within, moved, x).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * size + element, out, mask=inside)


@triton.jit
def _mass(x, L1: tl.constexpr):
    return tl.abs(x) if L1 else x * x


@triton.jit
def _root(mass, L1: tl.constexpr):
    return mass if L1 else tl.sqrt_rn(mass)


@triton.jit
def _pixels(place, first, WIDTH: tl.constexpr):
    """Read some pixels of an image in all channels. A place ends with the corners of the two windows, W and V.

    Returns the clean pixels; x minus the clean pixels; a mask of the pixels in W; a mask of those in V; the positions
    in the image; a mask of the positions that exist; and, for pixels in W, their positions in the pattern of Square.
    """
    images, _pattern_ptr, channel, shape, windows = place
    x_ptr, nat_ptr = images
    channels, height, width, edge, side = shape
    top, left, other_top, other_left = windows
    pixel = first + tl.arange(0, WIDTH)[None, :]
    at, inside = channel * (height * width) + pixel, (channel < channels) & (pixel < height * width)
    nat = load(nat_ptr, at, inside)
    line = pixel // width
    column = pixel - line * width
    index = (line - top) * side + (column - left)
    one, two = _within(line - top, column - left, edge), _within(line - other_top, column - other_left, edge)
    return nat, load(x_ptr, at, inside) - nat, one, two, at, inside, index


@triton.jit
def _in_window(pattern_ptr, pixels, sign, length):
    """Return h of the op's formulas in the window W, and 0 outside W."""
    # pattern_ptr: [side, side]
    _nat, offset, one, _two, _at, _inside, index = pixels
    # The pattern is read for each channel, in the layout of the images: to change the layout takes longer.
    shape = tl.load(pattern_ptr + tl.broadcast_to(index, offset.shape), mask=one, other=0.0)
    return tl.where(one, shape * sign + offset * (1.0 / (TINY + length)), 0.0)


@triton.jit
def _moved(pixels, pattern_ptr, factors):
    """Return the natural pixels, their perturbations after the proposal, their positions, and which positions exist."""
    # pattern_ptr: [side, side]
    sign, length, scale = factors
    nat, offset, one, two, at, inside, _index = pixels
    new = _in_window(pattern_ptr, pixels, sign, length) * scale
    return nat, tl.where(one, new, tl.where(two, 0.0, offset)), at, inside


@triton.jit
def _again(place, factors, held, first, WHOLE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the result of `_moved` for some pixels: what is held if that is the whole image, and else what is read."""
    return held if WHOLE else _moved(_pixels(place, first, WIDTH), place[1], factors)


@triton.jit
def _l1_spread(proposal, shift, lo, hi, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Shorten all offsets by ``shift``. Return their l1 norm, how many are not 0, and the largest before that."""
    left, largest = tl.zeros((CHANNELS, WIDTH), tl.float32), tl.zeros((CHANNELS, WIDTH), tl.float32)
    count = tl.zeros((CHANNELS, WIDTH), tl.float32)
    place, factors, held = proposal
    _channels, height, width, _edge, _side = place[3]
    for first in range(0, WIDTH if WHOLE else height * width, WIDTH):
        nat, moved, _at, _inside = _again(place, factors, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        d = (nat + moved) - nat
        kept = clamp(tl.abs(d) - shift, 0.0, _room(d, nat, lo, hi))
        left += kept
        count += (kept > 0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(d))
    return tl.sum(tl.sum(left, 0), 0), tl.sum(tl.sum(count, 0), 0), tl.max(tl.max(largest, 0), 0)


@triton.jit
def _l1_shift(proposal, eps, lo, hi, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return whether the projection changes the image, and the amount by which it shortens every offset."""
    spread, count, largest = _l1_spread(proposal, 0.0, lo, hi, WHOLE=WHOLE, CHANNELS=CHANNELS, WIDTH=WIDTH)
    moves, shift, step = spread > eps, 0.0, 0
    # A proposal for a point in the ball has the norm eps before the box, so that only rounding can make it larger. Then
    # a step or two of Newton's method suffice. A step goes at most by the resolution of the halvings too far, because
    # no more offsets than ``count`` get shorter.
    while (spread > eps) & (step < STEPS):
        shift += (spread - eps) / count + largest * RESOLUTION
        spread, count, _ = _l1_spread(proposal, shift, lo, hi, WHOLE=WHOLE, CHANNELS=CHANNELS, WIDTH=WIDTH)
        step += 1
    if spread > eps:
        inner, shift = shift, largest
        for _ in range(HALVINGS):
            middle = (inner + shift) * 0.5
            spread, _, _ = _l1_spread(proposal, middle, lo, hi, WHOLE=WHOLE, CHANNELS=CHANNELS, WIDTH=WIDTH)
            outside = spread > eps
            inner, shift = tl.where(outside, middle, inner), tl.where(outside, shift, middle)
    return moves, shift


@triton.jit
def _factors(
    place, held, sign, eps, L1: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the factors of `_moved`, and for l2 the mass of all perturbations after the proposal.

    The factors are the signs of the channels, the old lengths in the window W, and the scale of the new content of W.
    """
    _images, pattern_ptr, _channel, shape, corners = place
    channels, height, width, edge, _side = shape
    rest, old = tl.zeros((CHANNELS, WIDTH), tl.float32), tl.zeros((CHANNELS, WIDTH), tl.float32)
    both, new = tl.zeros((CHANNELS, WIDTH), tl.float32), tl.zeros((CHANNELS, WIDTH), tl.float32)
    for first in range(0, WIDTH if WHOLE else height * width, WIDTH):
        _nat, offset, one, two, _at, _inside, _index = held if WHOLE else _pixels(place, first, WIDTH)
        mass = _mass(offset, L1)
        rest += tl.where(one | two, 0.0, mass)
        old += tl.where(one, mass, 0.0)
        both += tl.where(one | two, mass, 0.0)
    length, windows = _root(tl.sum(old, 1), L1)[:, None], tl.sum(both, 1)[:, None]
    others = tl.sum(tl.sum(rest, 0), 0)
    # tl.maximum would lose a NaN, but clamp propagates it.
    unused = clamp(_mass(eps, L1) - (others + tl.sum(tl.sum(windows, 1), 0)), 0.0, float("inf"))
    # A program that holds no image reads only the lines of W again.
    begin = 0 if WHOLE else corners[0] * width // WIDTH * WIDTH
    end = WIDTH if WHOLE else (corners[0] + edge) * width
    for first in range(begin, end, WIDTH):
        pixels = held if WHOLE else _pixels(place, first, WIDTH)
        new += _mass(_in_window(pattern_ptr, pixels, sign, length), L1)
    present = tl.sum(new, 1)[:, None]
    scale = _root(unused / channels + windows, L1) / (TINY + _root(present, L1))
    # No digits are lost here, because no summand is negative.
    return (sign, length, scale), others + tl.sum(tl.sum(present * scale * scale, 1), 0)


@triton.jit
def _mass_moved(
    x_ptr,  # [rows, channels, height, width]
    nat_ptr,  # [rows, channels, height, width]
    eps_ptr,  # [rows]
    numbers_ptr,  # [rows, T, 5 + channels], with the strides of_image and of_draw
    edge_ptr,  # []
    pattern_ptr,  # [2, side, side]
    out_ptr,  # [T * rows, channels, height, width]
    rows,
    channels,
    height,
    width,
    side,
    of_image,
    of_draw,
    lo,
    hi,
    L1: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program writes one proposal, in l2 or l1."""
    # d <- h / |h|_W (u / C + |d|_{W or V}^p)^(1/p) in W, 0 in the rest of V; then the projection of the norm.
    row = tl.program_id(0).to(tl.int64)
    image, pixels = row % rows, height * width
    size = channels * pixels
    edge = tl.load(edge_ptr).to(tl.int32)
    images, shape = (x_ptr + image * size, nat_ptr + image * size), (channels, height, width, edge, side)
    numbers_ptr += image * of_image + row // rows * of_draw
    lo, hi, eps = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32), tl.load(eps_ptr + image).to(tl.float32)
    windows = (
        _first(tl.load(numbers_ptr), edge, height),
        _first(tl.load(numbers_ptr + 1), edge, width),
        _first(tl.load(numbers_ptr + 2), edge, height),
        _first(tl.load(numbers_ptr + 3), edge, width),
    )
    pattern_ptr += tl.where(tl.load(numbers_ptr + 4) < 0.5, side * side, 0)
    channel = tl.arange(0, CHANNELS)[:, None]
    number = tl.load(numbers_ptr + PLACES + channel, mask=channel < channels, other=0.0)
    # The sign is 0 for channels that do not exist.
    sign = tl.where(channel < channels, tl.where(number < 0.5, -1.0, 1.0), 0.0)
    place = images, pattern_ptr, channel, shape, windows
    held = _pixels(place, 0, WIDTH) if WHOLE else 0
    factors, mass = _factors(place, held, sign, eps, L1=L1, WHOLE=WHOLE, CHANNELS=CHANNELS, WIDTH=WIDTH)
    held = _moved(held, pattern_ptr, factors) if WHOLE else 0

    if L1:
        proposal = place, factors, held
        moves, shift = _l1_shift(proposal, eps, lo, hi, WHOLE=WHOLE, CHANNELS=CHANNELS, WIDTH=WIDTH)
    stretch = eps / (tl.sqrt_rn(mass) + TINY)

    for first in range(0, WIDTH if WHOLE else pixels, WIDTH):
        nat, moved, at, inside = _again(place, factors, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        if L1:
            x = _l1_projected(nat + moved, nat, shift, moves=moves, lo=lo, hi=hi)
        else:
            x = clamp(nat + moved * stretch, lo, hi)
        tl.store(out_ptr + row * size + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def layout(channels: int, pixels: int) -> dict[str, int]:
    """Return the tile and the warps of a program of l2 or l1. The tile has all channels, rounded up, of some pixels."""
    every, width = next_power_of_2(channels), max(FEWEST, next_power_of_2(pixels))
    whole = every * width <= HELD
    width = width if whole else max(FEWEST, TILE // every)
    return {"WHOLE": whole, "CHANNELS": every, "WIDTH": width, "num_warps": whole_warps(every * width)}


def forward(
    x: Tensor,
    x_nat: Tensor,
    eps: Tensor,
    numbers: Tensor,
    pattern: Tensor | None,
    edge: Tensor,
    norm: int,
    lo: float,
    hi: float,
) -> Tensor:
    """Return the proposed images [T * B, C, H, W], contiguous. ``norm`` is 0 for linf, 1 for l2 and 2 for l1."""
    images, draws = numbers.shape[:2]
    out = torch.empty((draws * images, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    _, channels, height, width = x.shape
    numbers = numbers if numbers.stride(2) == 1 else numbers.contiguous()
    given = x.contiguous(), x_nat.contiguous(), eps.contiguous(), numbers, edge
    settings = *numbers.stride()[:2], float(lo), float(hi)
    if pattern is None:
        size = channels * height * width
        block, several = tile(size, x)
        sizes = draws * images, images, size, height, width
        programs = grid(draws * images, cdiv(size, block))
        launch(_linf, programs, *given, out, *sizes, *settings, WIDTH=block, num_warps=several, enable_fp_fusion=False)
    else:
        sizes = images, channels, height, width, pattern.shape[-1]
        shape = layout(channels, height * width) | limited(L1_REGISTERS)
        tensors = *given, pattern.contiguous(), out
        launch(
            _mass_moved, (draws * images,), *tensors, *sizes, *settings, L1=norm == 2, **shape, enable_fp_fusion=False
        )
    return out

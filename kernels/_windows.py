"""Sums the numbers of a matrix over shifts, for `contextual_attention`. A shift moves query and key by the same step.

A row of the matrix belongs to a query and has a number for every key. The functions compute one row at a time. A thread
computes a group of ``VECTOR`` neighboring keys, where VECTOR is 1 or 4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys(size, width, VECTOR: tl.constexpr, GROUPS: tl.constexpr):
    """Return each group's first key, whether it is one of the ``size`` keys, and its row and column in the grid."""
    at = tl.arange(0, GROUPS) * VECTOR
    y = (at.to(tl.uint32) // tl.cast(width, tl.uint32)).to(tl.int32)
    return at, at < size, y, at - y * width


@triton.jit
def load(pointer, at, inside, VECTOR: tl.constexpr):
    """Return the numbers of each group, [GROUPS, VECTOR] in float32. Groups that are not inside get 0."""
    at = at[:, None] + tl.arange(0, VECTOR)[None, :]
    return tl.load(pointer + at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def parts(x):
    """Return the four columns of x [GROUPS, 4]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def whole(a, b, c, d):
    """Join four columns into [GROUPS, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def moved_in(x, first, VECTOR: tl.constexpr):
    """Return the predecessor of each number in its group. The first number of a group has the predecessor ``first``."""
    if VECTOR == 1:
        out = first[:, None]
    else:
        a, b, c, _d = parts(x)
        out = whole(first, a, b, c)
    return out


@triton.jit
def moved_out(x, last, VECTOR: tl.constexpr):
    """Return the successor of each number in its group. The last number of a group has the successor ``last``."""
    if VECTOR == 1:
        out = last[:, None]
    else:
        _a, b, c, d = parts(x)
        out = whole(b, c, d, last)
    return out


@triton.jit
def previous_pair(pointer, stride, at, inside, has_begun, VECTOR: tl.constexpr):
    """Return m[n - 1, i - 1] for every key i. ``pointer`` is row n of the matrix m.

    ``has_begun`` is False for the first group in a line of the grid. The first number of this group has no predecessor,
    and 0 is used as its predecessor.
    """
    x = load(pointer - stride, at, inside, VECTOR)
    first = tl.load(pointer - stride + at - 1, mask=inside & has_begun, other=0.0).to(tl.float32)
    return moved_in(x, first, VECTOR)


@triton.jit
def next_pair(pointer, stride, at, inside, goes_on, VECTOR: tl.constexpr):
    """Return m[n + 1, i + 1] for every key i. ``pointer`` is row n of the matrix m.

    ``goes_on`` is False for the last group in a line of the grid. The last number of this group has no successor, and 0
    is used as its successor.
    """
    x = load(pointer + stride, at, inside, VECTOR)
    last = tl.load(pointer + stride + at + VECTOR, mask=inside & goes_on, other=0.0).to(tl.float32)
    return moved_out(x, last, VECTOR)


@triton.jit
def line(pointer, stride, at, inside, x, column, width, VECTOR: tl.constexpr):
    """Return the sum of m[n + o, i + o] for o = -1, 0 and 1, without terms that are in another line of the grid.

    ``pointer`` is row n of the matrix m. ``x`` is the column of the query in the grid, and ``column`` is the column of
    each group's first key.
    """
    total = load(pointer, at, inside, VECTOR)
    total += previous_pair(pointer, stride, at, inside=inside & (x > 0), has_begun=column > 0, VECTOR=VECTOR)
    return total + next_pair(
        pointer, stride, at, inside=inside & (x < width - 1), goes_on=column + VECTOR < width, VECTOR=VECTOR
    )


@triton.jit
def window(pointer, keys, query, sizes, VECTOR: tl.constexpr):
    """Return the sum of m[n + o, i + o] over those of the nine steps o for which query and key remain on the grid.

    ``pointer`` is row n of the matrix m. ``keys`` are the results of `keys`. ``query`` is the row and the column of the
    query in the grid.
    """
    at, inside, row, column = keys
    y, x = query
    size, height, width = sizes
    total = line(pointer, size, at, inside=inside, x=x, column=column, width=width, VECTOR=VECTOR)
    far = width * tl.cast(size, tl.int64) + width
    above, below = inside & (y > 0) & (row > 0), inside & (y < height - 1) & (row < height - 1)
    total += line(pointer - far, size, at, inside=above, x=x, column=column, width=width, VECTOR=VECTOR)
    return total + line(pointer + far, size, at, inside=below, x=x, column=column, width=width, VECTOR=VECTOR)


@triton.jit
def store_wings(pointer, at, value, size, width):
    """Store copies of the numbers ``value`` in the wings of their row.

    The wings are duplicates of some of the numbers, before and after the row (see contextual_attention.py). ``pointer``
    is number 0 of the row.
    """
    tl.store(pointer + at + (size - 1), value, mask=(at >= 1) & (at <= width) & (at < size))
    tl.store(pointer + at - (size - 1), value, mask=(at >= size - 1 - width) & (at < size - 1))


@triton.jit
def store_winged(pointer, at, value, inside, size, width, VECTOR: tl.constexpr):
    """Store the numbers of a row and of its wings. ``pointer`` is number 0 of the row."""
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(pointer + i, value, mask=inside[:, None])
    if VECTOR == 1:
        store_wings(pointer, i, value, size, width)
    else:
        # The wings have a different alignment than the row, so their numbers are stored one by one.
        a, b, c, d = parts(value)
        store_wings(pointer, at, a, size, width)
        store_wings(pointer, at + 1, b, size, width)
        store_wings(pointer, at + 2, c, size, width)
        store_wings(pointer, at + 3, d, size, width)

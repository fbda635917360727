"""Windows of a matrix between positions of a grid, query and key moved together: for `contextual_attention`.

A program has a row of the matrix, a thread a group of ``VECTOR`` neighbouring keys, 1 or 4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys(size, width, VECTOR: tl.constexpr, GROUPS: tl.constexpr):
    """The first key of each thread's group, which groups are inside, and their row and column in the grid."""
    at = tl.arange(0, GROUPS) * VECTOR
    y = (at.to(tl.uint32) // tl.cast(width, tl.uint32)).to(tl.int32)
    return at, at < size, y, at - y * width


@triton.jit
def load(pointer, at, inside, VECTOR: tl.constexpr):
    """The numbers of each group, [GROUPS, VECTOR] in float32, 0 where not inside."""
    at = at[:, None] + tl.arange(0, VECTOR)[None, :]
    return tl.load(pointer + at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def parts(x):
    """[GROUPS, 4] -> four blocks."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def whole(a, b, c, d):
    """Four blocks -> [GROUPS, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def moved_in(x, first, VECTOR: tl.constexpr):
    """Each number's predecessor in its group; ``first`` is that of the group's first."""
    if VECTOR == 1:
        out = first[:, None]
    else:
        a, b, c, _d = parts(x)
        out = whole(first, a, b, c)
    return out


@triton.jit
def moved_out(x, last, VECTOR: tl.constexpr):
    """Each number's successor in its group; ``last`` is that of the group's last."""
    if VECTOR == 1:
        out = last[:, None]
    else:
        _a, b, c, d = parts(x)
        out = whole(b, c, d, last)
    return out


@triton.jit
def previous_pair(pointer, stride, at, inside, starts, VECTOR: tl.constexpr):
    """x[n - 1, i - 1], ``pointer`` being row n; the group's first number has one where ``starts``."""
    x = load(pointer - stride, at, inside, VECTOR)
    first = tl.load(pointer - stride + at - 1, mask=inside & starts, other=0.0).to(tl.float32)
    return moved_in(x, first, VECTOR)


@triton.jit
def next_pair(pointer, stride, at, inside, ends, VECTOR: tl.constexpr):
    """x[n + 1, i + 1], in the same form."""
    x = load(pointer + stride, at, inside, VECTOR)
    last = tl.load(pointer + stride + at + VECTOR, mask=inside & ends, other=0.0).to(tl.float32)
    return moved_out(x, last, VECTOR)


@triton.jit
def line(pointer, stride, at, inside, x, column, width, VECTOR: tl.constexpr):
    """Sum over the moves along a line of the grid; ``x`` is the query's column, ``column`` that of a first key."""
    total = load(pointer, at, inside, VECTOR)
    total += previous_pair(pointer, stride, at, inside=inside & (x > 0), starts=column > 0, VECTOR=VECTOR)
    return total + next_pair(
        pointer, stride, at, inside=inside & (x < width - 1), ends=column + VECTOR < width, VECTOR=VECTOR
    )


@triton.jit
def window(pointer, size, at, inside, y, x, row, column, height, width, VECTOR: tl.constexpr):
    """Sum over the nine moves o of x[n + o, i + o], wherever both are on the grid; ``pointer`` is row n."""
    total = line(pointer, size, at, inside=inside, x=x, column=column, width=width, VECTOR=VECTOR)
    far = width * tl.cast(size, tl.int64) + width
    above, below = inside & (y > 0) & (row > 0), inside & (y < height - 1) & (row < height - 1)
    total += line(pointer - far, size, at, inside=above, x=x, column=column, width=width, VECTOR=VECTOR)
    return total + line(pointer + far, size, at, inside=below, x=x, column=column, width=width, VECTOR=VECTOR)


@triton.jit
def store_wings(pointer, at, value, size, width):
    """Single numbers of a row into its wings; ``pointer`` is the row's number 0."""
    tl.store(pointer + at + (size - 1), value, mask=(at >= 1) & (at <= width) & (at < size))
    tl.store(pointer + at - (size - 1), value, mask=(at >= size - 1 - width) & (at < size - 1))


@triton.jit
def store_winged(pointer, at, value, inside, size, width, VECTOR: tl.constexpr):
    """A row's numbers and its wings; ``pointer`` is the row's number 0."""
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(pointer + i, value, mask=inside[:, None])
    if VECTOR == 1:
        store_wings(pointer, i, value, size, width)
    else:  # the wings have another alignment than the row
        a, b, c, d = parts(value)
        store_wings(pointer, at, a, size, width)
        store_wings(pointer, at + 1, b, size, width)
        store_wings(pointer, at + 2, c, size, width)
        store_wings(pointer, at + 3, d, size, width)

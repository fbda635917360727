// From products of pixels to attention weights and back (purify_fast/ops/contextual_attention.py is the definition).
//
// Matrices are [cells][cells], a query's row of keys each; both positions are cells of one grid, in row-major order.
// Every function makes one row, from rows of another matrix moved by as many keys as queries: long loops of sums.
#pragma once

#include "math.h"

namespace pf {

struct Grid {
  int64_t height, width;

  PF_HD int64_t cells() const { return height * width; }
};

// Moves by top .. bottom rows and left .. right columns of the grid, each within -1 .. 1.
struct Window {
  int top, bottom, left, right;
};
constexpr Window all_neighbours = {-1, 1, -1, 1};

// The weights' sums for the pixels (2 i + a, 2 j + b), and the moves that lead back.
PF_HD Window spread_window(int a, int b) { return {a - 1, a, b - 1, b}; }
PF_HD Window gather_window(int a, int b) { return {-a, 1 - a, -b, 1 - b}; }

// 1 for the cells that have one to their left, then for those with one to their right: 2 * cells numbers.
template <class W>
PF_HD void inner_columns(Grid grid, W* inner) {
  for (int64_t i = 0; i < grid.cells(); ++i) {
    inner[i] = i % grid.width > 0 ? W(1) : W(0);
    inner[grid.cells() + i] = i % grid.width < grid.width - 1 ? W(1) : W(0);
  }
}

// out[i] += from[i + shift], begin <= i < end.
template <class T, class W>
PF_HD void add_moved(W* __restrict__ out, const T* __restrict__ from, int64_t begin, int64_t end, int64_t shift) {
  from += shift;
  for (int64_t i = begin; i < end; ++i) out[i] += load(from[i]);
}

// row[i] += sum over the window's moves o of x[n + o][i + o], where both are on the grid.
template <class T, class W>
PF_HD void add_window(W* __restrict__ row, const T* __restrict__ x, Grid grid, int64_t n, Window window,
                      const W* __restrict__ inner) {
  const int64_t cells = grid.cells(), y = n / grid.width, column = n % grid.width;
  for (int down = window.top; down <= window.bottom; ++down) {
    if (y + down < 0 || y + down >= grid.height) continue;
    for (int right = window.left; right <= window.right; ++right) {
      if (column + right < 0 || column + right >= grid.width) continue;
      const int64_t shift = down * grid.width + right;
      const int64_t begin = shift < 0 ? -shift : 0, end = shift > 0 ? cells - shift : cells;
      const T* from = x + (n + shift) * cells + shift;
      if (right == 0) {
        add_moved(row, from, begin, end, 0);
      } else {
        const W* stays = right < 0 ? inner : inner + cells;
        for (int64_t i = begin; i < end; ++i) {
          const W value = load(from[i]);
          row[i] += stays[i] != 0 ? value : W(0);
        }
      }
    }
  }
}

// row = x[n] + what lies before and behind it on the diagonal, in row-major order.
template <class W>
PF_HD void fuse_rows(W* __restrict__ row, const W* __restrict__ x, Grid grid, int64_t n) {
  const int64_t cells = grid.cells();
  for (int64_t i = 0; i < cells; ++i) row[i] = x[n * cells + i];
  if (n > 0) add_moved(row, x + (n - 1) * cells, 1, cells, -1);
  if (n < cells - 1) add_moved(row, x + (n + 1) * cells, 0, cells - 1, 1);
}

// The same in column-major order: below the last cell of a column comes the first of the next.
template <class W>
PF_HD void fuse_columns(W* __restrict__ row, const W* __restrict__ x, Grid grid, int64_t n) {
  const int64_t cells = grid.cells(), width = grid.width, wrap = cells - 1 - width;
  for (int64_t i = 0; i < cells; ++i) row[i] = x[n * cells + i];
  if (n < cells - 1) {
    const W* next = x + (n < cells - width ? n + width : n - wrap) * cells;
    add_moved(row, next, 0, cells - width, width);
    add_moved(row, next, cells - width, cells - 1, -wrap);
  }
  if (n > 0) {
    const W* previous = x + (n < width ? n + wrap : n - width) * cells;
    add_moved(row, previous, width, cells, -width);
    add_moved(row, previous, 1, width, wrap);
  }
}

// A row of scores into keep * softmax(scale * keep * scores).
template <class W>
PF_HD void attention_row(W* __restrict__ row, const W* __restrict__ keep, W scale, int64_t n) {
  constexpr int lanes = 16;
  for (int64_t i = 0; i < n; ++i) row[i] *= scale * keep[i];
  W peaks[lanes];
  for (int j = 0; j < lanes; ++j) peaks[j] = row[0];
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int j = 0; j < lanes; ++j) peaks[j] = max_nan(row[i + j], peaks[j]);
  }
  for (int64_t i = whole; i < n; ++i) peaks[0] = max_nan(row[i], peaks[0]);
  for (int j = 1; j < lanes; ++j) peaks[0] = max_nan(peaks[j], peaks[0]);
  const W peak = peaks[0];
  for (int64_t i = 0; i < n; ++i) row[i] = exp_unit(row[i] - peak);
  const W* e = row;
  const W inverse = 1 / ordered_sum<W>(n, [=](int64_t i) PF_INLINE { return e[i]; });
  for (int64_t i = 0; i < n; ++i) row[i] *= inverse * keep[i];
}

// The gradient of the weights into that of the scores; keep is 1 wherever a weight is not 0.
template <class W>
PF_HD void attention_row_backward(W* __restrict__ row, const W* __restrict__ weights, W scale, int64_t n) {
  const W* grad = row;
  const W along = ordered_sum<W>(n, [=](int64_t i) PF_INLINE { return grad[i] * weights[i]; });
  for (int64_t i = 0; i < n; ++i) row[i] = scale * weights[i] * (row[i] - along);
}

}  // namespace pf

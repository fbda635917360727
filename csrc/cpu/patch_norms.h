// Computes 1 / norm of the 3x3 patch around every cell of a grid, and its gradient, from the products of the pixels.
#pragma once

#include "../core/contextual_attention.h"

namespace pf::cpu {

constexpr double smallest_norm = 1e-4;

// Calls f(j) for j = i and for every neighbor j of the cell i.
template <class F>
PF_INLINE void for_neighbours(Grid grid, int64_t i, F f) {
  const int64_t y = i / grid.width, x = i % grid.width;
  for (int64_t row = y > 0 ? y - 1 : 0; row <= y + 1 && row < grid.height; ++row) {
    for (int64_t column = x > 0 ? x - 1 : 0; column <= x + 1 && column < grid.width; ++column) {
      f(row * grid.width + column);
    }
  }
}

// Returns 1 / max(norm, 1e-4) of a patch, from the sum of its squares. This sum is clamped before the root is computed.
template <class W>
W inverse_norm(W squares) {
  return 1 / pf::sqrt(max_nan(squares, static_cast<W>(smallest_norm * smallest_norm)));
}

// Computes every patch's inverse norm. The diagonal of the pixels' `products` [cells][cells] has the squares.
template <class W>
void inverse_norms(const W* products, Grid grid, W* out) {
  for (int64_t i = 0; i < grid.cells(); ++i) {
    W squares = 0;
    for_neighbours(grid, i, [&](int64_t j) { squares += products[j * (grid.cells() + 1)]; });
    out[i] = inverse_norm(squares);
  }
}

// Adds the gradient that comes through the norms to the diagonal of `slopes` [cells][cells]. The gradient of the pixels
// is `slopes` times the pixels, so a diagonal entry is the factor of a pixel in its own gradient. to_inverse is the
// gradient of the inverse norms, and is overwritten.
template <class W>
void add_norm_slopes(W* to_inverse, const W* inverse, Grid grid, W* slopes) {
  const W clamped = inverse_norm(W(0));
  for (int64_t i = 0; i < grid.cells(); ++i) {
    // The derivative of 1 / sqrt(squares) is -inverse^3 / 2, that of the squares twice the pixel: 1/2 and 2 cancel.
    const W slope = -to_inverse[i] * inverse[i] * inverse[i] * inverse[i];
    to_inverse[i] = inverse[i] == clamped ? W(0) : slope;
  }
  for (int64_t i = 0; i < grid.cells(); ++i) {
    for_neighbours(grid, i, [&](int64_t j) { slopes[i * (grid.cells() + 1)] += to_inverse[j]; });
  }
}

// Replaces x [n][n] by x + its transpose, tile by tile.
template <class W>
void add_transpose(W* x, int64_t n) {
  constexpr int64_t tile = 16;
  for (int64_t top = 0; top < n; top += tile) {
    for (int64_t left = top; left < n; left += tile) {
      const int64_t bottom = top + tile < n ? top + tile : n, right = left + tile < n ? left + tile : n;
      for (int64_t i = top; i < bottom; ++i) {
        for (int64_t j = top == left ? i : left; j < right; ++j) {
          const W sum = x[i * n + j] + x[j * n + i];
          x[i * n + j] = sum;
          x[j * n + i] = sum;
        }
      }
    }
  }
}

}  // namespace pf::cpu

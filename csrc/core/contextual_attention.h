// Turns products of pixels into attention weights, and back: see purify_fast/ops/contextual_attention.py.
//
// The matrices are [cells][cells]: a row per query with a number per key, both cells of a grid in row-major order.
#pragma once

#include "math.h"

namespace pf {

struct Grid {
  int64_t height, width;

  PF_INLINE int64_t cells() const { return height * width; }
};

// Replaces a row of scores by keep * softmax(scale * keep * scores).
template <class W>
PF_INLINE void attention_row(W* __restrict__ row, const W* __restrict__ keep, W scale, int64_t n) {
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
  const W inverse = 1 / ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return e[i]; });
  for (int64_t i = 0; i < n; ++i) row[i] *= inverse * keep[i];
}

// Replaces the gradient of the weights by that of the scores. A key with keep = 0 already has weight 0.
template <class W>
PF_INLINE void attention_row_backward(W* __restrict__ row, const W* __restrict__ weights, W scale, int64_t n) {
  const W* grad = row;
  const W along = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return grad[i] * weights[i]; });
  for (int64_t i = 0; i < n; ++i) row[i] = scale * weights[i] * (row[i] - along);
}

}  // namespace pf

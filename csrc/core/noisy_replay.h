// Noisy replay of clean images (purify_fast/ops/noisy_replay.py is the definition).
#pragma once

#include "math.h"

namespace pf {

// NaN is not above the threshold.
template <class W>
PF_INLINE bool is_replayed(W drift, W tau) {
  return drift > tau;
}

// From a number of the stream in [0, 1); NaN in x or eps stays. 2 uniform - 1 is exact.
template <class W>
PF_INLINE W replayed(W x, float uniform, W eps, W lo, W hi) {
  return clamp_nan(x + eps * static_cast<W>(2 * uniform - 1), lo, hi);
}

}  // namespace pf

// Noisy replay of clean images. purify_fast/ops/noisy_replay.py has the definition.
#pragma once

#include "math.h"

namespace pf {

// Returns true if a sample is replayed. It is not replayed if the drift is NaN.
template <class W>
PF_INLINE bool is_replayed(W drift, W tau) {
  return drift > tau;
}

// Returns x plus noise, clipped to [lo, hi]. `uniform` is a random number in [0, 1), and 2 uniform - 1 is exact. NaN in
// x or eps gives NaN.
template <class W>
PF_INLINE W replayed(W x, float uniform, W eps, W lo, W hi) {
  return clamp_nan(x + eps * static_cast<W>(2 * uniform - 1), lo, hi);
}

}  // namespace pf

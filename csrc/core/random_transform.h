// The random transforms of AToP (purify_fast/ops/random_transform.py is the definition).
#pragma once

#include "math.h"

namespace pf {

template <class W>
PF_INLINE W noisy_pixel(W x, W noise, W sigma) {
  return x + sigma * noise;
}

// With noise, clipped, scaled to [-1, 1]; NaN stays.
template <class W>
PF_INLINE W transformed(W x, W noise, W sigma) {
  return 2 * clamp_nan(noisy_pixel(x, noise, sigma), W(0), W(1)) - 1;
}

// The gradient that reaches x; both ends of the clip pass it, NaN does not.
template <class W>
PF_INLINE W transformed_slope(W x, W noise, W sigma, W grad) {
  const W u = noisy_pixel(x, noise, sigma);
  return (u >= 0) & (u <= 1) ? 2 * grad : W(0);
}

// The owner of the block whose key has this rank: the pass that hides it. With num_passes = 0 there is one pass; the
// `masked_blocks` blocks of the least ranks are hidden and owned by 1, the others are owned by 0.
PF_INLINE uint8_t owner_of(int64_t rank, int64_t blocks, int64_t masked_blocks, int64_t num_passes) {
  return static_cast<uint8_t>(num_passes == 0 ? rank < masked_blocks : rank / (blocks / num_passes));
}

}  // namespace pf

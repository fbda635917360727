// The random transforms of AToP (purify_fast/ops/random_transform.py is the definition).
#pragma once

#include "math.h"

namespace pf {

template <class W>
PF_HD W noisy_pixel(W x, W noise, W sigma) {
  return x + sigma * noise;
}

// With noise, clipped, scaled to [-1, 1]; NaN stays.
template <class W>
PF_HD W transformed(W x, W noise, W sigma) {
  return 2 * clamp_nan(noisy_pixel(x, noise, sigma), W(0), W(1)) - 1;
}

// The gradient that reaches x; both ends of the clip pass it, NaN does not.
template <class W>
PF_HD W transformed_slope(W x, W noise, W sigma, W grad) {
  const W u = noisy_pixel(x, noise, sigma);
  return (u >= 0) & (u <= 1) ? 2 * grad : W(0);
}

// Who owns the block whose key has this rank; with parts = 0 the first `missing` are owned by 1, the others by 0.
PF_HD uint8_t owner_of(int64_t rank, int64_t blocks, int64_t missing, int64_t parts) {
  return static_cast<uint8_t>(parts == 0 ? rank < missing : rank / (blocks / parts));
}

}  // namespace pf

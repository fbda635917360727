// The random transforms of AToP. purify_fast/ops/random_transform.py has the definition.
#pragma once

#include "math.h"

namespace pf {

template <class W>
PF_INLINE W noisy_pixel(W x, W noise, W sigma) {
  return x + sigma * noise;
}

// Returns the pixel with noise, clipped to [0, 1] and scaled to [-1, 1]. NaN gives NaN.
template <class W>
PF_INLINE W transformed(W x, W noise, W sigma) {
  return 2 * clamp_nan(noisy_pixel(x, noise, sigma), W(0), W(1)) - 1;
}

// Returns the gradient with respect to x. Both ends of the clip pass the gradient. A NaN pixel has gradient 0.
template <class W>
PF_INLINE W transformed_slope(W x, W noise, W sigma, W grad) {
  const W u = noisy_pixel(x, noise, sigma);
  return (u >= 0) & (u <= 1) ? 2 * grad : W(0);
}

// Returns the owner of a block: the index of the pass that hides the block. `rank` is the rank of the block's random
// key. num_passes = 0 means a single pass, which hides the `masked_blocks` blocks with the lowest ranks. In this case
// the result only tells whether a block is hidden (1) or not (0).
PF_INLINE uint8_t owner_of(int64_t rank, int64_t blocks, int64_t masked_blocks, int64_t num_passes) {
  return static_cast<uint8_t>(num_passes == 0 ? rank < masked_blocks : rank / (blocks / num_passes));
}

}  // namespace pf

// Draws random numbers by Philox4x32-10 (Salmon et al., SC 2011). purify_fast/ops/philox.py has the definition.
//
// key = (low word, high word of the seed), counter = (element / 4, draw, sample, stream).
// Element i takes word i mod 4.
#pragma once

#include "math.h"

namespace pf {

// These numbers must never change, because results depend on them.
enum class Stream : uint32_t {
  latent = 1,
  transform_noise = 2,
  mask = 3,
  attack_start = 4,
  replay_noise = 5,
  augmentation = 6,
  diffusion = 9,
};

enum class Distribution : int { bits = 0, uniform = 1, normal = 2 };

struct Key {
  uint32_t low, high;
};

PF_INLINE Key key_of(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

// Replaces the counter by its four random words. U stores a 32-bit word: uint32_t, or uint64_t with a zero upper half.
// AVX-512 processes the uint64_t form twice as fast.
template <class U>
PF_INLINE void philox(Key key, U& c0, U& c1, U& c2, U& c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<U>(p1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<U>(p1 & 0xFFFFFFFFu);
    c2 = static_cast<U>(p0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<U>(p0 & 0xFFFFFFFFu);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// Returns a multiple of 2^-24 in [0, 1). The conversion from int32 is exact, and one instruction on every CPU.
PF_INLINE float uniform(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f; }

// Makes two independent normal numbers from two words, by the Box-Muller transform.
PF_INLINE void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  // u is in (0, 1], so that its logarithm is finite.
  const float u = static_cast<float>(static_cast<int32_t>((a >> 8) + 1u)) * 0x1p-24f;
  const float radius = sqrt(-2.0f * log(u));
  float sine, cosine;
  // The definition requires the angle to be rounded to float32 before the sine and the cosine.
  sincos_turn(static_cast<float>(static_cast<int32_t>(b >> 8)) * 3.7450704e-07f, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Writes the elements 4 group .. 4 group + 3 for one sample id and one draw index. Floats are written as bit patterns.
PF_INLINE void draw_group(Distribution kind, Key key, uint32_t group, uint32_t draw, uint32_t sample, uint32_t stream,
                          uint32_t out[4]) {
  uint32_t w[4] = {group, draw, sample, stream};
  philox(key, w[0], w[1], w[2], w[3]);
  for (int i = 0; i < 4; ++i) out[i] = kind == Distribution::bits ? w[i] : bit_cast<uint32_t>(uniform(w[i]));
  if (kind == Distribution::normal) {
    for (int i = 0; i < 4; i += 2) {
      float first, second;
      normal_pair(w[i], w[i + 1], first, second);
      out[i] = bit_cast<uint32_t>(first);
      out[i + 1] = bit_cast<uint32_t>(second);
    }
  }
}

}  // namespace pf

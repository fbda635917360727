// Code that every kernel shares: storage types, float32 functions that a compiler can vectorize, and sums in a fixed
// order.
//
// The float32 functions are branch-free polynomials (our own minimax fits). Their error is at most 2 ulp. The functions
// propagate NaN and handle infinities. Without fused multiply-adds they give the same bits on every CPU. The float64
// functions call libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

// Forces inlining, for the instruction set of the caller. Lambdas need PF_INLINED_LAMBDA.
#if defined(__GNUC__)
#define PF_INLINE __attribute__((always_inline)) inline
#define PF_INLINED_LAMBDA __attribute__((always_inline))
#else
#define PF_INLINE inline
#define PF_INLINED_LAMBDA
#endif

namespace pf {

template <class To, class From>
PF_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

// 16-bit floats are stored in these types. All arithmetic is in float.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// The type of the arithmetic on numbers of a storage type.
template <class T>
struct wide {
  using type = float;
};
template <>
struct wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename wide<T>::type;

PF_INLINE float load(float x) { return x; }
PF_INLINE double load(double x) { return x; }
PF_INLINE float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
PF_INLINE float load(half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Multiplying by a power of two shifts the exponent exactly, also for subnormal numbers.
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  const uint32_t bits = magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

// A store rounds to the nearest number, and ties to even, like PyTorch.
PF_INLINE void store(float& to, float x) { to = x; }
PF_INLINE void store(double& to, double x) { to = x; }
PF_INLINE void store(bfloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
PF_INLINE void store(half& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? 0x7c00u : out;
  out = magnitude > 0x7f800000u ? 0x7e00u : out;
  to.bits = static_cast<uint16_t>(out | sign);
}

// max, min and clamp propagate NaN, like torch.maximum, torch.minimum and torch.clamp. Compilers vectorize this form,
// but not `a > b || a != a`.
template <class W>
PF_INLINE W max_nan(W a, W b) {
  const W most = a > b ? a : b;
  return a != a ? a : most;
}
template <class W>
PF_INLINE W min_nan(W a, W b) {
  const W least = a < b ? a : b;
  return a != a ? a : least;
}
template <class W>
PF_INLINE W clamp_nan(W x, W lo, W hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}
template <class W>
PF_INLINE W abs(W x) {
  return x < 0 ? -x : x;
}
template <class W>
PF_INLINE bool finite(W x) {
  constexpr W largest = std::numeric_limits<W>::max();
  return abs(x) <= largest;
}

namespace detail {

// ln2_hi has 12 bits, so n * ln2_hi is exact.
constexpr float ln2_hi = 0.693115234375f, ln2_lo = 3.1946183e-05f;
// 1.5 * 2^23. Adding it to a float rounds the float to an integer.
constexpr float magic = 12582912.0f;

// Returns exp(r) - 1 for |r| <= ln(2) / 2.
PF_INLINE float exp_minus_one(float r) {
  float p = 1.98458769e-4f;
  p = p * r + 1.39406252e-3f;
  p = p * r + 8.33338937e-3f;
  p = p * r + 0.0416663609f;
  p = p * r + 0.166666664f;
  p = p * r + 0.500000004f;
  return r + r * r * p;
}

// Splits x into n ln 2 + r, |r| <= ln(2) / 2, and returns exp(r) - 1. For NaN, the result is NaN, and n arbitrary.
PF_INLINE float reduce_exp(float x, int32_t& n) {
  const float shifted = x * 1.44269504f + magic;
  n = static_cast<int32_t>(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(magic));
  const float whole = shifted - magic;
  return exp_minus_one((x - whole * ln2_hi) - whole * ln2_lo);
}

PF_INLINE float power_of_two(int32_t n) { return bit_cast<float>((static_cast<uint32_t>(n) + 127u) << 23); }

// Returns log(1 + f) + small, for sqrt(1/2) <= 1 + f <= sqrt(2), adding `small` to small terms first.
PF_INLINE float log_near_one(float f, float small) {
  float p = 0.067476823f;
  p = p * f - 0.116775028f;
  p = p * f + 0.11888712f;
  p = p * f - 0.124053432f;
  p = p * f + 0.142194513f;
  p = p * f - 0.16668005f;
  p = p * f + 0.200021235f;
  p = p * f - 0.250000095f;
  p = p * f + 0.333333125f;
  const float square = f * f;
  return f + (p * f * square - 0.5f * square + small);
}

}  // namespace detail

PF_INLINE float exp(float x) {
  // The result is infinite for every x above this bound.
  x = x > 90.0f ? 90.0f : x;
  x = x < -105.0f ? -105.0f : x;
  int32_t n;
  const float p = 1.0f + detail::reduce_exp(x, n);
  // The scaling takes two steps, because 2^n itself may overflow or be subnormal.
  const int32_t half_n = n >> 1;
  return p * detail::power_of_two(half_n) * detail::power_of_two(n - half_n);
}

// Holds exp(x) and exp(x) - 1 for x <= 0. The member `exp` has the same bits as the function exp, except that it is 0
// where exp(x) is subnormal. exp_units needs only two thirds of the instructions of the function exp. NaN gives NaN.
template <class W>
struct ExpUnit {
  W exp, minus_one;
};
PF_INLINE ExpUnit<float> exp_units(float x) {
  // With this shift, the low bits of `shifted` are the biased exponent of the result.
  constexpr float least = -87.33654f, shift = detail::magic + 127.0f;
  const float bounded = x < least ? least : x;
  const float shifted = bounded * 1.44269504f + shift;
  const float whole = shifted - shift;
  const float q = detail::exp_minus_one((bounded - whole * detail::ln2_hi) - whole * detail::ln2_lo);
  const float scale = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  return {(x < least ? 0.0f : 1.0f + q) * scale, scale * q + (scale - 1.0f)};
}
PF_INLINE float exp_unit(float x) { return exp_units(x).exp; }

PF_INLINE float expm1(float x) {
  x = x > 88.8f ? 88.8f : x;
  x = x < -40.0f ? -40.0f : x;
  int32_t n;
  const float q = detail::reduce_exp(x, n);
  // `scale` is half of 2^n, because 2^n may overflow although the result does not.
  const float scale = detail::power_of_two(n - 1);
  const float out = 2.0f * (scale * q + (scale - 0.5f));
  // For n = 0 the scaling is skipped, because it would round a subnormal number.
  return n == 0 ? q : out;
}

PF_INLINE float log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const uint32_t bits = bit_cast<uint32_t>(tiny ? x * 8388608.0f : x);
  // n is the exponent for which the mantissa is in [sqrt(1/2), sqrt(2)).
  const int32_t n = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float mantissa = bit_cast<float>(bits - (static_cast<uint32_t>(n) << 23));
  const float whole = static_cast<float>(tiny ? n - 23 : n);
  constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  float out = whole * detail::ln2_hi + detail::log_near_one(mantissa - 1.0f, whole * detail::ln2_lo);
  out = x == infinity ? x : out;
  out = x > 0.0f ? out : nan;
  return x == 0.0f ? -infinity : out;
}

// Returns log(1 + x) for 0 <= x <= 1. The losses need only this range.
PF_INLINE float log1p_unit(float x) {
  const bool upper = x > 0.41421354f;
  const float f = upper ? 0.5f * (x - 1.0f) : x;
  return (upper ? detail::ln2_hi : 0.0f) + detail::log_near_one(f, upper ? detail::ln2_lo : 0.0f);
}

// Computes the sine and the cosine for 0 <= x <= 2 pi.
PF_INLINE void sincos_turn(float x, float& sine, float& cosine) {
  const float shifted = x * 0.636619772f + detail::magic;
  // The two low bits are the quadrant.
  const uint32_t quadrant = bit_cast<uint32_t>(shifted);
  const float n = shifted - detail::magic;
  const float r = ((x - n * 1.57080078125f) + n * 4.455447196960449e-06f) - n * 9.920936e-10f;
  const float z = r * r;
  const float s = r + r * z * (-0.166666666f + z * (0.0083333293f + z * (-1.98393115e-4f + z * 2.71811403e-6f)));
  const float c = (1.0f - 0.5f * z) + z * z * (0.0416666457f + z * (-0.00138873156f + z * 2.44330808e-5f));
  const float sine_size = quadrant & 1u ? c : s, cosine_size = quadrant & 1u ? s : c;
  sine = quadrant & 2u ? -sine_size : sine_size;
  cosine = (quadrant + 1u) & 2u ? -cosine_size : cosine_size;
}

PF_INLINE double exp(double x) { return ::exp(x); }
PF_INLINE double exp_unit(double x) { return ::exp(x); }
PF_INLINE ExpUnit<double> exp_units(double x) { return {::exp(x), ::expm1(x)}; }
PF_INLINE double expm1(double x) { return ::expm1(x); }
PF_INLINE double log(double x) { return ::log(x); }
PF_INLINE double log1p_unit(double x) { return ::log1p(x); }
PF_INLINE float sqrt(float x) { return ::sqrtf(x); }
PF_INLINE double sqrt(double x) { return ::sqrt(x); }

// Returns the sigmoid, or 0 where the sigmoid would be subnormal.
template <class W>
PF_INLINE W sigmoid(W x) {
  const W e = exp_unit(-abs(x));
  return (x < 0 ? e : W(1)) / (1 + e);
}

// Sets out[i] = value(i). Rounding to 16 bits has its own loop: with clamps, compilers do not vectorize it.
template <class T, class F>
PF_INLINE void store_all(T* __restrict__ out, int64_t n, F value) {
  if constexpr (sizeof(T) == 2) {
    constexpr int64_t block = 128;
    float rounded[block];
    for (int64_t start = 0; start < n; start += block) {
      const int64_t count = n - start < block ? n - start : block;
      for (int64_t i = 0; i < count; ++i) rounded[i] = value(start + i);
      for (int64_t i = 0; i < count; ++i) store(out[start + i], rounded[i]);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) store(out[i], value(i));
}

// Returns the sum of term(i) for all i < n. The order of the additions depends only on n. Each block has 16 running
// sums, and the sums of the blocks are added in double.
template <class W, class F>
PF_INLINE W ordered_sum(int64_t n, F term) {
  constexpr int lanes = 16, block = 64 * lanes;
  const int64_t whole = n / lanes * lanes;
  double total = 0;
  for (int64_t start = 0; start < whole; start += block) {
    const int64_t stop = start + block < whole ? start + block : whole;
    W sum[lanes] = {};
    for (int64_t i = start; i < stop; i += lanes) {
      for (int j = 0; j < lanes; ++j) sum[j] += term(i + j);
    }
    for (int width = lanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
    }
    total += sum[0];
  }
  W rest = 0;
  for (int64_t i = whole; i < n; ++i) rest += term(i);
  return static_cast<W>(total + rest);
}

// Returns the largest of n numbers, NaN if there is one, and -infinity if n is 0.
template <class T>
PF_INLINE wide_t<T> largest(const T* __restrict__ x, int64_t n) {
  // With several maxima, a comparison does not wait for the previous one. Few numbers do not need them.
  constexpr int64_t lanes = 64, few = 16;
  wide_t<T> most[lanes] = {-std::numeric_limits<wide_t<T>>::infinity()};
  if (n < few) {
    for (int64_t i = 0; i < n; ++i) most[0] = max_nan(wide_t<T>(load(x[i])), most[0]);
    return most[0];
  }
  for (int64_t j = 1; j < lanes; ++j) most[j] = most[0];
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) most[j] = max_nan(wide_t<T>(load(x[i + j])), most[j]);
  }
  for (int64_t i = whole; i < n; ++i) most[i - whole] = max_nan(wide_t<T>(load(x[i])), most[i - whole]);
  for (int64_t width = lanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) most[j] = max_nan(most[j], most[j + width]);
  }
  return most[0];
}

}  // namespace pf

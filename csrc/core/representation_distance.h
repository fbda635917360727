// Distances between representations. purify_fast/ops/representation_distance.py has the definition.
#pragma once

#include "math.h"

namespace pf {

enum class Distance : int { abs_cosine = 0, cosine = 1, angular = 2, l2 = 3 };

// If |u||v| is less than least_norms, the cosine c and its gradient count as 0. The slope of arccos is computed with
// max(1 - c^2, least_square_sine).
constexpr double least_norms = 1e-30, least_square_sine = 1e-4;

// The numbers u.v, |u|^2 and |v|^2 of one sample.
struct Products {
  double dot, uu, vv;
};

// The distance of u from v. Its gradient with respect to u is scale * (v - along * u), which is exactly 0 at u = v.
struct Measured {
  double distance, scale, along;
};

// Adds `lanes` float sums, each over a few numbers and so precise enough, to lanes / 2 sums in double.
template <int lanes, class W>
PF_INLINE void fold(const W* x, double* total) {
  constexpr int half = lanes / 2;
  for (int j = 0; j < half; ++j) total[j] += static_cast<double>(x[j]) + static_cast<double>(x[j + half]);
}
template <int lanes>
PF_INLINE double sum_of(double* x) {
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) x[j] += x[j + width];
  }
  return x[0];
}

// Computes u.v, |u|^2 and |v|^2 in one pass. The order of the additions depends only on n. All three sums use the same
// order, so they are equal to the last bit if u = v.
template <class L, class T, class W = wide_t<L>>
PF_INLINE Products products(const L* u, const T* v, int64_t n) {
  constexpr int lanes = 32;
  constexpr int block = 32 * lanes;
  double dot[lanes / 2] = {}, uu[lanes / 2] = {}, vv[lanes / 2] = {};
  const int64_t whole = n / lanes * lanes;
  for (int64_t start = 0; start < whole; start += block) {
    const int64_t stop = start + block < whole ? start + block : whole;
    W dots[lanes] = {}, us[lanes] = {}, vs[lanes] = {};
    for (int64_t i = start; i < stop; i += lanes) {
      for (int j = 0; j < lanes; ++j) {
        const W a = load(u[i + j]), b = load(v[i + j]);
        dots[j] += a * b;
        us[j] += a * a;
        vs[j] += b * b;
      }
    }
    fold<lanes>(dots, dot);
    fold<lanes>(us, uu);
    fold<lanes>(vs, vv);
  }
  for (int64_t i = whole; i < n; ++i) {
    const double a = load(u[i]), b = load(v[i]);
    dot[0] += a * b;
    uu[0] += a * a;
    vv[0] += b * b;
  }
  return {sum_of<lanes / 2>(dot), sum_of<lanes / 2>(uu), sum_of<lanes / 2>(vv)};
}

PF_INLINE Measured angle(Distance kind, Products p) {
  const double norms = sqrt(p.uu * p.vv);
  if (norms < least_norms) return {kind == Distance::angular ? 0.5 : 1.0, 0, 0};
  constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double cosine = norms < infinity ? clamp_nan(p.dot / norms, -1.0, 1.0) : nan;
  const double along = p.dot / p.uu;
  if (kind == Distance::angular) {
    constexpr double pi = 3.14159265358979323846;
    const double square_sine = max_nan(1 - cosine * cosine, least_square_sine);
    return {::acos(cosine) / pi, -1 / (pi * sqrt(square_sine) * norms), along};
  }
  if (kind == Distance::cosine) return {max_nan(1 - cosine, 0.0), -1 / norms + 0 * cosine, along};
  // If the cosine is NaN, the sign is NaN too.
  const double sign = cosine > 0 ? 1 : (cosine < 0 ? -1 : 0 * cosine);
  return {max_nan(1 - abs(cosine), 0.0), -sign / norms, along};
}

// Returns the Euclidean distance and its gradient, from |u - v|^2.
PF_INLINE Measured euclidean(double square) {
  const double distance = sqrt(square);
  return {distance, distance > 0 ? -1 / distance : 0 * distance, 1};
}

template <class L, class T, class W = wide_t<L>>
PF_INLINE W square_distance(const L* u, const T* v, int64_t n) {
  return ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W d = static_cast<W>(load(u[i])) - static_cast<W>(load(v[i]));
    return d * d;
  });
}

// Computes the distance of one sample with n elements.
template <class L, class T>
PF_INLINE Measured representation_distance(Distance kind, const L* u, const T* v, int64_t n) {
  return kind == Distance::l2 ? euclidean(square_distance(u, v, n)) : angle(kind, products(u, v, n));
}

template <class W>
PF_INLINE W representation_slope(W u, W v, W scale, W along) {
  return scale * (v - along * u);
}

}  // namespace pf

// One step of projected gradient descent. purify_fast/ops/pgd_step.py has the definition.
#pragma once

#include <type_traits>

#include "math.h"

namespace pf {

enum class Norm : int { linf = 0, l2 = 1, l1 = 2 };

template <class W>
struct PgdStep {
  W alpha, eps, lo, hi;
};

// Computes the step of one element for linf. A zero or non-finite gradient does not move the element. NaN in x, x_nat,
// alpha or eps gives NaN.
template <class W>
PF_INLINE W pgd_step_linf(W x, W grad, W x_nat, PgdStep<W> step) {
  constexpr W largest = std::numeric_limits<W>::max();
  W sign = grad > 0 ? W(1) : W(0);
  sign = grad < 0 ? W(-1) : sign;
  sign = abs(grad) <= largest ? sign : W(0);
  const W moved = x + step.alpha * sign;
  return clamp_nan(min_nan(max_nan(moved, x_nat - step.eps), x_nat + step.eps), step.lo, step.hi);
}

// The direction g / |g| of the gradient g of one sample, or 0 if any element of g is not finite, or if all are 0. The
// factor 1 / |g| is stored as two numbers, because a single number could overflow. Divisions would take longer.
template <class W>
struct Direction {
  W scale, inverse;
  bool usable;

  PF_INLINE W operator()(W grad) const {
    const W unit = grad * scale * inverse;
    return usable ? unit : W(0);
  }
};

// Returns max |x_i|, or NaN if any element is NaN.
template <class T, class W = wide_t<T>>
PF_INLINE W largest_size(const T* x, int64_t n) {
  constexpr int lanes = 16;
  W peaks[lanes] = {};
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int j = 0; j < lanes; ++j) peaks[j] = max_nan(abs(load(x[i + j])), peaks[j]);
  }
  for (int64_t i = whole; i < n; ++i) peaks[0] = max_nan(abs(load(x[i])), peaks[0]);
  for (int j = 1; j < lanes; ++j) peaks[0] = max_nan(peaks[j], peaks[0]);
  return peaks[0];
}

template <class T, class W = wide_t<T>>
PF_INLINE Direction<W> l2_direction(const T* grad, int64_t n) {
  const W highest = largest_size(grad, n);
  const bool usable = finite(highest) & (highest > 0);
  const W peak = usable ? highest : W(1);
  // `scale` brings any peak, subnormal or huge, into a range in which its inverse is accurate.
  constexpr W small = std::numeric_limits<W>::epsilon() * std::numeric_limits<W>::epsilon(), tiny = small * small;
  const W scale = peak < tiny ? 1 / tiny : (peak > 1 / tiny ? tiny : W(1));
  const W inverse = 1 / (peak * scale);
  // The gradient is divided by max |g| first, so that the squares of tiny gradients do not underflow.
  const W length = usable ? sqrt(ordered_sum<W>(n,
                                                [=](int64_t i) PF_INLINED_LAMBDA {
                                                  const W g = load(grad[i]) * scale * inverse;
                                                  return g * g;
                                                }))
                          : W(1);
  return {scale, inverse / length, usable};
}

// Returns the factor, at most 1, by which the vector offset(i), i < n, must be multiplied to be in the L2 ball of
// radius eps.
template <class W, class F>
PF_INLINE W l2_shrink(int64_t n, W eps, F offset) {
  const W radius = sqrt(ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W d = offset(i);
    return d * d;
  }));
  return radius > eps ? eps / radius : W(1);
}

// Computes the step of one sample with n elements, for l2.
template <class T, class W = wide_t<T>>
PF_INLINE void pgd_step_l2(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<W> step) {
  const Direction<W> direction = l2_direction(grad, n);
  const W alpha = step.alpha;
  const auto offset = [=](int64_t i) PF_INLINED_LAMBDA {
    return (load(x[i]) + alpha * direction(load(grad[i]))) - load(x_nat[i]);
  };
  const W shrink = l2_shrink(n, step.eps, offset);
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return clamp_nan(load(x_nat[i]) + offset(i) * shrink, step.lo, step.hi);
  });
}

template <class W>
using bits_t = std::conditional_t<sizeof(W) == 8, int64_t, int32_t>;

// Returns a threshold above 0 that only the k largest of the x_i in [0, most], i < n, and numbers equal to the k-th
// largest reach. Zeros are always below it. The search bisects bit patterns, which have the same order as such numbers.
template <class W>
PF_INLINE W reached_by(int64_t k, const W* x, int64_t n, W most) {
  // At least k elements are >= low, and fewer than k are >= high.
  bits_t<W> low = 0, high = bit_cast<bits_t<W>>(most) + 1;
  while (high - low > 1) {
    const bits_t<W> middle = low + (high - low) / 2;
    const W least = bit_cast<W>(middle);
    bits_t<W> count = 0;
    for (int64_t i = 0; i < n; ++i) count += x[i] >= least ? 1 : 0;
    (count >= k ? low : high) = middle;
    if (count == k) break;
  }
  return bit_cast<W>(low > 0 ? low : bits_t<W>(1));
}

// Computes the step of one sample with n elements for l1. The k elements with the largest gradients move. `scratch` has
// room for 3 n numbers.
template <class T, class W = wide_t<T>>
PF_INLINE void pgd_step_l1(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<W> step, int64_t k,
                           W* scratch) {
  W *moved = scratch, *size = scratch + n, *room = scratch + 2 * n;
  const W lo = step.lo, hi = step.hi, most = largest_size(grad, n);
  W least = std::numeric_limits<W>::infinity(), length = 0;
  if (finite(most)) {
    store_all(size, n, [=](int64_t i) PF_INLINED_LAMBDA {
      const W at = load(x[i]), g = load(grad[i]);
      const bool stopped = ((at >= hi) & (g > 0)) | ((at <= lo) & (g < 0));
      return stopped ? W(0) : abs(g);
    });
    least = reached_by(k, size, n, most);
    bits_t<W> count = 0;
    for (int64_t i = 0; i < n; ++i) count += (size[i] >= least) & (size[i] > 0) ? 1 : 0;
    length = step.alpha * (1 / static_cast<W>(count > 0 ? count : 1));
  } else {
    store_all(size, n, [](int64_t) PF_INLINED_LAMBDA { return W(0); });
  }
  store_all(moved, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W ahead = load(grad[i]) > 0 ? length : -length;
    // `size > 0` is needed because a processor that flushes denormals treats the smallest threshold as 0.
    return load(x[i]) + ((size[i] >= least) & (size[i] > 0) ? ahead : W(0));
  });

  const auto offset = [=](int64_t i) PF_INLINED_LAMBDA { return moved[i] - load(x_nat[i]); };
  store_all(size, n, [=](int64_t i) PF_INLINED_LAMBDA { return abs(offset(i)); });
  store_all(room, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W center = load(x_nat[i]), free = offset(i) > 0 ? hi - center : center - lo;
    return free > 0 ? free : W(0);
  });
  // The comparison is false for NaN.
  const auto outside = [=](W shift) PF_INLINED_LAMBDA {
    return ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return clamp_nan(size[i] - shift, W(0), room[i]); }) >
           step.eps;
  };
  const bool moves = outside(0);
  W outer = 0;
  if (moves) {
    W inner = 0;
    outer = largest_size(size, n);
    for (int i = 0; i < std::numeric_limits<W>::digits; ++i) {
      const W middle = (inner + outer) / 2;
      (outside(middle) ? inner : outer) = middle;
    }
  }
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W center = load(x_nat[i]), d = offset(i), left = clamp_nan(abs(d) - outer, W(0), abs(d));
    const W z = center + (d < 0 ? -left : left);
    return clamp_nan(moves | (d != d) ? z : moved[i], lo, hi);
  });
}

}  // namespace pf

// One step of projected gradient descent (purify_fast/ops/pgd_step.py is the definition).
#pragma once

#include "math.h"

namespace pf {

enum class Norm : int { linf = 0, l2 = 1 };

template <class W>
struct PgdStep {
  W alpha, eps, lo, hi;
};

// One element. A non-finite or zero gradient moves nothing; NaN in x, x_nat, alpha or eps stays.
template <class W>
PF_HD W pgd_step_linf(W x, W grad, W x_nat, PgdStep<W> step) {
  constexpr W largest = std::numeric_limits<W>::max();
  W sign = grad > 0 ? W(1) : W(0);
  sign = grad < 0 ? W(-1) : sign;
  sign = abs(grad) <= largest ? sign : W(0);
  const W moved = x + step.alpha * sign;
  return clamp_nan(min_nan(max_nan(moved, x_nat - step.eps), x_nat + step.eps), step.lo, step.hi);
}

// The direction g / |g| of a sample; 0 if any element is not finite, or all are zero. In two factors, since one alone
// might overflow; and no divisions, which would take most of the time.
template <class W>
struct Direction {
  W scale, inverse;
  bool usable;

  PF_HD W operator()(W grad) const {
    const W unit = grad * scale * inverse;
    return usable ? unit : W(0);
  }
};

template <class T, class W = wide_t<T>>
PF_HD Direction<W> l2_direction(const T* grad, int64_t n) {
  constexpr int lanes = 16;
  W peaks[lanes] = {};  // max |g|; each lane keeps NaN
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int j = 0; j < lanes; ++j) peaks[j] = max_nan(abs(load(grad[i + j])), peaks[j]);
  }
  for (int64_t i = whole; i < n; ++i) peaks[0] = max_nan(abs(load(grad[i])), peaks[0]);
  for (int j = 1; j < lanes; ++j) peaks[0] = max_nan(peaks[j], peaks[0]);

  const bool usable = finite(peaks[0]) & (peaks[0] > 0);
  const W peak = usable ? peaks[0] : W(1);
  // brings any peak, subnormal or huge, to where its inverse is exact enough
  constexpr W small = std::numeric_limits<W>::epsilon() * std::numeric_limits<W>::epsilon(), tiny = small * small;
  const W scale = peak < tiny ? 1 / tiny : (peak > 1 / tiny ? tiny : W(1));
  const W inverse = 1 / (peak * scale);
  // scaled by max |g|, so that the squares of tiny gradients do not vanish
  const W length = usable ? sqrt(ordered_sum<W>(n,
                                                [=](int64_t i) PF_INLINE {
                                                  const W g = load(grad[i]) * scale * inverse;
                                                  return g * g;
                                                }))
                          : W(1);
  return {scale, inverse / length, usable};
}

// What offset(i), i < n, is multiplied by to lie in the ball.
template <class W, class F>
PF_HD W l2_shrink(int64_t n, W eps, F offset) {
  const W radius = sqrt(ordered_sum<W>(n, [=](int64_t i) PF_INLINE {
    const W d = offset(i);
    return d * d;
  }));
  return radius > eps ? eps / radius : W(1);
}

// One sample of n elements.
template <class T, class W = wide_t<T>>
PF_HD void pgd_step_l2(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<W> step) {
  const Direction<W> direction = l2_direction(grad, n);
  const W alpha = step.alpha;
  const auto offset = [=](int64_t i)
                          PF_INLINE { return (load(x[i]) + alpha * direction(load(grad[i]))) - load(x_nat[i]); };
  const W shrink = l2_shrink(n, step.eps, offset);
  store_all(out, n,
            [=](int64_t i) PF_INLINE { return clamp_nan(load(x_nat[i]) + offset(i) * shrink, step.lo, step.hi); });
}

}  // namespace pf

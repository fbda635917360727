// One step of Auto-PGD. purify_fast/ops/apgd_step.py has the definition.
#pragma once

#include "pgd_step.h"

namespace pf {

template <class W>
struct ApgdStep : PgdStep<W> {
  // momentum is the factor a of the definition, and rest is 1 - a. The difference is computed in double, then rounded.
  W momentum, rest;
};

// z is the result of the step without momentum. Returns x plus a part of the move from x to z, plus a part of the
// previous move.
template <class W>
PF_INLINE W with_momentum(W x, W z, W previous, ApgdStep<W> step) {
  return x + step.momentum * (z - x) + step.rest * (x - previous);
}

// Computes the step of one element, for linf.
template <class W>
PF_INLINE W apgd_step_linf(W x, W grad, W x_nat, W previous, ApgdStep<W> step) {
  const W moved = with_momentum(x, pgd_step_linf<W>(x, grad, x_nat, step), previous, step);
  return clamp_nan(min_nan(max_nan(moved, x_nat - step.eps), x_nat + step.eps), step.lo, step.hi);
}

// Computes the step of one sample with n elements, for l2. `scratch` has room for n numbers.
template <class T, class W = wide_t<T>>
PF_INLINE void apgd_step_l2(const T* x, const T* grad, const T* x_nat, const T* previous, T* out, int64_t n,
                            ApgdStep<W> step, W* scratch) {
  const Direction<W> direction = l2_direction(grad, n);
  const W alpha = step.alpha;
  const auto offset = [=](int64_t i) PF_INLINED_LAMBDA {
    return (load(x[i]) + alpha * direction(load(grad[i]))) - load(x_nat[i]);
  };
  const W inner = l2_shrink(n, step.eps, offset);
  store_all(scratch, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W from = load(x[i]), center = load(x_nat[i]);
    const W z = clamp_nan(center + offset(i) * inner, step.lo, step.hi);
    return with_momentum(from, z, load(previous[i]), step) - center;
  });
  const W outer = l2_shrink(n, step.eps, [=](int64_t i) PF_INLINED_LAMBDA { return scratch[i]; });
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return clamp_nan(load(x_nat[i]) + scratch[i] * outer, step.lo, step.hi);
  });
}

}  // namespace pf

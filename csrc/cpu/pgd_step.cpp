#include "../core/pgd_step.h"

#include "common.h"

namespace pf::cpu {
namespace {

template <class T>
PF_INLINE void linf_loop(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<wide_t<T>> step) {
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return pgd_step_linf(load(x[i]), load(grad[i]), load(x_nat[i]), step);
  });
}

// Calls step(x, grad, x_nat, out, scratch) for one sample. The step reads its inputs several times, so float16 is
// converted once, before the step. The conversion needs 4 n numbers of scratch memory.
template <class T, class W, class F>
PF_INLINE void widened(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, W* scratch, F step) {
  if constexpr (std::is_same_v<T, half>) {
    W *wide_x = scratch, *wide_grad = scratch + n, *wide_nat = scratch + 2 * n, *wide_out = scratch + 3 * n;
    for (int64_t i = 0; i < n; ++i) wide_x[i] = load(x[i]);
    for (int64_t i = 0; i < n; ++i) wide_grad[i] = load(grad[i]);
    for (int64_t i = 0; i < n; ++i) wide_nat[i] = load(x_nat[i]);
    step(wide_x, wide_grad, wide_nat, wide_out, scratch + 4 * n);
    for (int64_t i = 0; i < n; ++i) store(out[i], wide_out[i]);
  } else {
    step(x, grad, x_nat, out, scratch);
  }
}

template <class T, class W = wide_t<T>>
PF_INLINE void l2_sample(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<W> step, W* scratch) {
  widened(x, grad, x_nat, out, n, scratch,
          [=](const auto* a, const auto* g, const auto* b, auto* to, W*)
              PF_INLINED_LAMBDA { pgd_step_l2(a, g, b, to, n, step); });
}

template <class T, class W = wide_t<T>>
PF_INLINE void l1_sample(const T* x, const T* grad, const T* x_nat, T* out, int64_t n, PgdStep<W> step, int64_t k,
                         W* scratch) {
  widened(x, grad, x_nat, out, n, scratch,
          [=](const auto* a, const auto* g, const auto* b, auto* to, W* rest)
              PF_INLINED_LAMBDA { pgd_step_l1(a, g, b, to, n, step, k, rest); });
}

#define PF_LOOPS(CLONES, T)                                                                                \
  CLONES void linf(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ x_nat,       \
                   T* __restrict__ out, int64_t n, PgdStep<wide_t<T>> step) {                              \
    linf_loop(x, grad, x_nat, out, n, step);                                                               \
  }                                                                                                        \
  CLONES void l2(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ x_nat,         \
                 T* __restrict__ out, int64_t n, PgdStep<wide_t<T>> step, wide_t<T>* scratch) {            \
    l2_sample(x, grad, x_nat, out, n, step, scratch);                                                      \
  }                                                                                                        \
  CLONES void l1(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ x_nat,         \
                 T* __restrict__ out, int64_t n, PgdStep<wide_t<T>> step, int64_t k, wide_t<T>* scratch) { \
    l1_sample(x, grad, x_nat, out, n, step, k, scratch);                                                   \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

Tensor pgd_step(Tensor x, Tensor grad, Tensor x_nat, Tensor alpha, Tensor eps, int64_t norm, double lo, double hi,
                double density) {
  const ScalarType dtype = x.scalar_type(), wide_type = wide_dtype(dtype);
  x = dense(x);
  grad = dense(grad, dtype);
  x_nat = dense(x_nat, dtype);
  alpha = dense(alpha, wide_type);
  eps = dense(eps, wide_type);
  Tensor out = new_like(x);
  const int64_t samples = x.size(0), n = samples > 0 ? x.numel() / samples : 0;
  if (x.numel() == 0) return out;
  dispatch(dtype, "pgd_step", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T *px = data<T>(x), *pg = data<T>(grad), *pn = data<T>(x_nat);
    const W *pa = data<W>(alpha), *pe = data<W>(eps);
    T* to = writable<T>(out);
    const auto step = [&](int64_t b) { return PgdStep<W>{pa[b], pe[b], static_cast<W>(lo), static_cast<W>(hi)}; };
    constexpr int64_t wider = std::is_same_v<T, half> ? 4 : 0;
    if (static_cast<Norm>(norm) == Norm::l2) {
      parallel_rows(samples, 2 * n, [&](int64_t begin, int64_t end) {
        std::vector<W> scratch(wider * n);
        for (int64_t b = begin; b < end; ++b) {
          l2(px + b * n, pg + b * n, pn + b * n, to + b * n, n, step(b), scratch.data());
        }
      });
    } else if (static_cast<Norm>(norm) == Norm::l1) {
      const auto share = static_cast<int64_t>(density * static_cast<double>(n) + 0.5), k = share > 0 ? share : 1;
      // The step of a sample makes about fifty short passes over its elements.
      parallel_rows(samples, 10 * n, [&](int64_t begin, int64_t end) {
        std::vector<W> scratch((wider + 3) * n);
        for (int64_t b = begin; b < end; ++b) {
          l1(px + b * n, pg + b * n, pn + b * n, to + b * n, n, step(b), k, scratch.data());
        }
      });
    } else {
      split_elements(samples, n, [&](int64_t b, int64_t begin, int64_t count) {
        linf(px + begin, pg + begin, pn + begin, to + begin, count, step(b));
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("pgd_step", TORCH_BOX(&pf::cpu::pgd_step)); }

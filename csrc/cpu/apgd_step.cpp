// Without fused multiply-adds, the linf step has the same bits as the reference.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/apgd_step.h"

#include "common.h"

namespace pf::cpu {
namespace {

template <class T>
PF_INLINE void linf_loop(const T* x, const T* grad, const T* x_nat, const T* previous, T* out, int64_t n,
                         ApgdStep<wide_t<T>> step) {
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return apgd_step_linf(load(x[i]), load(grad[i]), load(x_nat[i]), load(previous[i]), step);
  });
}

#define PF_LOOPS(CLONES, T)                                                                                    \
  CLONES void linf(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ x_nat,           \
                   const T* __restrict__ previous, T* __restrict__ out, int64_t n, ApgdStep<wide_t<T>> step) { \
    linf_loop(x, grad, x_nat, previous, out, n, step);                                                         \
  }                                                                                                            \
  CLONES void l2(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ x_nat,             \
                 const T* __restrict__ previous, T* __restrict__ out, int64_t n, ApgdStep<wide_t<T>> step,     \
                 wide_t<T>* scratch) {                                                                         \
    apgd_step_l2(x, grad, x_nat, previous, out, n, step, scratch);                                             \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

Tensor apgd_step(Tensor x, Tensor grad, Tensor x_nat, Tensor previous, Tensor alpha, Tensor eps, double momentum,
                 int64_t norm, double lo, double hi) {
  const ScalarType dtype = x.scalar_type(), wide_type = wide_dtype(dtype);
  x = dense(x);
  grad = dense(grad, dtype);
  x_nat = dense(x_nat, dtype);
  previous = dense(previous, dtype);
  alpha = dense(alpha, wide_type);
  eps = dense(eps, wide_type);
  Tensor out = new_like(x);
  const int64_t samples = x.size(0), n = samples > 0 ? x.numel() / samples : 0;
  if (x.numel() == 0) return out;
  dispatch(dtype, "apgd_step", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T *px = data<T>(x), *pg = data<T>(grad), *pn = data<T>(x_nat), *pp = data<T>(previous);
    const W *pa = data<W>(alpha), *pe = data<W>(eps);
    T* to = writable<T>(out);
    const auto step = [&](int64_t b) {
      return ApgdStep<W>{{pa[b], pe[b], static_cast<W>(lo), static_cast<W>(hi)},
                         static_cast<W>(momentum),
                         static_cast<W>(1 - momentum)};
    };
    if (static_cast<Norm>(norm) == Norm::l2) {
      parallel_rows(samples, 3 * n, [&](int64_t begin, int64_t end) {
        std::vector<W> scratch(n);
        for (int64_t b = begin; b < end; ++b) {
          l2(px + b * n, pg + b * n, pn + b * n, pp + b * n, to + b * n, n, step(b), scratch.data());
        }
      });
    } else {
      split_elements(samples, n, [&](int64_t b, int64_t begin, int64_t count) {
        linf(px + begin, pg + begin, pn + begin, pp + begin, to + begin, count, step(b));
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("apgd_step", TORCH_BOX(&pf::cpu::apgd_step)); }

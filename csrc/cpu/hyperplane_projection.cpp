#include "../core/hyperplane_projection.h"

#include "common.h"

namespace pf::cpu {
namespace {

#define PF_LOOPS(CLONES, T)                                                                                        \
  CLONES void project(const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ out, int64_t n, Norm norm, \
                      Plane<wide_t<T>> plane, wide_t<T>* scratch) {                                                \
    hyperplane_projection(x, w, out, n, norm, plane, scratch);                                                     \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

Tensor project_all(Tensor x, Tensor w, Tensor b, int64_t norm, double lo, double hi) {
  const ScalarType dtype = x.scalar_type();
  x = dense(x);
  w = dense(w, dtype);
  b = dense(b, wide_dtype(dtype));
  Tensor out = new_like(x);
  const int64_t rows = x.size(0), n = rows > 0 ? x.numel() / rows : 0;
  if (x.numel() == 0) return out;
  dispatch(dtype, "hyperplane_projection", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T *px = data<T>(x), *pw = data<T>(w);
    const W* pb = data<W>(b);
    T* to = writable<T>(out);
    // The projection of a row makes about ten to thirty short passes over its elements.
    parallel_rows(rows, 10 * n, [&](int64_t begin, int64_t end) {
      std::vector<W> scratch(2 * n);
      for (int64_t row = begin; row < end; ++row) {
        project(px + row * n, pw + row * n, to + row * n, n, static_cast<Norm>(norm),
                Plane<W>{pb[row], static_cast<W>(lo), static_cast<W>(hi)}, scratch.data());
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("hyperplane_projection", TORCH_BOX(&pf::cpu::project_all)); }

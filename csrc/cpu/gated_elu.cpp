#include "../core/gated_elu.h"

#include "common.h"

namespace pf::cpu {
namespace {

// A row has n numbers a, followed by n numbers b. A row is an image, or in channels_last a pixel. The numbers `a` of
// all rows are indexed without gaps, and a tile has `tile` of them. So the loops are long even if n is small.
constexpr int64_t tile = 1024;

// Calls f(offset in the tile, index of a, length) for contiguous parts of the elements [first, first + count).
template <class F>
PF_INLINE void for_each_stretch(int64_t first, int64_t count, int64_t n, F f) {
  int64_t row = first / n, at = first % n;
  for (int64_t done = 0; done < count; ++row, at = 0) {
    const int64_t length = n - at < count - done ? n - at : count - done;
    f(done, row * 2 * n + at, length);
    done += length;
  }
}
template <class T>
PF_INLINE void gather(const T* rows, int64_t first, int64_t count, int64_t n, T* a, T* b) {
  for_each_stretch(first, count, n, [=](int64_t to, int64_t from, int64_t length) PF_INLINED_LAMBDA {
    for (int64_t i = 0; i < length; ++i) a[to + i] = rows[from + i];
    for (int64_t i = 0; i < length; ++i) b[to + i] = rows[from + n + i];
  });
}
template <class T>
PF_INLINE void scatter(const T* a, const T* b, int64_t first, int64_t count, int64_t n, T* rows) {
  for_each_stretch(first, count, n, [=](int64_t from, int64_t to, int64_t length) PF_INLINED_LAMBDA {
    for (int64_t i = 0; i < length; ++i) rows[to + i] = a[from + i];
    for (int64_t i = 0; i < length; ++i) rows[to + n + i] = b[from + i];
  });
}

template <class T>
PF_INLINE void forward_loop(const T* features, T* out, int64_t n, int64_t begin, int64_t end) {
  T a[tile], b[tile];
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = end - first < tile ? end - first : tile;
    gather(features, first, count, n, a, b);
    const T *pa = a, *pb = b;
    store_all(out + first, count, [=](int64_t i) PF_INLINED_LAMBDA { return pf::gated_elu(load(pa[i]), load(pb[i])); });
  }
}
template <class T, class W = wide_t<T>>
PF_INLINE void backward_loop(const T* grad, const T* features, T* out, int64_t n, int64_t begin, int64_t end) {
  T a[tile], b[tile];
  W slope_a[tile], slope_b[tile];
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = end - first < tile ? end - first : tile;
    gather(features, first, count, n, a, b);
    for (int64_t i = 0; i < count; ++i) {
      const W g = load(grad[first + i]);
      const GatedEluSlope<W> slope = gated_elu_slope<W>(load(a[i]), load(b[i]));
      slope_a[i] = g * slope.a;
      slope_b[i] = g * slope.b;
    }
    for (int64_t i = 0; i < count; ++i) store(a[i], slope_a[i]);
    for (int64_t i = 0; i < count; ++i) store(b[i], slope_b[i]);
    scatter(a, b, first, count, n, out);
  }
}

#define PF_LOOPS(CLONES, T)                                                                                         \
  CLONES void forward(const T* __restrict__ features, T* __restrict__ out, int64_t n, int64_t begin, int64_t end) { \
    forward_loop(features, out, n, begin, end);                                                                     \
  }                                                                                                                 \
  CLONES void backward(const T* __restrict__ grad, const T* __restrict__ features, T* __restrict__ out, int64_t n,  \
                       int64_t begin, int64_t end) {                                                                \
    backward_loop(grad, features, out, n, begin, end);                                                              \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// Returns half of the product of the sizes of dimension `dim` and of all later dimensions.
int64_t half_row(const Tensor& features, int64_t dim) {
  int64_t n = 1;
  for (int64_t i = dim; i < features.dim(); ++i) n *= features.size(i);
  return n / 2;
}

Tensor gated_elu(Tensor features, int64_t dim) {
  const Tensor x = dense(features);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[dim] /= 2;
  Tensor out = new_tensor(sizes.data(), x.dim(), x.scalar_type());
  const int64_t n = half_row(x, dim);
  dispatch(x.scalar_type(), "gated_elu", [&](auto tag) {
    using T = decltype(tag);
    const T* from = data<T>(x);
    T* to = writable<T>(out);
    parallel_rows(out.numel(), 2, [&](int64_t begin, int64_t end) { forward(from, to, n, begin, end); });
  });
  return out;
}

Tensor gated_elu_backward(Tensor grad, Tensor features, int64_t dim) {
  const Tensor x = dense(features), g = dense(grad, features.scalar_type());
  Tensor out = new_like(x);
  const int64_t n = half_row(x, dim);
  dispatch(x.scalar_type(), "gated_elu_backward", [&](auto tag) {
    using T = decltype(tag);
    const T *upstream = data<T>(g), *from = data<T>(x);
    T* to = writable<T>(out);
    parallel_rows(g.numel(), 2, [&](int64_t begin, int64_t end) { backward(upstream, from, to, n, begin, end); });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("gated_elu", TORCH_BOX(&pf::cpu::gated_elu));
  m.impl("gated_elu_backward", TORCH_BOX(&pf::cpu::gated_elu_backward));
}

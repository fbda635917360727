#include "../core/representation_distance.h"

#include "common.h"

namespace pf::cpu {
namespace {

// `Out` is the dtype of the arithmetic if the slope is stored for the backward, and otherwise the student's dtype.
template <class L, class T, class Out, class W = wide_t<L>>
PF_INLINE void backward_loop(W scale, W along, const L* student, const T* teacher, Out* out, int64_t n) {
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return representation_slope<W>(load(student[i]), load(teacher[i]), scale, along);
  });
}

#define PF_LOOPS(CLONES, L, T)                                                                                         \
  CLONES Products all_products(const L* __restrict__ student, const T* __restrict__ teacher, int64_t n) {              \
    return products(student, teacher, n);                                                                              \
  }                                                                                                                    \
  CLONES wide_t<L> all_squares(const L* __restrict__ student, const T* __restrict__ teacher, int64_t n) {              \
    return square_distance(student, teacher, n);                                                                       \
  }                                                                                                                    \
  CLONES void backward(wide_t<L> scale, wide_t<L> along, const L* __restrict__ student, const T* __restrict__ teacher, \
                       L* __restrict__ out, int64_t n) {                                                               \
    backward_loop(scale, along, student, teacher, out, n);                                                             \
  }
PF_FOR_EACH_PAIR(PF_LOOPS)

#define PF_WIDE_SLOPES(CLONES, L, T)                                                              \
  CLONES void keep_slope(wide_t<L> scale, wide_t<L> along, const L* __restrict__ student,         \
                         const T* __restrict__ teacher, wide_t<L>* __restrict__ out, int64_t n) { \
    backward_loop(scale, along, student, teacher, out, n);                                        \
  }
PF_FOR_EACH_PAIR(PF_WIDE_SLOPES)

// Returns float64 if any layer is float64, and float32 otherwise.
ScalarType result_dtype(const std::vector<Tensor>& layers) {
  for (const Tensor& x : layers) {
    if (x.scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

int64_t row_size(const Tensor& x) { return x.size(0) > 0 ? x.numel() / x.size(0) : 0; }

// Returns the distance of one row and the numbers that give its slope.
template <class L, class T>
Measured measured(Distance kind, const L* u, const T* v, int64_t n) {
  return kind == Distance::l2 ? euclidean(all_squares(u, v, n)) : angle(kind, all_products(u, v, n));
}

std::tuple<Tensor, Tensor> representation_distance(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                   int64_t kind) {
  const auto layers = static_cast<int64_t>(student.size()), rows = student[0].size(0);
  const ScalarType dtype = result_dtype(student);
  Tensor distance = new_tensor({rows, layers}, dtype), slopes = new_tensor({rows, layers, 2}, dtype);
  dispatch(dtype, "representation_distance", [&](auto tag) {
    using W = wide_t<decltype(tag)>;
    W *to = writable<W>(distance), *to_slopes = writable<W>(slopes);
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t n = row_size(student[layer]);
      with_pair(student[layer], teacher[layer], "representation_distance", [&](auto* u, auto* v) {
        parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            const Measured row = measured(static_cast<Distance>(kind), u + b * n, v + b * n, n);
            const int64_t at = b * layers + layer;
            to[at] = static_cast<W>(row.distance);
            to_slopes[2 * at] = static_cast<W>(row.scale);
            to_slopes[2 * at + 1] = static_cast<W>(row.along);
          }
        });
      });
    }
  });
  return {distance, slopes};
}

std::vector<Tensor> representation_distance_backward(Tensor grad, std::vector<Tensor> student,
                                                     std::vector<Tensor> teacher, Tensor slopes) {
  const auto layers = static_cast<int64_t>(student.size()), rows = student[0].size(0);
  slopes = dense(slopes);
  grad = dense(grad, slopes.scalar_type());
  std::vector<Tensor> outs;
  for (const Tensor& x : student) outs.push_back(new_like(x));
  dispatch(slopes.scalar_type(), "representation_distance_backward", [&](auto tag) {
    using R = wide_t<decltype(tag)>;
    const R *upstream = data<R>(grad), *slope = data<R>(slopes);
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t n = row_size(student[layer]);
      with_pair(student[layer], teacher[layer], "representation_distance_backward", [&](auto* u, auto* v) {
        using L = std::remove_cvref_t<decltype(*u)>;
        L* to = writable<L>(outs[layer]);
        parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            const int64_t at = b * layers + layer;
            backward(static_cast<wide_t<L>>(upstream[at] * slope[2 * at]), static_cast<wide_t<L>>(slope[2 * at + 1]),
                     u + b * n, v + b * n, to + b * n, n);
          }
        });
      });
    }
  });
  return outs;
}

// Returns the distance of one layer, and its gradient with respect to the student, in the dtype of the arithmetic,
// written while the row is in the cache. purify_fast/ops/representation_distance.py calls this function.
std::tuple<Tensor, Tensor> representation_distance_keeping(Tensor student, Tensor teacher, int64_t kind) {
  const int64_t rows = student.size(0), n = row_size(student);
  const ScalarType dtype = wide_dtype(student.scalar_type());
  Tensor distance = new_tensor({rows}, dtype), slope = new_tensor(student.sizes().data(), student.dim(), dtype);
  with_pair(student, teacher, "representation_distance_keeping", [&](auto* u, auto* v) {
    using L = std::remove_cvref_t<decltype(*u)>;
    using W = wide_t<L>;
    W *to = writable<W>(distance), *to_slope = writable<W>(slope);
    parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * n;
        const Measured row = measured(static_cast<Distance>(kind), u + at, v + at, n);
        to[b] = static_cast<W>(row.distance);
        keep_slope(static_cast<W>(row.scale), static_cast<W>(row.along), u + at, v + at, to_slope + at, n);
      }
    });
  });
  return {distance, slope};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("representation_distance", TORCH_BOX(&pf::cpu::representation_distance));
  m.impl("representation_distance_keeping", TORCH_BOX(&pf::cpu::representation_distance_keeping));
  m.impl("representation_distance_backward", TORCH_BOX(&pf::cpu::representation_distance_backward));
}

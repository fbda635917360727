#include "../core/reconstruction_loss.h"

#include "common.h"

namespace pf::cpu {
namespace {

template <class L, class T, class W = wide_t<L>>
PF_INLINE void forward_loop(const L* logits, const T* target, W* loss, int64_t rows, int64_t n) {
  for (int64_t b = 0; b < rows; ++b) loss[b] = pf::reconstruction_loss(logits + b * n, target + b * n, n);
}
template <class L, class T, class W = wide_t<L>>
PF_INLINE void backward_loop(W grad, const L* logits, const T* target, L* out, int64_t n) {
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return grad * reconstruction_loss_slope<W>(load(logits[i]), load(target[i]));
  });
}

#define PF_LOOPS(CLONES, L, T)                                                                                        \
  CLONES void forward(const L* __restrict__ logits, const T* __restrict__ target, wide_t<L>* __restrict__ loss,       \
                      int64_t rows, int64_t n) {                                                                      \
    forward_loop(logits, target, loss, rows, n);                                                                      \
  }                                                                                                                   \
  CLONES void backward(wide_t<L> grad, const L* __restrict__ logits, const T* __restrict__ target,                    \
                       L* __restrict__ out, int64_t n) {                                                              \
    backward_loop(grad, logits, target, out, n);                                                                      \
  }                                                                                                                   \
  CLONES wide_t<L> keeping(const L* __restrict__ logits, const T* __restrict__ target, wide_t<L>* __restrict__ slope, \
                           int64_t n) {                                                                               \
    return reconstruction_loss_and_slope(logits, target, slope, n);                                                   \
  }
PF_FOR_EACH_PAIR(PF_LOOPS)

#define PF_SCALES(CLONES, T)                                                                                \
  CLONES void scale(wide_t<T> factor, const wide_t<T>* __restrict__ from, T* __restrict__ out, int64_t n) { \
    store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA { return factor * from[i]; });                       \
  }
PF_FOR_EACH_DTYPE(PF_SCALES)

Tensor reconstruction_loss(Tensor logits, Tensor target) {
  const int64_t rows = logits.size(0), n = rows > 0 ? logits.numel() / rows : 0;
  Tensor loss = new_tensor({rows}, wide_dtype(logits.scalar_type()));
  with_pair(logits, target, "reconstruction_loss", [&](auto* l, auto* t) {
    auto* to = writable<wide_t<std::remove_cvref_t<decltype(*l)>>>(loss);
    parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
      forward(l + begin * n, t + begin * n, to + begin, end - begin, n);
    });
  });
  return loss;
}

Tensor reconstruction_loss_backward(Tensor grad, Tensor logits, Tensor target) {
  const int64_t rows = logits.size(0), n = rows > 0 ? logits.numel() / rows : 0;
  Tensor out = new_like(logits);
  const Tensor g = dense(grad, wide_dtype(logits.scalar_type()));
  with_pair(logits, target, "reconstruction_loss", [&](auto* l, auto* t) {
    using L = std::remove_cvref_t<decltype(*l)>;
    const auto* from = data<wide_t<L>>(g);
    L* to = writable<L>(out);
    parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) backward(from[b], l + b * n, t + b * n, to + b * n, n);
    });
  });
  return out;
}

// Also stores the slope, which the backward only scales. purify_fast/ops/reconstruction_loss.py calls this function.
std::tuple<Tensor, Tensor> reconstruction_loss_keeping(Tensor logits, Tensor target) {
  const int64_t rows = logits.size(0), n = rows > 0 ? logits.numel() / rows : 0;
  const ScalarType dtype = wide_dtype(logits.scalar_type());
  Tensor loss = new_tensor({rows}, dtype), slope = new_tensor(logits.sizes().data(), logits.dim(), dtype);
  with_pair(logits, target, "reconstruction_loss", [&](auto* l, auto* t) {
    using W = wide_t<std::remove_cvref_t<decltype(*l)>>;
    W *to = writable<W>(loss), *to_slope = writable<W>(slope);
    parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) to[b] = keeping(l + b * n, t + b * n, to_slope + b * n, n);
    });
  });
  return {loss, slope};
}

// Multiplies row b of `rows` [B, ...] by grad[b], in the dtype of `rows`, and rounds the result to `dtype`.
Tensor scaled_rows(Tensor grad, Tensor rows, ScalarType dtype) {
  const Tensor from = dense(rows), g = dense(grad, from.scalar_type());
  const int64_t count = from.size(0), n = count > 0 ? from.numel() / count : 0;
  Tensor out = new_tensor(from.sizes().data(), from.dim(), dtype);
  dispatch(dtype, "scaled_rows", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const W *factors = data<W>(g), *values = data<W>(from);
    T* to = writable<T>(out);
    // A multiplication is half a unit of the work in `parallel_rows`.
    parallel_rows(count, n / 2, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) scale(factors[b], values + b * n, to + b * n, n);
    });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("reconstruction_loss", TORCH_BOX(&pf::cpu::reconstruction_loss));
  m.impl("reconstruction_loss_keeping", TORCH_BOX(&pf::cpu::reconstruction_loss_keeping));
  m.impl("scaled_rows", TORCH_BOX(&pf::cpu::scaled_rows));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&pf::cpu::reconstruction_loss_backward));
}

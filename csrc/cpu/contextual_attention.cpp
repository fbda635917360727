#include "../core/contextual_attention.h"

#include <memory>

#include "common.h"
#include "moved_rows.h"
#include "patch_norms.h"

namespace pf::cpu {
namespace {

// The arguments that all passes of a call share. Matrices in scratch memory have rows with `size` numbers.
template <class W>
struct Call {
  Grid grid;
  W scale;
  Masks<W> masks;

  Call(int64_t height, int64_t width, double scale) : grid{height, width}, scale(static_cast<W>(scale)), masks(grid) {}
  int64_t cells() const { return grid.cells(); }
  int64_t size() const { return masks.size(); }
  Padded<W> matrix(const W* scratch) const { return {scratch, size()}; }
};

// -- loops over queries -----------------------------------------------------------------------------------------------

// Loops over queries begin .. end - 1 of a sample, whose first row in a `Dense` is `first`.

// Computes the scores before "fuse". A score is the sum of products of pixels over the nine offsets, times the inverse
// norm of the key.
template <class W>
PF_INLINE void scores_loop(const Dense<W>& x, int64_t first, const W* inverse, W* out, const Call<W>& call,
                           int64_t begin, int64_t end) {
  Term<W> terms[9];
  for (int64_t n = begin; n < end; ++n) {
    W* row = out + n * call.size();
    neighbour_terms(x, first, call.grid, n, call.masks, terms);
    sum_terms<9>(terms, row, call.size());
    for (int64_t i = 0; i < call.cells(); ++i) row[i] *= inverse[i];
  }
}
template <class W>
PF_INLINE void rows_loop(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end) {
  Term<W> terms[3];
  for (int64_t n = begin; n < end; ++n) {
    row_terms(call.matrix(x), call.cells(), n, call.masks, terms);
    sum_terms<3>(terms, out + n * call.size(), call.size());
  }
}
template <class W>
PF_INLINE void columns_loop(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end) {
  Term<W> terms[5];
  for (int64_t n = begin; n < end; ++n) {
    column_terms(call.matrix(x), call.grid, n, call.masks, terms);
    sum_terms<5>(terms, out + n * call.size(), call.size());
  }
}
// Computes the weights in scratch memory, and copies them to the tensor that the op returns.
template <class W>
PF_INLINE void attend_loop(const W* x, const W* keep, W* out, W* weights, const Call<W>& call, int64_t begin,
                           int64_t end) {
  const int64_t cells = call.cells();
  columns_loop(x, out, call, begin, end);
  for (int64_t n = begin; n < end; ++n) {
    const W* row = out + n * call.size();
    attention_row(out + n * call.size(), keep, call.scale, cells);
    for (int64_t i = 0; i < cells; ++i) weights[n * cells + i] = row[i];
  }
}
// Computes the sums of the weights for each of the four phases (see pixels.h). `spare` has room for four rows.
template <class T, class W = wide_t<T>>
PF_INLINE void spread_loop(const W* weights, T* out, const Call<W>& call, int64_t begin, int64_t end, W* spare) {
  const int64_t cells = call.cells();
  Term<W> terms[9];
  for (int64_t n = begin; n < end; ++n) {
    neighbour_terms(call.matrix(weights), 0, call.grid, n, call.masks, terms);
    quarter_terms(terms, spare, call.size());
    for (int64_t phase = 0; phase < 4; ++phase) {
      const W* row = spare + phase * call.size();
      store_all(out + (phase * cells + n) * cells, cells, [=](int64_t i) PF_INLINED_LAMBDA { return row[i]; });
    }
  }
}
// Computes the gradient of the scores after "fuse", from the gradient of the sums of the weights.
template <class T, class W = wide_t<T>>
PF_INLINE void gather_loop(const Dense<T>& grad, int64_t first, const W* weights, W* out, const Call<W>& call,
                           int64_t begin, int64_t end) {
  Term<T> terms[16];
  for (int64_t n = begin; n < end; ++n) {
    W* row = out + n * call.size();
    phase_terms(grad, first, call.grid, n, call.masks, terms);
    sum_terms<16>(terms, row, call.size());
    for (int64_t i = 0; i < call.size(); ++i) row[i] *= W(0.25);
    attention_row_backward(row, weights + n * call.cells(), call.scale, call.cells());
  }
}
// Applies the row-major pass of "fuse" to `x`, multiplies the result by the inverse norms, and writes the products to
// `out`. Also computes the gradient of the inverse norms, summed over these queries. `spare` has room for two rows.
template <class W>
PF_INLINE void inverse_loop(const W* x, const Dense<W>& correlation, int64_t first, const W* inverse, W* out,
                            W* to_inverse, const Call<W>& call, int64_t begin, int64_t end, W* spare) {
  const int64_t cells = call.cells(), size = call.size();
  const W *fused = spare, *patches = spare + size;
  Term<W> near[3], around[9];
  for (int64_t i = 0; i < cells; ++i) to_inverse[i] = 0;
  for (int64_t n = begin; n < end; ++n) {
    row_terms(call.matrix(x), cells, n, call.masks, near);
    sum_terms<3>(near, spare, size);
    neighbour_terms(correlation, first, call.grid, n, call.masks, around);
    sum_terms<9>(around, spare + size, size);
    for (int64_t i = 0; i < cells; ++i) {
      to_inverse[i] += fused[i] * patches[i];
      out[n * size + i] = fused[i] * inverse[i];
    }
  }
}
// Computes the gradient of the products of pixels. `spare` has room for one row.
template <class W>
PF_INLINE void patches_loop(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end, W* spare) {
  const int64_t cells = call.cells();
  const W* row = spare;
  Term<W> terms[9];
  for (int64_t n = begin; n < end; ++n) {
    neighbour_terms(call.matrix(x), 0, call.grid, n, call.masks, terms);
    sum_terms<9>(terms, spare, call.size());
    for (int64_t i = 0; i < cells; ++i) out[n * cells + i] = row[i];
  }
}

#define PF_LOOPS(CLONES, W)                                                                                            \
  CLONES void scores(const Dense<W>& x, int64_t first, const W* inverse, W* out, const Call<W>& call, int64_t begin,   \
                     int64_t end) {                                                                                    \
    scores_loop(x, first, inverse, out, call, begin, end);                                                             \
  }                                                                                                                    \
  CLONES void rows(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end) {                              \
    rows_loop(x, out, call, begin, end);                                                                               \
  }                                                                                                                    \
  CLONES void columns(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end) {                           \
    columns_loop(x, out, call, begin, end);                                                                            \
  }                                                                                                                    \
  CLONES void attend(const W* x, const W* keep, W* out, W* weights, const Call<W>& call, int64_t begin, int64_t end) { \
    attend_loop(x, keep, out, weights, call, begin, end);                                                              \
  }                                                                                                                    \
  CLONES void to_inverses(const W* x, const Dense<W>& correlation, int64_t first, const W* inverse, W* out,            \
                          W* to_inverse, const Call<W>& call, int64_t begin, int64_t end, W* spare) {                  \
    inverse_loop(x, correlation, first, inverse, out, to_inverse, call, begin, end, spare);                            \
  }                                                                                                                    \
  CLONES void patches(const W* x, W* out, const Call<W>& call, int64_t begin, int64_t end, W* spare) {                 \
    patches_loop(x, out, call, begin, end, spare);                                                                     \
  }
PF_FOR_EACH_WIDE_DTYPE(PF_LOOPS)

#define PF_STORED_LOOPS(CLONES, T)                                                                              \
  CLONES void spread(const wide_t<T>* weights, T* out, const Call<wide_t<T>>& call, int64_t begin, int64_t end, \
                     wide_t<T>* spare) {                                                                        \
    spread_loop(weights, out, call, begin, end, spare);                                                         \
  }                                                                                                             \
  CLONES void gather(const Dense<T>& grad, int64_t first, const wide_t<T>* weights, wide_t<T>* out,             \
                     const Call<wide_t<T>>& call, int64_t begin, int64_t end) {                                 \
    gather_loop(grad, first, weights, out, call, begin, end);                                                   \
  }
PF_FOR_EACH_DTYPE(PF_STORED_LOOPS)

// Two matrices in scratch memory, with room around them. They are reused for every sample.
template <class W>
class Scratch {
 public:
  explicit Scratch(const Call<W>& call)
      : room_(reach(call.grid)), matrix_(call.cells() * call.size()), memory_(new W[3 * room_ + 2 * matrix_]) {}
  W* one() const { return memory_.get() + room_; }
  W* two() const { return one() + matrix_ + room_; }

 private:
  int64_t room_, matrix_;
  // The memory is uninitialized. Everything that affects the result is written before it is read.
  std::unique_ptr<W[]> memory_;
};

// A part of the computation. f(sample, begin, end, scratch) must compute the units begin .. end - 1 of a sample. A
// sample has `units` units. `cost` is the work of a unit, as in `parallel_rows`.
template <class F>
struct Pass {
  int64_t units, cost;
  F f;
};
template <class F>
Pass(int64_t, int64_t, F) -> Pass<F>;

// Runs the passes one after the other for every sample. If there are many small samples, each thread processes whole
// samples. Otherwise, the threads share the rows of one sample.
template <class W, class... Passes>
void run_passes(int64_t batch, const Call<W>& call, const Passes&... passes) {
  constexpr int64_t small = 256, many = 8;
  if (call.cells() <= small && batch >= many) {
    parallel_rows(batch, ((passes.units * passes.cost) + ...), [&](int64_t begin, int64_t end) {
      const Scratch<W> scratch(call);
      for (int64_t b = begin; b < end; ++b) (passes.f(b, int64_t{0}, passes.units, scratch), ...);
    });
    return;
  }
  const Scratch<W> scratch(call);
  for (int64_t b = 0; b < batch; ++b) {
    (parallel_rows(passes.units, passes.cost, [&](int64_t begin, int64_t end) { passes.f(b, begin, end, scratch); }),
     ...);
  }
}

// -- the op ---------------------------------------------------------------------------------------------------------

// correlation is [batch, cells, cells]; inverse and keep are [batch, cells]. All are in the wide dtype.
template <class T, class W = wide_t<T>>
void forward(const Tensor& correlation, const W* inverse, const W* keep, const Call<W>& call, T* out, W* weights) {
  const int64_t batch = correlation.size(0), cells = call.cells(), square = cells * cells;
  if (batch == 0) return;
  const Dense<W> x(data<W>(correlation), batch, call.grid);
  run_passes(batch, call,
             Pass{cells, 9 * cells,
                  [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    scores(x, b * cells, inverse + b * cells, scratch.one(), call, begin, end);
                  }},
             Pass{cells, 3 * cells,
                  [&](int64_t, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    rows(scratch.one(), scratch.two(), call, begin, end);
                  }},
             Pass{cells, 9 * cells,
                  [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    attend(scratch.two(), keep + b * cells, scratch.one(), weights + b * square, call, begin, end);
                  }},
             Pass{cells, 13 * cells, [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    std::vector<W> spare(4 * call.size());
                    spread(scratch.one(), out + 4 * b * square, call, begin, end, spare.data());
                  }});
}

std::tuple<Tensor, Tensor> contextual_attention(Tensor correlation, Tensor inverse, Tensor keep, int64_t height,
                                                int64_t width, double scale) {
  const ScalarType dtype = keep.scalar_type(), wide_type = wide_dtype(dtype);
  const int64_t batch = correlation.size(0), cells = height * width;
  const Tensor x = dense(correlation, wide_type), norms = dense(inverse, wide_type), mask = dense(keep, wide_type);
  Tensor out = new_tensor({batch, 4, cells, cells}, dtype), weights = new_tensor({batch, cells, cells}, wide_type);
  dispatch(dtype, "contextual_attention", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const Call<W> call(height, width, scale);
    forward<T>(x, data<W>(norms), data<W>(mask), call, writable<T>(out), writable<W>(weights));
  });
  return {out, weights};
}

template <class T, class W = wide_t<T>>
void backward(const T* grad, const Tensor& correlation, const W* inverse, const W* weights, const Call<W>& call, W* out,
              W* to_inverse) {
  // The number of queries in one partial sum. It is fixed, so that the result does not depend on the number of threads.
  constexpr int64_t block = 32;
  const int64_t batch = correlation.size(0), cells = call.cells(), square = cells * cells;
  const int64_t blocks = (cells + block - 1) / block;
  if (batch == 0) return;
  const Dense<T> upstream(grad, 4 * batch, call.grid);
  const Dense<W> x(data<W>(correlation), batch, call.grid);
  std::vector<W> parts(batch * blocks * cells);
  run_passes(batch, call,
             Pass{cells, 20 * cells,
                  [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    gather(upstream, 4 * b * cells, weights + b * square, scratch.one(), call, begin, end);
                  }},
             Pass{cells, 5 * cells,
                  [&](int64_t, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    columns(scratch.one(), scratch.two(), call, begin, end);
                  }},
             Pass{blocks, 15 * block * cells,
                  [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    std::vector<W> spare(2 * call.size());
                    for (int64_t k = begin; k < end; ++k) {
                      const int64_t stop = k * block + block < cells ? k * block + block : cells;
                      to_inverses(scratch.two(), x, b * cells, inverse + b * cells, scratch.one(),
                                  parts.data() + (b * blocks + k) * cells, call, k * block, stop, spare.data());
                    }
                  }},
             Pass{cells, 9 * cells, [&](int64_t b, int64_t begin, int64_t end, const Scratch<W>& scratch) {
                    std::vector<W> spare(call.size());
                    patches(scratch.one(), out + b * square, call, begin, end, spare.data());
                  }});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < cells; ++i) to_inverse[b * cells + i] = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      for (int64_t i = 0; i < cells; ++i) to_inverse[b * cells + i] += parts[(b * blocks + k) * cells + i];
    }
  }
}

std::tuple<Tensor, Tensor> contextual_attention_backward(Tensor grad, Tensor correlation, Tensor inverse,
                                                         Tensor weights, int64_t height, int64_t width, double scale) {
  const ScalarType dtype = grad.scalar_type(), wide_type = wide_dtype(dtype);
  const int64_t batch = correlation.size(0), cells = height * width;
  const Tensor g = dense(grad), x = dense(correlation, wide_type), norms = dense(inverse, wide_type),
               a = dense(weights, wide_type);
  Tensor out = new_tensor({batch, cells, cells}, wide_type), to_inverse = new_tensor({batch, cells}, wide_type);
  dispatch(dtype, "contextual_attention_backward", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const Call<W> call(height, width, scale);
    backward<T>(data<T>(g), x, data<W>(norms), data<W>(a), call, writable<W>(out), writable<W>(to_inverse));
  });
  return {out, to_inverse};
}

// -- eager calls ------------------------------------------------------------------------------------------------------

// In eager calls, these functions compute everything between the matrix products, including the norms.

// Returns the sums of the weights, the weights, and the inverse norms, which come from the diagonal of the products.
std::tuple<Tensor, Tensor, Tensor> contextual_attention_spread(Tensor correlation, Tensor valid, int64_t height,
                                                               int64_t width, double scale, ScalarType dtype) {
  const ScalarType wide_type = wide_dtype(dtype);
  const int64_t batch = correlation.size(0), cells = height * width;
  const Tensor x = dense(correlation, wide_type), mask = dense(valid, wide_type);
  Tensor out = new_tensor({batch, 4, cells, cells}, dtype), weights = new_tensor({batch, cells, cells}, wide_type);
  Tensor inverse = new_tensor({batch, cells}, wide_type);
  dispatch(dtype, "contextual_attention", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const Call<W> call(height, width, scale);
    W* norms = writable<W>(inverse);
    parallel_rows(batch, 9 * cells, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        inverse_norms(data<W>(x) + b * cells * cells, call.grid, norms + b * cells);
      }
    });
    forward<T>(x, norms, data<W>(mask), call, writable<T>(out), writable<W>(weights));
  });
  return {out, weights, inverse};
}

// Returns the matrix by which the pixels must be multiplied to give their gradient: the gradient of the products plus
// its transpose. The diagonal also includes the gradient through the norms.
Tensor contextual_attention_slopes(Tensor grad, Tensor correlation, Tensor inverse, Tensor weights, int64_t height,
                                   int64_t width, double scale) {
  const std::tuple<Tensor, Tensor> slopes =
      contextual_attention_backward(grad, correlation, inverse, weights, height, width, scale);
  Tensor out = std::get<0>(slopes), to_inverse = std::get<1>(slopes);
  const Tensor norms = dense(inverse, out.scalar_type());
  const Grid grid{height, width};
  const int64_t cells = grid.cells();
  dispatch(out.scalar_type(), "contextual_attention", [&](auto tag) {
    using W = wide_t<decltype(tag)>;
    W *to = writable<W>(out), *through = writable<W>(to_inverse);
    parallel_rows(out.size(0), cells * (cells + 9), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        add_transpose(to + b * cells * cells, cells);
        add_norm_slopes(through + b * cells, data<W>(norms) + b * cells, grid, to + b * cells * cells);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("contextual_attention", TORCH_BOX(&pf::cpu::contextual_attention));
  m.impl("contextual_attention_backward", TORCH_BOX(&pf::cpu::contextual_attention_backward));
  m.impl("contextual_attention_spread", TORCH_BOX(&pf::cpu::contextual_attention_spread));
  m.impl("contextual_attention_slopes", TORCH_BOX(&pf::cpu::contextual_attention_slopes));
}

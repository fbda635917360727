#include "../core/contextual_attention.h"

#include "common.h"

namespace pf::cpu {
namespace {

// Rows of every loop: query n of sample b is row b * cells + n. `inner` and `spare` are of the caller.

// Sums of neighbours, the keys scaled if `inverse` is given.
template <class W>
PF_HD void patches_loop(const W* x, const W* inverse, W* out, Grid grid, const W* inner, int64_t begin, int64_t end) {
  const int64_t cells = grid.cells();
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / cells;
    W* row = out + r * cells;
    for (int64_t i = 0; i < cells; ++i) row[i] = 0;
    add_window(row, x + b * cells * cells, grid, r % cells, all_neighbours, inner);
    for (int64_t i = 0; inverse && i < cells; ++i) row[i] *= inverse[b * cells + i];
  }
}
template <class W>
PF_HD void rows_loop(const W* x, W* out, Grid grid, int64_t begin, int64_t end) {
  const int64_t cells = grid.cells();
  for (int64_t r = begin; r < end; ++r) fuse_rows(out + r * cells, x + r / cells * cells * cells, grid, r % cells);
}
template <class W>
PF_HD void columns_loop(const W* x, W* out, Grid grid, int64_t begin, int64_t end) {
  const int64_t cells = grid.cells();
  for (int64_t r = begin; r < end; ++r) fuse_columns(out + r * cells, x + r / cells * cells * cells, grid, r % cells);
}
template <class W>
PF_HD void attend_loop(const W* x, const W* keep, W scale, W* out, Grid grid, int64_t begin, int64_t end) {
  const int64_t cells = grid.cells();
  columns_loop(x, out, grid, begin, end);
  for (int64_t r = begin; r < end; ++r) attention_row(out + r * cells, keep + r / cells * cells, scale, cells);
}
template <class T, class W = wide_t<T>>
PF_HD void spread_loop(const W* weights, T* out, Grid grid, const W* inner, int64_t begin, int64_t end, W* spare) {
  const int64_t cells = grid.cells();
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / cells, n = r % cells;
    for (int phase = 0; phase < 4; ++phase) {
      for (int64_t i = 0; i < cells; ++i) spare[i] = 0;
      add_window(spare, weights + b * cells * cells, grid, n, spread_window(phase / 2, phase % 2), inner);
      const W* sum = spare;
      store_all(out + ((b * 4 + phase) * cells + n) * cells, cells,
                [=](int64_t i) PF_INLINE { return W(0.25) * sum[i]; });
    }
  }
}
template <class T, class W = wide_t<T>>
PF_HD void gather_loop(const T* grad, const W* weights, W scale, W* out, Grid grid, const W* inner, int64_t begin,
                       int64_t end) {
  const int64_t cells = grid.cells();
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / cells, n = r % cells;
    W* row = out + r * cells;
    for (int64_t i = 0; i < cells; ++i) row[i] = 0;
    for (int phase = 0; phase < 4; ++phase) {
      add_window(row, grad + (b * 4 + phase) * cells * cells, grid, n, gather_window(phase / 2, phase % 2), inner);
    }
    for (int64_t i = 0; i < cells; ++i) row[i] *= W(0.25);
    attention_row_backward(row, weights + r * cells, scale, cells);
  }
}
// Queries begin .. end of one sample: `x` fused by rows and scaled into `out`, and the gradient of the inverse norms,
// summed over these queries. spare: 2 * cells numbers.
template <class W>
PF_HD void inverse_loop(const W* x, const W* correlation, const W* inverse, W* out, W* to_inverse, Grid grid,
                        const W* inner, int64_t begin, int64_t end, W* spare) {
  const int64_t cells = grid.cells();
  W* patches = spare + cells;
  for (int64_t i = 0; i < cells; ++i) to_inverse[i] = 0;
  for (int64_t n = begin; n < end; ++n) {
    fuse_rows(spare, x, grid, n);
    for (int64_t i = 0; i < cells; ++i) patches[i] = 0;
    add_window(patches, correlation, grid, n, all_neighbours, inner);
    for (int64_t i = 0; i < cells; ++i) to_inverse[i] += spare[i] * patches[i];
    for (int64_t i = 0; i < cells; ++i) out[n * cells + i] = spare[i] * inverse[i];
  }
}

#define PF_LOOPS(W)                                                                                                \
  PF_CLONES void patches(const W* x, const W* inverse, W* out, Grid grid, const W* inner, int64_t begin,           \
                         int64_t end) {                                                                            \
    patches_loop(x, inverse, out, grid, inner, begin, end);                                                        \
  }                                                                                                                \
  PF_CLONES void rows(const W* x, W* out, Grid grid, int64_t begin, int64_t end) {                                 \
    rows_loop(x, out, grid, begin, end);                                                                           \
  }                                                                                                                \
  PF_CLONES void columns(const W* x, W* out, Grid grid, int64_t begin, int64_t end) {                              \
    columns_loop(x, out, grid, begin, end);                                                                        \
  }                                                                                                                \
  PF_CLONES void attend(const W* x, const W* keep, W scale, W* out, Grid grid, int64_t begin, int64_t end) {       \
    attend_loop(x, keep, scale, out, grid, begin, end);                                                            \
  }                                                                                                                \
  PF_CLONES void to_inverses(const W* x, const W* correlation, const W* inverse, W* out, W* to_inverse, Grid grid, \
                             const W* inner, int64_t begin, int64_t end, W* spare) {                               \
    inverse_loop(x, correlation, inverse, out, to_inverse, grid, inner, begin, end, spare);                        \
  }
PF_LOOPS(float)
PF_LOOPS(double)

#define PF_STORED_LOOPS(T)                                                                                   \
  PF_CLONES void spread(const wide_t<T>* weights, T* out, Grid grid, const wide_t<T>* inner, int64_t begin,  \
                        int64_t end, wide_t<T>* spare) {                                                     \
    spread_loop(weights, out, grid, inner, begin, end, spare);                                               \
  }                                                                                                          \
  PF_CLONES void gather(const T* grad, const wide_t<T>* weights, wide_t<T> scale, wide_t<T>* out, Grid grid, \
                        const wide_t<T>* inner, int64_t begin, int64_t end) {                                \
    gather_loop(grad, weights, scale, out, grid, inner, begin, end);                                         \
  }
PF_FOR_EACH_DTYPE(PF_STORED_LOOPS)

// f(first sample, samples), as many samples at a time as keep a pass's result in the cache for the next.
template <class F>
void for_each_group(int64_t batch, int64_t cells, F f) {
  constexpr int64_t numbers = 1 << 20;
  const int64_t step = cells * cells < numbers ? numbers / (cells * cells) : 1;
  for (int64_t b = 0; b < batch; b += step) f(b, batch - b < step ? batch - b : step);
}

template <class W>
std::vector<W> inner_of(Grid grid) {
  std::vector<W> inner(2 * grid.cells());
  inner_columns(grid, inner.data());
  return inner;
}

// One matrix for every sample of a group.
inline Tensor scratch_for(int64_t batch, int64_t cells, ScalarType dtype) {
  int64_t most = 0;
  for_each_group(batch, cells, [&](int64_t, int64_t samples) { most = samples > most ? samples : most; });
  return new_tensor({most, cells, cells}, dtype);
}

std::tuple<Tensor, Tensor> contextual_attention(Tensor correlation, Tensor inverse, Tensor keep, int64_t height,
                                                int64_t width, double scale) {
  const ScalarType dtype = keep.scalar_type(), wide_type = wide_dtype(dtype);
  const Grid grid{height, width};
  const int64_t batch = correlation.size(0), cells = grid.cells();
  const Tensor x = dense(correlation, wide_type), norms = dense(inverse, wide_type), mask = dense(keep, wide_type);
  Tensor out = new_tensor({batch, 4, cells, cells}, dtype), weights = new_tensor({batch, cells, cells}, wide_type);
  Tensor first = scratch_for(batch, cells, wide_type), second = scratch_for(batch, cells, wide_type);
  dispatch(dtype, "contextual_attention", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const std::vector<W> columns_inside = inner_of<W>(grid);
    const W *inner = columns_inside.data(), *from = data<W>(x), *scales = data<W>(norms), *v = data<W>(mask);
    W *one = writable<W>(first), *two = writable<W>(second), *attention = writable<W>(weights);
    T* to = writable<T>(out);
    for_each_group(batch, cells, [&](int64_t b, int64_t samples) {
      const int64_t count = samples * cells, at = b * cells * cells;
      parallel_rows(count, 9 * cells, [&](int64_t begin, int64_t end) {
        patches(from + at, scales + b * cells, one, grid, inner, begin, end);
      });
      parallel_rows(count, 3 * cells, [&](int64_t begin, int64_t end) { rows(one, two, grid, begin, end); });
      parallel_rows(count, 9 * cells, [&](int64_t begin, int64_t end) {
        attend(two, v + b * cells, static_cast<W>(scale), attention + at, grid, begin, end);
      });
      parallel_rows(count, 16 * cells, [&](int64_t begin, int64_t end) {
        std::vector<W> spare(cells);
        spread(attention + at, to + 4 * at, grid, inner, begin, end, spare.data());
      });
    });
  });
  return {out, weights};
}

std::tuple<Tensor, Tensor> contextual_attention_backward(Tensor grad, Tensor correlation, Tensor inverse,
                                                         Tensor weights, int64_t height, int64_t width, double scale) {
  constexpr int64_t block = 32;  // queries whose part of a sum over all is made together, whatever the threads
  const ScalarType dtype = grad.scalar_type(), wide_type = wide_dtype(dtype);
  const Grid grid{height, width};
  const int64_t batch = correlation.size(0), cells = grid.cells(), blocks = (cells + block - 1) / block;
  const Tensor g = dense(grad), x = dense(correlation, wide_type), norms = dense(inverse, wide_type),
               a = dense(weights, wide_type);
  Tensor out = new_tensor({batch, cells, cells}, wide_type), to_inverse = new_tensor({batch, cells}, wide_type);
  Tensor first = scratch_for(batch, cells, wide_type), second = scratch_for(batch, cells, wide_type);
  Tensor parts = new_tensor({batch, blocks, cells}, wide_type);
  dispatch(dtype, "contextual_attention_backward", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const std::vector<W> columns_inside = inner_of<W>(grid);
    const W *inner = columns_inside.data(), *from = data<W>(x), *scales = data<W>(norms), *attention = data<W>(a);
    const T* upstream = data<T>(g);
    W *one = writable<W>(first), *two = writable<W>(second), *to = writable<W>(out), *part = writable<W>(parts);
    W* sums = writable<W>(to_inverse);
    for_each_group(batch, cells, [&](int64_t b, int64_t samples) {
      const int64_t count = samples * cells, square = cells * cells, at = b * square;
      parallel_rows(count, 20 * cells, [&](int64_t begin, int64_t end) {
        gather(upstream + 4 * at, attention + at, static_cast<W>(scale), one, grid, inner, begin, end);
      });
      parallel_rows(count, 3 * cells, [&](int64_t begin, int64_t end) { columns(one, two, grid, begin, end); });
      parallel_rows(samples * blocks, 15 * block * cells, [&](int64_t begin, int64_t end) {
        std::vector<W> spare(2 * cells);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t s = i / blocks, n = i % blocks * block, stop = n + block < cells ? n + block : cells;
          to_inverses(two + s * square, from + at + s * square, scales + (b + s) * cells, one + s * square,
                      part + (b * blocks + i) * cells, grid, inner, n, stop, spare.data());
        }
      });
      parallel_rows(count, 9 * cells, [&](int64_t begin, int64_t end) {
        patches(one, static_cast<const W*>(nullptr), to + at, grid, inner, begin, end);
      });
    });
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < cells; ++i) sums[b * cells + i] = 0;
      for (int64_t k = 0; k < blocks; ++k) {
        for (int64_t i = 0; i < cells; ++i) sums[b * cells + i] += part[(b * blocks + k) * cells + i];
      }
    }
  });
  return {out, to_inverse};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("contextual_attention", TORCH_BOX(&pf::cpu::contextual_attention));
  m.impl("contextual_attention_backward", TORCH_BOX(&pf::cpu::contextual_attention_backward));
}

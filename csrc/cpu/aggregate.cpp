#include "../core/aggregate.h"

#include <algorithm>
#include <type_traits>

#include "common.h"

namespace pf::cpu {
namespace {

constexpr int64_t lanes = 16, tile_width = 128;

// Copies a row of `classes` numbers. If `more` is true, it copies 16 numbers, because a loop of unknown length is
// slower than a few extra copies. Both arrays must then have room for 16 numbers.
template <class T>
PF_INLINE void copy_row(const T* from, T* to, int64_t classes, bool more) {
  if (more) {
    T row[lanes];
    for (int64_t c = 0; c < lanes; ++c) row[c] = from[c];
    for (int64_t c = 0; c < lanes; ++c) to[c] = row[c];
  } else {
    for (int64_t c = 0; c < classes; ++c) to[c] = from[c];
  }
}
// True if 16 numbers of sample k may be copied together: later samples of the image overwrite the extra numbers.
PF_INLINE bool room_behind(int64_t k, int64_t samples, int64_t classes) {
  return classes < lanes && (samples - k) * classes >= lanes;
}

// Copies logits [images][samples][classes] into a tile [samples][width], or back. width >= images * classes, and the
// rest of the tile is 0. 16-bit numbers of several images are gathered first, so that one long loop converts them. The
// tile must be followed by one more row of scratch memory.
template <class T, class W>
PF_INLINE void to_tile(const T* __restrict__ logits, W* __restrict__ tile, int64_t images, int64_t samples,
                       int64_t classes, int64_t width) {
  const bool gather = sizeof(T) == 2 && images > 1;
  T gathered[tile_width + lanes] = {};
  for (int64_t k = 0; k < samples; ++k, tile += width) {
    const bool more = room_behind(k, samples, classes);
    for (int64_t b = 0; b < images; ++b) {
      const T* from = logits + (b * samples + k) * classes;
      if constexpr (std::is_same_v<T, W>) {
        copy_row(from, tile + b * classes, classes, more);
      } else if (gather) {
        copy_row(from, gathered + b * classes, classes, more);
      } else {
        for (int64_t c = 0; c < classes; ++c) tile[b * classes + c] = load(from[c]);
      }
    }
    for (int64_t i = 0; gather && i < width; ++i) tile[i] = load(gathered[i]);
    for (int64_t i = images * classes; i < width; ++i) tile[i] = 0;
  }
}
template <class T, class W>
PF_INLINE void from_tile(const W* __restrict__ tile, T* __restrict__ out, int64_t images, int64_t samples,
                         int64_t classes, int64_t width) {
  const bool gather = sizeof(T) == 2 && images > 1;
  T gathered[tile_width + lanes];
  for (int64_t k = 0; k < samples; ++k, tile += width) {
    const bool more = room_behind(k, samples, classes);
    for (int64_t i = 0; gather && i < width; ++i) store(gathered[i], tile[i]);
    for (int64_t b = 0; b < images; ++b) {
      T* to = out + (b * samples + k) * classes;
      if constexpr (std::is_same_v<T, W>) {
        copy_row(tile + b * classes, to, classes, more);
      } else if (gather) {
        copy_row(gathered + b * classes, to, classes, more);
      } else {
        for (int64_t c = 0; c < classes; ++c) store(to[c], tile[b * classes + c]);
      }
    }
  }
}

// `tile` is followed by aggregate_scratch_rows + 1 rows of scratch memory. Both functions overwrite the tile.
template <class W>
PF_INLINE void forward_tile(Aggregation method, W* tile, W* out, int64_t images, int64_t samples, int64_t classes,
                            int64_t width) {
  // `width` is a multiple of `lanes`, so this line does not change it. The line tells this fact to the compiler.
  width = width / lanes * lanes;
  W* row = tile + samples * width;
  aggregate_tile(method, tile, samples, images, classes, width, row, row + width);
  for (int64_t i = 0; i < images * classes; ++i) out[i] = row[i];
}
template <class W>
PF_INLINE void backward_tile(Aggregation method, const W* grad, W* tile, int64_t images, int64_t samples,
                             int64_t classes, int64_t width) {
  width = width / lanes * lanes;
  W* row = tile + samples * width;
  for (int64_t i = 0; i < width; ++i) row[i] = i < images * classes ? grad[i] : 0;
  aggregate_tile_backward(method, tile, row, samples, images, classes, width, row + width);
}
// Loops over numbers that are in a tile already are compiled for the dtypes of the arithmetic alone.
#define PF_TILES(CLONES, W)                                                                                          \
  CLONES void forward(Aggregation method, W* tile, W* out, int64_t images, int64_t samples, int64_t classes,         \
                      int64_t width) {                                                                               \
    forward_tile(method, tile, out, images, samples, classes, width);                                                \
  }                                                                                                                  \
  CLONES void backward(Aggregation method, const W* grad, W* tile, int64_t images, int64_t samples, int64_t classes, \
                       int64_t width) {                                                                              \
    backward_tile(method, grad, tile, images, samples, classes, width);                                              \
  }
PF_FOR_EACH_WIDE_DTYPE(PF_TILES)

// Calls f(first lane, number of lanes) for the classes of one image, at least `lanes`, in place. Each call gets a
// multiple of `lanes` lanes, so the last call may overlap another call and compute some lanes twice. `f` is called in
// one place, because it is inlined wherever it is called.
template <class F>
PF_INLINE void for_lanes(int64_t classes, F f) {
  const int64_t groups = (classes + lanes - 1) / lanes, most = aggregate_lanes / lanes;
  const int64_t fewest = (groups + most - 1) / most;
  // A single call, rounded up to a multiple of `lanes`, would be wider than a row.
  const int64_t parts = fewest == 1 && classes % lanes != 0 ? 2 : fewest;
  for (int64_t part = 0, group = 0; part < parts; ++part) {
    const int64_t width = (groups - group + parts - part - 1) / (parts - part) * lanes, at = group * lanes;
    f(at + width <= classes ? at : classes - width, width);
    group += width / lanes;
  }
}
template <class T, class W = wide_t<T>>
PF_INLINE void forward_image(const T* logits, W* out, int64_t samples, int64_t classes) {
  for_lanes(classes, [=](int64_t at, int64_t width) PF_INLINED_LAMBDA {
    logsumexp_lanes(logits + at, samples, width / lanes * lanes, classes, out + at);
  });
}
template <class T, class W = wide_t<T>>
PF_INLINE void backward_image(const W* grad, const T* logits, T* out, int64_t samples, int64_t classes, W* scratch) {
  for_lanes(classes, [=](int64_t at, int64_t width) PF_INLINED_LAMBDA {
    softmax_lanes(grad + at, logits + at, out + at, samples, width / lanes * lanes, classes, scratch);
  });
}
template <class T, class W = wide_t<T>>
PF_INLINE void mean_image(const T* logits, W* out, int64_t samples, int64_t classes) {
  for_lanes(classes, [=](int64_t at, int64_t width) PF_INLINED_LAMBDA {
    W sum[aggregate_lanes] = {};
    for (int64_t k = 0; k < samples; ++k) {
      for (int64_t j = 0; j < width / lanes * lanes; ++j) sum[j] += load(logits[k * classes + at + j]);
    }
    for (int64_t j = 0; j < width; ++j) out[at + j] = sum[j] / static_cast<W>(samples);
  });
}
// Processes the rows of all images together, because they are contiguous.
template <class T, class W = wide_t<T>>
PF_INLINE void vote_images(const T* logits, W* out, int64_t images, int64_t samples, int64_t classes) {
  for (int64_t i = 0; i < images * classes; ++i) out[i] = 0;
  int32_t best[aggregate_lanes];
  for (int64_t row = 0; row < images * samples; row += aggregate_lanes) {
    const int64_t left = images * samples - row, rows = left < aggregate_lanes ? left : aggregate_lanes;
    if (classes < lanes) {
      first_largest(logits + row * classes, rows, classes, best);
    } else {
      for (int64_t j = 0; j < rows; ++j) best[j] = first_largest_of(logits + (row + j) * classes, classes);
    }
    for (int64_t j = 0; j < rows; ++j) out[(row + j) / samples * classes + best[j]] += 1;
  }
}
template <class T, class W = wide_t<T>>
PF_INLINE void mean_image_backward(const W* grad, T* out, int64_t samples, int64_t classes, W* scratch) {
  for (int64_t i = 0; i < classes; ++i) scratch[i] = grad[i] / static_cast<W>(samples);
  for (int64_t k = 0; k < samples; ++k) {
    for (int64_t i = 0; i < classes; ++i) store(out[k * classes + i], scratch[i]);
  }
}

// Computes the result of the op. Also stores three rows per image for the backward. Per class, they contain the largest
// logit, the factor by which the backward multiplies exp(logit - largest logit), and, for "peel", the probability.
// `scratch` has room for one row.
template <class T, class W = wide_t<T>>
PF_INLINE void keep_image(Aggregation method, const T* logits, W* out, W* kept, int64_t samples, int64_t classes,
                          W* scratch) {
  W *most = kept, *factor = kept + classes, *share = kept + 2 * classes;
  for_lanes(classes, [=](int64_t at, int64_t width) PF_INLINED_LAMBDA {
    exponentials(logits + at, samples, width / lanes * lanes, classes, most + at, share + at);
  });
  for (int64_t i = 0; i < classes; ++i) {
    const W whole = most[i] + log(share[i]);
    out[i] = finite(most[i]) ? whole : most[i];
    // `softmax_lanes` explains the case of an infinite maximum.
    factor[i] = finite(most[i]) ? W(1) / share[i] : W(1);
  }
  if (method == Aggregation::lse) return;
  for (int64_t i = 0; i < classes; ++i) {
    W slope;
    out[i] = tangent_exp(out[i], slope);
    factor[i] *= slope;
  }
  softmax_parts(out, 1, classes, classes, scratch);
  for (int64_t i = 0; i < classes; ++i) {
    share[i] = exp_unit(out[i]) / scratch[i];
    out[i] -= log(scratch[i]);
  }
}
template <class T, class W = wide_t<T>>
PF_INLINE void kept_image_backward(Aggregation method, const W* grad, const T* logits, const W* kept, T* out,
                                   int64_t samples, int64_t classes, W* scratch) {
  const W *most = kept, *factor = kept + classes, *share = kept + 2 * classes, *slope = scratch;
  // If share[i] is near 1, grad[i] - share[i] * total may be as small as the rounding error of total. Therefore total
  // comes from ordered_sum, which rounds in the same way for every instruction set.
  const W total = method == Aggregation::peel
                      ? ordered_sum<W>(classes, [=](int64_t i) PF_INLINED_LAMBDA { return grad[i]; })
                      : W(0);
  for (int64_t i = 0; i < classes; ++i) {
    const W beside = method == Aggregation::peel ? share[i] * total : W(0);
    scratch[i] = (grad[i] - beside) * factor[i];
  }
  for (int64_t k = 0; k < samples; ++k) {
    const T* x = logits + k * classes;
    store_all(out + k * classes, classes,
              [=](int64_t i) PF_INLINED_LAMBDA { return exp_unit(static_cast<W>(load(x[i])) - most[i]) * slope[i]; });
  }
}

#define PF_LOOPS(CLONES, T)                                                                                            \
  CLONES void read_tile(const T* logits, wide_t<T>* tile, int64_t images, int64_t samples, int64_t classes,            \
                        int64_t width) {                                                                               \
    to_tile(logits, tile, images, samples, classes, width / lanes * lanes);                                            \
  }                                                                                                                    \
  CLONES void write_tile(const wide_t<T>* tile, T* out, int64_t images, int64_t samples, int64_t classes,              \
                         int64_t width) {                                                                              \
    from_tile(tile, out, images, samples, classes, width / lanes * lanes);                                             \
  }                                                                                                                    \
  CLONES void whole_forward(Aggregation method, const T* logits, wide_t<T>* out, int64_t images, int64_t samples,      \
                            int64_t classes) {                                                                         \
    if (method == Aggregation::vote) return vote_images(logits, out, images, samples, classes);                        \
    for (int64_t b = 0; b < images; ++b, logits += samples * classes, out += classes) {                                \
      if (method == Aggregation::lse) {                                                                                \
        forward_image(logits, out, samples, classes);                                                                  \
      } else {                                                                                                         \
        mean_image(logits, out, samples, classes);                                                                     \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  CLONES void whole_backward(Aggregation method, const wide_t<T>* grad, const T* logits, T* out, int64_t images,       \
                             int64_t samples, int64_t classes, wide_t<T>* scratch) {                                   \
    for (int64_t b = 0; b < images; ++b, grad += classes, logits += samples * classes, out += samples * classes)       \
      if (method == Aggregation::mean) {                                                                               \
        mean_image_backward(grad, out, samples, classes, scratch);                                                     \
      } else {                                                                                                         \
        backward_image(grad, logits, out, samples, classes, scratch);                                                  \
      }                                                                                                                \
  }                                                                                                                    \
  CLONES void keep(Aggregation method, const T* logits, wide_t<T>* out, wide_t<T>* kept, int64_t images,               \
                   int64_t samples, int64_t classes, wide_t<T>* scratch) {                                             \
    for (int64_t b = 0; b < images; ++b, logits += samples * classes, out += classes, kept += 3 * classes) {           \
      keep_image(method, logits, out, kept, samples, classes, scratch);                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  CLONES void kept_backward(Aggregation method, const wide_t<T>* grad, const T* logits, const wide_t<T>* kept, T* out, \
                            int64_t images, int64_t samples, int64_t classes, wide_t<T>* scratch) {                    \
    for (int64_t b = 0; b < images; ++b, grad += classes, kept += 3 * classes) {                                       \
      const int64_t at = b * samples * classes;                                                                        \
      kept_image_backward(method, grad, logits + at, kept, out + at, samples, classes, scratch);                       \
    }                                                                                                                  \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// Calls f(first image, number of images, width, tile), each time with as many images as fit into a tile.
template <class W, class F>
void for_each_tile(int64_t batch, int64_t samples, int64_t classes, F f) {
  const int64_t step = classes < tile_width ? tile_width / classes : 1;
  const int64_t width = (step * classes + lanes - 1) / lanes * lanes;
  parallel_rows(batch, 2 * samples * classes, [&](int64_t begin, int64_t end) {
    std::vector<W> scratch((samples + aggregate_scratch_rows + 1) * width);
    for (; begin < end; begin += step) f(begin, end - begin < step ? end - begin : step, width, scratch.data());
  });
}

Tensor aggregate(Tensor logits, int64_t method) {
  const Tensor x = dense(logits);
  const int64_t batch = x.size(0), samples = x.size(1), classes = x.size(2);
  Tensor out = new_tensor({batch, classes}, wide_dtype(x.scalar_type()));
  dispatch(x.scalar_type(), "aggregate", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T* from = data<T>(x);
    W* to = writable<W>(out);
    const auto kind = static_cast<Aggregation>(method);
    const bool in_lanes = classes >= lanes && (kind == Aggregation::lse || kind == Aggregation::mean);
    if (in_lanes || kind == Aggregation::vote) {
      parallel_rows(batch, (kind == Aggregation::lse ? 2 : 1) * samples * classes, [&](int64_t begin, int64_t end) {
        whole_forward(kind, from + begin * samples * classes, to + begin * classes, end - begin, samples, classes);
      });
      return;
    }
    for_each_tile<W>(batch, samples, classes, [&](int64_t b, int64_t images, int64_t width, W* tile) {
      read_tile(from + b * samples * classes, tile, images, samples, classes, width);
      forward(kind, tile, to + b * classes, images, samples, classes, width);
    });
  });
  return out;
}

Tensor aggregate_backward(Tensor grad, Tensor logits, int64_t method) {
  const Tensor x = dense(logits), g = dense(grad, wide_dtype(logits.scalar_type()));
  const int64_t batch = x.size(0), samples = x.size(1), classes = x.size(2);
  Tensor out = new_like(x);
  if (static_cast<Aggregation>(method) == Aggregation::vote) return torch::stable::zero_(out);
  dispatch(x.scalar_type(), "aggregate_backward", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T* from = data<T>(x);
    const W* upstream = data<W>(g);
    T* to = writable<T>(out);
    const auto kind = static_cast<Aggregation>(method);
    if (classes >= lanes && (kind == Aggregation::mean || kind == Aggregation::lse)) {
      parallel_rows(batch, (kind == Aggregation::lse ? 2 : 1) * samples * classes, [&](int64_t begin, int64_t end) {
        std::vector<W> scratch(std::max(samples * aggregate_lanes, classes));
        const int64_t at = begin * samples * classes;
        whole_backward(kind, upstream + begin * classes, from + at, to + at, end - begin, samples, classes,
                       scratch.data());
      });
      return;
    }
    for_each_tile<W>(batch, samples, classes, [&](int64_t b, int64_t images, int64_t width, W* tile) {
      const int64_t at = b * samples * classes;
      if (kind != Aggregation::mean) read_tile(from + at, tile, images, samples, classes, width);
      backward(kind, upstream + b * classes, tile, images, samples, classes, width);
      write_tile(tile, to + at, images, samples, classes, width);
    });
  });
  return out;
}

// Returns the result and the rows of `keep_image`, for "lse" and "peel" with at least `lanes` classes.
std::tuple<Tensor, Tensor> aggregate_keeping(Tensor logits, int64_t method) {
  const Tensor x = dense(logits);
  const int64_t batch = x.size(0), samples = x.size(1), classes = x.size(2);
  STD_TORCH_CHECK(classes >= lanes && method <= static_cast<int64_t>(Aggregation::peel),
                  "aggregate_keeping: needs method lse or peel and at least 16 classes; there are ", classes);
  const ScalarType wide_type = wide_dtype(x.scalar_type());
  Tensor out = new_tensor({batch, classes}, wide_type), kept = new_tensor({batch, 3, classes}, wide_type);
  dispatch(x.scalar_type(), "aggregate", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    W *to = writable<W>(out), *rows = writable<W>(kept);
    parallel_rows(batch, 2 * samples * classes, [&](int64_t begin, int64_t end) {
      std::vector<W> scratch(classes);
      keep(static_cast<Aggregation>(method), data<T>(x) + begin * samples * classes, to + begin * classes,
           rows + 3 * begin * classes, end - begin, samples, classes, scratch.data());
    });
  });
  return {out, kept};
}

Tensor aggregate_from_kept(Tensor grad, Tensor logits, Tensor kept, int64_t method) {
  const Tensor x = dense(logits), g = dense(grad, kept.scalar_type());
  const int64_t batch = x.size(0), samples = x.size(1), classes = x.size(2);
  Tensor out = new_like(x);
  dispatch(x.scalar_type(), "aggregate_backward", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    T* to = writable<T>(out);
    parallel_rows(batch, 2 * samples * classes, [&](int64_t begin, int64_t end) {
      std::vector<W> scratch(classes);
      const int64_t at = begin * samples * classes;
      kept_backward(static_cast<Aggregation>(method), data<W>(g) + begin * classes, data<T>(x) + at,
                    data<W>(kept) + 3 * begin * classes, to + at, end - begin, samples, classes, scratch.data());
    });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("aggregate", TORCH_BOX(&pf::cpu::aggregate));
  m.impl("aggregate_backward", TORCH_BOX(&pf::cpu::aggregate_backward));
  m.impl("aggregate_keeping", TORCH_BOX(&pf::cpu::aggregate_keeping));
  m.impl("aggregate_from_kept", TORCH_BOX(&pf::cpu::aggregate_from_kept));
}

// Copies the pixels of contextual_attention into matrices before the matrix products, and back afterwards.
#include "common.h"
#include "pixels.h"

namespace pf::cpu {
namespace {

// Feature maps x [batch, channels, 2 height, 2 width] and their phases. For contiguous x the phases are [batch, 4,
// channels, cells]. For channels_last x they are [batch, 4, cells, channels].
struct Maps {
  int64_t batch, channels, height, width;
  int64_t cells() const { return height * width; }
  int64_t phase() const { return channels * cells(); }
};

// Splits the planes begin .. end - 1 of contiguous maps. Plane c of sample b has the index b * channels + c.
template <class T>
PF_INLINE void split_planes_loop(const T* x, T* phases, Maps maps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* to = phases + (i / maps.channels * 4 * maps.channels + i % maps.channels) * maps.cells();
    split_plane(x + i * 4 * maps.cells(), to, maps.height, maps.width, maps.phase());
  }
}
// Joins the phases of the planes begin .. end - 1. `more` [batch, channels, cells] is added to phase 0, if `more` is
// not null. `spare` has room for phase 0 of one plane.
template <class T, class W = wide_t<T>>
PF_INLINE void join_planes_loop(const T* phases, const W* more, T* x, Maps maps, int64_t begin, int64_t end, T* spare) {
  const int64_t cells = maps.cells();
  for (int64_t i = begin; i < end; ++i) {
    const T* from = phases + (i / maps.channels * 4 * maps.channels + i % maps.channels) * cells;
    if (more) {
      const W* added = more + i * cells;
      store_all(spare, cells, [=](int64_t k) PF_INLINED_LAMBDA { return load(from[k]) + added[k]; });
    }
    join_plane(more ? spare : from, from, x + i * 4 * cells, maps.height, maps.width, maps.phase());
  }
}
// Splits the rows of pixels begin .. end - 1 of channels_last maps. Row y of sample b has the index b * 2 height + y.
template <class T>
PF_INLINE void split_rows_loop(const T* x, T* phases, Maps maps, int64_t begin, int64_t end) {
  const int64_t channels = maps.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / (2 * maps.height), y = i % (2 * maps.height);
    const T* from = x + i * 2 * maps.width * channels;
    T* to = phases + (4 * b + y % 2 * 2) * maps.phase() + y / 2 * maps.width * channels;
    for (int64_t j = 0; j < maps.width; ++j) {
      copy_numbers(from + 2 * j * channels, to + j * channels, channels);
      copy_numbers(from + (2 * j + 1) * channels, to + maps.phase() + j * channels, channels);
    }
  }
}
// Joins the phases of rows begin .. end - 1. `more` [batch, cells, channels] or null is added to phase 0.
template <class T, class W = wide_t<T>>
PF_INLINE void join_rows_loop(const T* phases, const W* more, T* x, Maps maps, int64_t begin, int64_t end) {
  const int64_t channels = maps.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / (2 * maps.height), y = i % (2 * maps.height), at = y / 2 * maps.width * channels;
    const T* from = phases + (4 * b + y % 2 * 2) * maps.phase() + at;
    T* to = x + i * 2 * maps.width * channels;
    for (int64_t j = 0; j < maps.width; ++j) {
      const T* even = from + j * channels;
      if (more && y % 2 == 0) {
        const W* added = more + b * maps.phase() + at + j * channels;
        store_all(to + 2 * j * channels, channels,
                  [=](int64_t k) PF_INLINED_LAMBDA { return load(even[k]) + added[k]; });
      } else {
        copy_numbers(even, to + 2 * j * channels, channels);
      }
      copy_numbers(even + maps.phase(), to + (2 * j + 1) * channels, channels);
    }
  }
}

#define PF_LOOPS(CLONES, T)                                                                                    \
  CLONES void split_planes(const T* x, T* phases, Maps maps, int64_t begin, int64_t end) {                     \
    split_planes_loop(x, phases, maps, begin, end);                                                            \
  }                                                                                                            \
  CLONES void join_planes(const T* phases, const wide_t<T>* more, T* x, Maps maps, int64_t begin, int64_t end, \
                          T* spare) {                                                                          \
    join_planes_loop(phases, more, x, maps, begin, end, spare);                                                \
  }                                                                                                            \
  CLONES void split_rows(const T* x, T* phases, Maps maps, int64_t begin, int64_t end) {                       \
    split_rows_loop(x, phases, maps, begin, end);                                                              \
  }                                                                                                            \
  CLONES void join_rows(const T* phases, const wide_t<T>* more, T* x, Maps maps, int64_t begin, int64_t end) { \
    join_rows_loop(phases, more, x, maps, begin, end);                                                         \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

Tensor contextual_attention_split(Tensor features, bool channels_last) {
  const Maps maps{features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2};
  const ScalarType dtype = features.scalar_type();
  const Tensor x = channels_last ? features : dense(features);
  Tensor phases = channels_last ? new_tensor({maps.batch, 4, maps.cells(), maps.channels}, dtype)
                                : new_tensor({maps.batch, 4, maps.channels, maps.cells()}, dtype);
  dispatch(dtype, "contextual_attention", [&](auto tag) {
    using T = decltype(tag);
    const T* from = data<T>(x);
    T* to = writable<T>(phases);
    if (channels_last) {
      parallel_rows(maps.batch * 2 * maps.height, 2 * maps.width * maps.channels,
                    [&](int64_t begin, int64_t end) { split_rows(from, to, maps, begin, end); });
    } else {
      parallel_rows(maps.batch * maps.channels, 4 * maps.cells(),
                    [&](int64_t begin, int64_t end) { split_planes(from, to, maps, begin, end); });
    }
  });
  return phases;
}

Tensor contextual_attention_join(Tensor phases, std::optional<Tensor> more, int64_t height, int64_t width,
                                 bool channels_last) {
  const Maps maps{phases.size(0), phases.size(channels_last ? 3 : 2), height, width};
  const ScalarType dtype = phases.scalar_type();
  const Tensor from = dense(phases);
  Tensor x = new_images(maps.batch, maps.channels, 2 * height, 2 * width, dtype, channels_last);
  std::optional<Tensor> extra;
  if (more.has_value()) extra = dense(*more, wide_dtype(dtype));
  dispatch(dtype, "contextual_attention", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const W* added = extra.has_value() ? data<W>(*extra) : nullptr;
    T* to = writable<T>(x);
    if (channels_last) {
      parallel_rows(maps.batch * 2 * height, 2 * width * maps.channels,
                    [&](int64_t begin, int64_t end) { join_rows(data<T>(from), added, to, maps, begin, end); });
    } else {
      parallel_rows(maps.batch * maps.channels, 4 * maps.cells(), [&](int64_t begin, int64_t end) {
        std::vector<T> spare(added ? maps.cells() : 0);
        join_planes(data<T>(from), added, to, maps, begin, end, spare.data());
      });
    }
  });
  return x;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("contextual_attention_split", TORCH_BOX(&pf::cpu::contextual_attention_split));
  m.impl("contextual_attention_join", TORCH_BOX(&pf::cpu::contextual_attention_join));
}

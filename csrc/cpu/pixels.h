// Splits feature maps into four phases and joins them again. Phase 2 a + b has the pixels (2 i + a, 2 j + b), for a, b
// in {0, 1}.
#pragma once

#include <cstring>

#include "../core/math.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PF_SHUFFLE 1
#endif
#endif

namespace pf::cpu {

template <int bytes>
struct Shuffled;
template <>
struct Shuffled<2> {
  typedef uint16_t Four __attribute__((vector_size(8)));
  typedef uint16_t Eight __attribute__((vector_size(16)));
};
template <>
struct Shuffled<4> {
  typedef uint32_t Four __attribute__((vector_size(16)));
  typedef uint32_t Eight __attribute__((vector_size(32)));
};
template <>
struct Shuffled<8> {
  typedef uint64_t Four __attribute__((vector_size(32)));
  typedef uint64_t Eight __attribute__((vector_size(64)));
};

// Splits x[0 .. 2 n - 1] into even and odd positions, eight at a time: rows are too short for longer vectors.
template <class T>
PF_INLINE void split_row(const T* __restrict__ x, T* __restrict__ even, T* __restrict__ odd, int64_t n) {
  int64_t j = 0;
#if defined(PF_SHUFFLE)
  for (; j + 4 <= n; j += 4) {
    typename Shuffled<sizeof(T)>::Eight row;
    std::memcpy(&row, x + 2 * j, sizeof row);
    const typename Shuffled<sizeof(T)>::Four first = __builtin_shufflevector(row, row, 0, 2, 4, 6),
                                             second = __builtin_shufflevector(row, row, 1, 3, 5, 7);
    std::memcpy(even + j, &first, sizeof first);
    std::memcpy(odd + j, &second, sizeof second);
  }
#endif
  for (; j < n; ++j) {
    even[j] = x[2 * j];
    odd[j] = x[2 * j + 1];
  }
}
// Undoes `split_row`.
template <class T>
PF_INLINE void join_row(const T* __restrict__ even, const T* __restrict__ odd, T* __restrict__ x, int64_t n) {
  int64_t j = 0;
#if defined(PF_SHUFFLE)
  for (; j + 4 <= n; j += 4) {
    typename Shuffled<sizeof(T)>::Four first, second;
    std::memcpy(&first, even + j, sizeof first);
    std::memcpy(&second, odd + j, sizeof second);
    const typename Shuffled<sizeof(T)>::Eight row = __builtin_shufflevector(first, second, 0, 4, 1, 5, 2, 6, 3, 7);
    std::memcpy(x + 2 * j, &row, sizeof row);
  }
#endif
  for (; j < n; ++j) {
    x[2 * j] = even[j];
    x[2 * j + 1] = odd[j];
  }
}

// Splits x [2 height][2 width] into its phases [height][width]. The phases are `apart` elements apart in memory.
template <class T>
PF_INLINE void split_plane(const T* x, T* phases, int64_t height, int64_t width, int64_t apart) {
  for (int64_t i = 0; i < height; ++i, x += 4 * width, phases += width) {
    split_row(x, phases, phases + apart, width);
    split_row(x + 2 * width, phases + 2 * apart, phases + 3 * apart, width);
  }
}

// Undoes `split_plane`. Phase 0 is read from `first`, and the other three phases from `phases`.
template <class T>
PF_INLINE void join_plane(const T* first, const T* phases, T* x, int64_t height, int64_t width, int64_t apart) {
  for (int64_t i = 0; i < height; ++i, x += 4 * width, phases += width, first += width) {
    join_row(first, phases + apart, x, width);
    join_row(phases + 2 * apart, phases + 3 * apart, x + 2 * width, width);
  }
}

template <class T>
PF_INLINE void copy_numbers(const T* __restrict__ from, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace pf::cpu

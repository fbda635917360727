// Feature maps and their four phases: the pixels (2 i + a, 2 j + b) of every a, b in {0, 1}, phase 2 a + b.
#pragma once

#include "../core/math.h"

namespace pf::cpu {

// x [2 height][2 width] into its phases [height][width], which lie `apart` elements apart.
template <class T>
PF_HD void split_plane(const T* __restrict__ x, T* __restrict__ phases, int64_t height, int64_t width, int64_t apart) {
  for (int64_t row = 0; row < 2 * height; ++row, x += 2 * width) {
    T* __restrict__ even = phases + row % 2 * 2 * apart + row / 2 * width;
    T* __restrict__ odd = even + apart;
    for (int64_t j = 0; j < width; ++j) {
      even[j] = x[2 * j];
      odd[j] = x[2 * j + 1];
    }
  }
}

// The inverse. Where `first` is given, it takes the place of phase 0.
template <class T>
PF_HD void join_plane(const T* __restrict__ phases, const T* __restrict__ first, T* __restrict__ x, int64_t height,
                      int64_t width, int64_t apart) {
  for (int64_t row = 0; row < 2 * height; ++row, x += 2 * width) {
    const int64_t at = row / 2 * width;
    const T* __restrict__ odd = phases + (row % 2 * 2 + 1) * apart + at;
    const T* __restrict__ even = row % 2 == 0 && first ? first + at : odd - apart;
    for (int64_t j = 0; j < width; ++j) {
      x[2 * j] = even[j];
      x[2 * j + 1] = odd[j];
    }
  }
}

// n numbers from one place to another.
template <class T>
PF_HD void copy_numbers(const T* __restrict__ from, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// f(width), with those widths as constants that are too small for a loop to be fast that does not know them.
template <class F>
PF_HD void with_width(int64_t width, F f) {
  switch (width) {
    case 2:
      return f(int64_t{2});
    case 4:
      return f(int64_t{4});
    case 8:
      return f(int64_t{8});
    case 16:
      return f(int64_t{16});
    default:
      return f(width);
  }
}

}  // namespace pf::cpu

// The inner loops of random_transform, compiled once per instruction set. Include this file after fused multiply-adds
// are switched off, so that the pixels have the same bits on every CPU.
#pragma once

#include "../core/random_transform.h"
#include "common.h"

namespace pf::cpu {
namespace {

// The unsigned integer of a storage type's size: hiding replaces bits, so a loop works for every such type.
template <int bytes>
struct word_of;
template <>
struct word_of<2> {
  using type = uint16_t;
};
template <>
struct word_of<4> {
  using type = uint32_t;
};
template <>
struct word_of<8> {
  using type = uint64_t;
};
template <class T>
using word_t = typename word_of<sizeof(T)>::type;

// Neighboring columns that are all visible, or all hidden.
struct Run {
  int64_t begin, length;
  bool seen;
};
// Consecutive rows of a plane that all have the same runs.
struct Strip {
  int64_t rows, width;
  const Run* runs;
  // The number of runs.
  int64_t count;
};

// Writes the transformed pixels of a strip, and 0 for hidden pixels. `noise` has numbers for the visible runs only,
// without gaps. It is null if there is no noise.
template <class T, class W = wide_t<T>>
PF_INLINE void transform_loop(const T* __restrict__ x, const float* __restrict__ noise, W sigma, Strip strip,
                              W* __restrict__ out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const T* from = x + row * strip.width + run.begin;
      W* to = out + row * strip.width + run.begin;
      if (!run.seen) {
        for (int64_t i = 0; i < run.length; ++i) to[i] = 0;
      } else if (noise == nullptr) {
        for (int64_t i = 0; i < run.length; ++i) to[i] = transformed<W>(load(from[i]), 0, 0);
      } else {
        for (int64_t i = 0; i < run.length; ++i) to[i] = transformed<W>(load(from[i]), noise[i], sigma);
        noise += run.length;
      }
    }
  }
}
// Computes the gradient of the pixels of a strip. If `first`, the gradient is assigned to `out`; otherwise it is added.
// Only the visible runs of grad are read.
template <bool first, class T, class W = wide_t<T>>
PF_INLINE void slope_loop(const T* __restrict__ x, const float* __restrict__ noise, W sigma, const W* __restrict__ grad,
                          Strip strip, W* __restrict__ out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const int64_t at = row * strip.width + run.begin;
      const T* from = x + at;
      const W* slope = grad + at;
      W* to = out + at;
      if (!run.seen) {
        if (first) {
          for (int64_t i = 0; i < run.length; ++i) to[i] = 0;
        }
      } else if (noise == nullptr) {
        for (int64_t i = 0; i < run.length; ++i) {
          to[i] = (first ? W(0) : to[i]) + transformed_slope<W>(load(from[i]), 0, 0, slope[i]);
        }
      } else {
        for (int64_t i = 0; i < run.length; ++i) {
          to[i] = (first ? W(0) : to[i]) + transformed_slope<W>(load(from[i]), noise[i], sigma, slope[i]);
        }
        noise += run.length;
      }
    }
  }
}
// Writes the value `seen` for visible pixels of the strip, and `hidden` for hidden pixels.
template <class U>
PF_INLINE void mark_loop(U seen, U hidden, Strip strip, U* out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const U value = run.seen ? seen : hidden;
      for (int64_t i = 0; i < run.length; ++i) out[row * strip.width + run.begin + i] = value;
    }
  }
}

// Rounds n numbers to the storage type T.
template <class T, class W>
PF_INLINE void round_loop(const W* from, word_t<T>* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    store(rounded, static_cast<wide_t<T>>(from[i]));
    to[i] = bit_cast<word_t<T>>(rounded);
  }
}
// Adds to sum[i] the gradients of pixel i in the passes first .. first + passes - 1, except for the pass that hides the
// pixel (its owner). In grad, passes are `apart` elements apart, and pixels are `stride` elements apart.
template <int passes, class T, class W>
PF_INLINE void add_loop(const T* __restrict__ grad, int64_t apart, int64_t stride, const uint32_t* __restrict__ owner,
                        uint32_t first, W* __restrict__ sum, int64_t n) {
  const auto added = [=](int64_t i, int64_t at) PF_INLINED_LAMBDA {
    W total = sum[i];
    for (int j = 0; j < passes; ++j) {
      // The value is read in any case, because only a loop without a branch is vectorized.
      const W g = static_cast<W>(load(grad[j * apart + at]));
      total += owner[i] == first + static_cast<uint32_t>(j) ? W(0) : g;
    }
    return total;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) sum[i] = added(i, i);
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] = added(i, i * stride);
  }
}
// Does the same as add_loop for any number of passes, four at a time.
template <class T, class W>
PF_INLINE void add_passes(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first,
                          int64_t passes, W* sum, int64_t n) {
  for (; passes >= 4; passes -= 4, first += 4, grad += 4 * apart) {
    add_loop<4>(grad, apart, stride, owner, first, sum, n);
  }
  for (; passes > 0; --passes, ++first, grad += apart) add_loop<1>(grad, apart, stride, owner, first, sum, n);
}

// The owners of the blocks of an image, and the size of a block in pixels.
struct Blocks {
  const uint8_t* owners;
  int64_t columns, tall, wide;
};
// Computes the same sums as add_passes for `rows` rows, beginning with row `first`. Requires wide blocks and contiguous
// pixels. Blocks are processed as a whole, so the pass that hides a block is not read. The other passes are added in
// their order, three at a time.
template <class T, class W>
PF_INLINE void add_blocks_loop(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows,
                               W* sum) {
  const int64_t width = blocks.columns * blocks.wide;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* owners = blocks.owners + (first + row) / blocks.tall * blocks.columns;
    for (int64_t column = 0; column < blocks.columns; ++column) {
      const int64_t at = row * width + column * blocks.wide;
      W* __restrict__ to = sum + at;
      for (int64_t i = 0; i < blocks.wide; ++i) to[i] = 0;
      const T* seen[3];
      int count = 0;
      for (int64_t pass = 0; pass < passes; ++pass) {
        if (owners[column] == pass) continue;
        seen[count++] = grad + pass * apart + at;
        if (count < 3) continue;
        const T* __restrict__ a = seen[0], * __restrict__ b = seen[1], * __restrict__ c = seen[2];
        for (int64_t i = 0; i < blocks.wide; ++i) {
          to[i] = ((to[i] + static_cast<W>(load(a[i]))) + static_cast<W>(load(b[i]))) + static_cast<W>(load(c[i]));
        }
        count = 0;
      }
      for (int j = 0; j < count; ++j) {
        const T* __restrict__ a = seen[j];
        for (int64_t i = 0; i < blocks.wide; ++i) to[i] += static_cast<W>(load(a[i]));
      }
    }
  }
}

#define PF_LOOPS(CLONES, T)                                                                                          \
  CLONES void transform(const T* x, const float* noise, wide_t<T> sigma, Strip strip, wide_t<T>* out) {              \
    transform_loop(x, noise, sigma, strip, out);                                                                     \
  }                                                                                                                  \
  CLONES void slope(const T* x, const float* noise, wide_t<T> sigma, const wide_t<T>* grad, bool first, Strip strip, \
                    wide_t<T>* out) {                                                                                \
    if (first) {                                                                                                     \
      slope_loop<true>(x, noise, sigma, grad, strip, out);                                                           \
    } else {                                                                                                         \
      slope_loop<false>(x, noise, sigma, grad, strip, out);                                                          \
    }                                                                                                                \
  }                                                                                                                  \
  CLONES void round_to(T, const float* __restrict__ from, word_t<T>* __restrict__ to, int64_t n) {                   \
    round_loop<T>(from, to, n);                                                                                      \
  }                                                                                                                  \
  CLONES void add_seen(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first,          \
                       int64_t passes, float* sum, int64_t n) {                                                      \
    add_passes(grad, apart, stride, owner, first, passes, sum, n);                                                   \
  }                                                                                                                  \
  CLONES void add_blocks(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows,   \
                         float* sum) {                                                                               \
    add_blocks_loop(grad, apart, passes, blocks, first, rows, sum);                                                  \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// The same loops for images in float64.
template <class T>
void round_to(T, const double* from, word_t<T>* to, int64_t n) {
  round_loop<T>(from, to, n);
}
template <class T>
void add_seen(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first, int64_t passes,
              double* sum, int64_t n) {
  add_passes(grad, apart, stride, owner, first, passes, sum, n);
}
template <class T>
void add_blocks(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows, double* sum) {
  add_blocks_loop(grad, apart, passes, blocks, first, rows, sum);
}

// For pixel i, writes `hidden` if `pass` owns it, and seen(i) otherwise. In `out`, pixels are `stride` elements apart.
template <class U, class Seen>
PF_INLINE void choose_loop(Seen seen, U hidden, const U* owner, U pass, U* out, int64_t stride, int64_t n) {
  const auto chosen = [=](int64_t i) PF_INLINED_LAMBDA {
    const U s = seen(i);
    return owner[i] == pass ? hidden : s;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = chosen(i);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * stride] = chosen(i);
  }
}

#define PF_CHOICES(U)                                                                                             \
  PF_CLONES void hide(const U* __restrict__ t, const U* __restrict__ owner, U pass, U* __restrict__ out,          \
                      int64_t stride, int64_t n) {                                                                \
    choose_loop([=](int64_t i) PF_INLINED_LAMBDA { return t[i]; }, U(0), owner, pass, out, stride, n);            \
  }                                                                                                               \
  PF_CLONES void mark(U seen, U hidden, const U* __restrict__ owner, U pass, U* __restrict__ out, int64_t stride, \
                      int64_t n) {                                                                                \
    choose_loop([=](int64_t) PF_INLINED_LAMBDA { return seen; }, hidden, owner, pass, out, stride, n);            \
  }                                                                                                               \
  PF_CLONES void mark_runs(U seen, U hidden, Strip strip, U* out) { mark_loop(seen, hidden, strip, out); }
PF_CHOICES(uint16_t)
PF_CHOICES(uint32_t)
PF_CHOICES(uint64_t)

}  // namespace
}  // namespace pf::cpu

// Computes rows of [cells][cells] matrices as sums of shifted rows. In each term, the query and the key are shifted by
// the same step.
//
// The code adds 64 bytes at a time. Bit masks remove numbers from beyond a row or beyond the grid, so a NaN there has
// no effect. In scratch memory, every row has room for a multiple of 64 bytes, and the memory next to a row may be
// read. `Dense` makes other matrices readable in the same way.
#pragma once

#include <cstring>
#include <vector>

#include "../core/contextual_attention.h"

namespace pf::cpu {

// Vectors of 64 bytes: numbers of type W, and integers of the same size.
template <class W>
struct Lanes {
  using Word = int32_t;
  typedef W Numbers __attribute__((vector_size(64)));
  typedef Word Words __attribute__((vector_size(64)));
};
template <>
struct Lanes<double> {
  using Word = int64_t;
  typedef double Numbers __attribute__((vector_size(64)));
  typedef Word Words __attribute__((vector_size(64)));
};
template <class W>
using word_of_t = typename Lanes<W>::Word;
// The lengths of rows are rounded up to a multiple of this number.
constexpr int64_t whole_lanes = 16;
PF_INLINE int64_t padded(int64_t cells) { return (cells + whole_lanes - 1) / whole_lanes * whole_lanes; }
// Shifted rows extend beyond the first and the last number of a matrix by at most this number of elements.
PF_INLINE int64_t reach(Grid grid) { return grid.width + 1 + whole_lanes; }

// Fills the 64 bytes of `out` with the numbers that begin at `from`. 16-bit numbers are converted to float. `out` is an
// argument, because functions cannot return a vector of 64 bytes on processors without instructions for such vectors.
template <class Words>
PF_INLINE void load_lanes(const float* from, Words& out) {
  std::memcpy(&out, from, sizeof out);
}
template <class Words>
PF_INLINE void load_lanes(const double* from, Words& out) {
  std::memcpy(&out, from, sizeof out);
}
template <class Words>
PF_INLINE void load_lanes(const bfloat16* from, Words& out) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Wide __attribute__((vector_size(64)));
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  const Wide shifted = __builtin_convertvector(bits, Wide) << 16;
  std::memcpy(&out, &shifted, sizeof out);
}
template <class Words>
PF_INLINE void load_lanes(const half* from, Words& out) {
  float numbers[sizeof(Words) / sizeof(float)];
  for (size_t j = 0; j < sizeof(Words) / sizeof(float); ++j) numbers[j] = load(from[j]);
  std::memcpy(&out, numbers, sizeof out);
}

// One term of a sum of rows: the numbers that begin at `from`, in the places where the mask has set bits.
template <class T, class W = wide_t<T>>
struct Term {
  const T* from;
  const word_of_t<W>* mask;
};

// out[i] = the sum of the terms at i, for i < size. `size` is a multiple of the vector length.
template <int count, class T, class W = wide_t<T>>
PF_INLINE void sum_terms(const Term<T>* terms, W* out, int64_t size) {
  using Numbers = typename Lanes<W>::Numbers;
  using Words = typename Lanes<W>::Words;
  constexpr int64_t step = 64 / sizeof(W);
  for (int64_t i = 0; i < size; i += step) {
    Numbers total = {};
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) {
      Words value, mask;
      load_lanes(terms[k].from + i, value);
      std::memcpy(&mask, terms[k].mask + i, sizeof mask);
      total += reinterpret_cast<Numbers>(value & mask);
    }
    std::memcpy(out + i, &total, sizeof total);
  }
}

// Each of the four phases (see pixels.h) has four of the nine terms. For each phase, writes a row of `size` numbers: a
// quarter of the sum of the phase's terms.
template <class W>
PF_INLINE void quarter_terms(const Term<W>* terms, W* out, int64_t size) {
  using Numbers = typename Lanes<W>::Numbers;
  using Words = typename Lanes<W>::Words;
  constexpr int64_t step = 64 / sizeof(W);
  for (int64_t i = 0; i < size; i += step) {
    Numbers left[3], right[3];
#pragma GCC unroll 3
    for (int down = 0; down < 3; ++down) {
      Numbers x[3];
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        Words value, mask;
        load_lanes(terms[3 * down + k].from + i, value);
        std::memcpy(&mask, terms[3 * down + k].mask + i, sizeof mask);
        x[k] = reinterpret_cast<Numbers>(value & mask) * W(0.25);
      }
      left[down] = x[1] + x[0];
      right[down] = x[1] + x[2];
    }
    const Numbers phases[4] = {left[1] + left[0], right[1] + right[0], left[1] + left[2], right[1] + right[2]};
#pragma GCC unroll 4
    for (int phase = 0; phase < 4; ++phase) std::memcpy(out + phase * size + i, &phases[phase], sizeof phases[phase]);
  }
}

// The masks of all shifts. A mask has set bits for the keys that are still on the grid after the shift.
template <class W>
class Masks {
 public:
  using Word = word_of_t<W>;

  explicit Masks(Grid grid) : size_(padded(grid.cells())), words_(count * size_) {
    const int64_t cells = grid.cells(), width = grid.width;
    for (int64_t i = 0; i < cells; ++i) {
      const int64_t y = i / width, column = i % width;
      for (int k = 0; k < 9; ++k) {
        const int64_t down = y + k / 3 - 1, right = column + k % 3 - 1;
        set(k, i, down >= 0 && down < grid.height && right >= 0 && right < width);
      }
      set(before_, i, i > 0);
      set(after_, i, i < cells - 1);
      set(below_, i, i < cells - width);
      set(next_top_, i, i >= cells - width && i < cells - 1);
      set(above_, i, i >= width);
      set(last_bottom_, i, i > 0 && i < width);
    }
  }

  PF_INLINE int64_t size() const { return size_; }
  // The mask of the keys that have a neighbor `down` rows below and `right` columns to the right. Both are -1, 0 or 1.
  PF_INLINE const Word* neighbour(int down, int right) const { return mask(3 * (down + 1) + right + 1); }
  PF_INLINE const Word* every() const { return neighbour(0, 0); }
  PF_INLINE const Word* none() const { return mask(none_); }
  // In row-major order: all keys except the first, and all keys except the last.
  PF_INLINE const Word* before() const { return mask(before_); }
  PF_INLINE const Word* after() const { return mask(after_); }
  // In column-major order, the next key is the cell below (for the keys of the mask `below`) or the top of the next
  // column (for the keys of `next_top`). The previous key is the cell above (`above`) or the bottom of the previous
  // column (`last_bottom`).
  PF_INLINE const Word* below() const { return mask(below_); }
  PF_INLINE const Word* next_top() const { return mask(next_top_); }
  PF_INLINE const Word* above() const { return mask(above_); }
  PF_INLINE const Word* last_bottom() const { return mask(last_bottom_); }

 private:
  enum { none_ = 9, before_, after_, below_, next_top_, above_, last_bottom_, count };
  PF_INLINE const Word* mask(int k) const { return words_.data() + k * size_; }
  void set(int k, int64_t i, bool on) { words_[k * size_ + i] = on ? Word(-1) : Word(0); }

  int64_t size_;
  std::vector<Word> words_;
};

// A matrix in scratch memory. Its rows are `stride` apart, and the memory around it may be read.
template <class T>
struct Padded {
  const T* begin;
  int64_t stride;
  PF_INLINE const T* at(int64_t row, int64_t column) const { return begin + row * stride + column; }
};

// Contiguous matrices. The memory before the first matrix and after the last matrix must not be read. A read that could
// cross one of these ends uses a padded copy of the end.
template <class T>
class Dense {
 public:
  Dense(const T* begin, int64_t matrices, Grid grid)
      : begin_(begin), cells_(grid.cells()), numbers_(matrices * cells_ * cells_), size_(padded(cells_)) {
    const int64_t room = reach(grid), kept = numbers_ < size_ ? numbers_ : size_;
    ends_.resize(2 * (2 * room + size_));
    head_ = ends_.data() + room;
    T* tail = ends_.data() + 2 * room + size_ + room;
    for (int64_t i = 0; i < kept; ++i) head_[i] = begin[i];
    for (int64_t i = 0; i < kept; ++i) tail[i] = begin[numbers_ - kept + i];
    tail_ = tail - (numbers_ - kept);
  }

  // `row` is an index into the rows of all matrices together.
  PF_INLINE const T* at(int64_t row, int64_t column) const {
    const int64_t offset = row * cells_ + column;
    if (offset < 0) return head_ + offset;
    return (offset + size_ > numbers_ ? tail_ : begin_) + offset;
  }

 private:
  const T* begin_;
  int64_t cells_, numbers_, size_;
  std::vector<T> ends_;
  T* head_;
  const T* tail_;
};

// Writes the nine terms of query n, one for each offset. A term is the row of the query at this offset from query n,
// with its keys shifted by the same offset. `first` is the index of the first row of the matrix.
template <class T, class Matrix>
PF_INLINE void neighbour_terms(const Matrix& x, int64_t first, Grid grid, int64_t n, const Masks<wide_t<T>>& masks,
                               Term<T>* terms) {
  const int64_t y = n / grid.width, column = n % grid.width;
  for (int down = -1; down <= 1; ++down) {
    const bool row_inside = y + down >= 0 && y + down < grid.height;
    for (int right = -1; right <= 1; ++right, ++terms) {
      const bool inside = row_inside && column + right >= 0 && column + right < grid.width;
      const int64_t shift = inside ? down * grid.width + right : 0;
      *terms = {x.at(first + n + shift, shift), inside ? masks.neighbour(down, right) : masks.none()};
    }
  }
}
// Writes 16 terms. Their sum, divided by 4, is the gradient of row n of the attention weights. The terms are rows of
// the gradients of the four phases. `first` is the index of the first row of the first phase.
template <class T>
PF_INLINE void phase_terms(const Dense<T>& grad, int64_t first, Grid grid, int64_t n, const Masks<wide_t<T>>& masks,
                           Term<T>* terms) {
  const int64_t y = n / grid.width, column = n % grid.width;
  for (int phase = 0; phase < 4; ++phase, first += grid.cells()) {
    for (int down = -(phase / 2); down <= 1 - phase / 2; ++down) {
      const bool row_inside = y + down >= 0 && y + down < grid.height;
      for (int right = -(phase % 2); right <= 1 - phase % 2; ++right, ++terms) {
        const bool inside = row_inside && column + right >= 0 && column + right < grid.width;
        const int64_t shift = inside ? down * grid.width + right : 0;
        *terms = {grad.at(first + n + shift, shift), inside ? masks.neighbour(down, right) : masks.none()};
      }
    }
  }
}
// Writes the terms of the first pass of "fuse": the rows n - 1, n and n + 1, shifted by keys in row-major order.
template <class T>
PF_INLINE void row_terms(Padded<T> x, int64_t cells, int64_t n, const Masks<wide_t<T>>& masks, Term<T>* terms) {
  const bool last = n == cells - 1;
  terms[0] = {x.at(n, 0), masks.every()};
  terms[1] = n > 0 ? Term<T>{x.at(n - 1, -1), masks.before()} : Term<T>{x.at(n, 0), masks.none()};
  terms[2] = last ? Term<T>{x.at(n, 0), masks.none()} : Term<T>{x.at(n + 1, 1), masks.after()};
}
// Writes the terms of the second pass of "fuse": row n, and the rows before and after it, shifted by one key, in
// column-major order. There, the top of a column follows the last cell of the previous column.
template <class T>
PF_INLINE void column_terms(Padded<T> x, Grid grid, int64_t n, const Masks<wide_t<T>>& masks, Term<T>* terms) {
  const int64_t cells = grid.cells(), width = grid.width, wrap = cells - 1 - width;
  const bool first = n == 0, last = n == cells - 1;
  const int64_t next = last ? n : n < cells - width ? n + width : n - wrap;
  const int64_t previous = first ? n : n < width ? n + wrap : n - width;
  terms[0] = {x.at(n, 0), masks.every()};
  terms[1] = {x.at(next, width), last ? masks.none() : masks.below()};
  terms[2] = {x.at(next, -wrap), last ? masks.none() : masks.next_top()};
  terms[3] = {x.at(previous, -width), first ? masks.none() : masks.above()};
  terms[4] = {x.at(previous, wrap), first ? masks.none() : masks.last_bottom()};
}

}  // namespace pf::cpu

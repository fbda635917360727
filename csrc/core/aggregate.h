// Combines the predictions from K samples into one prediction, in the log domain. purify_fast/ops/aggregate.py has the
// definition.
//
// The functions work on a tile [samples][width]. A lane is one (image, class) pair, so every loop is long even if there
// are few classes. The caller may round `width` up. It must then write numbers into the additional lanes too.
#pragma once

#include "math.h"

namespace pf {

enum class Aggregation : int { lse = 0, peel = 1, mean = 2, probability = 3, vote = 4 };

// With this bound, tangent_exp remains finite in float32 for logits up to about 1e8.
constexpr double tangent_from = 70.0;

// Returns exp(q) for q <= tangent_from. Above tangent_from, the tangent of exp at tangent_from replaces exp. Also
// writes the derivative to `slope`.
template <class W>
PF_INLINE W tangent_exp(W q, W& slope) {
  constexpr W from = static_cast<W>(tangent_from);
  slope = exp(q > from ? from : q);
  return slope * (1 + max_nan(W(q - from), W(0)));
}

// The number that logsumexp subtracts before the exponential: the maximum, or 0 if the maximum is infinite.
template <class W>
PF_INLINE W shift_of(W maximum) {
  constexpr W infinity = std::numeric_limits<W>::infinity();
  return abs(maximum) == infinity ? W(0) : maximum;
}

// Writes the largest and the smallest number of each lane over the samples.
template <class W>
PF_INLINE void lane_range(const W* __restrict__ tile, int64_t samples, int64_t width, W* __restrict__ most,
                          W* __restrict__ least) {
  for (int64_t i = 0; i < width; ++i) most[i] = least[i] = tile[i];
  for (int64_t k = 1; k < samples; ++k) {
    const W* row = tile + k * width;
    for (int64_t i = 0; i < width; ++i) {
      most[i] = max_nan(row[i], most[i]);
      least[i] = min_nan(row[i], least[i]);
    }
  }
}

// The largest number of lanes computed together: enough for vectors, and few enough for the first-level cache.
constexpr int64_t aggregate_lanes = 64;

// For each of `lanes` lanes, computes two numbers over the samples. `most` is the largest number, and `sum` is the sum
// of exp(x - most). Two samples of a lane are `stride` elements apart. If `most` is infinite, `sum` is meaningless, so
// callers check `most`.
template <class T, class W>
PF_INLINE void exponentials(const T* __restrict__ x, int64_t samples, int64_t lanes, int64_t stride,
                            W* __restrict__ most, W* __restrict__ sum) {
  for (int64_t j = 0; j < lanes; ++j) most[j] = load(x[j]);
  for (int64_t k = 1; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) most[j] = max_nan(static_cast<W>(load(x[k * stride + j])), most[j]);
  }
  for (int64_t j = 0; j < lanes; ++j) sum[j] = 0;
  for (int64_t k = 0; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) sum[j] += exp_unit(static_cast<W>(load(x[k * stride + j])) - most[j]);
  }
}

// Does the same as `exponentials`, and also overwrites the numbers with their exponentials.
template <class W>
PF_INLINE void tile_exponentials(W* __restrict__ x, int64_t samples, int64_t lanes, int64_t stride,
                                 W* __restrict__ most, W* __restrict__ sum) {
  for (int64_t j = 0; j < lanes; ++j) most[j] = x[j];
  for (int64_t k = 1; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) most[j] = max_nan(x[k * stride + j], most[j]);
  }
  for (int64_t j = 0; j < lanes; ++j) sum[j] = 0;
  for (int64_t k = 0; k < samples; ++k) {
    W* row = x + k * stride;
    for (int64_t j = 0; j < lanes; ++j) {
      row[j] = exp_unit(row[j] - most[j]);
      sum[j] += row[j];
    }
  }
}

// Computes logsumexp over the samples, for each of `lanes` lanes.
template <class T, class W>
PF_INLINE void logsumexp_lanes(const T* __restrict__ x, int64_t samples, int64_t lanes, int64_t stride,
                               W* __restrict__ out) {
  W most[aggregate_lanes], sum[aggregate_lanes];
  exponentials(x, samples, lanes, stride, most, sum);
  for (int64_t j = 0; j < lanes; ++j) {
    const W whole = most[j] + log(sum[j]);
    out[j] = finite(most[j]) ? whole : most[j];
  }
}

// Writes grad * softmax over the samples, for each of `lanes` lanes. `scratch` has room for samples * lanes numbers.
template <class T, class W>
PF_INLINE void softmax_lanes(const W* __restrict__ grad, const T* __restrict__ x, T* __restrict__ out, int64_t samples,
                             int64_t lanes, int64_t stride, W* __restrict__ scratch) {
  for (int64_t k = 0; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) scratch[k * lanes + j] = load(x[k * stride + j]);
  }
  W most[aggregate_lanes], sum[aggregate_lanes];
  tile_exponentials(scratch, samples, lanes, lanes, most, sum);
  // Where the maximum is infinite, the exponentials are NaN at infinite numbers and 0 beside them, as the gradient of
  // torch.logsumexp.
  for (int64_t j = 0; j < lanes; ++j) sum[j] = finite(most[j]) ? grad[j] / sum[j] : grad[j];
  for (int64_t k = 0; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) scratch[k * lanes + j] *= sum[j];
  }
  for (int64_t k = 0; k < samples; ++k) {
    for (int64_t j = 0; j < lanes; ++j) store(out[k * stride + j], scratch[k * lanes + j]);
  }
}

// For each of `rows` contiguous rows of x (at most aggregate_lanes), writes the lowest index of the largest of the
// row's `classes` numbers. NaN counts as the largest. The inner loop runs over the rows: along a row, every comparison
// would wait for the previous comparison.
template <class T>
PF_INLINE void first_largest(const T* __restrict__ x, int64_t rows, int64_t classes, int32_t* __restrict__ best) {
  using W = wide_t<T>;
  W most[aggregate_lanes];
  for (int64_t j = 0; j < rows; ++j) {
    most[j] = load(x[j * classes]);
    best[j] = 0;
  }
  for (int64_t i = 1; i < classes; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      const W value = load(x[j * classes + i]);
      const bool better = !(value <= most[j]) & (most[j] == most[j]);
      best[j] = better ? static_cast<int32_t>(i) : best[j];
      most[j] = better ? value : most[j];
    }
  }
}

// Does the same as `first_largest` for one long row. It finds the largest number, and then its first index.
template <class T>
PF_INLINE int32_t first_largest_of(const T* __restrict__ x, int64_t classes) {
  using W = wide_t<T>;
  const W most = largest(x, classes);
  int32_t first = static_cast<int32_t>(classes);
  for (int32_t i = 0; i < static_cast<int32_t>(classes); ++i) {
    const W value = load(x[i]);
    const int32_t here = (value == most) | (value != value) ? i : static_cast<int32_t>(classes);
    first = here < first ? here : first;
  }
  return first;
}

// yes = sigmoid(x) and no = sigmoid(-x). The scaled numbers are yes / exp(yes_shift) and no / exp(no_shift).
template <class W>
struct Sigmoids {
  W yes, no, scaled_yes, scaled_no;
};
// A compiler may fuse a product and a sum into one instruction, which does not round the product. This bound prevents
// the fusion and never changes a value that is at most 1. Both forms of `sigmoids` below then round in the same way.
template <class W>
PF_INLINE W at_most_one(W x) {
  return x > 1 ? W(1) : x;
}
// Computes the sigmoids of x and their scaled forms. `shifted` may be false only if both shifts are 0. If a shift is 0,
// the result has the same bits for both values of `shifted`.
template <bool shifted, class W>
PF_INLINE Sigmoids<W> sigmoids(W x, W yes_shift, W no_shift) {
  const bool low = x < 0;
  const W e = at_most_one(exp_unit(-abs(x))), share = 1 / (1 + e);
  Sigmoids<W> s;
  s.yes = s.scaled_yes = (low ? e : W(1)) * share;
  s.no = s.scaled_no = (low ? W(1) : e) * share;
  if constexpr (shifted) {
    const W yes = exp_unit(low ? x - yes_shift : W(0)), no = exp_unit(low ? W(0) : -x - no_shift);
    s.scaled_yes = yes * share;
    s.scaled_no = no * share;
  }
  return s;
}

// From here on sigmoid(-x) equals exp(-x) to the last bit, so a shift loses no digits; far above, a sum may underflow.
constexpr double sigmoid_shift_from = 40.0;

// For each lane, computes a shift for the sum of sigmoid(x) and a shift for the sum of sigmoid(-x). `sigmoid_sums`
// divides each sum by exp(shift). A shift is 0 unless all sigmoids in the sum are tiny. Returns false only if all
// shifts are 0.
template <class W>
PF_INLINE bool sigmoid_shifts(const W* __restrict__ tile, int64_t samples, int64_t width, W* __restrict__ yes_shift,
                              W* __restrict__ no_shift) {
  constexpr W from = static_cast<W>(sigmoid_shift_from);
  lane_range(tile, samples, width, yes_shift, no_shift);
  int32_t shifted = 0;
  for (int64_t i = 0; i < width; ++i) {
    const W most = yes_shift[i], least = no_shift[i];
    yes_shift[i] = most < -from ? shift_of(most) : W(0);
    no_shift[i] = least > from ? shift_of(-least) : W(0);
    shifted |= static_cast<int32_t>((most < -from) | (least > from));
  }
  return shifted != 0;
}

// Computes the sums of sigmoid(x) and of sigmoid(-x) over the samples, each divided by exp(shift). If `keep` is true
// and `shifted` is false, also overwrites each number x with the slope of sigmoid at x.
template <bool shifted, bool keep, class W>
PF_INLINE void sigmoid_sums(W* __restrict__ tile, int64_t samples, int64_t width, const W* __restrict__ yes_shift,
                            const W* __restrict__ no_shift, W* __restrict__ yes_sum, W* __restrict__ no_sum) {
  for (int64_t i = 0; i < width; ++i) yes_sum[i] = no_sum[i] = 0;
  for (int64_t k = 0; k < samples; ++k) {
    W* __restrict__ row = tile + k * width;
    for (int64_t i = 0; i < width; ++i) {
      const Sigmoids<W> s = sigmoids<shifted>(row[i], yes_shift[i], no_shift[i]);
      yes_sum[i] += at_most_one(s.scaled_yes);
      no_sum[i] += at_most_one(s.scaled_no);
      if (keep && !shifted) row[i] = s.yes * s.no;
    }
  }
}
// Overwrites the tile with the gradient through both sums of `sigmoid_sums`. Before the call, the tile must hold the
// logits if `shifted` is true, and the slopes from `sigmoid_sums` otherwise.
template <bool shifted, class W>
PF_INLINE void sigmoid_slopes(W* __restrict__ tile, int64_t samples, int64_t width, const W* __restrict__ yes_shift,
                              const W* __restrict__ no_shift, const W* __restrict__ of_yes,
                              const W* __restrict__ of_no) {
  for (int64_t k = 0; k < samples; ++k) {
    W* __restrict__ row = tile + k * width;
    for (int64_t i = 0; i < width; ++i) {
      W yes = row[i], no = row[i];
      if constexpr (shifted) {
        const Sigmoids<W> s = sigmoids<true>(row[i], yes_shift[i], no_shift[i]);
        yes = s.scaled_yes * s.no;
        no = s.scaled_no * s.yes;
      }
      row[i] = yes * of_yes[i] + no * of_no[i];
    }
  }
}

// Overwrites the logits with grad times the Jacobian of mean_sigmoid. `scratch` has room for 4 * width numbers.
template <class W>
PF_INLINE void sigmoids_backward(W* __restrict__ tile, const W* __restrict__ grad, int64_t samples, int64_t width,
                                 W* scratch) {
  W* const __restrict__ yes_shift = scratch;
  W* const __restrict__ no_shift = scratch + width;
  W* const __restrict__ of_yes = scratch + 2 * width;
  W* const __restrict__ of_no = scratch + 3 * width;
  const bool shifted = sigmoid_shifts(tile, samples, width, yes_shift, no_shift);
  if (shifted) {
    sigmoid_sums<true, true>(tile, samples, width, yes_shift, no_shift, of_yes, of_no);
  } else {
    sigmoid_sums<false, true>(tile, samples, width, yes_shift, no_shift, of_yes, of_no);
  }
  for (int64_t i = 0; i < width; ++i) {
    of_yes[i] = grad[i] / of_yes[i];
    of_no[i] = grad[i] / of_no[i];
  }
  if (shifted) {
    sigmoid_slopes<true>(tile, samples, width, yes_shift, no_shift, of_yes, of_no);
  } else {
    sigmoid_slopes<false>(tile, samples, width, yes_shift, no_shift, of_yes, of_no);
  }
}

// Replaces the number of every class by the sum over all classes of its image.
template <class W>
PF_INLINE void sum_over_classes(W* __restrict__ row, int64_t images, int64_t classes) {
  for (int64_t image = 0; image < images; ++image, row += classes) {
    W total = 0;
    for (int64_t i = 0; i < classes; ++i) total += row[i];
    for (int64_t i = 0; i < classes; ++i) row[i] = total;
  }
}

// Computes a softmax over the classes in two parts: s becomes s - max, and `sum` becomes the sum of exp(s - max).
template <class W>
PF_INLINE void softmax_parts(W* __restrict__ s, int64_t images, int64_t classes, int64_t width, W* __restrict__ sum) {
  for (int64_t image = 0; image < images; ++image) {
    W* row = s + image * classes;
    W most = row[0];
    for (int64_t i = 1; i < classes; ++i) most = max_nan(row[i], most);
    for (int64_t i = 0; i < classes; ++i) row[i] -= most;
  }
  for (int64_t i = 0; i < width; ++i) sum[i] = exp_unit(s[i]);
  sum_over_classes(sum, images, classes);
}

// The number of scratch rows, with `width` numbers each, that each of the two functions below needs.
constexpr int aggregate_scratch_rows = 4;

// Aggregates a tile [samples][width] into out [width]. Overwrites the tile.
template <class W>
PF_INLINE void aggregate_tile(Aggregation method, W* __restrict__ tile, int64_t samples, int64_t images,
                              int64_t classes, int64_t width, W* __restrict__ out, W* scratch) {
  W* const __restrict__ a = scratch;
  W* const __restrict__ b = scratch + width;
  W* const __restrict__ c = scratch + 2 * width;
  switch (method) {
    case Aggregation::lse:
    case Aggregation::peel:
      tile_exponentials(tile, samples, width, width, a, b);
      for (int64_t i = 0; i < width; ++i) {
        const W whole = a[i] + log(b[i]);
        out[i] = finite(a[i]) ? whole : a[i];
      }
      if (method == Aggregation::lse) return;
      for (int64_t i = 0; i < width; ++i) out[i] = tangent_exp(out[i], a[i]);
      softmax_parts(out, images, classes, width, b);
      for (int64_t i = 0; i < width; ++i) out[i] -= log(b[i]);
      return;
    case Aggregation::mean:
      for (int64_t i = 0; i < width; ++i) out[i] = 0;
      for (int64_t k = 0; k < samples; ++k) {
        for (int64_t i = 0; i < width; ++i) out[i] += tile[k * width + i];
      }
      for (int64_t i = 0; i < width; ++i) out[i] /= static_cast<W>(samples);
      return;
    case Aggregation::probability:
      if (sigmoid_shifts(tile, samples, width, a, b)) {
        sigmoid_sums<true, false>(tile, samples, width, a, b, out, c);
      } else {
        sigmoid_sums<false, false>(tile, samples, width, a, b, out, c);
      }
      for (int64_t i = 0; i < width; ++i) out[i] = (a[i] + log(out[i])) - (b[i] + log(c[i]));
      return;
    case Aggregation::vote:
      for (int64_t i = 0; i < width; ++i) out[i] = 0;
      for (int64_t k = 0; k < samples; ++k) {
        for (int64_t image = 0; image < images; ++image) {
          const W* row = tile + k * width + image * classes;
          // Among equal numbers the first wins. NaN counts as the largest.
          int64_t best = 0;
          W most = row[0];
          for (int64_t i = 1; i < classes; ++i) {
            const bool better = !(row[i] <= most) & (most == most);
            best = better ? i : best;
            most = better ? row[i] : most;
          }
          out[image * classes + best] += 1;
        }
      }
      return;
  }
}

// Overwrites the logits in the tile with grad [width] times the Jacobian. Overwrites grad too.
template <class W>
PF_INLINE void aggregate_tile_backward(Aggregation method, W* __restrict__ tile, W* __restrict__ grad, int64_t samples,
                                       int64_t images, int64_t classes, int64_t width, W* scratch) {
  W* const __restrict__ a = scratch;
  W* const __restrict__ b = scratch + width;
  W* const __restrict__ c = scratch + 2 * width;
  W* const __restrict__ d = scratch + 3 * width;
  switch (method) {
    case Aggregation::lse:
    case Aggregation::peel:
      tile_exponentials(tile, samples, width, width, a, b);
      for (int64_t i = 0; i < width; ++i) {
        // `softmax_lanes` explains the case of an infinite maximum.
        c[i] = finite(a[i]) ? W(1) / b[i] : W(1);
        a[i] += log(b[i]);
      }
      if (method == Aggregation::peel) {
        for (int64_t i = 0; i < width; ++i) {
          W slope;
          d[i] = tangent_exp(a[i], slope);
          c[i] *= slope;
          a[i] = grad[i];
        }
        softmax_parts(d, images, classes, width, b);
        sum_over_classes(a, images, classes);
        for (int64_t i = 0; i < width; ++i) grad[i] -= exp_unit(d[i]) / b[i] * a[i];
      }
      for (int64_t i = 0; i < width; ++i) grad[i] *= c[i];
      for (int64_t k = 0; k < samples; ++k) {
        for (int64_t i = 0; i < width; ++i) tile[k * width + i] *= grad[i];
      }
      return;
    case Aggregation::mean:
      for (int64_t i = 0; i < width; ++i) grad[i] /= static_cast<W>(samples);
      for (int64_t k = 0; k < samples; ++k) {
        for (int64_t i = 0; i < width; ++i) tile[k * width + i] = grad[i];
      }
      return;
    case Aggregation::probability:
      sigmoids_backward(tile, grad, samples, width, scratch);
      return;
    case Aggregation::vote:
      for (int64_t i = 0; i < samples * width; ++i) tile[i] = 0;
      return;
  }
}

}  // namespace pf

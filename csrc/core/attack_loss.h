// Computes the loss of an attack, its gradient, and whether an image is wrong: see purify_fast/ops/attack_loss.py.
#pragma once

#include "math.h"

namespace pf {

enum class AttackLoss : int { ce = 0, margin = 1, scaled_margin = 2, dlr = 3, margin_targeted = 4, dlr_targeted = 5 };

// The loss of the cross-entropy below which the exact form replaces the usual form.
template <class W>
constexpr W sure_below = W(0.00390625) * (std::numeric_limits<W>::epsilon() / std::numeric_limits<float>::epsilon());
// The z below which the cross-entropy of logits in T continues along its tangent: 0.7 log(smallest normal number).
template <class T>
constexpr double least_exponent = 0.7 * 0.6931471805599453 * -126;
template <>
inline constexpr double least_exponent<half> = 0.7 * 0.6931471805599453 * -14;
template <>
inline constexpr double least_exponent<double> = 0.7 * 0.6931471805599453 * -1022;
constexpr double tiny_width = 1e-12;

// Several rows of logits, and the results for them. A row of labels has `columns` numbers: the true class and, if there
// are two, the target class. `sign` is -1 for an attack that approaches the true class.
template <class T>
struct AttackRows {
  const T* logits;
  const int64_t* labels;
  int64_t columns, classes;
  AttackLoss kind;
  wide_t<T> sign;
  T* gradient;
  wide_t<T>* loss;
  float* wrong;
};

// The length of a row in the scratch memory. The numbers after the logits are -infinity, so vectors need no remainder.
PF_INLINE int64_t padded(int64_t classes) { return (classes + 15) / 16 * 16; }

// Replaces the logits of a row by `sign` times the gradient of the cross-entropy, and returns the loss. `top` is the
// largest logit of the other classes.
template <class T, class W>
PF_INLINE W cross_entropy(W* __restrict__ row, int64_t n, int64_t y, W top, W sign) {
  const W of_true = row[y], most = max_nan(top, of_true);
  const W whole = log(ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return exp_unit(row[i] - most); }));
  W loss = -((of_true - most) - whole), shift = most, log_sum = whole, scale = sign, of_y = -sign;
  if (loss < sure_below<W>) {
    row[y] = -std::numeric_limits<W>::infinity();
    const W sum = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return exp_unit(row[i] - top); });
    const W z = (top - of_true) + log(sum);
    // If the other classes are masked, z is NaN, and the usual form is kept.
    if (z < sure_below<W>) {
      constexpr W least = static_cast<W>(least_exponent<T>);
      const W bounded = z < least ? least : z, slope = sigmoid(bounded);
      loss = log1p_unit(exp_unit(bounded)) + slope * (z - bounded);
      shift = top;
      log_sum = 0;
      scale = sign * (slope / sum);
      of_y = -sign * slope;
    } else {
      row[y] = of_true;
    }
  }
  // The order of the operations is PyTorch's.
  for (int64_t i = 0; i < n; ++i) row[i] = exp_unit((row[i] - shift) - log_sum) * scale;
  row[y] += of_y;
  return loss;
}

// Does the same for the margin and the losses made of it. `t` is the target class, or -1.
template <class W>
PF_INLINE W margin_loss(W* __restrict__ row, int64_t n, int32_t y, int32_t t, AttackLoss kind, W top, W sign) {
  constexpr W infinity = std::numeric_limits<W>::infinity();
  const W of_true = row[y], margin = (t < 0 ? top : row[t]) - of_true;
  // The four largest logits, of which equal ones are in the order of their indices.
  W value[4] = {-infinity, -infinity, -infinity, -infinity}, width = 1;
  int32_t order[4] = {-1, -1, -1, -1};
  const bool divided = kind == AttackLoss::dlr || kind == AttackLoss::dlr_targeted;
  if (kind == AttackLoss::scaled_margin) {
    const double mean = ordered_sum<double>(n, [=](int64_t i) PF_INLINED_LAMBDA { return double(row[i]); }) / n;
    const double squares =
        ordered_sum<double>(n, [=](int64_t i) PF_INLINED_LAMBDA { return (row[i] - mean) * (row[i] - mean); });
    width = static_cast<W>(sqrt(squares / n)) + W(tiny_width);
  } else if (divided) {
    for (int32_t i = 0; i < n; ++i) {
      if (!(row[i] > value[3])) continue;
      int k = 3;
      for (; k > 0 && row[i] > value[k - 1]; --k) {
        value[k] = value[k - 1];
        order[k] = order[k - 1];
      }
      value[k] = row[i];
      order[k] = i;
    }
    // Unlike value[0], this maximum is NaN if a logit is.
    width = max_nan(top, of_true) - (t < 0 ? value[2] : (value[2] + value[3]) / 2) + W(tiny_width);
  }
  const W loss = margin / width, ratio = divided ? loss : W(0), share = t < 0 ? W(1) : W(0.5);
  const int32_t first = order[0], third = order[2], fourth = t < 0 ? -1 : order[3];
  row[y] = -infinity;
  // Equal logits share the gradient of the margin.
  const W count = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return W(row[i] == top); });
  for (int32_t j = 0; j < padded(n); ++j) {
    const W up = t < 0 ? (row[j] == top ? W(1) : W(0)) / count : W(j == t);
    const W of_margin = j == y ? (j == t ? W(0) : W(-1)) : up;
    const W of_width = W(j == first) - (W(j == third) + W(j == fourth)) * share;
    row[j] = sign * ((of_margin - ratio * of_width) / width);
  }
  return loss;
}

// Computes rows [begin, end). `row` has room for padded(classes) numbers.
template <class T, class W = wide_t<T>>
PF_INLINE void attack_loss(const AttackRows<T>& rows, int64_t begin, int64_t end, W* __restrict__ row) {
  const int64_t n = rows.classes, whole = padded(n);
  for (int64_t b = begin; b < end; ++b) {
    const T* __restrict__ logits = rows.logits + b * n;
    T* __restrict__ gradient = rows.gradient + b * n;
    for (int64_t i = 0; i < n; ++i) row[i] = load(logits[i]);
    for (int64_t i = n; i < whole; ++i) row[i] = -std::numeric_limits<W>::infinity();
    const int64_t* labels = rows.labels + b * rows.columns;
    const auto y = static_cast<int32_t>(labels[0]), t = rows.columns > 1 ? static_cast<int32_t>(labels[1]) : -1;
    const W of_true = row[y], before = largest(row, y), after = largest(row + y + 1, n - y - 1);
    const W top = max_nan(before, after);
    const W loss = rows.kind == AttackLoss::ce ? cross_entropy<T>(row, whole, y, top, rows.sign)
                                               : margin_loss(row, n, y, t, rows.kind, top, rows.sign);
    for (int64_t i = 0; i < n; ++i) store(gradient[i], row[i]);
    // The first of the largest logits decides. NaN fails the comparisons.
    const bool decides = (of_true > before || (y == 0 && before == before)) && of_true >= after;
    rows.wrong[b] = !decides || (rows.kind == AttackLoss::margin && loss != loss) ? 1.0f : 0.0f;
    rows.loss[b] = rows.sign * loss;
  }
}

}  // namespace pf

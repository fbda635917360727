// Computes the binary cross-entropy with logits, summed per sample: see purify_fast/ops/reconstruction_loss.py.
#pragma once

#include "math.h"

namespace pf {

// Returns max(l, 0) - l t + log(1 + exp(-|l|)), where l is the logit and t the target. The order of the additions keeps
// all digits of the small loss of a pixel that is predicted correctly and with certainty.
template <class W>
PF_INLINE W reconstruction_loss_term(W logit, W target) {
  return ((1 - target) * logit - min_nan(logit, W(0))) + log1p_unit(exp_unit(-abs(logit)));
}

template <class L, class T, class W = wide_t<L>>
PF_INLINE W reconstruction_loss(const L* logits, const T* target, int64_t n) {
  return ordered_sum<W>(
      n, [=](int64_t i) PF_INLINED_LAMBDA { return reconstruction_loss_term<W>(load(logits[i]), load(target[i])); });
}

template <class W>
PF_INLINE W reconstruction_loss_slope(W logit, W target) {
  return sigmoid(logit) - target;
}

// Returns the loss as the sum of reconstruction_loss_term in the order of ordered_sum. Also writes every pixel's slope.
template <class L, class T, class W = wide_t<L>>
PF_INLINE W reconstruction_loss_and_slope(const L* logits, const T* target, W* __restrict__ slope, int64_t n) {
  return ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W logit = load(logits[i]), t = load(target[i]), e = exp_unit(-abs(logit));
    slope[i] = (logit < 0 ? e : W(1)) / (1 + e) - t;
    return ((1 - t) * logit - min_nan(logit, W(0))) + log1p_unit(e);
  });
}

}  // namespace pf

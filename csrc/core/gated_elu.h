// Computes the ELU of half of the channels, times the sigmoid of the others: see purify_fast/ops/gated_elu.py.
#pragma once

#include "math.h"

namespace pf {

template <class W>
PF_INLINE W elu(W x) {
  const W below = exp_units(x).minus_one;
  return x > 0 ? x : below;
}

template <class W>
PF_INLINE W gated_elu(W a, W b) {
  return elu(a) * sigmoid(b);
}

template <class W>
struct GatedEluSlope {
  W a, b;
};

// Returns the slopes to a and b. 1 - sigmoid(b) would lose digits, so sigmoid(-b) is from the same exponential.
template <class W>
PF_INLINE GatedEluSlope<W> gated_elu_slope(W a, W b) {
  const W tail = exp_unit(-abs(b)), inverse = 1 / (1 + tail);
  const W gate = (b < 0 ? tail : W(1)) * inverse;
  const ExpUnit<W> below = exp_units(a);
  const W elu = a > 0 ? a : below.minus_one, slope = a > 0 ? W(1) : below.exp;
  return {gate * slope, elu * (tail * inverse * inverse)};
}

}  // namespace pf

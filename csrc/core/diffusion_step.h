// One step of a diffusion sampler. purify_fast/ops/diffusion_step.py has the definition.
#pragma once

#include "math.h"

namespace pf {

// The fields have the order of the op's `coefficients` tensor.
template <class W>
struct StepCoefficients {
  W of_state, of_prediction, clip, image, state, noise, log_low, log_high;
};

template <class W>
PF_INLINE W predicted_image(W x, W m, const StepCoefficients<W>& k) {
  return k.of_state * x + k.of_prediction * m;
}

// Returns the next state without noise. NaN gives NaN.
template <class W>
PF_INLINE W stepped(W x, W m, const StepCoefficients<W>& k) {
  return k.image * clamp_nan(predicted_image(x, m, k), -k.clip, k.clip) + k.state * x;
}

// Returns the standard deviation of the noise if variances are learned. v interpolates between two log-variances.
template <class W>
PF_INLINE W learned_deviation(W v, const StepCoefficients<W>& k) {
  const W share = W(0.5) * (v + 1);
  return k.noise * exp(W(0.5) * (share * k.log_high + (1 - share) * k.log_low));
}

// Returns the gradient with respect to the predicted image before the clip. Both ends of the clip pass the gradient.
template <class W>
PF_INLINE W image_slope(W x, W m, W grad, const StepCoefficients<W>& k) {
  const W image = predicted_image(x, m, k);
  return (image >= -k.clip) & (image <= k.clip) ? k.image * grad : W(0);
}

template <class W>
PF_INLINE W learned_slope(W v, W noise, W grad, const StepCoefficients<W>& k) {
  return grad * noise * (W(0.25) * (k.log_high - k.log_low) * learned_deviation(v, k));
}

}  // namespace pf

// Computes a latent, and the KL divergence of its distribution from N(0, I): see purify_fast/ops/sample_latent.py.
#pragma once

#include "math.h"

namespace pf {

template <class W>
PF_INLINE W latent(W mu, W logvar, W noise) {
  return mu + noise * exp(W(0.5) * logvar);
}

// Returns mu^2 + exp(logvar) - logvar - 1, in a form that loses no digits near logvar = 0. The divergence is half of
// the sum of these terms.
template <class W>
PF_INLINE W divergence_term(W mu, W logvar) {
  return mu * mu + (expm1(logvar) - logvar);
}

template <class T, class W = wide_t<T>>
PF_INLINE W divergence(const T* mu, const T* logvar, int64_t n) {
  const auto term = [=](int64_t i) PF_INLINED_LAMBDA { return divergence_term<W>(load(mu[i]), load(logvar[i])); };
  return W(0.5) * ordered_sum<W>(n, term);
}

template <class W>
PF_INLINE W latent_mu_slope(W mu, W grad_z, W grad_kl) {
  return grad_z + grad_kl * mu;
}

template <class W>
PF_INLINE W latent_logvar_slope(W logvar, W noise, W grad_z, W grad_kl) {
  return W(0.5) * (grad_z * (noise * exp(W(0.5) * logvar)) + grad_kl * expm1(logvar));
}
// Returns the same slope as `latent_logvar_slope`, from the stored deviation noise * exp(logvar / 2).
template <class W>
PF_INLINE W latent_logvar_slope_kept(W logvar, W deviation, W grad_z, W grad_kl) {
  return W(0.5) * (grad_z * deviation + grad_kl * expm1(logvar));
}

}  // namespace pf

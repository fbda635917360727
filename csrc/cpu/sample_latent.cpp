#include "../core/sample_latent.h"

#include "philox.h"

namespace pf::cpu {
namespace {

// The number of random numbers that are drawn together. They fit into the cache.
constexpr int64_t chunk = 2048;

template <class T, class W = wide_t<T>>
PF_INLINE void forward_loop(const T* mu, const T* logvar, const float* noise, T* z, W* kl, int64_t rows, int64_t n) {
  store_all(z, rows * n,
            [=](int64_t i) PF_INLINED_LAMBDA { return latent<W>(load(mu[i]), load(logvar[i]), noise[i]); });
  for (int64_t b = 0; b < rows; ++b) kl[b] = divergence(mu + b * n, logvar + b * n, n);
}
template <class T, class W = wide_t<T>>
PF_INLINE void backward_loop(const T* grad_z, const W* grad_kl, const T* mu, const T* logvar, const float* noise,
                             T* out_mu, T* out_logvar, int64_t rows, int64_t n) {
  for (int64_t b = 0; b < rows; ++b) {
    const W gk = grad_kl[b];
    const int64_t at = b * n;
    store_all(out_mu + at, n, [=](int64_t i) PF_INLINED_LAMBDA {
      return latent_mu_slope<W>(load(mu[at + i]), load(grad_z[at + i]), gk);
    });
    store_all(out_logvar + at, n, [=](int64_t i) PF_INLINED_LAMBDA {
      return latent_logvar_slope<W>(load(logvar[at + i]), noise[at + i], load(grad_z[at + i]), gk);
    });
  }
}

template <class T, class W = wide_t<T>>
PF_INLINE void keeping_loop(const T* mu, const T* logvar, const float* noise, T* z, W* kl, W* deviation, int64_t rows,
                            int64_t n) {
  for (int64_t i = 0; i < rows * n; ++i) deviation[i] = noise[i] * exp(W(0.5) * load(logvar[i]));
  const W* moved = deviation;
  store_all(z, rows * n, [=](int64_t i) PF_INLINED_LAMBDA { return load(mu[i]) + moved[i]; });
  for (int64_t b = 0; b < rows; ++b) kl[b] = divergence(mu + b * n, logvar + b * n, n);
}
template <class T, class W = wide_t<T>>
PF_INLINE void from_kept_loop(const T* grad_z, W grad_kl, const T* mu, const T* logvar, const W* deviation, T* out_mu,
                              T* out_logvar, int64_t n) {
  store_all(out_mu, n,
            [=](int64_t i) PF_INLINED_LAMBDA { return latent_mu_slope<W>(load(mu[i]), load(grad_z[i]), grad_kl); });
  store_all(out_logvar, n, [=](int64_t i) PF_INLINED_LAMBDA {
    return latent_logvar_slope_kept<W>(load(logvar[i]), deviation[i], load(grad_z[i]), grad_kl);
  });
}

#define PF_LOOPS(CLONES, T)                                                                                            \
  CLONES void forward(const T* __restrict__ mu, const T* __restrict__ logvar, const float* __restrict__ noise,         \
                      T* __restrict__ z, wide_t<T>* __restrict__ kl, int64_t rows, int64_t n) {                        \
    forward_loop(mu, logvar, noise, z, kl, rows, n);                                                                   \
  }                                                                                                                    \
  CLONES void backward(const T* __restrict__ grad_z, const wide_t<T>* __restrict__ grad_kl, const T* __restrict__ mu,  \
                       const T* __restrict__ logvar, const float* __restrict__ noise, T* __restrict__ out_mu,          \
                       T* __restrict__ out_logvar, int64_t rows, int64_t n) {                                          \
    backward_loop(grad_z, grad_kl, mu, logvar, noise, out_mu, out_logvar, rows, n);                                    \
  }                                                                                                                    \
  CLONES void keeping(const T* __restrict__ mu, const T* __restrict__ logvar, const float* __restrict__ noise,         \
                      T* __restrict__ z, wide_t<T>* __restrict__ kl, wide_t<T>* __restrict__ deviation, int64_t rows,  \
                      int64_t n) {                                                                                     \
    keeping_loop(mu, logvar, noise, z, kl, deviation, rows, n);                                                        \
  }                                                                                                                    \
  CLONES void from_kept(const T* __restrict__ grad_z, wide_t<T> grad_kl, const T* __restrict__ mu,                     \
                        const T* __restrict__ logvar, const wide_t<T>* __restrict__ deviation, T* __restrict__ out_mu, \
                        T* __restrict__ out_logvar, int64_t n) {                                                       \
    from_kept_loop(grad_z, grad_kl, mu, logvar, deviation, out_mu, out_logvar, n);                                     \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// Calls f(begin, end, noise of these rows), with a few rows at a time.
template <class F>
void with_noise(const Tensor& seed, const Tensor& sample_ids, int64_t rows, int64_t n, F f) {
  const Tensor ids = dense(sample_ids);
  const Rows stream{key_of(*data<int64_t>(seed)), data<int64_t>(ids), 1, 0, static_cast<uint32_t>(Stream::latent)};
  const int64_t step = n < chunk ? chunk / (n > 0 ? n : 1) : 1;
  parallel_rows(rows, 8 * n, [&](int64_t begin, int64_t end) {
    std::vector<float> noise((step < end - begin ? step : end - begin) * n);
    for (; begin < end; begin += step) {
      const int64_t stop = begin + step < end ? begin + step : end;
      fill_rows(Distribution::normal, stream, begin, stop, n, reinterpret_cast<uint32_t*>(noise.data()));
      f(begin, stop, noise.data());
    }
  });
}

std::tuple<Tensor, Tensor> sample_latent(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) {
  const ScalarType dtype = mu.scalar_type();
  mu = dense(mu);
  logvar = dense(logvar, dtype);
  const int64_t rows = mu.size(0), n = mu.size(1);
  Tensor z = new_like(mu), kl = new_tensor({rows}, wide_dtype(dtype));
  dispatch(dtype, "sample_latent", [&](auto tag) {
    using T = decltype(tag);
    const T *m = data<T>(mu), *v = data<T>(logvar);
    T* to_z = writable<T>(z);
    auto* to_kl = writable<wide_t<T>>(kl);
    with_noise(seed, sample_ids, rows, n, [&](int64_t begin, int64_t end, const float* noise) {
      forward(m + begin * n, v + begin * n, noise, to_z + begin * n, to_kl + begin, end - begin, n);
    });
  });
  return {z, kl};
}

std::tuple<Tensor, Tensor> sample_latent_backward(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor seed,
                                                  Tensor sample_ids) {
  const ScalarType dtype = mu.scalar_type();
  mu = dense(mu);
  logvar = dense(logvar, dtype);
  grad_z = dense(grad_z, dtype);
  grad_kl = dense(grad_kl, wide_dtype(dtype));
  const int64_t rows = mu.size(0), n = mu.size(1);
  Tensor out_mu = new_like(mu), out_logvar = new_like(logvar);
  dispatch(dtype, "sample_latent_backward", [&](auto tag) {
    using T = decltype(tag);
    const T *gz = data<T>(grad_z), *m = data<T>(mu), *v = data<T>(logvar);
    const auto* gk = data<wide_t<T>>(grad_kl);
    T *to_mu = writable<T>(out_mu), *to_logvar = writable<T>(out_logvar);
    with_noise(seed, sample_ids, rows, n, [&](int64_t begin, int64_t end, const float* noise) {
      const int64_t at = begin * n;
      backward(gz + at, gk + begin, m + at, v + at, noise, to_mu + at, to_logvar + at, end - begin, n);
    });
  });
  return {out_mu, out_logvar};
}

// Also stores the deviation, so that no noise is drawn again. purify_fast/ops/sample_latent.py calls this function.
std::tuple<Tensor, Tensor, Tensor> sample_latent_keeping(Tensor mu, Tensor logvar, Tensor seed, Tensor sample_ids) {
  const ScalarType dtype = mu.scalar_type(), wide_type = wide_dtype(dtype);
  mu = dense(mu);
  logvar = dense(logvar, dtype);
  const int64_t rows = mu.size(0), n = mu.size(1);
  Tensor z = new_like(mu), kl = new_tensor({rows}, wide_type), deviation = new_tensor({rows, n}, wide_type);
  dispatch(dtype, "sample_latent_keeping", [&](auto tag) {
    using T = decltype(tag);
    const T *m = data<T>(mu), *v = data<T>(logvar);
    T* to_z = writable<T>(z);
    wide_t<T>*to_kl = writable<wide_t<T>>(kl), *kept = writable<wide_t<T>>(deviation);
    with_noise(seed, sample_ids, rows, n, [&](int64_t begin, int64_t end, const float* noise) {
      const int64_t at = begin * n;
      keeping(m + at, v + at, noise, to_z + at, to_kl + begin, kept + at, end - begin, n);
    });
  });
  return {z, kl, deviation};
}

std::tuple<Tensor, Tensor> sample_latent_from_kept(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar,
                                                   Tensor deviation) {
  const ScalarType dtype = mu.scalar_type();
  mu = dense(mu);
  logvar = dense(logvar, dtype);
  grad_z = dense(grad_z, dtype);
  grad_kl = dense(grad_kl, wide_dtype(dtype));
  deviation = dense(deviation);
  const int64_t rows = mu.size(0), n = mu.size(1);
  Tensor out_mu = new_like(mu), out_logvar = new_like(logvar);
  dispatch(dtype, "sample_latent_from_kept", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T *gz = data<T>(grad_z), *m = data<T>(mu), *v = data<T>(logvar);
    const W *gk = data<W>(grad_kl), *kept = data<W>(deviation);
    T *to_mu = writable<T>(out_mu), *to_logvar = writable<T>(out_logvar);
    parallel_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin, at = begin * n; b < end; ++b, at += n) {
        from_kept(gz + at, gk[b], m + at, v + at, kept + at, to_mu + at, to_logvar + at, n);
      }
    });
  });
  return {out_mu, out_logvar};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("sample_latent", TORCH_BOX(&pf::cpu::sample_latent));
  m.impl("sample_latent_keeping", TORCH_BOX(&pf::cpu::sample_latent_keeping));
  m.impl("sample_latent_from_kept", TORCH_BOX(&pf::cpu::sample_latent_from_kept));
  m.impl("sample_latent_backward", TORCH_BOX(&pf::cpu::sample_latent_backward));
}

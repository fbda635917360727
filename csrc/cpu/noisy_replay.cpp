// Without fused multiply-adds the result has the same bits as the reference.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/noisy_replay.h"

#include <algorithm>

#include "philox.h"

namespace pf::cpu {
namespace {

// The number of random numbers that are drawn together. They fit into the cache.
constexpr int64_t chunk = 2048;

template <class T, class W = wide_t<T>>
PF_INLINE void replay_loop(const T* x, const float* uniform, T* out, int64_t n, W eps, W lo, W hi) {
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA { return replayed<W>(load(x[i]), uniform[i], eps, lo, hi); });
}

#define PF_LOOPS(CLONES, T)                                                                                      \
  CLONES void replay(const T* __restrict__ x, const float* __restrict__ uniform, T* __restrict__ out, int64_t n, \
                     wide_t<T> eps, wide_t<T> lo, wide_t<T> hi) {                                                \
    replay_loop(x, uniform, out, n, eps, lo, hi);                                                                \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// Returns one byte per sample: 1 if the sample is replayed, and 0 otherwise.
std::vector<uint8_t> who(const Tensor& drift, const Tensor& tau) {
  std::vector<uint8_t> chosen(drift.numel());
  const Tensor values = dense(drift), limit = dense(tau, drift.scalar_type());
  dispatch(drift.scalar_type(), "noisy_replay", [&](auto tag) {
    using T = decltype(tag);
    const T *from = data<T>(values), *threshold = data<T>(limit);
    for (size_t b = 0; b < chosen.size(); ++b) chosen[b] = is_replayed(load(from[b]), load(*threshold));
  });
  return chosen;
}

Tensor noisy_replay(Tensor x, Tensor x_adv, Tensor drift, Tensor tau, Tensor eps, Tensor seed, Tensor sample_ids,
                    double lo, double hi) {
  const ScalarType dtype = x.scalar_type();
  x = dense(x);
  x_adv = dense(x_adv, dtype);
  eps = dense(eps, wide_dtype(dtype));
  sample_ids = dense(sample_ids);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  const int64_t samples = x.size(0), n = x.numel() / samples, chunks = (n + chunk - 1) / chunk;
  const std::vector<uint8_t> chosen = who(drift, tau);
  const Key key = key_of(*data<int64_t>(seed));
  const int64_t* ids = data<int64_t>(sample_ids);
  dispatch(dtype, "noisy_replay", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const T *clean = data<T>(x), *adversarial = data<T>(x_adv);
    const W* radius = data<W>(eps);
    T* to = writable<T>(out);
    parallel_rows(samples * chunks, 4 * std::min(chunk, n), [&](int64_t begin, int64_t end) {
      float uniform[chunk];
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / chunks, first = unit % chunks * chunk, count = std::min(chunk, n - first);
        const int64_t at = b * n + first;
        if (!chosen[b]) {
          std::copy_n(adversarial + at, count, to + at);
          continue;
        }
        fill_groups(Distribution::uniform, key, 0, static_cast<uint32_t>(ids[b]), Stream::replay_noise, first / 4,
                    (count + 3) / 4, reinterpret_cast<uint32_t*>(uniform));
        replay(clean + at, uniform, to + at, count, radius[b], static_cast<W>(lo), static_cast<W>(hi));
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("noisy_replay", TORCH_BOX(&pf::cpu::noisy_replay)); }

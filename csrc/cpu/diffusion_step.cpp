// Without fused multiply-adds, a step without noise has the same bits as the reference.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/diffusion_step.h"

#include <algorithm>

#include "philox.h"

namespace pf::cpu {
namespace {

// The number of elements of a row that are computed together. They fit into the cache.
constexpr int64_t chunk = 2048;
constexpr int coefficients_of_a_row = 8;
// This number must be equal to purify_fast.ops.diffusion_step.STEPS.
constexpr uint64_t steps = 1 << 16;

// Computes the next state of at most a chunk. v is null without learned variances, and `noise` without noise.
template <class T, class W = wide_t<T>>
PF_INLINE void forward_loop(const W* x, const T* m, const T* v, const float* noise, StepCoefficients<W> k, W* out,
                            int64_t n) {
  if (noise == nullptr) {
    store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA { return stepped<W>(x[i], load(m[i]), k); });
  } else if (v == nullptr) {
    store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
      return stepped<W>(x[i], load(m[i]), k) + k.noise * static_cast<W>(noise[i]);
    });
  } else {
    store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
      return stepped<W>(x[i], load(m[i]), k) + learned_deviation<W>(load(v[i]), k) * static_cast<W>(noise[i]);
    });
  }
}
// Computes the gradients of at most one chunk. to_v is null if variances are not learned.
template <class T, class W = wide_t<T>>
PF_INLINE void backward_loop(const W* grad, const W* x, const T* m, const T* v, const float* noise,
                             StepCoefficients<W> k, W* to_x, T* to_m, T* to_v, int64_t n) {
  W rounded[chunk];
  W* slopes = rounded;
  if constexpr (sizeof(T) == sizeof(W)) slopes = to_m;
  for (int64_t i = 0; i < n; ++i) {
    const W through = image_slope<W>(x[i], load(m[i]), grad[i], k);
    to_x[i] = k.of_state * through + k.state * grad[i];
    slopes[i] = k.of_prediction * through;
  }
  if constexpr (sizeof(T) < sizeof(W)) {
    for (int64_t i = 0; i < n; ++i) store(to_m[i], slopes[i]);
  }
  if (to_v == nullptr) return;
  if (noise == nullptr) {
    store_all(to_v, n, [](int64_t) PF_INLINED_LAMBDA { return W(0); });
  } else {
    store_all(to_v, n, [=](int64_t i) PF_INLINED_LAMBDA {
      return learned_slope<W>(load(v[i]), static_cast<W>(noise[i]), grad[i], k);
    });
  }
}

#define PF_LOOPS(CLONES, T)                                                                                            \
  CLONES void forward(const wide_t<T>* __restrict__ x, const T* __restrict__ m, const T* __restrict__ v,               \
                      const float* __restrict__ noise, const StepCoefficients<wide_t<T>>& k,                           \
                      wide_t<T>* __restrict__ out, int64_t n) {                                                        \
    forward_loop(x, m, v, noise, k, out, n);                                                                           \
  }                                                                                                                    \
  CLONES void backward(const wide_t<T>* __restrict__ grad, const wide_t<T>* __restrict__ x, const T* __restrict__ m,   \
                       const T* __restrict__ v, const float* __restrict__ noise, const StepCoefficients<wide_t<T>>& k, \
                       wide_t<T>* __restrict__ to_x, T* __restrict__ to_m, T* __restrict__ to_v, int64_t n) {          \
    backward_loop(grad, x, m, v, noise, k, to_x, to_m, to_v, n);                                                       \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// The layout of a row of the prediction: contiguous (planes of pixels) or channels_last (channels per pixel).
struct Planes {
  int64_t channels, pixels;
  bool channels_last;
};
// Calls f(offset in memory, size of the part) for parts of the `count` elements of a channels_last row, beginning with
// element `first`. The elements are counted as in a contiguous row. Elements of one part belong to one channel, so they
// are `channels` elements apart in memory.
template <class F>
void for_planes(Planes planes, int64_t first, int64_t count, F f) {
  for (const int64_t end = first + count; first < end;) {
    const int64_t channel = first / planes.pixels, stop = std::min((channel + 1) * planes.pixels, end);
    f((first - channel * planes.pixels) * planes.channels + channel, stop - first);
    first = stop;
  }
}
// Returns a pointer to `count` contiguous elements of a row. Copies them into `buffer` if the row is channels_last.
template <class T>
const T* gathered(const T* row, Planes planes, int64_t first, int64_t count, T* buffer) {
  if (!planes.channels_last) return row + first;
  T* to = buffer;
  for_planes(planes, first, count, [&](int64_t at, int64_t some) {
    for (int64_t i = 0; i < some; ++i) *to++ = row[at + i * planes.channels];
  });
  return buffer;
}
// Copies the elements of `buffer` to their places in a channels_last row.
template <class T>
void scatter(const T* buffer, T* row, Planes planes, int64_t first, int64_t count) {
  for_planes(planes, first, count, [&](int64_t at, int64_t some) {
    for (int64_t i = 0; i < some; ++i) row[at + i * planes.channels] = *buffer++;
  });
}

// The arguments of a call, apart from the images.
struct Job {
  // n is the number of elements in a row of x.
  int64_t rows, n;
  Planes planes;
  bool learned, noisy;
  Key key;
  const int64_t *sample_ids, *draws;
  uint64_t step;
  Tensor coefficients;

  int64_t in_prediction() const { return learned ? 2 * n : n; }

  template <class W>
  StepCoefficients<W> of_row(int64_t row) const {
    const W* k = data<W>(coefficients) + (coefficients.dim() == 2 ? row * coefficients_of_a_row : 0);
    // Comparisons with a NaN clip have no effect, but the result must be NaN, so the image's coefficient becomes NaN.
    const W image = k[2] == k[2] ? k[3] : k[2];
    return {k[0], k[1], k[2], image, k[4], k[5], k[6], k[7]};
  }
  // Draws normal numbers for `count` elements of a row, beginning with element `first`, a multiple of 4.
  void draw(int64_t row, int64_t first, int64_t count, float* noise) const {
    const auto word = static_cast<uint32_t>(static_cast<uint64_t>(draws[row]) * steps + step);
    fill_groups(Distribution::normal, key, word, static_cast<uint32_t>(sample_ids[row]), Stream::diffusion, first / 4,
                (count + 3) / 4, reinterpret_cast<uint32_t*>(noise));
  }
};

// The loops below read a prediction that is contiguous or channels_last. Other layouts are copied.
bool has_last(const Tensor& x) { return x.dim() == 4 && is_channels_last(x); }
Tensor in_planes(const Tensor& x) { return has_last(x) ? x : dense(x); }
Tensor new_planes(const Tensor& x) {
  return has_last(x) ? new_images(x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type(), true) : new_like(x);
}

Job job_of(const Tensor& x, const Tensor& prediction, const Tensor& coefficients, const Tensor& seed,
           const Tensor& sample_ids, const Tensor& draws, const Tensor& step, bool noisy) {
  const int64_t rows = x.size(0), n = x.numel() / rows, channels = prediction.size(1);
  const Planes planes{channels, n / x.size(1), has_last(prediction)};
  return {rows,
          n,
          planes,
          channels > x.size(1),
          noisy,
          key_of(*data<int64_t>(seed)),
          data<int64_t>(sample_ids),
          data<int64_t>(draws),
          static_cast<uint64_t>(*data<int64_t>(step)),
          coefficients};
}

// Calls f(row, first, count) for all rows, by chunks. `cost`: an element's time, relative to copying it.
template <class F>
void for_chunks(const Job& job, int64_t cost, const F& f) {
  const int64_t chunks = (job.n + chunk - 1) / chunk;
  parallel_rows(job.rows * chunks, cost * std::min(chunk, job.n), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % chunks * chunk;
      f(unit / chunks, first, std::min(chunk, job.n - first));
    }
  });
}

Tensor diffusion_step(Tensor x, Tensor prediction, Tensor coefficients, Tensor seed, Tensor sample_ids, Tensor draws,
                      Tensor step, bool noisy) {
  const ScalarType dtype = prediction.scalar_type();
  x = dense(x, wide_dtype(dtype));
  prediction = in_planes(prediction);
  coefficients = dense(coefficients, wide_dtype(dtype));
  sample_ids = dense(sample_ids);
  draws = dense(draws);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  const Job job = job_of(x, prediction, coefficients, seed, sample_ids, draws, step, noisy);
  dispatch(dtype, "diffusion_step", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const W* from = data<W>(x);
    const T* predicted = data<T>(prediction);
    W* to = writable<W>(out);
    for_chunks(job, noisy ? 4 : 1, [&](int64_t row, int64_t first, int64_t count) {
      T m_buffer[chunk], v_buffer[chunk];
      float noise[chunk];
      const StepCoefficients<W> k = job.of_row<W>(row);
      const bool drawn = noisy && k.noise != 0;
      const T* of_row = predicted + row * job.in_prediction();
      const T* m = gathered(of_row, job.planes, first, count, m_buffer);
      const T* v = job.learned && drawn ? gathered(of_row, job.planes, job.n + first, count, v_buffer) : nullptr;
      if (drawn) job.draw(row, first, count, noise);
      const int64_t at = row * job.n + first;
      forward(from + at, m, v, drawn ? noise : nullptr, k, to + at, count);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> diffusion_step_backward(Tensor grad, Tensor x, Tensor prediction, Tensor coefficients,
                                                   Tensor seed, Tensor sample_ids, Tensor draws, Tensor step,
                                                   bool noisy) {
  const ScalarType dtype = prediction.scalar_type();
  x = dense(x, wide_dtype(dtype));
  grad = dense(grad, wide_dtype(dtype));
  prediction = in_planes(prediction);
  coefficients = dense(coefficients, wide_dtype(dtype));
  sample_ids = dense(sample_ids);
  draws = dense(draws);
  Tensor out_x = new_like(x), out_m = new_planes(prediction);
  if (x.numel() == 0) return {out_x, out_m};
  const Job job = job_of(x, prediction, coefficients, seed, sample_ids, draws, step, noisy);
  dispatch(dtype, "diffusion_step_backward", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const W *slopes = data<W>(grad), *from = data<W>(x);
    const T* predicted = data<T>(prediction);
    W* to_x = writable<W>(out_x);
    T* to_prediction = writable<T>(out_m);
    for_chunks(job, noisy && job.learned ? 4 : 1, [&](int64_t row, int64_t first, int64_t count) {
      T m_buffer[chunk], v_buffer[chunk];
      float noise[chunk];
      const StepCoefficients<W> k = job.of_row<W>(row);
      const bool drawn = noisy && job.learned && k.noise != 0, last = job.planes.channels_last;
      const T* of_row = predicted + row * job.in_prediction();
      T* out_row = to_prediction + row * job.in_prediction();
      const T* m = gathered(of_row, job.planes, first, count, m_buffer);
      const T* v = drawn ? gathered(of_row, job.planes, job.n + first, count, v_buffer) : nullptr;
      if (drawn) job.draw(row, first, count, noise);
      T m_slopes[chunk], v_slopes[chunk];
      T* to_m = last ? m_slopes : out_row + first;
      T* to_v = !job.learned ? nullptr : last ? v_slopes : out_row + job.n + first;
      const int64_t at = row * job.n + first;
      backward(slopes + at, from + at, m, v, drawn ? noise : nullptr, k, to_x + at, to_m, to_v, count);
      if (!last) return;
      scatter(m_slopes, out_row, job.planes, first, count);
      if (job.learned) scatter(v_slopes, out_row, job.planes, job.n + first, count);
    });
  });
  return {out_x, out_m};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("diffusion_step", TORCH_BOX(&pf::cpu::diffusion_step));
  m.impl("diffusion_step_backward", TORCH_BOX(&pf::cpu::diffusion_step_backward));
}

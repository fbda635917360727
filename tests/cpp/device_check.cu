// Every function of csrc/core, called from device code: compiled by cuda_check.py, never run.
#include "core/aggregate.h"
#include "core/apgd_step.h"
#include "core/contextual_attention.h"
#include "core/decode_samples.h"
#include "core/decoder_geometry.h"
#include "core/decoder_item.h"
#include "core/decoder_plan.h"
#include "core/gated_elu.h"
#include "core/math.h"
#include "core/noisy_replay.h"
#include "core/pgd_step.h"
#include "core/philox.h"
#include "core/random_transform.h"
#include "core/reconstruction_loss.h"
#include "core/representation_distance.h"
#include "core/sample_latent.h"
#include "core/stitch.h"

template <class T>
__global__ void core_kernel(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out, int64_t n) {
  using W = pf::wide_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const W a = pf::load(x[i]), b = pf::load(y[i]);
  const W sum = pf::pgd_step_linf(a, b, a, pf::PgdStep<W>{a, b, a, b}) + pf::reconstruction_loss_term(a, b) +
                pf::apgd_step_linf(a, b, a, b, pf::ApgdStep<W>{{a, b, a, b}, a, b}) +
                pf::reconstruction_loss_slope(a, b) + pf::latent(a, b, a) + pf::divergence_term(a, b) +
                pf::latent_mu_slope(a, b, a) + pf::latent_logvar_slope(a, b, a, b) + pf::log_sigmoid(a) + pf::log(a) +
                pf::transformed(a, b, a) + pf::transformed_slope(a, b, a, b) + pf::representation_slope(a, b, a, b) +
                (pf::is_replayed(a, b) ? pf::replayed(a, 0.5f, b, a, b) : b);
  const pf::GatedEluSlope<W> slope = pf::gated_elu_slope(a, b);
  pf::store(out[i], sum + pf::gated_elu(a, b) + slope.a + slope.b);
}

template <class T>
__global__ void row_kernel(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out, int64_t n,
                           pf::wide_t<T>* scratch) {
  using W = pf::wide_t<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * n;
  pf::pgd_step_l2(x + row, y + row, x + row, out + row, n, pf::PgdStep<W>{1, 1, 0, 1});
  pf::pgd_step_l1(x + row, y + row, x + row, out + row, n, pf::PgdStep<W>{1, 1, 0, 1}, 1, scratch + 3 * row);
  pf::apgd_step_l2(x + row, y + row, x + row, y + row, out + row, n, pf::ApgdStep<W>{{1, 1, 0, 1}, 1, 0},
                   scratch + row);
  pf::store(out[row], pf::reconstruction_loss(x + row, y + row, n) + pf::divergence(x + row, y + row, n));
}

template <class T>
__global__ void distance_kernel(int kind, const T* __restrict__ x, const T* __restrict__ y,
                                pf::wide_t<T>* __restrict__ out, int64_t n) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * n;
  const pf::Measured d = pf::representation_distance(static_cast<pf::Distance>(kind), x + row, y + row, n);
  out[row] = static_cast<pf::wide_t<T>>(d.distance + d.scale + d.along);
}

template <class W>
__global__ void tile_kernel(int method, W* tile, W* out, W* scratch, int64_t samples, int64_t classes) {
  const auto kind = static_cast<pf::Aggregation>(method);
  pf::aggregate_tile(kind, tile, samples, 1, classes, classes, out, scratch);
  pf::aggregate_tile_backward(kind, tile, out, samples, 1, classes, classes, scratch);
}

template <class W>
__global__ void attention_kernel(W* row, const W* x, pf::Grid grid) {
  const int64_t cells = grid.cells();
  pf::attention_row(row, x, W(10), cells);
  pf::attention_row_backward(row, x, W(10), cells);
}

__global__ void block_kernel(pf::Blocks blocks, int64_t missing, int64_t parts, uint8_t* out) {
  out[threadIdx.x] = pf::owner_of(blocks.of(threadIdx.x, blockIdx.x), blocks.columns, missing, parts);
}

__global__ void stream_kernel(int kind, int64_t seed, uint32_t* out) {
  pf::draw_group(static_cast<pf::Distribution>(kind), pf::key_of(seed), threadIdx.x, 0, 0, 1, out + 4 * threadIdx.x);
}

#define INSTANTIATE(T)                                                                     \
  template __global__ void core_kernel<T>(const T*, const T*, T*, int64_t);                \
  template __global__ void row_kernel<T>(const T*, const T*, T*, int64_t, pf::wide_t<T>*); \
  template __global__ void distance_kernel<T>(int, const T*, const T*, pf::wide_t<T>*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(pf::half)
INSTANTIATE(pf::bfloat16)
template __global__ void tile_kernel<float>(int, float*, float*, float*, int64_t, int64_t);
template __global__ void tile_kernel<double>(int, double*, double*, double*, int64_t, int64_t);
template __global__ void attention_kernel<float>(float*, const float*, pf::Grid);
template __global__ void attention_kernel<double>(double*, const double*, pf::Grid);

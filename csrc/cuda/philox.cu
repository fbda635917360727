// The random stream on the GPU: the words of csrc/core/philox.h, one group of four elements per thread.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/philox.h"

namespace pf::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int threads = 256;

__global__ void __launch_bounds__(threads)
    philox_kernel(Distribution kind, const int64_t* __restrict__ seed, const int64_t* __restrict__ sample_ids,
                  int64_t rows, int64_t numel, int64_t draws, int64_t first_draw, uint32_t stream,
                  uint32_t* __restrict__ out) {
  const int64_t groups = (numel + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < rows * groups; i += stride) {
    const int64_t row = i / groups, group = i % groups;
    uint32_t words[4];
    draw_group(kind, key_of(*seed), static_cast<uint32_t>(group), static_cast<uint32_t>(first_draw + row % draws),
               static_cast<uint32_t>(sample_ids[row / draws]), stream, words);
    uint32_t* to = out + row * numel + 4 * group;
    if (numel % 4 == 0) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      for (int j = 0; j < 4; ++j) {
        if (4 * group + j < numel) to[j] = words[j];
      }
    }
  }
}

Tensor philox(Tensor seed, Tensor sample_ids, int64_t numel, int64_t stream, int64_t distribution, int64_t draws,
              int64_t first_draw) {
  const torch::stable::accelerator::DeviceGuard guard(sample_ids.get_device_index());
  const Tensor ids = torch::stable::contiguous(sample_ids);
  const auto kind = static_cast<Distribution>(distribution);
  const int64_t rows = ids.numel() * draws;
  Tensor out = torch::stable::new_empty(ids, {ids.numel(), draws, numel},
                                        kind == Distribution::bits ? ScalarType::Int : ScalarType::Float);
  const int64_t work = rows * ((numel + 3) / 4);
  if (work == 0) return out;
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(ids.get_device_index(), &current));
  const int64_t wanted = (work + threads - 1) / threads, most = 1 << 20;  // beyond it the threads loop
  philox_kernel<<<static_cast<unsigned>(wanted < most ? wanted : most), threads, 0,
                  static_cast<cudaStream_t>(current)>>>(
      kind, static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<const int64_t*>(ids.const_data_ptr()), rows,
      numel, draws, first_draw, static_cast<uint32_t>(stream), static_cast<uint32_t*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace pf::cuda

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CUDA, m) { m.impl("philox", TORCH_BOX(&pf::cuda::philox)); }

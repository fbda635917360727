// decode_samples on the GPU: the blocks of csrc/core/decode_samples.h, on tensor cores. bfloat16 products, float sums.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../core/decoder_plan.h"

namespace pf::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int threads = 32 * decoder::warps;
// Bytes of maps between the launches of one call, at most: enough to fill the GPU, little beside what a classifier
// takes.
constexpr int64_t workspace = int64_t{256} << 20;

// The machine of the block's program on the GPU: each lane of a warp runs the program, and knows of itself alone.
struct Warp {
  using Element = bfloat16;
  using Sum = float;
  static constexpr int lanes = 1;
  struct Rows {
    uint32_t v[4];
  };
  using Weights = uint4;

  Element* shared;
  // of `shared`, in the address space of shared memory
  uint32_t address;

  template <class F>
  __device__ __forceinline__ void each(F f) {
    f(static_cast<int>(threadIdx.x % 32), 0);
  }
  template <class F>
  __device__ __forceinline__ void for_threads(int n, F f) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) f(i);
  }
  template <class F>
  __device__ __forceinline__ void for_warps(int n, F f) {
    for (int i = static_cast<int>(threadIdx.x / 32); i < n; i += decoder::warps) {
      // the matrix instructions need whole warps, and at the borders of an item lanes take different branches
      __syncwarp();
      // The loads of rows are no volatile instructions, so that several are on their way at once. They depend on this
      // address, which the compiler cannot know to be the old one: none moves from an item to another, past a barrier.
      asm volatile("mov.u32 %0, %0;" : "+r"(address));
      f(i);
    }
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }

  __device__ __forceinline__ static uint32_t pair(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ __forceinline__ void put(int at, float value) { store(shared[at], value); }
  __device__ __forceinline__ void put_pair(int at, float a, float b) {
    *reinterpret_cast<uint32_t*>(shared + at) = pair(a, b);
  }
  __device__ __forceinline__ void copy(int at, const Element* from) {
    *reinterpret_cast<uint4*>(shared + at) = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ void write_pair(Element* to, float a, float b) {
    *reinterpret_cast<uint32_t*>(to) = pair(a, b);
  }
  __device__ __forceinline__ float read(const decoder::Image& image, int64_t at) {
    if (image.format == decoder::Format::f32) return static_cast<const float*>(image.data)[at];
    return load(static_cast<const bfloat16*>(image.data)[at]);
  }
  __device__ __forceinline__ void write(const decoder::Image& image, int64_t at, float value) {
    if (image.format == decoder::Format::f32) {
      static_cast<float*>(image.data)[at] = value;
    } else {
      store(static_cast<bfloat16*>(image.data)[at], value);
    }
  }

  __device__ __forceinline__ Weights load_weights(const Element* from) {
    return __ldg(reinterpret_cast<const uint4*>(from));
  }
  template <class At>
  __device__ __forceinline__ void load_rows(Rows (&a)[1], At at) {
    asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a[0].v[0]), "=r"(a[0].v[1]), "=r"(a[0].v[2]), "=r"(a[0].v[3])
        : "r"(address + 2u * static_cast<uint32_t>(at(0))));
  }
  template <class Sums, class B>
  __device__ __forceinline__ void multiply(Sums sums, const Rows (&a)[1], B weights, int half) {
    float* c = sums(0);
    const Weights b = weights(0);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0].v[0]), "r"(a[0].v[1]), "r"(a[0].v[2]), "r"(a[0].v[3]), "r"(half == 0 ? b.x : b.z),
          "r"(half == 0 ? b.y : b.w));
  }
};

using Task = decoder::Task<Warp>;

__global__ void __launch_bounds__(threads, 1) decode_kernel(const __grid_constant__ Task task) {
  extern __shared__ __align__(16) uint16_t maps[];
  // in shared memory, since its rows are indexed by variables, which registers cannot be
  __shared__ decoder::Block<Warp> block;
  if (threadIdx.x == 0) decoder::set_block(block, task, blockIdx.x);
  __syncthreads();
  Warp warp{reinterpret_cast<bfloat16*>(maps), static_cast<uint32_t>(__cvta_generic_to_shared(maps))};
  decoder::run(warp, block);
}

// Plans take milliseconds to find and are few: one for each decoder, number of samples and device.
std::vector<decoder::Segment> plan(const std::vector<int64_t>& numbers, const std::vector<decoder::Product>& chain,
                                   bool gradient, int64_t samples, int processors, bool alone) {
  static std::mutex lock;
  static std::map<std::tuple<std::vector<int64_t>, bool, int64_t, int, bool>, std::vector<decoder::Segment>> known;
  const std::lock_guard guard(lock);
  const auto key = std::make_tuple(numbers, gradient, samples, processors, alone);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() > 1000) known.clear();
  return known[key] = decoder::plan_of(chain, gradient, samples, processors, alone);
}

decoder::Image image_of(const Tensor& x) {
  const bool single = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || x.scalar_type() == ScalarType::BFloat16,
                  "decode_samples: images must be float32 or bfloat16");
  return {.data = x.mutable_data_ptr(),
          .format = single ? decoder::Format::f32 : decoder::Format::bf16,
          .n = x.stride(0),
          .c = x.stride(1),
          .h = x.stride(2),
          .w = x.stride(3)};
}

// Everything the forward and the backward call share; `task` brings its images.
void decode(Task task, const Tensor& condition, const Tensor& seed, const Tensor& sample_ids, const Tensor& packed,
            const Tensor& biases, const std::vector<int64_t>& numbers, int64_t samples, double slope, bool squash) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::BFloat16 && condition.scalar_type() == ScalarType::Float &&
                      biases.scalar_type() == ScalarType::Float,
                  "decode_samples: the CUDA kernel takes bfloat16 weights, float32 biases and conditions");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
                  "decode_samples: packed must begin at a multiple of 16 bytes");
  const int64_t images = sample_ids.numel();
  if (images == 0) return;
  const int32_t device = condition.get_device_index();
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  task.squashed = squash;
  task.slope = static_cast<float>(slope);
  task.total = images * samples;
  task.draws = samples;
  task.weights = static_cast<const bfloat16*>(packed.const_data_ptr());
  task.biases = static_cast<const float*>(biases.const_data_ptr());
  task.condition = static_cast<const float*>(condition.const_data_ptr());
  task.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  task.sample_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, decoder::shared_bytes));
  // replaced below: torch's stable interface has no constructor for a tensor without memory
  Tensor maps = packed;
  decoder::decode(
      task, numbers, workspace,
      [&](const std::vector<decoder::Product>& chain, bool gradient, int64_t total, bool alone) {
        return plan(numbers, chain, gradient, total, processors, alone);
      },
      [&](int64_t elements) {
        maps = torch::stable::new_empty(packed, {elements});
        return static_cast<bfloat16*>(maps.mutable_data_ptr());
      },
      [&](const Task& one) {
        const int64_t blocks = decoder::blocks_of(one);
        decode_kernel<<<static_cast<unsigned>(blocks), threads, sizeof(bfloat16) * one.segment.elements(),
                        static_cast<cudaStream_t>(stream)>>>(one);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

// Channels, height and width of the image, once there are enough numbers for one.
std::array<int64_t, 3> image_sizes(const std::vector<int64_t>& numbers) {
  decoder::chain_of(numbers, false);
  return {numbers.end()[-6], numbers.end()[-2], numbers.end()[-1]};
}

Tensor decode_samples(Tensor condition, Tensor seed, Tensor sample_ids, Tensor packed, Tensor biases,
                      std::vector<int64_t> numbers, int64_t samples, double slope, bool squash, bool channels_last,
                      ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(condition.get_device_index());
  condition = torch::stable::contiguous(condition);
  sample_ids = torch::stable::contiguous(sample_ids);
  const auto [c, h, w] = image_sizes(numbers);
  const int64_t total = sample_ids.numel() * samples;
  // one channel or one pixel is both layouts, and PyTorch then gives it the strides of the contiguous one
  const bool by_pixel = channels_last && c > 1 && h * w > 1;
  Tensor out = by_pixel ? torch::stable::new_empty(condition, {total, h, w, c}, dtype)
                        : torch::stable::new_empty(condition, {total, c, h, w}, dtype);
  // two transpositions, because torch::stable::permute came with torch 2.14
  if (by_pixel) out = torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
  Task task{};
  task.image = image_of(out);
  decode(task, condition, seed, sample_ids, packed, biases, numbers, samples, slope, squash);
  return out;
}

Tensor decode_samples_backward(Tensor grad, Tensor image, Tensor condition, Tensor seed, Tensor sample_ids,
                               Tensor packed, Tensor biases, std::vector<int64_t> numbers, int64_t samples,
                               double slope, bool squash) {
  const torch::stable::accelerator::DeviceGuard guard(condition.get_device_index());
  condition = torch::stable::contiguous(condition);
  sample_ids = torch::stable::contiguous(sample_ids);
  image_sizes(numbers);
  const int64_t images = sample_ids.numel(), features = numbers[1] * numbers[2] * numbers[3];
  Tensor out = torch::stable::new_empty(condition, {images, samples, features});
  Task task{};
  task.gradient = true;
  task.image = image_of(grad);
  task.result = image_of(image);
  task.condition_gradient = static_cast<float*>(out.mutable_data_ptr());
  decode(task, condition, seed, sample_ids, packed, biases, numbers, samples, slope, squash);
  return torch::stable::sum(out, std::vector<int64_t>{1});
}

}  // namespace
}  // namespace pf::cuda

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CUDA, m) {
  m.impl("decode_samples", TORCH_BOX(&pf::cuda::decode_samples));
  m.impl("decode_samples_backward", TORCH_BOX(&pf::cuda::decode_samples_backward));
}

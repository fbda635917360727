#include "common.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#include <immintrin.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>

#define PF_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define PF_PAIRS_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline)) inline
#define PF_UNROLL _Pragma("GCC unroll 16")

namespace pf::cpu {
namespace {

// Returns true if the processor has the instructions of PF_PAIRS, and PyTorch's variable does not forbid them.
bool has_pairs() {
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = set ? set : "";
  return most != "avx2" && most != "default" && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

struct Free {
  void operator()(void* at) const { std::free(at); }
};
using Floats = std::unique_ptr<float, Free>;

// Returns uninitialized memory that is aligned to cache lines.
Floats lines(int64_t count) {
  void* at = std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
  if (!at) throw std::bad_alloc();
  return Floats(static_cast<float*>(at));
}

// Loads 16 numbers of bfloat16, and converts them to float32.
PF_PAIRS_INLINE __m512 load_numbers(const uint16_t* from) {
  const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// The number of channels in a vector.
constexpr int64_t lanes = 16;

struct Sizes {
  // `width` is the number of channels in a group: 4, 8, or a multiple of 16.
  int64_t images, pixels, channels, width;
  float eps;
  // The channels of a block are processed together: those of one group, or of the groups in one vector.
  int64_t block() const { return std::max(width, lanes); }
  int64_t blocks() const { return channels / block(); }
};

// In each lane, the sum over the lanes of its group. A group has `width` lanes, or the whole vector.
PF_PAIRS_INLINE __m512 sum_of_group(__m512 x, int64_t width) {
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4e));
  if (width > 4) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (width > 8) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return x;
}

PF_PAIRS_INLINE void store_numbers(uint16_t* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// The sigmoid, with a relative error of 1e-4, below the 4e-3 of bfloat16. NaN gives NaN.
PF_PAIRS_INLINE __m512 sigmoid(__m512 x) {
  // 2^t = exp(-x), which is finite. 2^t = 2^whole 2^rest, with `rest` between -1/2 and 1/2.
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(t, whole);
  // The coefficients of the Taylor series are ln(2)^k / k!.
  __m512 p = _mm512_set1_ps(0.0096181291f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.0555041087f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.240226507f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.693147181f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, whole)));
}

// (x - center) * scale + bias, for 16 channels of a group. `scale` includes 1 / deviation and the weight.
struct Affine {
  __m512 center, scale, bias;
};

// The means and the deviations of the groups in one block of one image. Each lane has those of its own group.
class Block {
 public:
  PF_PAIRS Block(const Sizes& sizes, const uint16_t* first, const float* moved) : s(sizes), x(first), shift(moved) {
    const float width = static_cast<float>(s.width);
    const __m512 pixels = _mm512_set1_ps(static_cast<float>(s.pixels));
    const Floats means = lines(s.block()), squares = lines(s.block());
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < s.block(); c += lanes) {
      // The sums use differences from the first pixel: squares of large numbers would lose the digits of the deviation.
      const __m512 pivot = at(0, c), zero = _mm512_setzero_ps();
      __m512 sums[4] = {zero, zero, zero, zero}, products[4] = {zero, zero, zero, zero};
      for (int64_t p = 0; p < s.pixels; p += 4) {
        PF_UNROLL for (int k = 0; k < 4; ++k) {
          if (p + k >= s.pixels) break;
          const __m512 d = _mm512_sub_ps(at(p + k, c), pivot);
          sums[k] = _mm512_add_ps(sums[k], d);
          products[k] = _mm512_fmadd_ps(d, d, products[k]);
        }
      }
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
      const __m512 own =
          _mm512_add_ps(_mm512_add_ps(products[0], products[1]), _mm512_add_ps(products[2], products[3]));
      const __m512 apart = _mm512_div_ps(sum, pixels);
      const __m512 of_channel = _mm512_add_ps(_mm512_add_ps(pivot, apart), moved_by(c));
      _mm512_store_ps(means.get() + c, of_channel);
      _mm512_store_ps(squares.get() + c, _mm512_fnmadd_ps(sum, apart, own));
      total = _mm512_add_ps(total, of_channel);
    }
    mean = _mm512_div_ps(sum_of_group(total, s.width), _mm512_set1_ps(width));
    total = _mm512_setzero_ps();
    for (int64_t c = 0; c < s.block(); c += lanes) {
      const __m512 d = _mm512_sub_ps(_mm512_load_ps(means.get() + c), mean);
      total = _mm512_add_ps(total, _mm512_fmadd_ps(_mm512_mul_ps(d, d), pixels, _mm512_load_ps(squares.get() + c)));
    }
    const __m512 variance = _mm512_div_ps(sum_of_group(total, s.width), _mm512_mul_ps(pixels, _mm512_set1_ps(width)));
    const __m512 deviation = _mm512_sqrt_ps(_mm512_add_ps(variance, _mm512_set1_ps(s.eps)));
    inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), deviation);
  }
  PF_PAIRS_INLINE __m512 at(int64_t pixel, int64_t c) const { return load_numbers(x + pixel * s.channels + c); }
  PF_PAIRS_INLINE __m512 moved_by(int64_t c) const { return shift ? _mm512_loadu_ps(shift + c) : _mm512_setzero_ps(); }
  PF_PAIRS_INLINE Affine affine(const float* weight, const float* bias, int64_t c) const {
    return {_mm512_sub_ps(mean, moved_by(c)), _mm512_mul_ps(inverse, _mm512_loadu_ps(weight + c)),
            _mm512_loadu_ps(bias + c)};
  }
  __m512 mean, inverse;

 private:
  const Sizes& s;
  const uint16_t* x;
  const float* shift;
};

// The inputs of forward and backward. `shift` [rows, channels] has one row, or one per image, or is null.
struct Operands {
  const uint16_t* x;
  const float *weight, *bias, *shift;
  int64_t shift_rows;
};

template <class F>
void for_each_block(const Sizes& s, const Operands& in, int64_t begin, int64_t end, F f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / s.blocks(), channel = i % s.blocks() * s.block();
    const int64_t first = image * s.pixels * s.channels + channel;
    const float* shift = in.shift ? in.shift + (in.shift_rows > 1 ? image : 0) * s.channels + channel : nullptr;
    f(first, channel, shift);
  }
}

PF_PAIRS void forward_block(const Sizes& s, const Operands& in, int64_t first, int64_t channel, const float* shift,
                            uint16_t* out) {
  const Block block(s, in.x + first, shift);
  for (int64_t c = 0; c < s.block(); c += lanes) {
    const Affine a = block.affine(in.weight + channel, in.bias + channel, c);
    for (int64_t p = 0; p < s.pixels; ++p) {
      const __m512 n = _mm512_fmadd_ps(_mm512_sub_ps(block.at(p, c), a.center), a.scale, a.bias);
      store_numbers(out + first + p * s.channels + c, _mm512_mul_ps(n, sigmoid(n)));
    }
  }
}

PF_PAIRS void backward_block(const Sizes& s, const Operands& in, const uint16_t* grad, int64_t first, int64_t channel,
                             const float* shift, float* kept, uint16_t* out) {
  const Block block(s, in.x + first, shift);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 plain = _mm512_setzero_ps(), along = plain;
  for (int64_t c = 0; c < s.block(); c += lanes) {
    const Affine a = block.affine(in.weight + channel, in.bias + channel, c);
    __m512 sums = _mm512_setzero_ps(), products = sums;
    for (int64_t p = 0; p < s.pixels; ++p) {
      const __m512 d = _mm512_sub_ps(block.at(p, c), a.center), n = _mm512_fmadd_ps(d, a.scale, a.bias);
      const __m512 near = sigmoid(n), far = _mm512_sub_ps(one, near);
      const __m512 slope = _mm512_mul_ps(near, _mm512_fmadd_ps(n, far, one));
      // m is the gradient of (x - center), without the parts that come through the mean and the deviation. The second
      // loop subtracts these parts.
      const __m512 g = load_numbers(grad + first + p * s.channels + c);
      const __m512 m = _mm512_mul_ps(_mm512_mul_ps(g, slope), a.scale);
      sums = _mm512_add_ps(sums, m);
      products = _mm512_fmadd_ps(m, d, products);
      _mm512_store_ps(kept + c * s.pixels + p * lanes, m);
    }
    plain = _mm512_add_ps(plain, sums);
    along = _mm512_add_ps(along, products);
  }
  const __m512 share = _mm512_set1_ps(1 / static_cast<float>(s.pixels * s.width));
  const __m512 of_mean = _mm512_mul_ps(sum_of_group(plain, s.width), share);
  const __m512 of_deviation =
      _mm512_mul_ps(_mm512_mul_ps(sum_of_group(along, s.width), share), _mm512_mul_ps(block.inverse, block.inverse));
  for (int64_t c = 0; c < s.block(); c += lanes) {
    const __m512 center = block.affine(in.weight + channel, in.bias + channel, c).center;
    for (int64_t p = 0; p < s.pixels; ++p) {
      const __m512 d = _mm512_sub_ps(block.at(p, c), center);
      const __m512 m = _mm512_sub_ps(_mm512_load_ps(kept + c * s.pixels + p * lanes), of_mean);
      store_numbers(out + first + p * s.channels + c, _mm512_fnmadd_ps(d, of_deviation, m));
    }
  }
}

Tensor words_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.scalar_type() == ScalarType::BFloat16, "group_norm_silu: ", name,
                  " must be bfloat16 [B, ..., C]");
  return dense(x);
}
const uint16_t* words(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

// Checks the arguments, and calls f(sizes, operands, result) to fill a result like x, unless it is empty.
template <class F>
Tensor like(const Tensor& images, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& shift,
            int64_t groups, double eps, F f) {
  const Tensor x = words_of(images, "x");
  const int64_t count = x.size(0), channels = x.size(x.dim() - 1);
  const int64_t width = groups > 0 && channels % groups == 0 ? channels / groups : 0;
  STD_TORCH_CHECK(channels % lanes == 0 && width > 0 && (width % lanes == 0 || width == 4 || width == 8),
                  "group_norm_silu: the channels must be a multiple of 16, with 4, 8 or a multiple of 16 per group; "
                  "there are ",
                  channels, " channels in ", groups, " groups");
  STD_TORCH_CHECK(weight.numel() == channels && bias.numel() == channels, "group_norm_silu: weight and bias must have ",
                  channels, " numbers, one per channel");
  const Tensor w = dense(weight, ScalarType::Float), b = dense(bias, ScalarType::Float);
  std::optional<Tensor> moved;
  if (shift.has_value()) {
    STD_TORCH_CHECK(shift->dim() == 2 && shift->size(1) == channels && (shift->size(0) == 1 || shift->size(0) == count),
                    "group_norm_silu: shift must be [B, C] or [1, C]");
    moved = dense(*shift, ScalarType::Float);
  }
  Tensor out = new_like(x);
  if (out.numel() == 0) return out;
  const Sizes s{count, x.numel() / (count * channels), channels, width, static_cast<float>(eps)};
  const float* by = moved.has_value() ? data<float>(*moved) : nullptr;
  f(s, Operands{words(x), data<float>(w), data<float>(b), by, moved.has_value() ? moved->size(0) : 0},
    static_cast<uint16_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor group_norm_silu(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> shift, int64_t groups, double eps) {
  return like(x, weight, bias, shift, groups, eps, [](const Sizes& s, const Operands& in, uint16_t* out) {
    parallel_rows(s.images * s.blocks(), s.pixels * s.block(), [&](int64_t begin, int64_t end) {
      for_each_block(s, in, begin, end, [&](int64_t first, int64_t channel, const float* moved) {
        forward_block(s, in, first, channel, moved, out);
      });
    });
  });
}

Tensor group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> shift,
                                int64_t groups, double eps) {
  const Tensor g = words_of(grad, "grad");
  STD_TORCH_CHECK(g.numel() == x.numel(), "group_norm_silu_backward: grad must have the shape of x");
  return like(x, weight, bias, shift, groups, eps, [&](const Sizes& s, const Operands& in, uint16_t* out) {
    parallel_rows(s.images * s.blocks(), 2 * s.pixels * s.block(), [&](int64_t begin, int64_t end) {
      const Floats kept = lines(s.pixels * s.block());
      for_each_block(s, in, begin, end, [&](int64_t first, int64_t channel, const float* moved) {
        backward_block(s, in, words(g), first, channel, moved, kept.get(), out);
      });
    });
  });
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  // On other processors these ops have no kernel, and purify_fast runs their references.
  if (pf::cpu::has_pairs()) {
    m.impl("group_norm_silu", TORCH_BOX(&pf::cpu::group_norm_silu));
    m.impl("group_norm_silu_backward", TORCH_BOX(&pf::cpu::group_norm_silu_backward));
  }
}

#endif

// Code that all CPU kernels share: dispatch on the dtype, contiguous inputs, new outputs, and threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <array>
#include <cstring>
#include <vector>

#include "../core/math.h"

// Compiles a loop for each instruction set (v3: AVX2, FMA and F16C; v4: AVX-512). The library chooses when it is
// loaded. Templates cannot have this attribute, so each file has non-template overloads.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define PF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"))) static
#elif defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && defined(__GNUC__)
#define PF_CLONES __attribute__((target_clones("default", "avx2", "avx512f"))) static
#else
#define PF_CLONES static
#endif

// Calls X(CLONES, dtype), where CLONES declares a loop for this dtype. Loops in float64 are compiled once: their
// exponentials are libm's, which no instruction set makes faster.
#define PF_FOR_EACH_DTYPE(X) X(PF_CLONES, float) X(static, double) X(PF_CLONES, pf::half) X(PF_CLONES, pf::bfloat16)
// Calls X(CLONES, dtype) for the dtypes of the arithmetic.
#define PF_FOR_EACH_WIDE_DTYPE(X) X(PF_CLONES, float) X(static, double)
// Pairs of dtypes. The second is the first, or that of the arithmetic: images stay float32 under autocast.
#define PF_FOR_EACH_PAIR(X)                \
  X(PF_CLONES, float, float)               \
  X(static, double, double)                \
  X(PF_CLONES, pf::half, pf::half)         \
  X(PF_CLONES, pf::half, float)            \
  X(PF_CLONES, pf::bfloat16, pf::bfloat16) \
  X(PF_CLONES, pf::bfloat16, float)

namespace pf::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A task has at least this number of elements, because waking a thread takes about 5 us.
constexpr int64_t grain = 32768;

// Calls f(T{}), where T is the storage type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(half{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the tensors must be float16, bfloat16, float32 or float64; use .to()");
  }
}

inline ScalarType wide_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Returns x as a contiguous tensor of this dtype. Copies only if necessary.
inline Tensor dense(const Tensor& x, ScalarType dtype) {
  const Tensor same = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Requests pages of 2 MiB for a large new tensor. It is fresh memory, because C's allocator returns freed blocks of 32
// MiB or more to the system, and pages of 4 KiB would cause far more page faults.
inline void prefer_large_pages(const Tensor& x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t page = 2 << 20, least = 32 << 20;
  if (bytes < least) return;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, stop = (begin + bytes) / page * page;
  // madvise is only a hint. If the system ignores it, only time is lost.
  madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
#endif
}

// A result of at least this many bytes does not fit into a cache that few cores share, and may be written by `stream`.
constexpr int64_t streamed_bytes = 32 << 20;

// Copies without the caches, which halves the memory traffic: a normal write first reads the target. The pointers need
// no alignment. Call `streamed` after the last copy of a thread.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % 16), gap = (16 - past) % 16;
  const int64_t head = gap < bytes ? gap : bytes;
  std::memcpy(target, source, head);
  int64_t at = head;
  for (; at + 16 <= bytes; at += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
  }
  std::memcpy(target + at, source + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}
// Makes data that `stream` has written visible to other threads.
inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Returns a new, uninitialized CPU tensor.
inline Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(made.get(), &bytes));
  prefer_large_pages(made, bytes);
  return made;
}
// Returns a new, uninitialized, contiguous CPU tensor.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  constexpr int64_t most = 16;
  std::array<int64_t, most> strides;
  STD_TORCH_CHECK(dim <= most, "a tensor must have at most ", most, " dimensions; this one has ", dim);
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return new_strided(sizes, strides.data(), dim, dtype);
}
inline Tensor new_like(const Tensor& x) { return new_tensor(x.sizes().data(), x.dim(), x.scalar_type()); }
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// Returns new images [n, c, h, w] in either memory format.
inline Tensor new_images(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype, bool channels_last) {
  const int64_t sizes[] = {n, c, h, w}, last[] = {h * w * c, 1, w * c, c};
  return channels_last ? new_strided(sizes, last, 4, dtype) : new_tensor(sizes, 4, dtype);
}
// True if the images are channels_last and not contiguous. Strides of dimensions of size 1 are ignored, as in PyTorch.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t stride = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != stride) return false;
    stride *= x.size(dim);
  }
  return true;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* writable(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f(pointer to the elements of first, pointer to the elements of second). `second` is converted if necessary, so
// that the dtypes are a pair of PF_FOR_EACH_PAIR. A tensor that is not contiguous is copied.
template <class F>
void with_pair(const Tensor& first, const Tensor& second, const char* op, F f) {
  const ScalarType dtype = first.scalar_type();
  const Tensor a = dense(first);
  const Tensor b = dense(second, second.scalar_type() == dtype ? dtype : wide_dtype(dtype));
  dispatch(dtype, op, [&](auto tag) {
    using T = decltype(tag);
    if (b.scalar_type() == dtype) {
      f(data<T>(a), data<T>(b));
    } else {
      f(data<T>(a), data<wide_t<T>>(b));
    }
  });
}

// Calls f(begin, end) for ranges of rows, on PyTorch's threads. `cost` is a row's work, in elements of a simple loop.
template <class F>
void parallel_rows(int64_t rows, int64_t cost, const F& f) {
  const int64_t step = grain / (cost > 0 ? cost : 1) + 1;
  if (rows <= step) {
    if (rows > 0) f(int64_t{0}, rows);
  } else {
    torch::stable::parallel_for(0, rows, step, f);
  }
}

// Calls f(row, first, count) for ranges of the elements of `rows` rows with n elements each. A range lies within one
// row. The threads divide the elements, not the rows. `first` is an index into the elements of all rows together.
template <class F>
void split_elements(int64_t rows, int64_t n, const F& f) {
  parallel_rows(rows * n, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / n, stop = (row + 1) * n < end ? (row + 1) * n : end;
      f(row, begin, stop - begin);
      begin = stop;
    }
  });
}

}  // namespace pf::cpu

#include <algorithm>

#include "common.h"
#include "convolution_tiles.h"

#if PF_HAS_PAIRS

namespace pf::cpu {
namespace {

using convolution::Images;
using convolution::Sizes;
using convolution::WeightGradient;

// Runs parts of any size in parallel. The grain size is 1, because each part has thousands of products.
struct Parallel {
  template <class F>
  void operator()(int64_t count, const F& f) const {
    if (count > 0) torch::stable::parallel_for(0, count, 1, f);
  }
};

const uint16_t* words(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

Tensor images_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "convolution: ", name, " must be bfloat16");
  STD_TORCH_CHECK(x.dim() == 4, "convolution: ", name, " must have four dimensions; it has ", x.dim());
  return dense(x);
}
using Two = std::vector<int64_t>;

// Computes the sizes, and checks them so that no kernel reads beyond the tensors.
Sizes sizes_of(int64_t images, int64_t height, int64_t width, int64_t inputs, const Tensor& weight, const Two& stride,
               const Two& padding, const Two& dilation) {
  Sizes s{images, height, width, inputs, 0, 0, weight.size(0), {weight.size(1), weight.size(2)}, {}, {}, {}};
  const int64_t size[2] = {height, width};
  int64_t out[2];
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "convolution: stride, padding and dilation must have two numbers each");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(s.kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "convolution: kernel, stride and dilation must be above 0, and padding must be at least 0");
    s.stride[i] = stride[i], s.padding[i] = padding[i], s.dilation[i] = dilation[i];
    const int64_t room = size[i] + 2 * padding[i] - dilation[i] * (s.kernel[i] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "convolution: the kernel is larger than the padded image");
    out[i] = room / stride[i] + 1;
  }
  s.out_height = out[0], s.out_width = out[1];
  return s;
}

// Winograd's algorithm is used only for images with at least `fewest_tiles` tiles, because the transform of the weights
// takes the same time for every number of tiles. With four tiles per image, the algorithm was faster for a batch of
// eight images, forward and backward, but a third slower for the gradient of a single image. The gradient of the
// weights needs at least `fewest_tiles_of_gradient` tiles, because the transform of its sums takes additional time.
constexpr int64_t fewest_tiles = 4, fewest_tiles_of_gradient = 64;

// Computes the convolution of `input`. If `turned`, computes the gradient of the convolution's input. The argument
// `input` is then the gradient of the convolution's output.
Tensor convolve(const Sizes& s, const Tensor& input, const Tensor& weight, bool turned, const float* bias) {
  Tensor out = turned ? new_tensor({s.images, s.height, s.width, s.inputs}, ScalarType::BFloat16)
                      : new_tensor({s.images, s.out_height, s.out_width, s.outputs}, ScalarType::BFloat16);
  if (out.numel() == 0) return out;
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  if (convolution::by_tiles(s, fewest_tiles)) {
    convolution::TiledImages(s, turned).run(words(input), words(weight), bias, to, Parallel{});
  } else {
    Images(turned ? convolution::input_gradient_plan(s) : convolution::forward_plan(s))
        .run(words(input), words(weight), turned, bias, to, Parallel{});
  }
  return out;
}

Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> bias, Two stride, Two padding, Two dilation) {
  const Tensor x = images_of(input, "input"), w = images_of(weight, "weight");
  STD_TORCH_CHECK(w.size(3) == x.size(3), "convolution: weight must have ", x.size(3),
                  " input channels, like the input; it has ", w.size(3));
  const Sizes s = sizes_of(x.size(0), x.size(1), x.size(2), x.size(3), w, stride, padding, dilation);
  std::optional<Tensor> wide;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.outputs, "convolution: bias must have ", s.outputs,
                    " numbers, one per output channel");
    wide = dense(*bias, ScalarType::Float);
  }
  return convolve(s, x, w, false, wide.has_value() ? data<float>(*wide) : nullptr);
}

Tensor input_gradient(Tensor grad, Tensor weight, int64_t height, int64_t width, Two stride, Two padding,
                      Two dilation) {
  const Tensor g = images_of(grad, "grad"), w = images_of(weight, "weight");
  const Sizes s = sizes_of(g.size(0), height, width, w.size(3), w, stride, padding, dilation);
  STD_TORCH_CHECK(g.size(1) == s.out_height && g.size(2) == s.out_width && g.size(3) == s.outputs,
                  "convolution: grad must have the shape of the output");
  return convolve(s, g, w, true, nullptr);
}

std::tuple<Tensor, Tensor> weight_gradient(Tensor grad, Tensor input, Two kernel, Two stride, Two padding,
                                           Two dilation) {
  const Tensor g = images_of(grad, "grad"), x = images_of(input, "input");
  STD_TORCH_CHECK(kernel.size() == 2, "convolution: kernel must have two numbers; it has ", kernel.size());
  Tensor weight = new_tensor({g.size(3), kernel[0], kernel[1], x.size(3)}, ScalarType::Float);
  Tensor bias = new_tensor({g.size(3)}, ScalarType::Float);
  const Sizes s = sizes_of(x.size(0), x.size(1), x.size(2), x.size(3), weight, stride, padding, dilation);
  STD_TORCH_CHECK(g.size(0) == s.images && g.size(1) == s.out_height && g.size(2) == s.out_width,
                  "convolution: grad must have the shape of the output");
  if (g.numel() == 0 || x.numel() == 0) {
    std::fill_n(writable<float>(weight), weight.numel(), 0.0f);
    std::fill_n(writable<float>(bias), bias.numel(), 0.0f);
    return {weight, bias};
  }
  if (convolution::by_tiles(s, fewest_tiles_of_gradient)) {
    convolution::TiledWeightGradient(s).run(words(x), words(g), writable<float>(weight), Parallel{});
  } else {
    WeightGradient(s).run(words(x), words(g), writable<float>(weight), Parallel{});
  }
  const int64_t pixels = s.images * s.out_height * s.out_width;
  Parallel{}((s.outputs + 15) / 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      convolution::sum_pixels(words(g), pixels, s.outputs, 16 * i, writable<float>(bias));
    }
  });
  return {weight, bias};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  // On other processors these ops have no kernel, and purify_fast runs their references.
  if (pf::cpu::convolution::supported()) {
    m.impl("convolution", TORCH_BOX(&pf::cpu::forward));
    m.impl("convolution_input_gradient", TORCH_BOX(&pf::cpu::input_gradient));
    m.impl("convolution_weight_gradient", TORCH_BOX(&pf::cpu::weight_gradient));
  }
}

#endif

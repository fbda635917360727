// Computes convolutions by Winograd's algorithm. convolution_winograd.h transforms the images and weights. This file
// computes the 16 products of each output tile, as matrix products.
#pragma once

#include "convolution_images.h"
#include "convolution_weights.h"
#include "convolution_winograd.h"

#if PF_HAS_PAIRS

namespace pf::cpu::convolution {

// Computes the convolution, or the gradient of its input.
class TiledImages {
 public:
  // If `turned`, `run` maps the gradient of the convolution's output to that of its input.
  TiledImages(const Sizes& s, bool turned)
      : images(s.images),
        height(turned ? s.out_height : s.height),
        width(turned ? s.out_width : s.width),
        inputs(turned ? s.outputs : s.inputs),
        outputs(turned ? s.inputs : s.outputs),
        turned(turned),
        dilation{s.dilation[0], s.dilation[1]},
        padding{turned ? 2 * s.dilation[0] - s.padding[0] : s.padding[0],
                turned ? 2 * s.dilation[1] - s.padding[1] : s.padding[1]},
        grid(turned ? s.height : s.out_height, turned ? s.width : s.out_width, s.dilation),
        blocks(vectors(outputs, 3)) {}

  template <class Parallel>
  void run(const uint16_t* input, const uint16_t* weight, const float* bias, uint16_t* out,
           const Parallel& parallel) const {
    // The number of tiles in one part of the work. It is a multiple of 8, 12 and 16, because a function that `tiles_of`
    // returns multiplies up to 8, 12 or 16 tiles together.
    constexpr int64_t together = 48;
    const int64_t pairs = (inputs + 1) / 2, pitch = (inputs + 15) / 16 * 16, of_weights = blocks.pitch * pairs;
    Lines<uint32_t> packed(products * of_weights);
    if (turned) {
      pack_turned_kernels(weight, inputs, outputs, blocks, packed.get());
    } else {
      pack_kernels(weight, inputs, blocks, packed.get());
    }
    std::vector<float> biases(blocks.pitch, 0.0f);
    int64_t widest = 0;
    for (const Block& block : blocks.list) {
      if (bias) std::copy_n(bias + block.first, block.count, &biases[block.before]);
      widest = std::max(widest, block.pitch);
    }
    const int64_t tiles = images * grid.each;
    const std::vector<float> zeros(widest, 0.0f);
    parallel((tiles + together - 1) / together, [&](int64_t begin, int64_t end) {
      Lines<uint16_t> taken(products * together * pitch);
      Lines<float> sums(products * together * widest);
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * together, count = std::min(together, tiles - first);
        Spot spots[together];
        for (int64_t t = 0; t < count; ++t) {
          spots[t] = grid.at(first + t);
          const Pixels pixels(input, height, width, inputs, spots[t], padding, dilation, 4);
          take_input(pixels, inputs, pitch, together * pitch, taken.get() + t * pitch);
        }
        for (const Block& block : blocks.list) {
          const auto kinds = tiles_of<float>(block.count);
          for (int64_t i = 0; i < products; ++i) {
            const uint32_t* weights = packed.get() + i * of_weights + block.before * pairs;
            for (int64_t t = 0; t < count; t += kinds.most) {
              const int64_t some = std::min(kinds.most, count - t);
              const Factor factor{taken.get() + (i * together + t) * pitch, weights, pairs};
              float* to = sums.get() + (i * together + t) * block.pitch;
              kinds.of[some - 1](&factor, 1, pitch, zeros.data(), {to, block.pitch, block.pitch});
            }
          }
          for (int64_t t = 0; t < count; ++t) {
            give_output(sums.get() + t * block.pitch, together * block.pitch, block, biases.data() + block.before,
                        spots[t], grid, outputs, out);
          }
        }
      }
    });
  }

 private:
  const int64_t images, height, width, inputs, outputs;
  const bool turned;
  const int64_t dilation[2], padding[2];
  const Grid grid;
  const Blocks blocks;
};

// Computes the gradient of the weights. Each of the 16 products is a matrix product that sums over all tiles. The two
// numbers of a pair come from two tiles.
class TiledWeightGradient {
 public:
  explicit TiledWeightGradient(const Sizes& sizes)
      : s(sizes),
        grid(s.out_height, s.out_width, s.dilation),
        many_is_gradient(s.outputs >= s.inputs),
        of_gradient(many_is_gradient ? vectors(s.outputs, 3) : eights(s.outputs)),
        of_input(many_is_gradient ? eights(s.inputs) : vectors(s.inputs, 3)) {
    for (const Block& m : many().list) {
      for (const Block& one : single().list) {
        parts.push_back({m, one, total});
        total += one.count * rounded_to_eights(m.count);
      }
    }
  }

  // Writes the gradient to `result` [outputs, 3, 3, inputs].
  template <class Parallel>
  void run(const uint16_t* input, const uint16_t* gradient, float* result, const Parallel& parallel) const {
    Lines<float> sums(products * total);
    std::memset(sums.get(), 0, products * total * sizeof(float));
    const int64_t tiles = s.images * grid.each, bytes = products * 2 * (of_gradient.pitch + of_input.pitch);
    // `fitting` tiles per step have transformed data that fit into the cache of a core (`room` bytes).
    constexpr int64_t room = 1280 << 10;
    const int64_t fitting = std::clamp<int64_t>(room / bytes / few * few, few, (tiles + few - 1) / few * few);
    Lines<uint32_t> left(products * of_gradient.pitch * fitting / 2), right(products * of_input.pitch * fitting / 2);
    for (int64_t first = 0; first < tiles; first += fitting) {
      const int64_t count = std::min(fitting, tiles - first), pairs = (count + 1) / 2;
      parallel((count + few - 1) / few, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          take(input, gradient, first + i * few, std::min(few, count - i * few), i * few / 2, fitting / 2, left.get(),
               right.get());
        }
      });
      const auto each = static_cast<int64_t>(parts.size());
      parallel(products * each, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          add(parts[i % each], i / each, pairs, fitting / 2, left.get(), right.get(), sums.get());
        }
      });
    }
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) give(parts[i], sums.get(), result);
    });
  }

 private:
  // The number of tiles in one part of the work. It must be even.
  static constexpr int64_t few = 16;
  struct Part {
    Block many, single;
    int64_t sums;
  };
  const Blocks& many() const { return many_is_gradient ? of_gradient : of_input; }
  const Blocks& single() const { return many_is_gradient ? of_input : of_gradient; }

  void take(const uint16_t* input, const uint16_t* gradient, int64_t first, int64_t count, int64_t position,
            int64_t positions, uint32_t* left, uint32_t* right) const {
    constexpr int64_t none[2] = {0, 0};
    const auto of_spot = [&](int64_t tile, bool of_gradient_) {
      const Spot spot = grid.at(tile);
      return of_gradient_ ? Pixels(gradient, s.out_height, s.out_width, s.outputs, spot, none, s.dilation, 2)
                          : Pixels(input, s.height, s.width, s.inputs, spot, s.padding, s.dilation, 4);
    };
    for (int64_t t = 0; t < count; t += 2, ++position) {
      const bool two = t + 1 < count;
      take_pairs<true>(of_spot(first + t, true), two ? of_spot(first + t + 1, true) : Pixels(gradient), s.outputs,
                       of_gradient, position, positions, left);
      take_pairs<false>(of_spot(first + t, false), two ? of_spot(first + t + 1, false) : Pixels(input), s.inputs,
                        of_input, position, positions, right);
    }
  }

  void add(const Part& part, int64_t product, int64_t pairs, int64_t positions, const uint32_t* left,
           const uint32_t* right, float* sums) const {
    const Block& of_g = many_is_gradient ? part.many : part.single;
    const Block& of_x = many_is_gradient ? part.single : part.many;
    const Side gradient{left + (product * of_gradient.pitch + of_g.before) * positions, of_g.pitch, 1};
    const Side input{right + (product * of_input.pitch + of_x.before) * positions, of_x.pitch, 1};
    const Segment all{0, 0, pairs};
    weight_tile_of(part.many.count, part.single.count)(many_is_gradient ? gradient : input,
                                                       many_is_gradient ? input : gradient, &all, 1, many_is_gradient,
                                                       sums + product * total + part.sums);
  }

  void give(const Part& part, const float* sums, float* result) const {
    const int64_t row = rounded_to_eights(part.many.count);
    float made[9 * 16];
    for (int64_t b = 0; b < part.single.count; ++b) {
      for (int64_t m = 0; m < part.many.count; m += 16) {
        const int64_t count = std::min<int64_t>(16, part.many.count - m);
        give_kernel(sums + part.sums + b * row + m, total, first_of(count), made);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t output = many_is_gradient ? part.many.first + m + k : part.single.first + b;
          const int64_t input = many_is_gradient ? part.single.first + b : part.many.first + m + k;
          float* to = result + output * 9 * s.inputs + input;
          for (int64_t tap = 0; tap < 9; ++tap) to[tap * s.inputs] = made[16 * tap + k];
        }
      }
    }
  }

  const Sizes s;
  const Grid grid;
  const bool many_is_gradient;
  const Blocks of_gradient, of_input;
  std::vector<Part> parts;
  int64_t total = 0;
};

}  // namespace pf::cpu::convolution

#endif

// Computes a convolution, or the gradient of its input, which is also a convolution. The sums over taps and input
// channels are computed for a few output pixels and many output channels together. The two numbers of a pair (see
// convolution.h) come from neighboring channels, which are adjacent in memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "convolution.h"

#if PF_HAS_PAIRS

namespace pf::cpu::convolution {

using Pair [[gnu::may_alias]] = int32_t;

// The factors of one tap, or of several adjacent taps: `pairs` pairs of input numbers, and the same number of pairs of
// weights.
struct Factor {
  const uint16_t* pixels;
  const uint32_t* weights;
  int64_t pairs;
};
// The destination of a tile's results: the first pixel, the distance between pixels, and the number of channels to
// write. bfloat16 results are rounded, and only `channels` channels are written. float32 results include all channels.
template <class Number>
struct Target {
  Number* at;
  int64_t step;
  int64_t channels;
};

// Computes the sums over all factors for P neighboring pixels and 16 V + 8 H channels.
template <class Number, int V, int H, int P>
PF_PAIRS void image_tile(const Factor* factors, int64_t count, int64_t step, const float* bias,
                         const Target<Number>& to) {
  constexpr int pitch = V > 0 ? (16 * V + 8 * H + 15) / 16 * 16 : 8;
  __m512 wide[P][V + 1];
  __m256 narrow[P][H + 1];
  PF_UNROLL for (int p = 0; p < P; ++p) {
    PF_UNROLL for (int v = 0; v < V; ++v) wide[p][v] = _mm512_loadu_ps(bias + 16 * v);
    if constexpr (H > 0) narrow[p][0] = _mm256_loadu_ps(bias + 16 * V);
  }
  const int64_t step3 = 3 * step;
  for (const Factor* f = factors; f < factors + count; ++f) {
    const uint32_t* w = f->weights;
    // Three pixels share an address register, because there are fewer address registers than pixels.
    const uint16_t* x[(P + 2) / 3];
    x[0] = f->pixels;
    PF_UNROLL for (int i = 1; i < (P + 2) / 3; ++i) x[i] = x[i - 1] + step3;
    for (int64_t c = 0; c < f->pairs; ++c, w += pitch) {
      __m512i of_wide[V + 1];
      __m256i of_narrow;
      PF_UNROLL for (int v = 0; v < V; ++v) of_wide[v] = _mm512_loadu_si512(w + 16 * v);
      if constexpr (H > 0) of_narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16 * V));
      PF_UNROLL for (int p = 0; p < P; ++p) {
        const Pair pair = *reinterpret_cast<const Pair*>(x[p / 3] + p % 3 * step + 2 * c);
        if constexpr (V > 0) {
          const __m512i one = _mm512_set1_epi32(pair);
          PF_UNROLL for (int v = 0; v < V; ++v) {
            wide[p][v] = _mm512_dpbf16_ps(wide[p][v], (__m512bh)of_wide[v], (__m512bh)one);
          }
          if constexpr (H > 0) {
            narrow[p][0] = _mm256_dpbf16_ps(narrow[p][0], (__m256bh)of_narrow, (__m256bh)_mm512_castsi512_si256(one));
          }
        } else {
          narrow[p][0] = _mm256_dpbf16_ps(narrow[p][0], (__m256bh)of_narrow, (__m256bh)_mm256_set1_epi32(pair));
        }
      }
    }
  }
  // The masks of the channels that are written, one for each vector.
  __mmask16 masks[V + 1];
  PF_UNROLL for (int v = 0; v <= V; ++v) masks[v] = first_of(to.channels - 16 * v);
  PF_UNROLL for (int p = 0; p < P; ++p) {
    Number* at = to.at + p * to.step;
    if constexpr (std::is_same_v<Number, float>) {
      PF_UNROLL for (int v = 0; v < V; ++v) _mm512_storeu_ps(at + 16 * v, wide[p][v]);
      if constexpr (H > 0) _mm256_storeu_ps(at + 16 * V, narrow[p][0]);
    } else {
      PF_UNROLL for (int v = 0; v < V; ++v) {
        _mm256_mask_storeu_epi16(at + 16 * v, masks[v], (__m256i)_mm512_cvtneps_pbh(wide[p][v]));
      }
      if constexpr (H > 0) {
        const auto half = static_cast<__mmask8>(masks[V]);
        _mm_mask_storeu_epi16(at + 16 * V, half, (__m128i)_mm256_cvtneps_pbh(narrow[p][0]));
      }
    }
  }
}

template <class Number>
using ImageTile = void (*)(const Factor*, int64_t, int64_t, const float*, const Target<Number>&);

template <class Number, int V, int H, int... P>
constexpr std::array<ImageTile<Number>, sizeof...(P)> image_tiles(std::integer_sequence<int, P...>) {
  return {image_tile<Number, V, H, P + 1>...};
}
// Functions for tiles of 1, 2, ... `most` pixels. The registers have no room for larger tiles.
template <class Number>
struct Tiles {
  const ImageTile<Number>* of;
  int64_t most;
};
template <class Number, int V, int H, int P>
Tiles<Number> tiles() {
  static constexpr auto made = image_tiles<Number, V, H>(std::make_integer_sequence<int, P>{});
  return {made.data(), P};
}
template <class Number>
Tiles<Number> tiles_of(int64_t channels) {
  switch ((channels + 7) / 8) {
    case 1:
      return tiles<Number, 0, 1, 16>();
    case 2:
      return tiles<Number, 1, 0, 16>();
    case 3:
      return tiles<Number, 1, 1, 12>();
    case 4:
      return tiles<Number, 2, 0, 12>();
    case 5:
      return tiles<Number, 2, 1, 8>();
    default:
      return tiles<Number, 3, 0, 8>();
  }
}

// row and column: the input pixel that the tap reads, relative to the output pixel. kernel: the index of the tap in the
// kernel. together: the number of taps, beginning with this tap, whose weights are adjacent and which read adjacent
// pixels.
struct Tap {
  int64_t row, column, kernel, together = 1;
};
// Output pixels at regular distances that are computed from the same taps.
struct Phase {
  int64_t row, column, rows, columns;
  std::vector<Tap> taps;
};

// The plan of a convolution: the sizes of the images that it reads and writes, the distances between pixels, the number
// of taps, and the phases.
struct Plan {
  int64_t images, height, width, inputs, out_height, out_width, outputs;
  int64_t in_step[2], out_step[2];
  int64_t taps;
  std::vector<Phase> phases;
};

inline Plan forward_plan(const Sizes& s) {
  Plan plan{s.images,
            s.height,
            s.width,
            s.inputs,
            s.out_height,
            s.out_width,
            s.outputs,
            {s.stride[0], s.stride[1]},
            {1, 1},
            s.kernel[0] * s.kernel[1],
            {}};
  Phase all{0, 0, s.out_height, s.out_width, {}};
  for (int64_t a = 0; a < s.kernel[0]; ++a) {
    for (int64_t b = 0; b < s.kernel[1]; ++b) {
      all.taps.push_back({a * s.dilation[0] - s.padding[0], b * s.dilation[1] - s.padding[1], a * s.kernel[1] + b});
    }
  }
  plan.phases.push_back(std::move(all));
  return plan;
}

// Returns the plan of the input's gradient, in which the gradient of the output takes the place of the input.
inline Plan input_gradient_plan(const Sizes& s) {
  Plan plan{s.images,
            s.out_height,
            s.out_width,
            s.outputs,
            s.height,
            s.width,
            s.inputs,
            {1, 1},
            {s.stride[0], s.stride[1]},
            s.kernel[0] * s.kernel[1],
            {}};
  for (int64_t y = 0; y < std::min(s.stride[0], s.height); ++y) {
    for (int64_t x = 0; x < std::min(s.stride[1], s.width); ++x) {
      Phase phase{
          y, x, (s.height - y + s.stride[0] - 1) / s.stride[0], (s.width - x + s.stride[1] - 1) / s.stride[1], {}};
      for (int64_t a = 0; a < s.kernel[0]; ++a) {
        for (int64_t b = 0; b < s.kernel[1]; ++b) {
          const int64_t down = y + s.padding[0] - a * s.dilation[0], right = x + s.padding[1] - b * s.dilation[1];
          if (down % s.stride[0] == 0 && right % s.stride[1] == 0) {
            phase.taps.push_back({down / s.stride[0], right / s.stride[1], a * s.kernel[1] + b});
          }
        }
      }
      plan.phases.push_back(std::move(phase));
    }
  }
  return plan;
}

// Sorts the taps by the pixels that they read, and finds which taps are adjacent.
inline void join(Phase& phase) {
  auto& taps = phase.taps;
  const auto place = [](const Tap& tap) { return std::pair(tap.row, tap.column); };
  std::sort(taps.begin(), taps.end(), [&](const Tap& a, const Tap& b) { return place(a) < place(b); });
  for (size_t i = taps.size(); i-- > 1;) {
    if (place(taps[i]) == std::pair(taps[i - 1].row, taps[i - 1].column + 1)) taps[i - 1].together += taps[i].together;
  }
}

class Images {
 public:
  explicit Images(const Plan& plan)
      : p(plan), blocks(vectors(plan.outputs, plan.inputs < 64 ? 2 : 3)), pairs((plan.inputs + 1) / 2) {
    for (Phase& phase : p.phases) {
      join(phase);
      rows = std::max(rows, phase.rows);
      for (const Tap& tap : phase.taps) {
        above = std::max(above, -tap.row);
        below = std::max(below, tap.row);
        left = std::max(left, -tap.column);
        right = std::max(right, (phase.columns - 1) * p.in_step[1] + tap.column + 1 - p.width);
      }
    }
    columns = left + p.width + right;
  }

  // Packs the weights of the plan's convolution. They are [outputs, taps, inputs], or, in the plan of the input's
  // gradient (`turned`), [inputs, taps, outputs].
  void pack(const uint16_t* weight, bool turned, uint32_t* to) const {
    for (const Block& block : blocks.list) {
      uint32_t* place = to + block.before * p.taps * pairs;
      for (const Phase& phase : p.phases) {
        for (const Tap& tap : phase.taps) {
          if (turned) {
            pack_pairs(weight + tap.kernel * p.outputs, p.inputs, p.taps * p.outputs, block, 0, 2, 1, pairs, place);
          } else {
            pack_tap(weight, tap, block, place);
          }
          place += pairs * block.pitch;
        }
      }
    }
  }

  // Computes the plan's convolution. `bias` has one number per output channel, or is null.
  template <class Parallel>
  void run(const uint16_t* input, const uint16_t* weight, bool turned, const float* bias, uint16_t* out,
           const Parallel& parallel) const {
    Lines<uint32_t> packed(blocks.pitch * p.taps * pairs);
    pack(weight, turned, packed.get());
    std::vector<float> biases(blocks.pitch, 0.0f);
    if (bias) {
      for (const Block& block : blocks.list) std::copy_n(bias + block.first, block.count, &biases[block.before]);
    }
    // The work is divided into enough parts for many threads. The input rows of a part fit into the cache of a core.
    const int64_t row = columns * 2 * pairs * 2 * p.in_step[0];
    const int64_t fitting = std::max<int64_t>(1, (192 << 10) / std::max<int64_t>(1, row));
    const int64_t spread = (p.images * rows + 15) / 16;
    const int64_t band = std::max<int64_t>(std::min<int64_t>(4, rows), std::min({rows, fitting, spread}));
    const int64_t bands = band ? (rows + band - 1) / band : 0;
    parallel(p.images * bands, [&](int64_t begin, int64_t end) {
      const int64_t held = (band - 1) * p.in_step[0] + above + below + 1;
      Lines<uint16_t> copy(held * columns * 2 * pairs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / bands, first = i % bands * band, stop = std::min(rows, first + band);
        const int64_t top = first * p.in_step[0] - above;
        take(input + image * p.height * p.width * p.inputs, top, (stop - 1) * p.in_step[0] + below + 1, copy.get());
        uint16_t* target = out + image * p.out_height * p.out_width * p.outputs;
        for (const Block& block : blocks.list) {
          const uint32_t* weights = packed.get() + block.before * p.taps * pairs;
          for (const Phase& phase : p.phases) {
            for (int64_t y = first; y < std::min(stop, phase.rows); ++y) {
              multiply(phase, block, copy.get(), top, y, weights, biases.data() + block.before, target);
            }
            weights += static_cast<int64_t>(phase.taps.size()) * pairs * block.pitch;
          }
        }
      }
    });
  }

 private:
  void pack_tap(const uint16_t* weight, const Tap& tap, const Block& block, uint32_t* to) const {
    std::memset(to, 0, pairs * block.pitch * 4);
    for (int64_t c = 0; c < block.count; ++c) {
      const uint16_t* from = weight + ((block.first + c) * p.taps + tap.kernel) * p.inputs;
      const int64_t whole = p.inputs / 2;
      for (int64_t i = 0; i < whole; ++i) std::memcpy(to + i * block.pitch + c, from + 2 * i, 4);
      if (p.inputs % 2) to[whole * block.pitch + c] = from[p.inputs - 1];
    }
  }

  // Copies the rows of [top, stop) that lie within the image. Adds zeros on both sides of a row, and one zero after the
  // channels of a pixel if their number is odd.
  void take(const uint16_t* image, int64_t top, int64_t stop, uint16_t* to) const {
    const int64_t even = 2 * pairs, line = columns * even;
    for (int64_t y = std::max<int64_t>(0, top); y < std::min(stop, p.height); ++y) {
      uint16_t* row = to + (y - top) * line;
      const uint16_t* from = image + y * p.width * p.inputs;
      std::memset(row, 0, left * even * 2);
      std::memset(row + (left + p.width) * even, 0, right * even * 2);
      row += left * even;
      if (even == p.inputs) {
        std::memcpy(row, from, p.width * even * 2);
        continue;
      }
      for (int64_t x = 0; x < p.width; ++x, row += even, from += p.inputs) {
        for (int64_t c = 0; c < p.inputs; ++c) row[c] = from[c];
        row[p.inputs] = 0;
      }
    }
  }

  // Computes one row of a phase for the channels of a block.
  void multiply(const Phase& phase, const Block& block, const uint16_t* copy, int64_t top, int64_t y,
                const uint32_t* weights, const float* bias, uint16_t* out) const {
    const int64_t even = 2 * pairs, step = p.in_step[1] * even;
    const auto kinds = tiles_of<uint16_t>(block.count);
    std::vector<Factor>& factors = scratch();
    uint16_t* line = out + ((phase.row + y * p.out_step[0]) * p.out_width + phase.column) * p.outputs + block.first;
    const int64_t parts = (phase.columns + kinds.most - 1) / kinds.most;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t x = std::min(i * kinds.most, phase.columns), count = std::min(kinds.most, phase.columns - x);
      factors.clear();
      const auto taps = static_cast<int64_t>(phase.taps.size());
      for (int64_t t = 0; t < taps; t += phase.taps[t].together) {
        const Tap& tap = phase.taps[t];
        const int64_t row = y * p.in_step[0] + tap.row, column = x * p.in_step[1] + tap.column;
        if (row < 0 || row >= p.height || column >= p.width) continue;
        if (column + tap.together - 1 + (count - 1) * p.in_step[1] < 0) continue;
        const uint16_t* pixels = copy + ((row - top) * columns + left + column) * even;
        factors.push_back({pixels, weights + t * pairs * block.pitch, pairs * tap.together});
      }
      const Target<uint16_t> to{line + x * p.out_step[1] * p.outputs, p.out_step[1] * p.outputs, block.count};
      kinds.of[count - 1](factors.data(), static_cast<int64_t>(factors.size()), step, bias, to);
    }
  }
  static std::vector<Factor>& scratch() {
    static thread_local std::vector<Factor> made;
    return made;
  }

  Plan p;
  const Blocks blocks;
  const int64_t pairs;
  int64_t rows = 0, above = 0, below = 0, left = 0, right = 0, columns = 0;
};

}  // namespace pf::cpu::convolution

#endif

// Computes the gradient of a convolution's weights. For each tap of the kernel, the gradient is a product of two
// matrices: (input channels x pixels) times (pixels x output channels). The two numbers of a pair come from neighboring
// pixels of the output.
#pragma once

#include <algorithm>
#include <cstring>

#include "convolution.h"

#if PF_HAS_PAIRS

namespace pf::cpu::convolution {

// Consecutive pairs of a row: the first pair's position in gradient and input, and the number of pairs.
struct Segment {
  int64_t gradient, input, pairs;
};
// One of the two factors of the products: its pairs, the number of channels per position (`pitch`), and the number of
// positions from one pair of the sum to the next (`step`).
struct Side {
  const uint32_t* pairs;
  int64_t pitch, step;
};

// Adds the products of all pairs of all segments to sums[B][16 V + 8 H]. V vectors of 16 channels and H vectors of 8
// channels are multiplied with B single channels. All sums remain in registers.
template <int V, int H, int B>
PF_PAIRS void weight_tile(const Side& many, const Side& single, const Segment* segments, int64_t count,
                          bool many_is_gradient, float* sums) {
  constexpr int pitch = 16 * V + 8 * H;
  __m512 wide[B][V + 1];
  __m256 narrow[B][H + 1];
  PF_UNROLL for (int b = 0; b < B; ++b) {
    PF_UNROLL for (int v = 0; v < V; ++v) wide[b][v] = _mm512_loadu_ps(sums + b * pitch + 16 * v);
    if constexpr (H > 0) narrow[b][0] = _mm256_loadu_ps(sums + b * pitch + 16 * V);
  }
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at_many = many_is_gradient ? segments[s].gradient : segments[s].input;
    const int64_t at_single = many_is_gradient ? segments[s].input : segments[s].gradient;
    const uint32_t *x = many.pairs + at_many * many.pitch, *y = single.pairs + at_single * single.pitch;
    const int64_t x_step = many.step * many.pitch, y_step = single.step * single.pitch;
    for (int64_t p = segments[s].pairs; p > 0; --p, x += x_step, y += y_step) {
      __m512i of_wide[V + 1];
      __m256i of_narrow;
      PF_UNROLL for (int v = 0; v < V; ++v) of_wide[v] = _mm512_loadu_si512(x + 16 * v);
      if constexpr (H > 0) of_narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * V));
      PF_UNROLL for (int b = 0; b < B; ++b) {
        const __m512i one = _mm512_set1_epi32(static_cast<int>(y[b]));
        PF_UNROLL for (int v = 0; v < V; ++v) {
          wide[b][v] = _mm512_dpbf16_ps(wide[b][v], (__m512bh)of_wide[v], (__m512bh)one);
        }
        if constexpr (H > 0) {
          narrow[b][0] = _mm256_dpbf16_ps(narrow[b][0], (__m256bh)of_narrow, (__m256bh)_mm512_castsi512_si256(one));
        }
      }
    }
  }
  PF_UNROLL for (int b = 0; b < B; ++b) {
    PF_UNROLL for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + b * pitch + 16 * v, wide[b][v]);
    if constexpr (H > 0) _mm256_storeu_ps(sums + b * pitch + 16 * V, narrow[b][0]);
  }
}

using WeightTile = void (*)(const Side&, const Side&, const Segment*, int64_t, bool, float*);

template <int V, int H>
WeightTile weight_tile_of(int64_t singles) {
  constexpr WeightTile made[] = {weight_tile<V, H, 1>, weight_tile<V, H, 2>, weight_tile<V, H, 3>,
                                 weight_tile<V, H, 4>, weight_tile<V, H, 5>, weight_tile<V, H, 6>,
                                 weight_tile<V, H, 7>, weight_tile<V, H, 8>};
  return made[singles - 1];
}
inline WeightTile weight_tile_of(int64_t many, int64_t singles) {
  constexpr WeightTile (*made[])(int64_t) = {weight_tile_of<0, 1>, weight_tile_of<1, 0>, weight_tile_of<1, 1>,
                                             weight_tile_of<2, 0>, weight_tile_of<2, 1>, weight_tile_of<3, 0>};
  return made[(many + 7) / 8 - 1](singles);
}

// Sums the output's gradient over all pixels, for the bias of 16 channels, beginning with channel `first`.
PF_PAIRS inline void sum_pixels(const uint16_t* gradient, int64_t pixels, int64_t channels, int64_t first, float* to) {
  const __mmask16 mask = first_of(channels - first);
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const uint16_t* at = gradient + first;
  for (int64_t i = 0; i < pixels; i += 4) {
    PF_UNROLL for (int k = 0; k < 4; ++k, at += channels) {
      const __mmask16 seen = i + k < pixels ? mask : __mmask16(0);
      sums[k] = _mm512_add_ps(sums[k], load_numbers(seen ? at : gradient, seen));
    }
  }
  _mm512_mask_storeu_ps(to + first, mask,
                        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// Consecutive output rows of one image.
struct Band {
  int64_t image, first, stop;
};

class WeightGradient {
 public:
  explicit WeightGradient(const Sizes& sizes)
      : s(sizes),
        many_is_gradient(sizes.outputs >= sizes.inputs),
        of_gradient(many_is_gradient ? vectors(s.outputs, 3) : singles(s.outputs)),
        of_input(many_is_gradient ? singles(s.inputs) : vectors(s.inputs, 3)),
        pairs((s.out_width + 1) / 2),
        // A packed row of the input has `stride` more columns than the input. If the last output pixel has no neighbor,
        // a packed row also has one more column per kernel column.
        columns(s.width + s.stride[1] + (s.out_width % 2 ? s.kernel[1] : 0)),
        taps(s.kernel[0] * s.kernel[1]) {
    const Blocks& many = many_is_gradient ? of_gradient : of_input;
    const Blocks& single = many_is_gradient ? of_input : of_gradient;
    for (const Block& m : many.list) {
      for (const Block& one : single.list) {
        tiles.push_back({m, one, total});
        total += taps * one.count * rounded_to_eights(m.count);
      }
    }
  }

  // Writes the gradient to `result` [outputs, kernel, kernel, inputs]. parallel(count, f) must call f(begin, end) for
  // parts that together cover 0 .. count - 1. Every sum adds the pixels in the same order, whichever thread computes
  // it.
  template <class Parallel>
  void run(const uint16_t* input, const uint16_t* gradient, float* result, const Parallel& parallel) const {
    const auto parts = static_cast<int64_t>(tiles.size());
    Lines<float> sums(total);
    std::memset(sums.get(), 0, total * sizeof(float));
    const std::vector<std::vector<Band>> groups = grouped();
    int64_t out_rows = 0, in_rows = 0;
    for (const auto& group : groups) {
      int64_t outs = 0, ins = 0;
      for (const Band& band : group) outs += band.stop - band.first, ins += rows_of(band).second;
      out_rows = std::max(out_rows, outs);
      in_rows = std::max(in_rows, ins);
    }
    Lines<uint32_t> left(out_rows * pairs * of_gradient.pitch), right(in_rows * columns * of_input.pitch);
    for (const auto& group : groups) {
      const auto [lefts, rights] = pack(group, input, gradient, left.get(), right.get(), parallel);
      const auto segments = segments_of(group);
      const Packed packed{left.get(), right.get(), lefts, rights};
      parallel(parts, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) add(tiles[i], packed, segments, sums.get());
      });
    }
    parallel(parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write(tiles[i], sums.get(), result);
    });
  }

 private:
  struct Tile {
    Block many, single;
    int64_t sums;
  };
  // The packed gradient and the packed input of a group of bands, and the number of positions in each of them.
  struct Packed {
    const uint32_t *gradient, *input;
    int64_t gradients, inputs;
  };

  // Returns the first input row that a band reads, and the number of input rows.
  std::pair<int64_t, int64_t> rows_of(const Band& band) const {
    const int64_t low = band.first * s.stride[0] - s.padding[0];
    const int64_t high = (band.stop - 1) * s.stride[0] - s.padding[0] + (s.kernel[0] - 1) * s.dilation[0];
    const int64_t first = std::clamp<int64_t>(low, 0, s.height), stop = std::clamp<int64_t>(high + 1, 0, s.height);
    return {first, std::max<int64_t>(0, stop - first)};
  }

  // Divides the images into bands and groups of bands, whose packed gradient and input fit into a core's cache.
  std::vector<std::vector<Band>> grouped() const {
    constexpr int64_t room = 2048 << 10;
    const int64_t out_row = pairs * of_gradient.pitch * 4, in_row = columns * of_input.pitch * 4;
    const int64_t halo = (s.kernel[0] - 1) * s.dilation[0] * in_row;
    const int64_t whole = std::max<int64_t>(4, (room - halo) / std::max<int64_t>(1, out_row + s.stride[0] * in_row));
    std::vector<std::vector<Band>> groups;
    if (whole >= s.out_height) {
      const int64_t image = s.out_height * out_row + s.height * in_row;
      const int64_t together = std::max<int64_t>(1, room / std::max<int64_t>(1, image));
      for (int64_t n = 0; n < s.images; ++n) {
        if (n % together == 0) groups.emplace_back();
        groups.back().push_back({n, 0, s.out_height});
      }
      return groups;
    }
    const int64_t parts = (s.out_height + whole - 1) / whole;
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t i = 0; i < parts; ++i) {
        groups.push_back({{n, s.out_height * i / parts, s.out_height * (i + 1) / parts}});
      }
    }
    return groups;
  }

  // Packs the gradient and the input of a group, and returns the numbers of their positions.
  template <class Parallel>
  std::pair<int64_t, int64_t> pack(const std::vector<Band>& group, const uint16_t* input, const uint16_t* gradient,
                                   uint32_t* left, uint32_t* right, const Parallel& parallel) const {
    struct Row {
      const uint16_t* from;
      int64_t position;
      bool of_gradient;
    };
    std::vector<Row> rows;
    int64_t out_rows = 0, in_rows = 0;
    for (const Band& band : group) {
      for (int64_t y = band.first; y < band.stop; ++y) {
        const int64_t row = band.image * s.out_height + y;
        rows.push_back({gradient + row * s.out_width * s.outputs, pairs * out_rows++, true});
      }
      const auto [first, count] = rows_of(band);
      for (int64_t y = first; y < first + count; ++y) {
        const int64_t row = band.image * s.height + y;
        rows.push_back({input + row * s.width * s.inputs, columns * in_rows++, false});
      }
    }
    parallel(static_cast<int64_t>(rows.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (rows[i].of_gradient) {
          pack_gradient(rows[i].from, left, rows[i].position, out_rows * pairs);
        } else {
          pack_input(rows[i].from, right, rows[i].position, in_rows * columns);
        }
      }
    });
    return {out_rows * pairs, in_rows * columns};
  }
  void pack_gradient(const uint16_t* row, uint32_t* to, int64_t position, int64_t positions) const {
    for (const Block& block : of_gradient.list) {
      uint32_t* place = to + block.before * positions + position * block.pitch;
      pack_pairs(row, s.out_width, s.outputs, block, 0, 2, 1, pairs, place);
    }
  }
  void pack_input(const uint16_t* row, uint32_t* to, int64_t position, int64_t positions) const {
    const int64_t stride = s.stride[1];
    for (const Block& block : of_input.list) {
      uint32_t* place = to + block.before * positions + position * block.pitch;
      pack_pairs(row, s.width, s.inputs, block, -stride, 1, stride, s.width + stride, place);
      if (s.out_width % 2) {
        // The last output pixel has no neighbor. The distance in its pair is larger than any row, so 0 replaces the
        // second pixel. Otherwise an infinite input pixel that no output pixel uses would be multiplied by zero, and
        // give NaN.
        place += (s.width + stride) * block.pitch;
        const int64_t last = (s.out_width - 1) * stride - s.padding[1];
        pack_pairs(row, s.width, s.inputs, block, last, s.dilation[1], int64_t{1} << 40, s.kernel[1], place);
      }
    }
  }

  // Returns the segments of each tap, for the rows and pixels of a group where the tap is inside the input.
  std::vector<std::vector<Segment>> segments_of(const std::vector<Band>& group) const {
    std::vector<std::vector<Segment>> made(taps);
    const int64_t stride = s.stride[1];
    for (int64_t a = 0; a < s.kernel[0]; ++a) {
      for (int64_t b = 0; b < s.kernel[1]; ++b) {
        const int64_t shift = b * s.dilation[1] - s.padding[1];
        const int64_t low = std::max<int64_t>(0, shift < 0 ? (-shift + stride - 1) / stride : 0);
        const int64_t high = shift < s.width ? std::min(s.out_width, (s.width - 1 - shift) / stride + 1) : 0;
        if (low >= high) continue;
        const bool alone = s.out_width % 2 && high == s.out_width;
        const int64_t first = low / 2, stop = alone ? high / 2 : (high + 1) / 2;
        int64_t out_row = 0, in_row = 0;
        for (const Band& band : group) {
          const auto [begin, count] = rows_of(band);
          for (int64_t y = band.first; y < band.stop; ++y, ++out_row) {
            const int64_t from = y * s.stride[0] + a * s.dilation[0] - s.padding[0];
            if (from < 0 || from >= s.height) continue;
            const int64_t row = (in_row + from - begin) * columns, g = out_row * pairs;
            if (first < stop) {
              made[a * s.kernel[1] + b].push_back({g + first, row + stride + 2 * first * stride + shift, stop - first});
            }
            if (alone) made[a * s.kernel[1] + b].push_back({g + pairs - 1, row + s.width + stride + b, 1});
          }
          in_row += count;
        }
      }
    }
    return made;
  }

  void add(const Tile& tile, const Packed& packed, const std::vector<std::vector<Segment>>& segments,
           float* sums) const {
    const Block& of_g = many_is_gradient ? tile.many : tile.single;
    const Block& of_x = many_is_gradient ? tile.single : tile.many;
    const Side gradient{packed.gradient + of_g.before * packed.gradients, of_g.pitch, 1};
    const Side input{packed.input + of_x.before * packed.inputs, of_x.pitch, 2 * s.stride[1]};
    const WeightTile multiply = weight_tile_of(tile.many.count, tile.single.count);
    const int64_t size = tile.single.count * rounded_to_eights(tile.many.count);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const std::vector<Segment>& list = segments[tap];
      multiply(many_is_gradient ? gradient : input, many_is_gradient ? input : gradient, list.data(),
               static_cast<int64_t>(list.size()), many_is_gradient, sums + tile.sums + tap * size);
    }
  }
  void write(const Tile& tile, const float* sums, float* result) const {
    const int64_t row = rounded_to_eights(tile.many.count), size = tile.single.count * row;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* from = sums + tile.sums + tap * size;
      for (int64_t m = 0; m < tile.many.count; ++m) {
        for (int64_t b = 0; b < tile.single.count; ++b) {
          const int64_t output = many_is_gradient ? tile.many.first + m : tile.single.first + b;
          const int64_t input = many_is_gradient ? tile.single.first + b : tile.many.first + m;
          result[(output * taps + tap) * s.inputs + input] = from[b * row + m];
        }
      }
    }
  }

  const Sizes s;
  const bool many_is_gradient;
  const Blocks of_gradient, of_input;
  const int64_t pairs, columns, taps;
  std::vector<Tile> tiles;
  int64_t total = 0;
};

}  // namespace pf::cpu::convolution

#endif

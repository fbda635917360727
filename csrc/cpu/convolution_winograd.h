// Convolutions with 3 x 3 taps and stride 1 by Winograd's algorithm F(2 x 2, 3 x 3). For each input channel and each
// output channel, an output tile of 2 x 2 pixels needs 16 products instead of 36.
//
// Y = A' [(G g G') * (B' d B)] A
//
// d is a tile of 4 x 4 input pixels, g is the kernel, Y is a tile of 2 x 2 output pixels, and * multiplies elements. A,
// B and G are the constant matrices of the algorithm, and ' is the transpose. The gradient of the weights is G' [(A Y
// A') * (B' d B)] G, summed over the tiles, where Y is a tile of the output's gradient. The factors are computed in
// float32 and then rounded to bfloat16. This extra rounding makes the errors about twice as large as those from
// rounding the images and weights alone.
//
// With dilation D, pixels at distance D form an image of their own. There are D x D such images.
#pragma once

#include <algorithm>

#include "convolution.h"

#if PF_HAS_PAIRS

namespace pf::cpu::convolution {

// The number of products of a tile.
constexpr int64_t products = 16;

// The upper left pixel of an output tile.
struct Spot {
  int64_t image, row, column;
};

// The tiles of an output, in order. `each` is the number of tiles per image.
struct Grid {
  int64_t rows, columns, dilation[2], phases[2], tiles[2], each;

  Grid(int64_t height, int64_t width, const int64_t* apart)
      : rows(height), columns(width), dilation{apart[0], apart[1]} {
    const int64_t size[2] = {height, width};
    for (int i = 0; i < 2; ++i) {
      phases[i] = std::max<int64_t>(1, std::min(apart[i], size[i]));
      tiles[i] = ((size[i] + apart[i] - 1) / apart[i] + 1) / 2;
    }
    each = phases[0] * phases[1] * tiles[0] * tiles[1];
  }
  Spot at(int64_t index) const {
    const int64_t image = index / each, inside = index % each, phase = inside / (tiles[0] * tiles[1]);
    const int64_t tile = inside % (tiles[0] * tiles[1]);
    return {image, phase / phases[1] + tile / tiles[1] * 2 * dilation[0],
            phase % phases[1] + tile % tiles[1] * 2 * dilation[1]};
  }
};

// Returns true if Winograd's algorithm is faster than a direct convolution, which omits the zeros of the border. It
// must need less than 3/4 of the products, and with few channels or fewer tiles than `least`, the products are not most
// of the work. The sizes of one image decide, so that an image has the same result in every batch.
inline bool by_tiles(const Sizes& s, int64_t least) {
  if (s.kernel[0] != 3 || s.kernel[1] != 3 || s.stride[0] != 1 || s.stride[1] != 1) return false;
  const int64_t tiles = Grid(s.out_height, s.out_width, s.dilation).each;
  if (s.inputs * s.outputs < 16 * (s.inputs + s.outputs) || tiles < least) return false;
  int64_t sums = 1;
  const int64_t out[2] = {s.out_height, s.out_width}, in[2] = {s.height, s.width};
  for (int i = 0; i < 2; ++i) {
    int64_t inside = 0;
    for (int64_t tap = 0; tap < 3; ++tap) {
      const int64_t shift = tap * s.dilation[i] - s.padding[i];
      inside += std::max<int64_t>(0, std::min(out[i], in[i] - shift) - std::max<int64_t>(0, -shift));
    }
    sums *= inside;
  }
  return 4 * products * tiles < 3 * sums;
}

using Floats = __m512[4][4];

PF_PAIRS_INLINE __m256i rounded_numbers(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Replaces d by B' d B.
PF_PAIRS_INLINE void spread_input(Floats& d) {
  PF_UNROLL for (int k = 0; k < 4; ++k) {
    const __m512 a = d[k][0], b = d[k][1], c = d[k][2], e = d[k][3];
    d[k][0] = _mm512_sub_ps(a, c);
    d[k][1] = _mm512_add_ps(b, c);
    d[k][2] = _mm512_sub_ps(c, b);
    d[k][3] = _mm512_sub_ps(b, e);
  }
  PF_UNROLL for (int l = 0; l < 4; ++l) {
    const __m512 a = d[0][l], b = d[1][l], c = d[2][l], e = d[3][l];
    d[0][l] = _mm512_sub_ps(a, c);
    d[1][l] = _mm512_add_ps(b, c);
    d[2][l] = _mm512_sub_ps(c, b);
    d[3][l] = _mm512_sub_ps(b, e);
  }
}

// The pixels of a tile: 4 x 4 of the input, or 2 x 2 of the gradient. `seen` is 0 outside the image.
struct Pixels {
  const uint16_t* from[16];
  __mmask16 seen[16];

  Pixels(const uint16_t* images, int64_t height, int64_t width, int64_t channels, const Spot& spot,
         const int64_t* padding, const int64_t* dilation, int64_t side) {
    for (int64_t i = 0; i < side * side; ++i) {
      const int64_t row = spot.row - padding[0] + i / side * dilation[0];
      const int64_t column = spot.column - padding[1] + i % side * dilation[1];
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      from[i] = inside ? images + ((spot.image * height + row) * width + column) * channels : images;
      seen[i] = inside ? 0xffff : 0;
    }
  }
  // A tile without pixels.
  explicit Pixels(const uint16_t* images) {
    std::fill_n(from, 16, images);
    std::fill_n(seen, 16, __mmask16(0));
  }
};

// Computes B' d B for 16 channels, beginning with channel `c`.
PF_PAIRS_INLINE void spread_input(const Pixels& pixels, int64_t c, __mmask16 mask, Floats& d) {
  PF_UNROLL for (int i = 0; i < 16; ++i) {
    d[i / 4][i % 4] = load_numbers(pixels.from[i] + c, static_cast<__mmask16>(mask & pixels.seen[i]));
  }
  spread_input(d);
}

// Computes A Y A' for 16 channels, beginning with channel `c`.
PF_PAIRS_INLINE void spread_gradient(const Pixels& pixels, int64_t c, __mmask16 mask, Floats& d) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 y[4], half[4][2];
  PF_UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = load_numbers(pixels.from[i] + c, static_cast<__mmask16>(mask & pixels.seen[i]));
  }
  PF_UNROLL for (int l = 0; l < 2; ++l) {
    half[0][l] = y[l];
    half[1][l] = _mm512_add_ps(y[l], y[2 + l]);
    half[2][l] = _mm512_sub_ps(y[l], y[2 + l]);
    half[3][l] = _mm512_sub_ps(zero, y[2 + l]);
  }
  PF_UNROLL for (int k = 0; k < 4; ++k) {
    d[k][0] = half[k][0];
    d[k][1] = _mm512_add_ps(half[k][0], half[k][1]);
    d[k][2] = _mm512_sub_ps(half[k][0], half[k][1]);
    d[k][3] = _mm512_sub_ps(zero, half[k][1]);
  }
}

// Computes B' d B of a tile for all channels, into to[16][plane]. Each of the 16 rows gets `pitch` numbers, a multiple
// of 16, with zeros after the channels.
PF_PAIRS inline void take_input(const Pixels& pixels, int64_t channels, int64_t pitch, int64_t plane, uint16_t* to) {
  for (int64_t c = 0; c < pitch; c += 16) {
    Floats d;
    spread_input(pixels, c, first_of(channels - c), d);
    PF_UNROLL for (int i = 0; i < 16; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * plane + c), rounded_numbers(d[i / 4][i % 4]));
    }
  }
}

// Transforms two tiles of the gradient or of the input, and writes the pairs (number of the first tile, number of the
// second tile) of all channels into to[16][plane]. Blocks begin at multiples of 8. Each block has room for `positions`
// pairs.
template <bool gradient>
PF_PAIRS void take_pairs(const Pixels& first, const Pixels& second, int64_t channels, const Blocks& blocks,
                         int64_t position, int64_t positions, uint32_t* to) {
  const int64_t plane = blocks.pitch * positions;
  size_t which = 0;
  const auto place = [&](int64_t channel) {
    while (channel >= blocks.list[which].first + blocks.list[which].count) ++which;
    const Block& block = blocks.list[which];
    return to + block.before * positions + position * block.pitch + channel - block.first;
  };
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = first_of(channels - c);
    Floats d;
    __m256i x[16];
    if constexpr (gradient) {
      spread_gradient(first, c, mask, d);
    } else {
      spread_input(first, c, mask, d);
    }
    PF_UNROLL for (int i = 0; i < 16; ++i) x[i] = rounded_numbers(d[i / 4][i % 4]);
    if constexpr (gradient) {
      spread_gradient(second, c, mask, d);
    } else {
      spread_input(second, c, mask, d);
    }
    uint32_t *low = place(c), *high = channels > c + 8 ? place(c + 8) : nullptr;
    PF_UNROLL for (int i = 0; i < 16; ++i) {
      const __m256i y = rounded_numbers(d[i / 4][i % 4]);
      store_pairs(_mm256_castsi256_si128(x[i]), _mm256_castsi256_si128(y), low + i * plane);
      if (high) store_pairs(_mm256_extracti128_si256(x[i], 1), _mm256_extracti128_si256(y, 1), high + i * plane);
    }
  }
}

// Computes G' m G for 16 channels, into to[9][16]. m are sums of the 16 products, `step` numbers apart.
PF_PAIRS inline void give_kernel(const float* sums, int64_t step, __mmask16 mask, float* to) {
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 rows[3][4];
  PF_UNROLL for (int l = 0; l < 4; ++l) {
    __m512 m[4];
    PF_UNROLL for (int k = 0; k < 4; ++k) m[k] = _mm512_maskz_loadu_ps(mask, sums + (4 * k + l) * step);
    const __m512 both = _mm512_mul_ps(half, _mm512_add_ps(m[1], m[2]));
    rows[0][l] = _mm512_add_ps(m[0], both);
    rows[1][l] = _mm512_mul_ps(half, _mm512_sub_ps(m[1], m[2]));
    rows[2][l] = _mm512_add_ps(both, m[3]);
  }
  PF_UNROLL for (int k = 0; k < 3; ++k) {
    const __m512 both = _mm512_mul_ps(half, _mm512_add_ps(rows[k][1], rows[k][2]));
    _mm512_storeu_ps(to + 48 * k, _mm512_add_ps(rows[k][0], both));
    _mm512_storeu_ps(to + 48 * k + 16, _mm512_mul_ps(half, _mm512_sub_ps(rows[k][1], rows[k][2])));
    _mm512_storeu_ps(to + 48 * k + 32, _mm512_add_ps(both, rows[k][3]));
  }
}

// Computes G g G' for 16 channels. The taps are `step` numbers apart, and are read in reverse order if `turned`.
PF_PAIRS_INLINE void spread_kernel(const uint16_t* from, int64_t step, bool turned, __mmask16 mask, Floats& u) {
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 g[3][3], rows[4][3];
  PF_UNROLL for (int k = 0; k < 3; ++k) {
    PF_UNROLL for (int l = 0; l < 3; ++l) {
      g[k][l] = load_numbers(from + (turned ? 8 - 3 * k - l : 3 * k + l) * step, mask);
    }
  }
  PF_UNROLL for (int l = 0; l < 3; ++l) {
    const __m512 outer = _mm512_add_ps(g[0][l], g[2][l]);
    rows[0][l] = g[0][l];
    rows[1][l] = _mm512_mul_ps(half, _mm512_add_ps(outer, g[1][l]));
    rows[2][l] = _mm512_mul_ps(half, _mm512_sub_ps(outer, g[1][l]));
    rows[3][l] = g[2][l];
  }
  PF_UNROLL for (int k = 0; k < 4; ++k) {
    const __m512 outer = _mm512_add_ps(rows[k][0], rows[k][2]);
    u[k][0] = rows[k][0];
    u[k][1] = _mm512_mul_ps(half, _mm512_add_ps(outer, rows[k][1]));
    u[k][2] = _mm512_mul_ps(half, _mm512_sub_ps(outer, rows[k][1]));
    u[k][3] = rows[k][2];
  }
}

// Transposes the first `count` columns of 8 x 8 numbers into rows. The rows are `pitch` numbers apart.
PF_PAIRS_INLINE void store_columns(const uint32_t (*from)[8], int64_t count, int64_t pitch, uint32_t* to) {
  __m256i x[8], y[8];
  PF_UNROLL for (int i = 0; i < 8; ++i) x[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from[i]));
  PF_UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  PF_UNROLL for (int i = 0; i < 8; i += 4) {
    PF_UNROLL for (int k = 0; k < 2; ++k) {
      x[i + 2 * k] = _mm256_unpacklo_epi64(y[i + k], y[i + 2 + k]);
      x[i + 2 * k + 1] = _mm256_unpackhi_epi64(y[i + k], y[i + 2 + k]);
    }
  }
  PF_UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  PF_UNROLL for (int i = 0; i < 8; ++i) {
    if (i < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * pitch), y[i]);
  }
}

// Computes G g G' for the weights [outputs, 9, inputs] of a convolution, and packs the results as pairs of neighboring
// input channels, into to[16][block][pair][output channels].
PF_PAIRS inline void pack_kernels(const uint16_t* weight, int64_t inputs, const Blocks& blocks, uint32_t* to) {
  const int64_t pairs = (inputs + 1) / 2, plane = blocks.pitch * pairs;
  // The results for 8 output channels and 16 input channels: [product][output channel][pair].
  alignas(32) uint32_t made[16][8][8];
  for (const Block& block : blocks.list) {
    uint32_t* place = to + block.before * pairs;
    for (int64_t o = 0; o < block.pitch; o += 8) {
      for (int64_t c = 0; c < inputs; c += 16) {
        for (int64_t k = 0; k < 8; ++k) {
          Floats u;
          const bool there = o + k < block.count;
          spread_kernel(there ? weight + (block.first + o + k) * 9 * inputs + c : weight, inputs, false,
                        there ? first_of(inputs - c) : __mmask16(0), u);
          PF_UNROLL for (int i = 0; i < 16; ++i) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(made[i][k]), rounded_numbers(u[i / 4][i % 4]));
          }
        }
        uint32_t* at = place + c / 2 * block.pitch + o;
        for (int64_t i = 0; i < 16; ++i) store_columns(made[i], pairs - c / 2, block.pitch, at + i * plane);
      }
    }
  }
}
// Does the same as pack_kernels for the convolution that computes the gradient of the input. The pairs are those of
// neighboring output channels, and the kernel is turned by 180 degrees.
PF_PAIRS inline void pack_turned_kernels(const uint16_t* weight, int64_t outputs, int64_t inputs, const Blocks& blocks,
                                         uint32_t* to) {
  const int64_t pairs = (outputs + 1) / 2, plane = blocks.pitch * pairs;
  for (const Block& block : blocks.list) {
    uint32_t* place = to + block.before * pairs;
    for (int64_t p = 0; p < pairs; ++p) {
      for (int64_t c = 0; c < block.pitch; c += 16) {
        const __mmask16 mask = first_of(block.count - c), second = 2 * p + 1 < outputs ? mask : __mmask16(0);
        const uint16_t* from = weight + 2 * p * 9 * inputs + block.first + c;
        Floats u, v;
        spread_kernel(from, inputs, true, mask, u);
        spread_kernel(second ? from + 9 * inputs : from, inputs, true, second, v);
        PF_UNROLL for (int i = 0; i < 16; ++i) {
          const __m256i x = rounded_numbers(u[i / 4][i % 4]), y = rounded_numbers(v[i / 4][i % 4]);
          uint32_t* at = place + i * plane + p * block.pitch + c;
          if (block.pitch == 8) {
            store_pairs(_mm256_castsi256_si128(x), _mm256_castsi256_si128(y), at);
          } else {
            store_pairs(x, y, at);
          }
        }
      }
    }
  }
}

// Computes A' m A of one tile plus the bias, for the channels of a block. m are the sums of the 16 products. Writes the
// pixels that lie within the output.
PF_PAIRS inline void give_output(const float* sums, int64_t plane, const Block& block, const float* bias,
                                 const Spot& spot, const Grid& grid, int64_t channels, uint16_t* out) {
  uint16_t* to[4];
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t row = spot.row + i / 2 * grid.dilation[0], column = spot.column + i % 2 * grid.dilation[1];
    const bool inside = row < grid.rows && column < grid.columns;
    const int64_t pixel = (spot.image * grid.rows + row) * grid.columns + column;
    to[i] = inside ? out + pixel * channels + block.first : nullptr;
  }
  for (int64_t c = 0; c < block.pitch; c += 16) {
    const __mmask16 mask = first_of(block.count - c), read = first_of(block.pitch - c);
    __m512 half[4][2];
    PF_UNROLL for (int k = 0; k < 4; ++k) {
      __m512 m[4];
      PF_UNROLL for (int l = 0; l < 4; ++l) m[l] = _mm512_maskz_loadu_ps(read, sums + (4 * k + l) * plane + c);
      half[k][0] = _mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]);
      half[k][1] = _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]);
    }
    const __m512 shift = _mm512_maskz_loadu_ps(read, bias + c);
    PF_UNROLL for (int l = 0; l < 2; ++l) {
      const __m512 upper = _mm512_add_ps(_mm512_add_ps(half[0][l], half[1][l]), half[2][l]);
      const __m512 lower = _mm512_sub_ps(_mm512_sub_ps(half[1][l], half[2][l]), half[3][l]);
      if (to[l]) _mm256_mask_storeu_epi16(to[l] + c, mask, rounded_numbers(_mm512_add_ps(upper, shift)));
      if (to[2 + l]) _mm256_mask_storeu_epi16(to[2 + l] + c, mask, rounded_numbers(_mm512_add_ps(lower, shift)));
    }
  }
}

}  // namespace pf::cpu::convolution

#endif

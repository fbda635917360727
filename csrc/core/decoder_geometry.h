// A decoder of transposed convolutions as matrix products, without a gather of its inputs, and how it is cut into
// blocks: every index of csrc/cuda/decode_samples.cu. decode_samples.h has the program of a block.
//
// A transposed convolution of stride s is s * s products, one for each residue of (y, x) mod s: the outputs of such a
// class see the same taps. Its gradient is one product, of stride s. With kernel W, padding p and rows numbered by y:
//
//   forward    out(y) = sum_k W[k]   in((y + p - k) / s), over the k that divide
//   gradient   out(i) = sum_k W[k]^T in(s i - p + k)
//
// The packed weights and the matrix instruction's fragments have their indices here, too.
#pragma once

#include "philox.h"

namespace pf::decoder {

// Channels of the input that are multiplied at once: two steps of the matrix instruction, 16 bytes of weights per lane.
constexpr int channel_tile = 32;
// Columns (channels of the output) and rows (pixels) of one matrix instruction: its n and its m.
constexpr int column_tile = 8, row_tile = 16;
// Row tiles that a warp computes at once.
constexpr int item_rows = 8;
// Warps of a block.
constexpr int warps = 8;
// Unused elements after every pixel in shared memory: 16 bytes, so that the rows of a fragment lie in different banks.
constexpr int pixel_gap = 8;
// Products of the longest chain.
constexpr int max_products = 12;
// A coordinate from which no tap reaches a map, and the longest side that a map may have.
constexpr int outside = -(1 << 14), largest_side = 1 << 13;
// Shared memory that the maps of a block may take. Every GPU since sm_80 has 99 KiB; the kernel needs some itself.
constexpr int shared_bytes = 98 * 1024;

PF_HD int round_up(int value, int step) { return (value + step - 1) / step * step; }
PF_HD int ceil_div(int value, int step) { return (value + step - 1) / step; }
PF_HD int least(int a, int b) { return a < b ? a : b; }
PF_HD int most(int a, int b) { return a > b ? a : b; }

// Rows lo .. hi - 1 of a map.
struct Rows {
  int lo, hi;
  PF_HD int count() const { return hi - lo; }
};

// One transposed convolution, or its gradient: the map that is read and the map that is written.
struct Product {
  int in_c, in_h, in_w, out_c, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  // out_c, padded to the next product's channel tile, or to a column tile if the output is the image
  int columns;
  // where its biases begin; the first product has none of its own, since the condition holds them, pixel by pixel
  int bias;
  // where its packed weights begin
  int64_t weights;
  // whether the output is the image
  bool image;

  PF_HD int channels() const { return round_up(in_c, channel_tile); }
  PF_HD int pitch() const { return channels() + pixel_gap; }  // elements from pixel to pixel of the map that is read
  PF_HD int64_t packed() const { return int64_t{kernel_h} * kernel_w * channels() * columns; }
};

// Where one class of outputs reads along one axis. Position i of the class is output out_step i + out_first. Its tap j
// is kernel index tap_first + tap_step j, and reads input in_step i + in_first + in_per_tap j.
struct Axis {
  int out_step, out_first, in_step, in_first, in_per_tap, tap_first, tap_step, taps;

  // The first position whose output is not before `out`.
  PF_HD int from(int out) const { return out <= out_first ? 0 : ceil_div(out - out_first, out_step); }
};

PF_HD Axis axis_of(bool gradient, int kernel, int stride, int padding, int residue) {
  if (gradient) {
    return {.out_step = 1,
            .out_first = 0,
            .in_step = stride,
            .in_first = -padding,
            .in_per_tap = 1,
            .tap_first = 0,
            .tap_step = 1,
            .taps = kernel};
  }
  const int first = (residue + padding) % stride;
  return {.out_step = stride,
          .out_first = residue,
          .in_step = 1,
          .in_first = (residue + padding - first) / stride,
          .in_per_tap = -1,
          .tap_first = first,
          .tap_step = stride,
          .taps = first < kernel ? ceil_div(kernel - first, stride) : 0};
}

// The rows that output rows `out` read, within the map.
PF_HD Rows rows_read(const Product& p, bool gradient, Rows out) {
  int lo, hi;
  if (gradient) {
    lo = p.stride_h * out.lo - p.padding_h;
    hi = p.stride_h * (out.hi - 1) - p.padding_h + p.kernel_h;
  } else {
    const int first = out.lo + p.padding_h - (p.kernel_h - 1);
    lo = first <= 0 ? 0 : ceil_div(first, p.stride_h);
    hi = (out.hi - 1 + p.padding_h) / p.stride_h + 1;
  }
  lo = most(lo, 0);
  hi = least(hi, p.in_h);
  return lo < hi ? Rows{lo, hi} : Rows{0, 0};
}

// The index of a weight in a product's packed weights [tap][channel / 32][column / 8][lane][8]: what a lane needs for
// two steps of the matrix instruction lies together.
PF_HD int64_t weight_index(const Product& p, int tap, int channel, int column) {
  const int step = channel % 32 / 16, half = channel % 16 / 8, pair = channel % 8 / 2, low = channel % 2;
  const int lane = column % 8 * 4 + pair;
  const int64_t tile =
      (int64_t{tap} * (p.channels() / channel_tile) + channel / channel_tile) * (p.columns / column_tile) +
      column / column_tile;
  return tile * (channel_tile * column_tile) + lane * 8 + step * 4 + half * 2 + low;
}

// Which element of its matrices a lane of the instruction m16n8k16 holds: PTX ISA, "Matrix Fragments for mma.m16n8k16".
PF_HD int a_row(int lane, int i) { return lane / 4 + (i / 2 % 2) * 8; }
PF_HD int a_channel(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 4) * 8; }
PF_HD int b_channel(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 2) * 8; }
PF_HD int b_column(int lane) { return lane / 4; }
PF_HD int c_row(int lane, int i) { return lane / 4 + (i / 2) * 8; }
PF_HD int c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Consecutive products that one launch computes.
struct Segment {
  // the first and the last product
  int first, last;
  // what a block computes: samples, and rows of the last product's output
  int samples, rows;
  // elements of the two buffers in shared memory: for maps 0, 2, .. of the segment, and for maps 1, 3, ..
  int buffers[2];
  // elements of a pixel of zeros, which is read for taps outside of the map
  int zeros;

  PF_HD int elements() const { return buffers[0] + buffers[1] + zeros; }
};

enum class Format : int { f32 = 0, bf16 = 1, f64 = 2 };

// Images in memory with any strides n, c, h, w; float64 on the host only.
struct Image {
  void* data;
  Format format;
  int64_t n, c, h, w;

  PF_HD int64_t at(int64_t sample, int channel, int y, int x) const {
    return sample * n + channel * c + int64_t{y} * h + int64_t{x} * w;
  }
};

// What all blocks of a launch share. On the GPU maps and weights are bfloat16 (Element), sums float (Sum).
template <class Machine>
struct Task {
  using Element = typename Machine::Element;
  using Sum = typename Machine::Sum;
  // The products of the chain and how many they are; this launch computes those of the segment.
  Product products[max_products];
  Segment segment;
  int count;
  // Whether the products are those of the gradient, from the image to the map before the first.
  bool gradient;
  // Whether the image is the sigmoid of the last map.
  bool squashed;
  // LeakyReLU's slope for negative numbers, between the products.
  Sum slope;
  // The samples of this launch. Sample n is draw n % draws of image n / draws.
  int64_t first_sample, total;
  int64_t draws;
  const Element* weights;
  const Sum* biases;
  // [images, h, w, c] of the first map: the condition's half of the first layer, with its bias.
  const Sum* condition;
  const int64_t *seed, *sample_ids;
  // [total, h, w, channels]: the map that the segment reads, unless it starts the chain, and the one that it writes,
  // unless it ends the chain.
  const Element* in;
  Element* out;
  // Gradient: the activation that product i's result is the gradient of, as forward left it.
  const Element* kept[max_products];
  // Forward: the result. Gradient: the gradient of the image.
  Image image;
  // Gradient: the image that forward computed, if it is a sigmoid.
  Image result;
  // Gradient: the result, [total, h, w, c] of the first map.
  Sum* condition_gradient;
};

template <class Machine>
struct Block {
  const Task<Machine>* task;
  // the first sample, and how many
  int64_t sample;
  int samples;
  // rows[i]: the rows of the map that product i reads which the block holds; the last are the rows of its result
  Rows rows[max_products + 1];
};

template <class Machine>
PF_HD void set_block(Block<Machine>& block, const Task<Machine>& task, int64_t index) {
  const Segment& s = task.segment;
  const int tiles = ceil_div(task.products[s.last].out_h, s.rows);
  block.task = &task;
  block.sample = index / tiles * s.samples;
  const int64_t left = task.total - block.sample;
  block.samples = left < s.samples ? static_cast<int>(left) : s.samples;
  const int tile = static_cast<int>(index % tiles);
  block.rows[s.last + 1] = {tile * s.rows, least((tile + 1) * s.rows, task.products[s.last].out_h)};
  for (int i = s.last; i >= s.first; --i) {
    block.rows[i] = rows_read(task.products[i], task.gradient, block.rows[i + 1]);
  }
}

template <class Machine>
PF_HD int64_t blocks_of(const Task<Machine>& task) {
  const Segment& s = task.segment;
  return (task.total + s.samples - 1) / s.samples * ceil_div(task.products[s.last].out_h, s.rows);
}

// Divides numbers from 0 to 2^16 - 1 by one that is not above 2^16, with a multiplication.
struct Divisor {
  int by;
  uint32_t inverse;

  PF_HD explicit Divisor(int n) : by(n), inverse(n > 1 ? 0xffffffffu / static_cast<uint32_t>(n) + 1 : 0) {}
  PF_HD int of(int n) const {
    return by > 1 ? static_cast<int>((uint64_t{inverse} * static_cast<uint32_t>(n)) >> 32) : n;
  }
};

// One class of a product's outputs, a rectangle of positions. The items of the warps are cut from it.
struct Class {
  Axis y, x;
  int first_y, first_x, height, width;

  PF_HD int positions() const { return height * width; }
};

PF_HD int classes(const Product& p, bool gradient) { return gradient ? 1 : p.stride_h * p.stride_w; }

PF_HD Class class_of(const Product& p, bool gradient, Rows out, int index) {
  // those with most taps first
  index = classes(p, gradient) - 1 - index;
  Class c;
  c.y = axis_of(gradient, p.kernel_h, p.stride_h, p.padding_h, index / p.stride_w);
  c.x = axis_of(gradient, p.kernel_w, p.stride_w, p.padding_w, index % p.stride_w);
  c.first_y = c.y.from(out.lo);
  c.first_x = 0;
  c.height = c.y.from(out.hi) - c.first_y;
  c.width = c.x.from(p.out_w);
  return c;
}

// How many column tiles a warp's item has, and how many items a class and a product's columns are cut into.
constexpr int map_columns = channel_tile / column_tile, image_columns = 1;
PF_HD int item_columns(const Product& p) { return p.image ? image_columns : map_columns; }

PF_HD int row_items(int samples, const Class& c) { return ceil_div(samples * c.positions(), row_tile * item_rows); }
PF_HD int column_items(const Product& p) { return p.columns / (column_tile * item_columns(p)); }

}  // namespace pf::decoder

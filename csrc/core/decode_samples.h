// A decoder of transposed convolutions as matrix products, without a gather of its inputs, and how it is cut into
// blocks: every index of csrc/cuda/decode_samples.cu, and the program of one of its blocks.
//
// A block decodes `samples` samples, `rows` rows of a segment's last map. The maps between stay in its shared memory,
// their borders computed again by the neighbours. A transposed convolution of stride s is s * s products, one for each
// residue of (y, x) mod s: the outputs of a class see the same taps. Its gradient is one product, of stride s.
//
//   forward    out(y) = sum_k W[k]   in((y + p - k) / s), over the k that divide
//   gradient   out(i) = sum_k W[k]^T in(s i - p + k)
//
// The program is written for a machine: the GPU's warp (csrc/cuda), or one of the host's (tests/cpp) that computes in
// float64 with the same fragments, lane by lane.
#pragma once

#include <type_traits>

#include "philox.h"

namespace pf::decoder {

constexpr int channel_tile = 32;     // of the inputs: two steps of the matrix instruction, 16 bytes of weights a lane
constexpr int column_tile = 8;       // of the outputs: the instruction's n
constexpr int row_tile = 16;         // the instruction's m
constexpr int item_rows = 8;         // row tiles of one warp's product
constexpr int warps = 8;             // of a block
constexpr int pixel_gap = 8;         // elements after a pixel: 16 bytes, so that rows of a fragment meet no bank twice
constexpr int max_products = 12;     // of a chain
constexpr int outside = -(1 << 14);  // a coordinate no tap brings into a map
constexpr int largest_side = 1 << 13;
constexpr int shared_bytes = 98 * 1024;  // of a block; every GPU since sm_80 has 99 KiB, the kernel needs some itself

PF_HD int round_up(int value, int step) { return (value + step - 1) / step * step; }
PF_HD int ceil_div(int value, int step) { return (value + step - 1) / step; }
PF_HD int least(int a, int b) { return a < b ? a : b; }
PF_HD int most(int a, int b) { return a > b ? a : b; }

// Rows lo .. hi - 1 of a map.
struct Rows {
  int lo, hi;
  PF_HD int count() const { return hi - lo; }
};

// One transposed convolution, or its gradient: the map that is read, the one that is written.
struct Product {
  int in_c, in_h, in_w, out_c, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int columns;      // out_c, padded: to the next product's channel tile, or to a column tile for an image
  int bias;         // where its biases begin; the first product's are the condition's, pixel by pixel
  int64_t weights;  // where its packed weights begin
  bool image;       // what it makes is the image

  PF_HD int channels() const { return round_up(in_c, channel_tile); }
  PF_HD int pitch() const { return channels() + pixel_gap; }  // elements from pixel to pixel of the map that is read
  PF_HD int64_t packed() const { return int64_t{kernel_h} * kernel_w * channels() * columns; }
};

// Where one class of outputs reads along one axis: position i is output out_step i + out_first, its tap j is kernel
// index tap_first + tap_step j and reads in_step i + in_first + in_per_tap j.
struct Axis {
  int out_step, out_first, in_step, in_first, in_per_tap, tap_first, tap_step, taps;

  // The first position whose output is not before `out`.
  PF_HD int from(int out) const { return out <= out_first ? 0 : ceil_div(out - out_first, out_step); }
};

PF_HD Axis axis_of(bool gradient, int kernel, int stride, int padding, int residue) {
  if (gradient) return {1, 0, stride, -padding, 1, 0, 1, kernel};
  const int first = (residue + padding) % stride;
  const int taps = first < kernel ? ceil_div(kernel - first, stride) : 0;
  return {stride, residue, 1, (residue + padding - first) / stride, -1, first, stride, taps};
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

// Of the packed weights of a product: [tap][channel / 32][column / 8][lane][8], what a lane needs for two steps of the
// matrix instruction lying together.
PF_HD int64_t weight_index(const Product& p, int tap, int channel, int column) {
  const int step = channel % 32 / 16, half = channel % 16 / 8, pair = channel % 8 / 2, low = channel % 2;
  const int lane = column % 8 * 4 + pair;
  const int64_t tile =
      (int64_t{tap} * (p.channels() / channel_tile) + channel / channel_tile) * (p.columns / column_tile) +
      column / column_tile;
  return tile * (channel_tile * column_tile) + lane * 8 + step * 4 + half * 2 + low;
}

// The matrix instruction m16n8k16, PTX ISA "Matrix Fragments for mma.m16n8k16": which element a lane holds.
PF_HD int a_row(int lane, int i) { return lane / 4 + (i / 2 % 2) * 8; }
PF_HD int a_channel(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 4) * 8; }
PF_HD int b_channel(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 2) * 8; }
PF_HD int b_column(int lane) { return lane / 4; }
PF_HD int c_row(int lane, int i) { return lane / 4 + (i / 2) * 8; }
PF_HD int c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Consecutive products that one launch computes.
struct Segment {
  int first, last;    // products, the last included
  int samples, rows;  // of a block; rows of the last product's output
  int buffers[2];     // elements of shared memory: maps 0, 2, .. and 1, 3, ..
  int zeros;          // elements of a pixel of zeros, which taps outside of the map read

  PF_HD int elements() const { return buffers[0] + buffers[1] + zeros; }
};

enum class Format : int { f32 = 0, bf16 = 1, f64 = 2 };

// An image [n, c, h, w] anywhere in memory; float64 on the host only.
struct Image {
  void* data;
  Format format;
  int64_t n, c, h, w;  // strides

  PF_HD int64_t at(int64_t sample, int channel, int y, int x) const {
    return sample * n + channel * c + int64_t{y} * h + int64_t{x} * w;
  }
};

// What all blocks of a launch share. On the GPU maps and weights are bfloat16 (Element), sums float (Sum).
template <class Machine>
struct Task {
  using Element = typename Machine::Element;
  using Sum = typename Machine::Sum;
  Product products[max_products];
  Segment segment;
  int count;                    // products
  bool gradient;                // of the products, to the map before the first
  bool squashed;                // the image is a sigmoid's
  Sum slope;                    // of LeakyReLU, between the products
  int64_t first_sample, total;  // samples of this launch; sample n is draw n % draws of image n / draws
  int64_t draws;
  const Element* weights;
  const Sum* biases;
  const Sum* condition;  // [images, h, w, c] of the first map: the condition's half and the bias
  const int64_t *seed, *sample_ids;
  const Element* in;                  // [total, h, w, channels]: the map the segment reads, not if it starts the chain
  Element* out;                       // likewise, not if it ends the chain
  const Element* kept[max_products];  // gradient: the activation where product i's result arrives, as forward left it
  Image image;                        // forward: the result; gradient: what arrives
  Image result;                       // gradient: the image that was computed, if squashed
  Sum* condition_gradient;            // [total, h, w, c] of the first map
};

template <class Machine>
struct Block {
  const Task<Machine>* task;
  int64_t sample;  // its first
  int samples;
  Rows rows[max_products + 1];  // rows[i]: of the map product i reads, that the block holds; the last is its result
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

// One class of one product: what a warp's items are cut from.
struct Class {
  Axis y, x;
  int first_y, first_x, height, width;  // positions

  PF_HD int positions() const { return height * width; }
};

PF_HD int classes(const Product& p, bool gradient) { return gradient ? 1 : p.stride_h * p.stride_w; }

PF_HD Class class_of(const Product& p, bool gradient, Rows out, int index) {
  index = classes(p, gradient) - 1 - index;  // those with most taps first
  Class c;
  c.y = axis_of(gradient, p.kernel_h, p.stride_h, p.padding_h, index / p.stride_w);
  c.x = axis_of(gradient, p.kernel_w, p.stride_w, p.padding_w, index % p.stride_w);
  c.first_y = c.y.from(out.lo);
  c.first_x = 0;
  c.height = c.y.from(out.hi) - c.first_y;
  c.width = c.x.from(p.out_w);
  return c;
}

// Column tiles of a warp's item.
constexpr int map_columns = channel_tile / column_tile, image_columns = 1;
PF_HD int item_columns(const Product& p) { return p.image ? image_columns : map_columns; }

PF_HD int row_items(int samples, const Class& c) { return ceil_div(samples * c.positions(), row_tile * item_rows); }
PF_HD int column_items(const Product& p) { return p.columns / (column_tile * item_columns(p)); }

// The product's output rows of a block, from the map in shared memory at `from`; `sink` takes what an item computed.
template <int columns, class Machine, class Sink>
PF_HD void multiply(Machine& machine, const Product& p, const Class& c, int samples, Rows in, int from, int zeros,
                    const typename Machine::Element* weights, int first_row, int first_column, Sink sink) {
  using Sum = typename Machine::Sum;
  const int rows = samples * c.positions(), pitch = p.pitch(), chunks = p.channels() / channel_tile;
  Sum sums[Machine::lanes][item_rows][columns][4] = {};
  struct Pixel {
    int row;       // of the block's map, before y is added
    int16_t y, x;  // which tap 0 reads
  };
  Pixel pixels[Machine::lanes][item_rows];
  int at[Machine::lanes][item_rows];
  machine.each([&](int lane, int slot) PF_INLINE {
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      const int row = first_row + row_tile * i + lane % row_tile, position = row % c.positions();
      const int y = position / c.width + c.first_y, x = position % c.width + c.first_x;
      pixels[slot][i] = {row / c.positions() * in.count() - in.lo, static_cast<int16_t>(c.y.in_step * y + c.y.in_first),
                         static_cast<int16_t>(row < rows ? c.x.in_step * x + c.x.in_first : outside)};
    }
  });

  struct Step {  // a tap, by its numbers along the axes, and 32 channels of it
    int y, x, chunk;
  };
  weights += weight_index(p, 0, 0, first_column);
  typename Machine::Weights now[Machine::lanes][columns], next[Machine::lanes][columns];
  const auto fetch = [&](const Step& step) PF_INLINE {
    const int y = c.y.tap_first + c.y.tap_step * step.y, x = c.x.tap_first + c.x.tap_step * step.x;
    const auto* source = weights + ((y * p.kernel_w + x) * chunks + step.chunk) * (channel_tile * p.columns);
    machine.each([&](int lane, int slot) PF_INLINE {
      PF_UNROLL
      for (int j = 0; j < columns; ++j) {
        next[slot][j] = machine.load_weights(source + j * (channel_tile * column_tile) + lane * 8);
      }
    });
  };
  Step step{c.x.taps > 0 ? 0 : c.y.taps, 0, 0};
  if (step.y < c.y.taps) fetch(step);
  PF_NO_UNROLL
  while (step.y < c.y.taps) {
    PF_UNROLL
    for (int slot = 0; slot < Machine::lanes; ++slot) {
      PF_UNROLL
      for (int j = 0; j < columns; ++j) now[slot][j] = next[slot][j];
    }
    if (step.chunk == 0) {
      machine.each([&](int lane, int slot) PF_INLINE {
        PF_UNROLL
        for (int i = 0; i < item_rows; ++i) {
          const Pixel& pixel = pixels[slot][i];
          const int y = pixel.y + c.y.in_per_tap * step.y, x = pixel.x + c.x.in_per_tap * step.x;
          const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
          const int where = inside ? from + ((pixel.row + y) * p.in_w + x) * pitch : zeros;
          at[slot][i] = where + lane / row_tile * 8;
        }
      });
    }
    const int chunk = step.chunk;
    if (++step.chunk == chunks) {
      step.chunk = 0;
      if (++step.x == c.x.taps) {
        step.x = 0;
        ++step.y;
      }
    }
    if (step.y < c.y.taps) fetch(step);  // in flight while this step is computed
    PF_UNROLL
    for (int half = 0; half < 2; ++half) {
      PF_UNROLL
      for (int i = 0; i < item_rows; ++i) {
        if (first_row + row_tile * i >= rows) continue;  // the same for all lanes
        typename Machine::Rows a[Machine::lanes];
        machine.load_rows(a, [&](int slot) PF_INLINE { return at[slot][i] + chunk * channel_tile + 16 * half; });
        PF_UNROLL
        for (int j = 0; j < columns; ++j) {
          machine.multiply([&](int slot) PF_INLINE -> Sum* { return sums[slot][i][j]; }, a,
                           [&](int slot) PF_INLINE { return now[slot][j]; }, half);
        }
      }
    }
  }

  machine.each([&](int lane, int slot) PF_INLINE {
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      PF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + row_tile * i + c_row(lane, 2 * half);
        if (row >= rows) continue;
        const int position = row % c.positions();
        const int y = c.y.out_step * (position / c.width + c.first_y) + c.y.out_first;
        const int x = c.x.out_step * (position % c.width + c.first_x) + c.x.out_first;
        const auto place = sink.place(row / c.positions(), y, x, first_column + c_column(lane, 0));
        PF_UNROLL
        for (int j = 0; j < columns; ++j) {
          sink.store(place, column_tile * j, sums[slot][i][j][2 * half], sums[slot][i][j][2 * half + 1]);
        }
      }
    }
  });
}

// Latents of the block's samples, as one pixel each: the same draws as purify_fast.ops.latents.
template <class Machine>
PF_HD void draw_latents(Machine& machine, const Block<Machine>& block, int to) {
  using Sum = typename Machine::Sum;
  const auto& task = *block.task;
  const Product& p = task.products[0];
  const int groups = p.channels() / 4;
  const Key key = key_of(*task.seed);
  machine.for_threads(block.samples * groups, [&](int i) PF_INLINE {
    const int sample = i / groups, group = i % groups;
    const int64_t n = task.first_sample + block.sample + sample;
    uint32_t words[4];
    draw_group(Distribution::normal, key, static_cast<uint32_t>(group), static_cast<uint32_t>(n % task.draws),
               static_cast<uint32_t>(task.sample_ids[n / task.draws]), static_cast<uint32_t>(Stream::latent), words);
    for (int j = 0; j < 4; ++j) {
      const int channel = 4 * group + j;
      machine.put(to + sample * p.pitch() + channel, channel < p.in_c ? bit_cast<float>(words[j]) : Sum{0});
    }
  });
}

// Rows of the map the segment reads, from memory.
template <class Machine>
PF_HD void load_map(Machine& machine, const Block<Machine>& block, int to) {
  const auto& task = *block.task;
  const Product& p = task.products[task.segment.first];
  const Rows rows = block.rows[task.segment.first];
  const int vectors = p.channels() / 8, width = p.in_w * vectors, size = rows.count() * width;
  machine.for_threads(block.samples * size, [&](int i) PF_INLINE {
    const int sample = i / size, row = i % size / width, x = i % width / vectors, vector = i % vectors;
    const int64_t pixel = ((block.sample + sample) * p.in_h + rows.lo + row) * p.in_w + x;
    machine.copy(to + ((sample * rows.count() + row) * p.in_w + x) * p.pitch() + 8 * vector,
                 task.in + pixel * p.channels() + 8 * vector);
  });
}

// What arrives at the image, through the sigmoid: the gradient of its logits.
template <class Machine>
PF_HD void load_image_gradient(Machine& machine, const Block<Machine>& block, int to) {
  const auto& task = *block.task;
  const Product& p = task.products[0];
  const Rows rows = block.rows[0];
  const int width = p.in_w * p.channels(), size = rows.count() * width;
  machine.for_threads(block.samples * size, [&](int i) PF_INLINE {
    const int sample = i / size, row = i % size / width, x = i % width / p.channels(), channel = i % p.channels();
    const int64_t n = task.first_sample + block.sample + sample;
    typename Machine::Sum value = 0;
    if (channel < p.in_c) {
      value = machine.read(task.image, task.image.at(n, channel, rows.lo + row, x));
      if (task.squashed) {
        const auto squashed = machine.read(task.result, task.result.at(n, channel, rows.lo + row, x));
        value *= squashed * (1 - squashed);
      }
    }
    machine.put(to + ((sample * rows.count() + row) * p.in_w + x) * p.pitch() + channel, value);
  });
}

// The image: adds the bias, and squashes.
template <class Machine>
struct ToImage {
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  int index;  // of the product
  int to;     // not used: nothing follows

  struct Place {
    int64_t at;
    int column;
  };

  PF_HD Place place(int sample, int y, int x, int column) const {
    const auto& task = *block.task;
    return {task.image.at(task.first_sample + block.sample + sample, column, y, x), column};
  }
  PF_HD void store(const Place& place, int offset, Sum a, Sum b) const {
    const auto& task = *block.task;
    const Product& p = task.products[index];
    const Sum both[2] = {a, b};
    PF_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (place.column + offset + i >= p.out_c) continue;
      const Sum value = both[i] + task.biases[p.bias + place.column + offset + i];
      machine.write(task.image, place.at + (offset + i) * task.image.c, task.squashed ? sigmoid(value) : value);
    }
  }
};

// Maps: forward adds the bias and bends, the gradient is scaled where forward was bent.
template <class Machine>
struct ToMap {
  using Element = typename Machine::Element;
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  int index;
  int to;  // the next map in shared memory

  struct Place {
    const Sum* bias;
    const Element* kept;
    Element* out;    // in memory, or
    int at;          // in shared memory, or
    Sum* condition;  // the condition's gradient
    int inside;      // columns from here that are no padding
  };

  PF_HD Place place(int sample, int y, int x, int column) const {
    const auto& task = *block.task;
    const Product& p = task.products[index];
    const int64_t n = block.sample + sample, in_map = int64_t{y} * p.out_w + x, size = int64_t{p.out_h} * p.out_w;
    Place place{nullptr, nullptr, nullptr, 0, nullptr, p.out_c - column};
    if (task.gradient) {
      place.kept = task.kept[index] + (n * size + in_map) * p.columns + column;
      if (index + 1 == task.count) {
        place.condition = task.condition_gradient + ((task.first_sample + n) * size + in_map) * p.out_c + column;
        return place;
      }
    } else if (index == 0) {
      place.bias = task.condition + ((task.first_sample + n) / task.draws * size + in_map) * p.out_c + column;
    } else {
      place.bias = task.biases + p.bias + column;
    }
    if (index == task.segment.last) {
      place.out = task.out + (n * size + in_map) * p.columns + column;
    } else {
      const Rows rows = block.rows[index + 1];
      place.at = to + ((sample * rows.count() + y - rows.lo) * p.out_w + x) * (p.columns + pixel_gap) + column;
    }
    return place;
  }

  PF_HD void store(const Place& place, int offset, Sum a, Sum b) const {
    const auto& task = *block.task;
    if (place.kept == nullptr) {
      a = bent(offset < place.inside ? a + place.bias[offset] : a);
      b = bent(offset + 1 < place.inside ? b + place.bias[offset + 1] : b);
    } else {
      if (!(load(place.kept[offset]) > 0)) a *= task.slope;
      if (!(load(place.kept[offset + 1]) > 0)) b *= task.slope;
      if (place.condition != nullptr) {
        if (offset < place.inside) place.condition[offset] = a;
        if (offset + 1 < place.inside) place.condition[offset + 1] = b;
        return;
      }
    }
    if (place.out != nullptr) {
      machine.write_pair(place.out + offset, a, b);
    } else {
      machine.put_pair(place.at + offset, a, b);
    }
  }

  PF_HD Sum bent(Sum value) const { return value > 0 ? value : value * block.task->slope; }
};

// All of one block, of one launch.
template <class Machine>
PF_HD void run(Machine& machine, const Block<Machine>& block) {
  const auto& task = *block.task;
  const Segment& segment = task.segment;
  const int zeros = segment.buffers[0] + segment.buffers[1];
  machine.for_threads(segment.zeros, [&](int i) PF_INLINE { machine.put(zeros + i, typename Machine::Sum{0}); });
  if (segment.first > 0) {
    load_map(machine, block, 0);
  } else if (task.gradient) {
    load_image_gradient(machine, block, 0);
  } else {
    draw_latents(machine, block, 0);
  }
  for (int index = segment.first; index <= segment.last; ++index) {
    machine.barrier();
    const Product& p = task.products[index];
    const bool odd = (index - segment.first) % 2 != 0;
    const int from = odd ? segment.buffers[0] : 0, to = odd ? 0 : segment.buffers[0];
    const auto* weights = task.weights + p.weights;
    int items = 0;
    for (int k = 0; k < classes(p, task.gradient); ++k) {
      items += row_items(block.samples, class_of(p, task.gradient, block.rows[index + 1], k)) * column_items(p);
    }
    machine.for_warps(items, [&](int item) PF_INLINE {
      Class c = class_of(p, task.gradient, block.rows[index + 1], 0);
      int before = 0;
      for (int k = 0; item - before >= row_items(block.samples, c) * column_items(p);) {
        before += row_items(block.samples, c) * column_items(p);
        c = class_of(p, task.gradient, block.rows[index + 1], ++k);
      }
      // neighbours share the weights
      const int height = row_items(block.samples, c), row = (item - before) % height, column = (item - before) / height;
      const auto go = [&](auto width, auto sink) PF_INLINE {
        constexpr int columns = decltype(width)::value;
        multiply<columns>(machine, p, c, block.samples, block.rows[index], from, zeros, weights,
                          row * row_tile * item_rows, column * columns * column_tile, sink);
      };
      if (p.image) {
        go(std::integral_constant<int, image_columns>{}, ToImage<Machine>{machine, block, index, to});
      } else {
        go(std::integral_constant<int, map_columns>{}, ToMap<Machine>{machine, block, index, to});
      }
    });
  }
}

}  // namespace pf::decoder

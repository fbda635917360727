// What a warp of csrc/cuda/decode_samples.cu multiplies at once: its sums in registers, the steps they are made of, and
// where their numbers come from. decode_samples.h has the program around it.
#pragma once

#include "decoder_geometry.h"

namespace pf::decoder {

// What one warp computes at once: item_rows tiles of rows, from `first_row` on, of one class of a product's outputs,
// and the columns from `first_column` on.
template <class Machine>
struct Item {
  const Product& product;
  const Class& outputs;
  // rows of the class in the block: its samples times the class's positions
  int rows;
  // groups of 32 channels, and elements from pixel to pixel, of the map that is read
  int chunks, pitch;
  // the map that is read: the rows that the block holds, and where it and a pixel of zeros begin in shared memory
  Rows in;
  int from, zeros;
  // the product's
  const typename Machine::Element* weights;
  int first_row, first_column;
};

// Where a row of an item reads: the row of the block's map, before y is added, and the pixel that tap 0 reads.
struct Pixel {
  int row;
  int16_t y, x;
};

// One step of the sums: a tap, by its numbers along the axes, and 32 channels of it.
struct Step {
  int y, x, chunk;
};

// An item's numbers, for each lane that the machine speaks of. On the GPU they are registers: every index is a
// constant. They are passed one by one, not in a struct: with one, the compiler takes 255 registers on sm_90 where it
// now takes 248, and spills 12 bytes on sm_100 and 20 on sm_120.
template <int columns, class Machine>
using Sums = typename Machine::Sum[Machine::lanes][item_rows][columns][4];
template <class Machine>
using Pixels = Pixel[Machine::lanes][item_rows];
template <class Machine>
using Places = int[Machine::lanes][item_rows];
template <int columns, class Machine>
using Weights = typename Machine::Weights[Machine::lanes][columns];

template <class Machine>
PF_HD void find_pixels(Machine& machine, const Item<Machine>& item, Pixels<Machine>& pixels) {
  const Class& c = item.outputs;
  const int rows = item.rows;
  const Divisor positions(c.positions()), width(c.width);
  machine.each([&](int lane, int slot) PF_INLINE {
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      const int row = item.first_row + row_tile * i + lane % row_tile, sample = positions.of(row);
      const int position = row - sample * c.positions(), line = width.of(position);
      const int y = line + c.first_y, x = position - line * c.width + c.first_x;
      pixels[slot][i] = {
          .row = sample * item.in.count() - item.in.lo,
          .y = static_cast<int16_t>(c.y.in_step * y + c.y.in_first),
          .x = static_cast<int16_t>(row < rows ? c.x.in_step * x + c.x.in_first : outside),
      };
    }
  });
}

// Loads the weights of a step; `weights` are those from the item's first column on.
template <int columns, class Machine>
PF_HD void fetch(Machine& machine, const Item<Machine>& item, const typename Machine::Element* weights,
                 const Step& step, Weights<columns, Machine>& next) {
  const Product& p = item.product;
  const Class& c = item.outputs;
  const int y = c.y.tap_first + c.y.tap_step * step.y, x = c.x.tap_first + c.x.tap_step * step.x;
  const auto* source = weights + ((y * p.kernel_w + x) * item.chunks + step.chunk) * (channel_tile * p.columns);
  machine.each([&](int lane, int slot) PF_INLINE {
    PF_UNROLL
    for (int j = 0; j < columns; ++j) {
      next[slot][j] = machine.load_weights(source + j * (channel_tile * column_tile) + lane * 8);
    }
  });
}

// Finds where in shared memory each row reads a tap: a pixel of the map, or zeros outside of it.
template <class Machine>
PF_HD void locate(Machine& machine, const Item<Machine>& item, const Pixels<Machine>& pixels, const Step& step,
                  Places<Machine>& at) {
  const Product& p = item.product;
  const Class& c = item.outputs;
  machine.each([&](int lane, int slot) PF_INLINE {
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      const Pixel& pixel = pixels[slot][i];
      const int y = pixel.y + c.y.in_per_tap * step.y, x = pixel.x + c.x.in_per_tap * step.x;
      const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
      const int where = inside ? item.from + ((pixel.row + y) * p.in_w + x) * item.pitch : item.zeros;
      at[slot][i] = where + lane / row_tile * 8;
    }
  });
}

// Adds the products of 32 channels of the current tap. Rows that the item does not have read the pixel of zeros.
template <int columns, class Machine>
PF_HD void add_products(Machine& machine, const Item<Machine>& item, const Places<Machine>& at,
                        const Weights<columns, Machine>& now, int chunk, Sums<columns, Machine>& sums) {
  PF_UNROLL
  for (int half = 0; half < 2; ++half) {
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      typename Machine::Rows a[Machine::lanes];
      machine.load_rows(a, [&](int slot) PF_INLINE { return at[slot][i] + chunk * channel_tile + 16 * half; });
      PF_UNROLL
      for (int j = 0; j < columns; ++j) {
        machine.multiply([&](int slot) PF_INLINE -> typename Machine::Sum* { return sums[slot][i][j]; }, a,
                         [&](int slot) PF_INLINE { return now[slot][j]; }, half);
      }
    }
  }
}

// All steps of an item. The weights of the next step are on their way while one is computed.
template <int columns, class Machine>
PF_HD void sum_products(Machine& machine, const Item<Machine>& item, Sums<columns, Machine>& sums) {
  const Class& c = item.outputs;
  Pixels<Machine> pixels;
  Places<Machine> at;
  Weights<columns, Machine> now, next;
  find_pixels(machine, item, pixels);
  const auto* weights = item.weights + weight_index(item.product, 0, 0, item.first_column);
  Step step{.y = c.x.taps > 0 ? 0 : c.y.taps, .x = 0, .chunk = 0};
  if (step.y < c.y.taps) fetch<columns>(machine, item, weights, step, next);
  PF_NO_UNROLL
  while (step.y < c.y.taps) {
    PF_UNROLL
    for (int slot = 0; slot < Machine::lanes; ++slot) {
      PF_UNROLL
      for (int j = 0; j < columns; ++j) now[slot][j] = next[slot][j];
    }
    if (step.chunk == 0) locate(machine, item, pixels, step, at);
    const int chunk = step.chunk;
    if (++step.chunk == item.chunks) {
      step.chunk = 0;
      if (++step.x == c.x.taps) {
        step.x = 0;
        ++step.y;
      }
    }
    if (step.y < c.y.taps) fetch<columns>(machine, item, weights, step, next);
    add_products<columns>(machine, item, at, now, chunk, sums);
  }
}

// Hands every row's sums to the sink, two neighbouring columns at a time.
template <int columns, class Machine, class Sink>
PF_HD void hand_to(Machine& machine, const Item<Machine>& item, const Sums<columns, Machine>& sums, const Sink& sink) {
  const Class& c = item.outputs;
  const int rows = item.rows;
  const Divisor positions(c.positions()), width(c.width);
  machine.each([&](int lane, int slot) PF_INLINE {
    const auto shared = sink.columns(item.first_column + c_column(lane, 0));
    PF_UNROLL
    for (int i = 0; i < item_rows; ++i) {
      PF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = item.first_row + row_tile * i + c_row(lane, 2 * half);
        if (row >= rows) continue;
        const int sample = positions.of(row), position = row - sample * c.positions(), line = width.of(position);
        const int y = c.y.out_step * (line + c.first_y) + c.y.out_first;
        const int x = c.x.out_step * (position - line * c.width + c.first_x) + c.x.out_first;
        const auto place = sink.place(shared, sample, y, x);
        PF_UNROLL
        for (int j = 0; j < columns; ++j) {
          sink.store(shared, place, j, sums[slot][i][j][2 * half], sums[slot][i][j][2 * half + 1]);
        }
      }
    }
  });
}

}  // namespace pf::decoder

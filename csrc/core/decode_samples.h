// The program of one block of csrc/cuda/decode_samples.cu: K latents per image through the decoder, or the image's
// gradient back to the condition.
//
// A block computes some samples, and some rows of a segment's last map. The maps between stay in its shared memory, in
// two buffers by turns; neighbouring blocks compute the rows at their common border twice. The weights come from
// memory, and between segments a map goes to memory.
//
//                  shared memory                                                   memory
//   forward
//     latents   -> buffer 0 --product 0--> buffer 1 --product 1--> buffer 0 .. --> map --> .. the next segment
//     map       -> buffer 0 --product i--> buffer 1 --  ..                     --> image
//   gradient
//     image's   -> buffer 0 --product 0--> buffer 1 --  ..                     --> condition's gradient
//
//   a product    sums[row, column] = sum over taps and channels of map[pixel of row, channel] weight[tap, channel,
//   column] its sink     forward: + bias, LeakyReLU (ToMap), or + bias, sigmoid (ToImage)
//                gradient: times the slope of LeakyReLU at the activation that forward kept (ToMap)
//
// The program is written for a machine: the GPU's warp (csrc/cuda), or one of the host's (tests/cpp) that computes in
// float64 with the same fragments, lane by lane.
#pragma once

#include <type_traits>

#include "decoder_item.h"

namespace pf::decoder {

// Draws the latents of the block's samples, one pixel each: the same numbers as purify_fast.ops.decode_samples.latents.
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

// Copies the rows of the map that the segment reads from memory.
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

// Loads the image's gradient and takes it through the sigmoid: the gradient of the image's logits.
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

// Where the sums of the last product go: they become the image, with their bias and through the sigmoid if the task has
// one.
template <class Machine>
struct ToImage {
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  // of the product
  int index;

  struct Place {
    int64_t at;
    int column;
  };

  PF_HD Place place(int sample, int y, int x, int column) const {
    const auto& task = *block.task;
    return {.at = task.image.at(task.first_sample + block.sample + sample, column, y, x), .column = column};
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

// Where the sums of the other products go: a map in shared memory or in memory, or the condition's gradient. Forward
// adds the bias and applies LeakyReLU; the gradient is multiplied by the slope that LeakyReLU had in forward.
template <class Machine>
struct ToMap {
  using Element = typename Machine::Element;
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  // of the product
  int index;
  // where the next map begins in shared memory
  int to;

  // For one pixel, from a column on: what is added or asked, and where the result goes.
  struct Place {
    // forward: the biases
    const Sum* bias = nullptr;
    // gradient: the activation that forward kept
    const Element* kept = nullptr;
    // the result is written to memory, to the condition's gradient, or to shared memory at `at`
    Element* out = nullptr;
    Sum* condition = nullptr;
    int at = 0;
    // how many columns from here on are no padding
    int inside;
  };

  PF_HD Place place(int sample, int y, int x, int column) const {
    const auto& task = *block.task;
    const Product& p = task.products[index];
    const int64_t n = block.sample + sample, in_map = int64_t{y} * p.out_w + x, size = int64_t{p.out_h} * p.out_w;
    Place place{.inside = p.out_c - column};
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
      a = leaky_relu(offset < place.inside ? a + place.bias[offset] : a);
      b = leaky_relu(offset + 1 < place.inside ? b + place.bias[offset + 1] : b);
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

  PF_HD Sum leaky_relu(Sum value) const { return value > 0 ? value : value * block.task->slope; }
};

// Everything that one block of a launch does.
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
      // neighbouring items read the same weights
      const int height = row_items(block.samples, c), row = (item - before) % height, column = (item - before) / height;
      const auto go = [&](auto width, auto sink) PF_INLINE {
        constexpr int columns = decltype(width)::value;
        const Item<Machine> work{.product = p,
                                 .outputs = c,
                                 .rows = block.samples * c.positions(),
                                 .chunks = p.channels() / channel_tile,
                                 .pitch = p.pitch(),
                                 .in = block.rows[index],
                                 .from = from,
                                 .zeros = zeros,
                                 .weights = weights,
                                 .first_row = row * row_tile * item_rows,
                                 .first_column = column * columns * column_tile};
        Sums<columns, Machine> sums = {};
        sum_products<columns>(machine, work, sums);
        hand_to<columns>(machine, work, sums, sink);
      };
      if (p.image) {
        go(std::integral_constant<int, image_columns>{}, ToImage<Machine>{machine, block, index});
      } else {
        go(std::integral_constant<int, map_columns>{}, ToMap<Machine>{machine, block, index, to});
      }
    });
  }
}

}  // namespace pf::decoder

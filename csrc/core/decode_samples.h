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
// one. What is the same for all of an item's pixels is found once, in `columns`.
template <class Machine>
struct ToImage {
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  // of the product
  int index;

  struct Columns {
    int first, inside;
    const Sum* bias;
    Image image;
    int64_t sample;
    bool squashed;
  };

  PF_HD Columns columns(int column) const {
    const auto& task = *block.task;
    const Product& p = task.products[index];
    return {.first = column,
            .inside = p.out_c - column,
            .bias = task.biases + p.bias + column,
            .image = task.image,
            .sample = task.first_sample + block.sample,
            .squashed = task.squashed};
  }
  PF_HD int64_t place(const Columns& columns, int sample, int y, int x) const {
    return columns.image.at(columns.sample + sample, columns.first, y, x);
  }
  PF_HD void store(const Columns& columns, int64_t at, int j, Sum a, Sum b) const {
    const Sum both[2] = {a, b};
    PF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int offset = column_tile * j + i;
      if (offset >= columns.inside) continue;
      const Sum value = both[i] + columns.bias[offset];
      machine.write(columns.image, at + offset * columns.image.c, columns.squashed ? sigmoid(value) : value);
    }
  }
};

// What a sum of the other products meets before it is stored, and where it goes.
enum class Meets { pixel_bias, bias, slope };
enum class Goes { shared, memory, condition };

// Where the sums of the other products go: a map in shared memory or in memory, or the condition's gradient. Forward
// adds the bias and applies LeakyReLU; the gradient is multiplied by the slope that LeakyReLU had in forward. The first
// product's bias is the condition, pixel by pixel.
template <class Machine, Meets meets, Goes goes>
struct ToMap {
  using Element = typename Machine::Element;
  using Sum = typename Machine::Sum;
  Machine& machine;
  const Block<Machine>& block;
  // of the product
  int index;
  // where the next map begins in shared memory
  int to;

  // For an item's columns from `first` on: what is the same for all of its pixels.
  struct Columns {
    int first;
    // how many columns from here on are no padding
    int inside;
    int width, height, padded;
    // the layer's biases
    Sum biases[2 * map_columns];
    // for the condition, the draws of an image
    const Sum* condition;
    int64_t first_sample, draws;
    // the activation that forward kept
    const Element* kept;
    Element* out;
    Sum* gradient;
    // of the block, in the result of the product
    int64_t sample;
    Rows rows;
    Sum slope;
  };
  struct Place {
    const Sum* bias = nullptr;
    const Element* kept = nullptr;
    Element* out = nullptr;
    Sum* gradient = nullptr;
    int at = 0;
  };

  PF_HD Columns columns(int column) const {
    const auto& task = *block.task;
    const Product& p = task.products[index];
    Columns all{};
    all.first = column;
    all.inside = p.out_c - column;
    all.width = p.out_w;
    all.height = p.out_h;
    all.padded = p.columns;
    all.sample = block.sample;
    all.slope = task.slope;
    if constexpr (meets == Meets::bias) {
      PF_UNROLL
      for (int j = 0; j < map_columns; ++j) {
        PF_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int offset = column_tile * j + i;
          all.biases[2 * j + i] = offset < all.inside ? task.biases[p.bias + column + offset] : Sum{0};
        }
      }
    } else if constexpr (meets == Meets::pixel_bias) {
      all.condition = task.condition + column;
      all.first_sample = task.first_sample;
      all.draws = task.draws;
    } else {
      all.kept = task.kept[index] + column;
    }
    if constexpr (goes == Goes::shared) all.rows = block.rows[index + 1];
    if constexpr (goes == Goes::memory) all.out = task.out + column;
    if constexpr (goes == Goes::condition)
      all.gradient = task.condition_gradient + column, all.first_sample = task.first_sample;
    return all;
  }

  PF_HD Place place(const Columns& all, int sample, int y, int x) const {
    const int64_t n = all.sample + sample, in_map = int64_t{y} * all.width + x, size = int64_t{all.height} * all.width;
    Place place;
    if constexpr (meets == Meets::pixel_bias) {
      const int channels = all.first + all.inside;
      place.bias = all.condition + ((all.first_sample + n) / all.draws * size + in_map) * channels;
    }
    if constexpr (meets == Meets::slope) place.kept = all.kept + (n * size + in_map) * all.padded;
    if constexpr (goes == Goes::condition) {
      place.gradient = all.gradient + ((all.first_sample + n) * size + in_map) * (all.first + all.inside);
    } else if constexpr (goes == Goes::memory) {
      place.out = all.out + (n * size + in_map) * all.padded;
    } else {
      place.at =
          to + ((sample * all.rows.count() + y - all.rows.lo) * all.width + x) * (all.padded + pixel_gap) + all.first;
    }
    return place;
  }

  PF_HD void store(const Columns& all, const Place& place, int j, Sum a, Sum b) const {
    const int offset = column_tile * j;
    if constexpr (meets == Meets::slope) {
      if (!(load(place.kept[offset]) > 0)) a *= all.slope;
      if (!(load(place.kept[offset + 1]) > 0)) b *= all.slope;
    } else if constexpr (meets == Meets::bias) {
      a = leaky_relu(all, a + all.biases[2 * j]);
      b = leaky_relu(all, b + all.biases[2 * j + 1]);
    } else {
      a = leaky_relu(all, offset < all.inside ? a + place.bias[offset] : a);
      b = leaky_relu(all, offset + 1 < all.inside ? b + place.bias[offset + 1] : b);
    }
    if constexpr (goes == Goes::condition) {
      if (offset < all.inside) place.gradient[offset] = a;
      if (offset + 1 < all.inside) place.gradient[offset + 1] = b;
    } else if constexpr (goes == Goes::memory) {
      machine.write_pair(place.out + offset, a, b);
    } else {
      machine.put_pair(place.at + offset, a, b);
    }
  }

  PF_HD static Sum leaky_relu(const Columns& all, Sum value) { return value > 0 ? value : value * all.slope; }
};

// Hands an item's sums to the sink that its product has in this launch.
template <class Machine>
PF_HD void hand_to_map(Machine& machine, const Block<Machine>& block, const Item<Machine>& work,
                       const Sums<map_columns, Machine>& sums, int index, int to) {
  const auto& task = *block.task;
  const auto go = [&](auto meets, auto goes) PF_INLINE {
    using Sink = ToMap<Machine, decltype(meets)::value, decltype(goes)::value>;
    hand_to<map_columns>(machine, work, sums, Sink{machine, block, index, to});
  };
  const auto anywhere = [&](auto meets) PF_INLINE {
    if (index == task.segment.last) {
      go(meets, std::integral_constant<Goes, Goes::memory>{});
    } else {
      go(meets, std::integral_constant<Goes, Goes::shared>{});
    }
  };
  if (!task.gradient && index == 0) {
    anywhere(std::integral_constant<Meets, Meets::pixel_bias>{});
  } else if (!task.gradient) {
    anywhere(std::integral_constant<Meets, Meets::bias>{});
  } else if (index + 1 < task.count) {
    anywhere(std::integral_constant<Meets, Meets::slope>{});
  } else {
    go(std::integral_constant<Meets, Meets::slope>{}, std::integral_constant<Goes, Goes::condition>{});
  }
}

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
      const auto go = [&](auto tiles, auto hand) PF_INLINE {
        constexpr int columns = decltype(tiles)::value;
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
        hand(work, sums);
      };
      if (p.image) {
        go(std::integral_constant<int, image_columns>{}, [&](const auto& work, const auto& sums) PF_INLINE {
          hand_to<image_columns>(machine, work, sums, ToImage<Machine>{machine, block, index});
        });
      } else {
        go(std::integral_constant<int, map_columns>{},
           [&](const auto& work, const auto& sums) PF_INLINE { hand_to_map(machine, block, work, sums, index, to); });
      }
    });
  }
}

}  // namespace pf::decoder

// Which products of a decoder share a launch, and how much of them a block takes: counted, on the host.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_samples.h"

namespace pf::decoder {

// Numbers of a decoder as the op takes them: latent size, then channels, height and width of the first map, then of
// every transposed convolution channels, kernel, stride, padding, height and width.
constexpr int head_numbers = 4, layer_numbers = 6;

// The gradient's products for those of a decoder, whose packed weights end at `weights`: the last first. It leaves out
// the first product of the decoder, since no gradient of the latents is wanted.
inline std::vector<Product> gradient_of(const std::vector<Product>& forward, int64_t weights) {
  std::vector<Product> backward;
  for (auto p = forward.rbegin(); p + 1 != forward.rend(); ++p) {
    Product back = *p;
    back.in_c = p->out_c, back.in_h = p->out_h, back.in_w = p->out_w;
    back.out_c = p->in_c, back.out_h = p->in_h, back.out_w = p->in_w;
    back.columns = round_up(back.out_c, channel_tile);
    back.weights = weights;
    back.image = false;
    weights += back.packed();
    backward.push_back(back);
  }
  return backward;
}

// The products of the decoder in the order they are computed, or those of its gradient. The first product of a decoder
// makes the first map of the latents: a transposed convolution of one pixel, whose stride is its kernel. The packed
// weights hold the decoder's products, then the gradient's.
inline std::vector<Product> chain_of(const std::vector<int64_t>& numbers, bool gradient) {
  const auto whole = static_cast<int64_t>(numbers.size()) - head_numbers;
  if (whole < layer_numbers || whole % layer_numbers != 0 || whole / layer_numbers + 1 > max_products) {
    throw std::runtime_error("decode_samples: geometry must have 4 + 6 n numbers, 1 <= n < " +
                             std::to_string(max_products) + ", got " + std::to_string(numbers.size()));
  }
  std::vector<Product> forward;
  const auto number = [&](int64_t i) { return static_cast<int>(numbers[i]); };
  int c = number(1), h = number(2), w = number(3), bias = 0;
  const Product first{.in_c = number(0),
                      .in_h = 1,
                      .in_w = 1,
                      .out_c = c,
                      .out_h = h,
                      .out_w = w,
                      .kernel_h = h,
                      .kernel_w = w,
                      .stride_h = h,
                      .stride_w = w,
                      .padding_h = 0,
                      .padding_w = 0,
                      .columns = round_up(c, channel_tile),
                      .bias = 0,
                      .weights = 0,
                      .image = false};
  int64_t weights = first.packed();
  forward.push_back(first);
  for (int64_t i = head_numbers; i < static_cast<int64_t>(numbers.size()); i += layer_numbers) {
    const bool image = i + layer_numbers == static_cast<int64_t>(numbers.size());
    const Product p{.in_c = c,
                    .in_h = h,
                    .in_w = w,
                    .out_c = number(i),
                    .out_h = number(i + 4),
                    .out_w = number(i + 5),
                    .kernel_h = number(i + 1),
                    .kernel_w = number(i + 1),
                    .stride_h = number(i + 2),
                    .stride_w = number(i + 2),
                    .padding_h = number(i + 3),
                    .padding_w = number(i + 3),
                    .columns = round_up(number(i), image ? column_tile : channel_tile),
                    .bias = bias,
                    .weights = weights,
                    .image = image};
    if (p.out_h > largest_side || p.out_w > largest_side || p.kernel_h > largest_side) {
      throw std::runtime_error("decode_samples: maps and kernels may have " + std::to_string(largest_side) +
                               " pixels a side, got " + std::to_string(most(most(p.out_h, p.out_w), p.kernel_h)));
    }
    bias += p.columns;
    weights += p.packed();
    forward.push_back(p);
    c = p.out_c, h = p.out_h, w = p.out_w;
  }
  return gradient ? gradient_of(forward, weights) : forward;
}

// Sizes of a segment's buffers: of its largest block.
inline Segment segment_of(const std::vector<Product>& chain, bool gradient, int first, int last, int samples,
                          int rows) {
  Segment s{.first = first, .last = last, .samples = samples, .rows = rows, .buffers = {0, 0}, .zeros = 0};
  for (int lo = 0; lo < chain[last].out_h; lo += rows) {
    Rows out{lo, least(lo + rows, chain[last].out_h)};
    for (int i = last; i >= first; --i) {
      out = rows_read(chain[i], gradient, out);
      int& buffer = s.buffers[(i - first) % 2];
      const int64_t needed = int64_t{samples} * out.count() * chain[i].in_w * chain[i].pitch();
      // what does not fit in an int counts as shared_bytes elements, which is too large already
      buffer = most(buffer, needed < shared_bytes ? static_cast<int>(needed) : shared_bytes);
    }
  }
  for (int i = first; i <= last; ++i) s.zeros = most(s.zeros, chain[i].pitch());
  return s;
}

// What a multiprocessor does in a cycle: about two thirds of the rate of mma.sync, of its share of the level-2 cache's
// rate, and of its share of the memory's. These are counted for Hopper, not measured; they weigh plans against each
// other.
constexpr double products_per_cycle = 700, cached_bytes_per_cycle = 40, memory_bytes_per_cycle = 16;

// Cycles of a segment for `total` samples.
inline double cycles_of(const std::vector<Product>& chain, bool gradient, const Segment& s, int64_t total,
                        int processors) {
  const auto& begin = chain[s.first];
  const auto& end = chain[s.last];
  double slowest = 0;
  Rows out{0, least(s.rows, end.out_h)};
  const int tiles = ceil_div(end.out_h, s.rows);
  // if there is one, a block away from the border
  if (tiles > 2) out = {s.rows, 2 * s.rows};
  double block = 0, weights = 0;
  for (int i = s.last; i >= s.first; --i) {
    const Product& p = chain[i];
    double work = 0;
    slowest = 0;
    for (int k = 0; k < classes(p, gradient); ++k) {
      const Class c = class_of(p, gradient, out, k);
      const int rows = s.samples * c.positions();
      const double step = double{1} * c.y.taps * c.x.taps * p.channels();
      const double item = step * least(round_up(rows, row_tile), row_tile * item_rows) * item_columns(p) * column_tile;
      slowest = slowest < item ? item : slowest;
      work += step * round_up(rows, row_tile) * p.columns;
    }
    const double share = work / warps;
    block += (share < slowest ? slowest : share) * warps;
    weights += 2.0 * static_cast<double>(p.packed());
    out = rows_read(p, gradient, out);
  }
  // bytes of the maps between segments
  double memory = 0;
  if (s.first > 0) memory += 2.0 * s.samples * out.count() * begin.in_w * begin.channels();
  if (s.last + 1 < static_cast<int>(chain.size())) memory += 2.0 * s.samples * s.rows * end.out_w * end.columns;
  const double compute = block / products_per_cycle, cached = weights / cached_bytes_per_cycle;
  const int64_t blocks = (total + s.samples - 1) / s.samples * tiles;
  const double waves = static_cast<double>((blocks + processors - 1) / processors);
  return waves * ((compute < cached ? cached : compute) + memory / memory_bytes_per_cycle);
}

// The segments that take the fewest cycles for `total` samples. With `alone` every product is a launch of its own, and
// every map goes to memory.
inline std::vector<Segment> plan_of(const std::vector<Product>& chain, bool gradient, int64_t total, int processors,
                                    bool alone) {
  const int count = static_cast<int>(chain.size());
  std::vector<double> least_cycles(count + 1, std::numeric_limits<double>::infinity());
  std::vector<Segment> chosen(count + 1);
  least_cycles[0] = 0;
  for (int last = 0; last < count; ++last) {
    for (int first = alone ? last : 0; first <= last; ++first) {
      for (int tiles = 1; tiles <= chain[last].out_h; ++tiles) {
        const int rows = ceil_div(chain[last].out_h, tiles);
        if (tiles > 1 && rows == ceil_div(chain[last].out_h, tiles - 1)) continue;
        for (int samples = 1; samples <= 32 && samples <= total; ++samples) {
          const Segment s = segment_of(chain, gradient, first, last, samples, rows);
          if (s.elements() * 2 > shared_bytes) break;
          const double cycles = least_cycles[first] + cycles_of(chain, gradient, s, total, processors);
          if (cycles < least_cycles[last + 1]) {
            least_cycles[last + 1] = cycles;
            chosen[last + 1] = s;
          }
        }
      }
    }
    if (!(least_cycles[last + 1] < std::numeric_limits<double>::infinity())) {
      throw std::runtime_error("decode_samples: one row of product " + std::to_string(last) + " needs more than " +
                               std::to_string(shared_bytes) + " bytes of shared memory");
    }
  }
  std::vector<Segment> plan;
  for (int end = count; end > 0; end = chosen[end].first) plan.insert(plan.begin(), chosen[end]);
  return plan;
}

// The maps that a plan leaves in memory, in elements of one sample: where the result of product i begins (-1 if it
// stays in shared memory), and as a last entry how many elements they are together.
inline std::vector<int64_t> maps_of(const std::vector<Product>& chain, const std::vector<Segment>& plan) {
  std::vector<int64_t> places(chain.size(), -1);
  int64_t sum = 0;
  for (const Segment& s : plan) {
    if (s.last + 1 == static_cast<int>(chain.size())) continue;
    places[s.last] = sum;
    sum += int64_t{chain[s.last].out_h} * chain[s.last].out_w * chain[s.last].columns;
  }
  places.push_back(sum);
  return places;
}

// Launches the segments of a plan, one after the other; `size` samples have room in `maps`.
template <class Machine, class Launch>
void follow(Task<Machine> task, const std::vector<Product>& chain, const std::vector<Segment>& plan,
            typename Machine::Element* maps, int64_t size, Launch launch) {
  const std::vector<int64_t> places = maps_of(chain, plan);
  task.count = static_cast<int>(chain.size());
  for (int i = 0; i < task.count; ++i) task.products[i] = chain[i];
  for (const Segment& s : plan) {
    task.segment = s;
    task.in = s.first == 0 ? nullptr : maps + places[s.first - 1] * size;
    task.out = s.last + 1 == task.count ? nullptr : maps + places[s.last] * size;
    launch(task);
  }
}

// Decodes task.total samples, or takes the image's gradient back to the condition. It works on as many samples at a
// time as leave at most `workspace` bytes of maps between the launches. For the gradient, forward is computed again
// first: nothing was stored.
//   plan(chain, gradient, samples, alone) -> segments; allocate(elements) -> memory; launch(task) -> one kernel
template <class Machine, class Plan, class Allocate, class Launch>
void decode(Task<Machine> task, const std::vector<int64_t>& numbers, int64_t workspace, Plan plan, Allocate allocate,
            Launch launch) {
  using Element = typename Machine::Element;
  const bool gradient = task.gradient;
  std::vector<Product> forward = chain_of(numbers, false), backward;
  if (gradient) backward = chain_of(numbers, true);
  // As few chunks of equal size as there is room for. The maps that a plan leaves in memory decide, and the plan
  // depends on the size: fewer and fewer samples are tried.
  int64_t chunk = task.total;
  std::vector<Segment> first, second;
  std::vector<int64_t> kept, passed;
  for (int64_t chunks = 1;;) {
    chunk = (task.total + chunks - 1) / chunks;
    first = plan(forward, false, chunk, gradient);
    if (gradient) second = plan(backward, true, chunk, false);
    kept = maps_of(forward, first);
    passed = gradient ? maps_of(backward, second) : std::vector<int64_t>{0};
    const int64_t bytes = (kept.back() + passed.back()) * static_cast<int64_t>(sizeof(Element));
    if (chunk <= 1 || chunk * bytes <= workspace) break;
    const int64_t needed = workspace < bytes ? task.total : (task.total + workspace / bytes - 1) / (workspace / bytes);
    chunks = needed > chunks ? needed : chunks + 1;
  }
  Element* maps = allocate(chunk * (kept.back() + (gradient ? passed.back() : 0)));
  const int64_t begin = task.first_sample, end = begin + task.total;
  for (int64_t n = begin; n < end; n += chunk) {
    task.first_sample = n;
    task.total = end - n < chunk ? end - n : chunk;
    task.gradient = false;
    std::vector<Segment> computed = first;
    // for the gradient the image itself is not needed
    if (gradient) computed.pop_back();
    follow(task, forward, computed, maps, chunk, launch);
    if (!gradient) continue;
    task.gradient = true;
    for (size_t i = 0; i < backward.size(); ++i) task.kept[i] = maps + kept[backward.size() - 1 - i] * chunk;
    follow(task, backward, second, maps + kept.back() * chunk, chunk, launch);
  }
}

}  // namespace pf::decoder

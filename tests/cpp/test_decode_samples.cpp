// The arithmetic of the decoder's tiles; tests/test_core_decoder.py compares what it computes with PyTorch.
#include <set>
#include <tuple>

#include "check.h"
#include "core/decoder_plan.h"

using namespace pf::decoder;

namespace {

const std::vector<int64_t> cifar{128, 256, 3, 3,  256, 3,  2, 1, 5, 5,  128, 3, 2, 1, 9, 9,  64,
                                 3,   2,   1, 17, 17,  32, 3, 2, 1, 33, 33,  3, 2, 1, 1, 32, 32};
const std::vector<int64_t> tiny{192, 256, 4, 4,  256, 3,  2, 1, 8, 8,  128, 3, 2, 1, 16, 16, 64,
                                3,   2,   1, 32, 32,  32, 3, 2, 1, 64, 64,  3, 3, 1, 1,  64, 64};
const std::vector<int64_t> imagenet{64,  256, 4,  4, 256, 3,  2,   1,   7, 7, 256, 3,  2,   1,  14, 14,
                                    256, 3,   2,  1, 28,  28, 128, 3,   2, 1, 56,  56, 64,  3,  2,  1,
                                    112, 112, 32, 3, 2,   1,  224, 224, 3, 3, 1,   1,  224, 224};
const std::vector<int64_t> odd{7, 40, 2, 3, 96, 2, 3, 0, 5, 8, 5, 5, 1, 2, 5, 8};

// Every output is in one class once, and reads what the definition says.
void classes_cover(const Product& p, bool gradient) {
  std::set<std::pair<int, int>> outputs;
  size_t count = 0, taps = 0, wanted = 0;
  const Rows all{0, p.out_h};
  for (int k = 0; k < classes(p, gradient); ++k) {
    const Class c = class_of(p, gradient, all, k);
    for (int i = 0; i < c.positions(); ++i) {
      const int py = i / c.width + c.first_y, px = i % c.width + c.first_x;
      const int y = c.y.out_step * py + c.y.out_first, x = c.x.out_step * px + c.x.out_first;
      CHECK(y >= 0 && y < p.out_h && x >= 0 && x < p.out_w);
      outputs.insert({y, x});
      ++count;
      for (int j = 0; j < c.y.taps; ++j) {
        const int from = c.y.in_step * py + c.y.in_first + c.y.in_per_tap * j, tap = c.y.tap_first + c.y.tap_step * j;
        CHECK(tap >= 0 && tap < p.kernel_h);
        CHECK(gradient ? from == y * p.stride_h - p.padding_h + tap : from * p.stride_h == y + p.padding_h - tap);
        if (x == 0 && from >= 0 && from < p.in_h) {
          ++taps;
          const Rows read = rows_read(p, gradient, {y, y + 1});
          CHECK(read.lo <= from && from < read.hi);
        }
      }
    }
  }
  CHECK(count == outputs.size() && count == static_cast<size_t>(p.out_h) * p.out_w);
  for (int y = 0; y < p.out_h; ++y) {
    for (int tap = 0; tap < p.kernel_h; ++tap) {
      const int up = y + p.padding_h - tap, down = y * p.stride_h - p.padding_h + tap;
      if (gradient ? down >= 0 && down < p.in_h : up >= 0 && up % p.stride_h == 0 && up / p.stride_h < p.in_h) ++wanted;
    }
  }
  CHECK(taps == wanted);
}

// Every weight has a place of its own, and a product's end is the next one's beginning.
void weights_fill(const std::vector<int64_t>& numbers) {
  int64_t end = 0;
  for (bool gradient : {false, true}) {
    for (const Product& p : chain_of(numbers, gradient)) {
      CHECK(p.weights == end && p.columns % column_tile == 0 && (p.image || p.columns % channel_tile == 0));
      end += p.packed();
      std::vector<bool> taken(p.packed());
      for (int tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
        for (int channel = 0; channel < p.channels(); ++channel) {
          for (int column = 0; column < p.columns; ++column) {
            const int64_t at = weight_index(p, tap, channel, column);
            CHECK(at >= 0 && at < p.packed() && !taken[at]);
            taken[at] = true;
          }
        }
      }
    }
  }
}

// The rows a block holds are those its last rows need, whatever the tile, and fit.
void plans_fit(const std::vector<int64_t>& numbers) {
  for (bool gradient : {false, true}) {
    const auto chain = chain_of(numbers, gradient);
    for (int64_t total : {1, 7, 64, 513, 4096, 100000}) {
      for (int processors : {1, 20, 132}) {
        int next = 0;
        for (const Segment& s : plan_of(chain, gradient, total, processors, false)) {
          CHECK(s.first == next && s.last >= s.first && s.rows >= 1 && s.samples >= 1 && s.samples <= total);
          CHECK(2 * s.elements() <= shared_bytes && s.buffers[0] % 8 == 0 && s.buffers[1] % 8 == 0);
          next = s.last + 1;
          for (int lo = 0; lo < chain[s.last].out_h; lo += s.rows) {
            Rows rows{lo, least(lo + s.rows, chain[s.last].out_h)};
            for (int i = s.last; i >= s.first; --i) {
              rows = rows_read(chain[i], gradient, rows);
              CHECK(s.samples * rows.count() * chain[i].in_w * chain[i].pitch() <= s.buffers[(i - s.first) % 2]);
            }
          }
        }
        CHECK(next == static_cast<int>(chain.size()));
      }
    }
  }
}

}  // namespace

int main() {
  for (const auto& numbers : {cifar, tiny, odd}) {
    for (bool gradient : {false, true}) {
      for (const Product& p : chain_of(numbers, gradient)) classes_cover(p, gradient);
    }
    weights_fill(numbers);
    plans_fit(numbers);
  }
  plans_fit(imagenet);
  const auto chain = chain_of(cifar, false);
  CHECK(chain.size() == 6 && chain[0].kernel_h == 3 && chain[0].stride_w == 3 && chain[5].columns == 8);
  CHECK(chain_of(cifar, true).size() == 5 && chain_of(cifar, true)[0].in_c == 3 && chain_of(cifar, true)[4].out_h == 3);

  // the fragments of one matrix instruction hold every element once
  std::set<std::pair<int, int>> a, b, c;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) a.insert({a_row(lane, i), a_channel(lane, i)});
    for (int i = 0; i < 4; ++i) b.insert({b_channel(lane, i), b_column(lane)});
    for (int i = 0; i < 4; ++i) c.insert({c_row(lane, i), c_column(lane, i)});
  }
  CHECK(a.size() == 256 && b.size() == 128 && c.size() == 128);
  CHECK(a.rbegin()->first == 15 && b.rbegin()->first == 15 && c.rbegin()->second <= 7);
  return failures > 0;
}

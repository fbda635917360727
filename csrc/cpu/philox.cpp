// Without fused multiply-adds the normals have the same bits on every CPU and GPU.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "philox.h"

#include <algorithm>
#include <cstring>

namespace pf::cpu {
namespace {

constexpr int lanes = 64;  // counters computed at once

PF_CLONES void fill_block(Distribution kind, Key key, const uint32_t* group, const uint32_t* draw,
                          const uint32_t* sample, uint32_t stream, uint32_t* out) {
  uint32_t w[4][lanes];
  for (int i = 0; i < lanes; ++i) {
    uint64_t c0 = group[i], c1 = draw[i], c2 = sample[i], c3 = stream;
    pf::philox(key, c0, c1, c2, c3);
    w[0][i] = static_cast<uint32_t>(c0);
    w[1][i] = static_cast<uint32_t>(c1);
    w[2][i] = static_cast<uint32_t>(c2);
    w[3][i] = static_cast<uint32_t>(c3);
  }
  if (kind == Distribution::normal) {
    for (int pair = 0; pair < 4; pair += 2) {
      for (int i = 0; i < lanes; ++i) {
        float first, second;
        normal_pair(w[pair][i], w[pair + 1][i], first, second);
        w[pair][i] = bit_cast<uint32_t>(first);
        w[pair + 1][i] = bit_cast<uint32_t>(second);
      }
    }
  } else if (kind == Distribution::uniform) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < lanes; ++i) w[j][i] = bit_cast<uint32_t>(uniform(w[j][i]));
    }
  }
  for (int i = 0; i < lanes; ++i) {
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w[j][i];
  }
}

// group_of(i) is the i-th of `count` groups.
template <class F>
void fill(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, F group_of, int64_t count,
          uint32_t* out) {
  uint32_t c0[lanes] = {}, c1[lanes], c2[lanes];
  std::fill_n(c1, lanes, draw);
  std::fill_n(c2, lanes, sample);
  for (int64_t start = 0; start < count; start += lanes) {
    const int64_t some = std::min<int64_t>(lanes, count - start);
    for (int64_t i = 0; i < some; ++i) c0[i] = group_of(start + i);
    if (some == lanes) {
      fill_block(kind, key, c0, c1, c2, static_cast<uint32_t>(stream), out + 4 * start);
    } else {
      uint32_t block[4 * lanes];
      fill_block(kind, key, c0, c1, c2, static_cast<uint32_t>(stream), block);
      std::memcpy(out + 4 * start, block, 4 * some * sizeof(uint32_t));
    }
  }
}

}  // namespace

void fill_groups(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, int64_t first,
                 int64_t count, uint32_t* out) {
  fill(kind, key, draw, sample, stream, [=](int64_t i) { return static_cast<uint32_t>(first + i); }, count, out);
}
void fill_these(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, const uint32_t* groups,
                int64_t count, uint32_t* out) {
  fill(kind, key, draw, sample, stream, [=](int64_t i) { return groups[i]; }, count, out);
}

void fill_rows(Distribution kind, const Rows& rows, int64_t begin, int64_t end, int64_t numel, uint32_t* out) {
  const int64_t groups = (numel + 3) / 4, last = (end - begin) * groups;
  int64_t row = begin, group = 0;
  // a row's end inside a block costs nothing: the counters of the next row follow
  for (int64_t start = 0; start < last; start += lanes) {
    uint32_t c0[lanes] = {}, c1[lanes] = {}, c2[lanes] = {};
    const int count = static_cast<int>(last - start < lanes ? last - start : lanes);
    int64_t first_row = row, first_group = group;
    for (int i = 0; i < count;) {
      const int64_t left = groups - group;
      const int run = static_cast<int>(left < count - i ? left : count - i);
      const uint32_t draw = static_cast<uint32_t>(rows.first_draw + row % rows.draws);
      const uint32_t sample = static_cast<uint32_t>(rows.sample_ids[row / rows.draws]);
      for (int j = 0; j < run; ++j, ++i) {
        c0[i] = static_cast<uint32_t>(group + j);
        c1[i] = draw;
        c2[i] = sample;
      }
      group += run;
      if (group == groups) {
        group = 0;
        ++row;
      }
    }
    if (numel % 4 == 0 && count == lanes) {
      fill_block(kind, rows.key, c0, c1, c2, rows.stream, out + 4 * start);
      continue;
    }
    uint32_t block[4 * lanes];
    fill_block(kind, rows.key, c0, c1, c2, rows.stream, block);
    for (int i = 0; i < count;) {
      const int64_t left = groups - first_group;
      const int run = static_cast<int>(left < count - i ? left : count - i);
      const int64_t element = 4 * first_group;
      const int64_t size = 4 * run < numel - element ? 4 * run : numel - element;
      std::memcpy(out + (first_row - begin) * numel + element, block + 4 * i, size * sizeof(uint32_t));
      i += run;
      first_group += run;
      if (first_group == groups) {
        first_group = 0;
        ++first_row;
      }
    }
  }
}

namespace {

Tensor philox(Tensor seed, Tensor sample_ids, int64_t numel, int64_t stream, int64_t distribution, int64_t draws,
              int64_t first_draw) {
  const Tensor ids = dense(sample_ids);
  const auto kind = static_cast<Distribution>(distribution);
  Tensor out =
      new_tensor({ids.numel(), draws, numel}, kind == Distribution::bits ? ScalarType::Int : ScalarType::Float);
  const Rows rows{key_of(*data<int64_t>(seed)), data<int64_t>(ids), draws, first_draw, static_cast<uint32_t>(stream)};
  uint32_t* to = writable<uint32_t>(out);
  parallel_rows(ids.numel() * draws, 4 * numel,
                [&](int64_t begin, int64_t end) { fill_rows(kind, rows, begin, end, numel, to + begin * numel); });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("philox", TORCH_BOX(&pf::cpu::philox)); }

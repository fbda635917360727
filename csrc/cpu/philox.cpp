// Without fused multiply-adds, the normal numbers have the same bits on every CPU.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "philox.h"

#include <algorithm>
#include <cstring>

// Philox needs products of 32 bits by 32 bits, with 64-bit results. AVX-512 has an instruction for them, but compilers
// do not use it for the portable loop, which multiplies 64 bits by 64 bits. Both versions give the same bits.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define PF_PORTABLE __attribute__((target("default")))
#define PF_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define PF_PORTABLE
#endif

namespace pf::cpu {
namespace {

// The number of counters that are computed together.
constexpr int lanes = 64;

// Computes the four words of every counter.
PF_PORTABLE void fill_words(Key key, const uint32_t* group, const uint32_t* draw, const uint32_t* sample,
                            uint32_t stream, uint32_t (*w)[lanes]) {
  for (int i = 0; i < lanes; ++i) {
    uint64_t c0 = group[i], c1 = draw[i], c2 = sample[i], c3 = stream;
    pf::philox(key, c0, c1, c2, c3);
    w[0][i] = static_cast<uint32_t>(c0);
    w[1][i] = static_cast<uint32_t>(c1);
    w[2][i] = static_cast<uint32_t>(c2);
    w[3][i] = static_cast<uint32_t>(c3);
  }
}
// Does the same as `fill_words` for counters that differ only in their group. The groups are group, group + 1, ...
PF_PORTABLE void fill_next(Key key, uint32_t group, uint32_t draw, uint32_t sample, uint32_t stream,
                           uint32_t (*w)[lanes]) {
  uint32_t c0[lanes], c1[lanes], c2[lanes];
  for (int i = 0; i < lanes; ++i) c0[i] = group + static_cast<uint32_t>(i), c1[i] = draw, c2[i] = sample;
  fill_words(key, c0, c1, c2, stream, w);
}
#if defined(PF_AVX512)
// The number of registers whose rounds are interleaved.
constexpr int together = 4;
// Computes the words of 32 counters, eight per register, in the lower halves of lanes. The upper halves are arbitrary.
PF_AVX512 inline void rounds(Key key, __m512i (&c)[4][together], uint32_t (*w)[lanes], int at) {
  const __m512i first = _mm512_set1_epi64(0xD2511F53), second = _mm512_set1_epi64(0xCD9E8D57);
  for (int round = 0; round < 10; ++round, key.low += 0x9E3779B9u, key.high += 0xBB67AE85u) {
    const __m512i low = _mm512_set1_epi64(key.low), high = _mm512_set1_epi64(key.high);
    for (int j = 0; j < together; ++j) {
      // The truth table of a ^ b ^ c.
      constexpr int all_three = 0x96;
      const __m512i p0 = _mm512_mul_epu32(c[0][j], first), p1 = _mm512_mul_epu32(c[2][j], second);
      c[0][j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[1][j], low, all_three);
      c[2][j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[3][j], high, all_three);
      c[1][j] = p1;
      c[3][j] = p0;
    }
  }
  for (int word = 0; word < 4; ++word) {
    for (int j = 0; j < together; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w[word] + at + 8 * j), _mm512_cvtepi64_epi32(c[word][j]));
    }
  }
}
PF_AVX512 void fill_words(Key key, const uint32_t* group, const uint32_t* draw, const uint32_t* sample, uint32_t stream,
                          uint32_t (*w)[lanes]) {
  const auto eight = [](const uint32_t* from) __attribute__((target("arch=x86-64-v4"))) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  for (int i = 0; i < lanes; i += 8 * together) {
    __m512i c[4][together];
    for (int j = 0; j < together; ++j) {
      c[0][j] = eight(group + i + 8 * j);
      c[1][j] = eight(draw + i + 8 * j);
      c[2][j] = eight(sample + i + 8 * j);
      c[3][j] = _mm512_set1_epi64(stream);
    }
    rounds(key, c, w, i);
  }
}
PF_AVX512 void fill_next(Key key, uint32_t group, uint32_t draw, uint32_t sample, uint32_t stream,
                         uint32_t (*w)[lanes]) {
  const __m512i steps = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < lanes; i += 8 * together) {
    __m512i c[4][together];
    for (int j = 0; j < together; ++j) {
      c[0][j] = _mm512_add_epi64(_mm512_set1_epi64(group + static_cast<uint32_t>(i + 8 * j)), steps);
      c[1][j] = _mm512_set1_epi64(draw);
      c[2][j] = _mm512_set1_epi64(sample);
      c[3][j] = _mm512_set1_epi64(stream);
    }
    rounds(key, c, w, i);
  }
}
#endif

// Converts the words into numbers of the distribution. The four numbers of a counter are adjacent in `out`.
PF_CLONES void shape_words(Distribution kind, uint32_t (*__restrict__ w)[lanes], uint32_t* __restrict__ out) {
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

void fill_block(Distribution kind, Key key, const uint32_t* group, const uint32_t* draw, const uint32_t* sample,
                uint32_t stream, uint32_t* out) {
  uint32_t w[4][lanes];
  fill_words(key, group, draw, sample, stream, w);
  shape_words(kind, w, out);
}
void fill_next_block(Distribution kind, Key key, uint32_t group, uint32_t draw, uint32_t sample, uint32_t stream,
                     uint32_t* out) {
  uint32_t w[4][lanes];
  fill_next(key, group, draw, sample, stream, w);
  shape_words(kind, w, out);
}

}  // namespace

void fill_groups(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, int64_t first,
                 int64_t count, uint32_t* out) {
  uint32_t block[4 * lanes];
  for (int64_t start = 0; start < count; start += lanes) {
    const int64_t some = std::min<int64_t>(lanes, count - start);
    uint32_t* to = some == lanes ? out + 4 * start : block;
    fill_next_block(kind, key, static_cast<uint32_t>(first + start), draw, sample, static_cast<uint32_t>(stream), to);
    if (some < lanes) std::memcpy(out + 4 * start, block, 4 * some * sizeof(uint32_t));
  }
}
void fill_these(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, const uint32_t* groups,
                int64_t count, uint32_t* out) {
  uint32_t c0[lanes] = {}, c1[lanes], c2[lanes], block[4 * lanes];
  std::fill_n(c1, lanes, draw);
  std::fill_n(c2, lanes, sample);
  for (int64_t start = 0; start < count; start += lanes) {
    const int64_t some = std::min<int64_t>(lanes, count - start);
    std::copy_n(groups + start, some, c0);
    uint32_t* to = some == lanes ? out + 4 * start : block;
    fill_block(kind, key, c0, c1, c2, static_cast<uint32_t>(stream), to);
    if (some < lanes) std::memcpy(out + 4 * start, block, 4 * some * sizeof(uint32_t));
  }
}

void fill_rows(Distribution kind, const Rows& rows, int64_t begin, int64_t end, int64_t numel, uint32_t* out) {
  const int64_t groups = (numel + 3) / 4, last = (end - begin) * groups;
  int64_t row = begin, group = 0;
  // A block of `lanes` counters that contains the end of a row continues with the counters of the next row.
  for (int64_t start = 0; start < last; start += lanes) {
    const int64_t left_in_row = groups - group;
    if (numel % 4 == 0 && left_in_row >= lanes) {
      const uint32_t draw = static_cast<uint32_t>(rows.first_draw + row % rows.draws);
      const uint32_t sample = static_cast<uint32_t>(rows.sample_ids[row / rows.draws]);
      fill_next_block(kind, rows.key, static_cast<uint32_t>(group), draw, sample, rows.stream, out + 4 * start);
      group += lanes;
      if (group == groups) {
        group = 0;
        ++row;
      }
      continue;
    }
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

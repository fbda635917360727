// Convolutions of bfloat16 channels_last images with the processor instruction vdpbf16ps. For each of 16 float32 sums,
// the instruction adds two products of neighboring numbers. So the operands are first arranged as pairs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define PF_HAS_PAIRS 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define PF_HAS_PAIRS 0
#endif

#if PF_HAS_PAIRS

#define PF_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define PF_PAIRS_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline)) inline
#define PF_UNROLL _Pragma("GCC unroll 16")

namespace pf::cpu::convolution {

// Returns true if the processor has the instructions of PF_PAIRS, and PyTorch's variable does not forbid them.
inline bool has_pairs() {
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = set ? set : "";
  return most != "avx2" && most != "default" && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// True if the processor has the instructions of PF_PAIRS but no AMX, with which oneDNN is faster.
inline bool supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return !tiles && has_pairs();
}

struct Sizes {
  int64_t images, height, width, inputs, out_height, out_width, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// Holds memory that a thread has released, for its next use. New memory would cause a page fault for each page.
class Kept {
 public:
  // The largest number of bytes that are held for a thread.
  static constexpr size_t most = 16 << 20;
  struct Piece {
    void* at;
    size_t bytes;
  };
  // Returns a piece with at least `bytes` and at most four times as many bytes, or null if there is none.
  Piece take(size_t bytes) {
    for (Piece& piece : pieces) {
      if (piece.bytes < bytes || piece.bytes > 4 * bytes) continue;
      const Piece found = piece;
      total -= found.bytes;
      piece = pieces.back();
      pieces.pop_back();
      return found;
    }
    return {nullptr, 0};
  }
  void put(Piece piece) {
    if (total + piece.bytes > most || pieces.size() > 16) return std::free(piece.at);
    pieces.push_back(piece);
    total += piece.bytes;
  }
  ~Kept() {
    for (const Piece& piece : pieces) std::free(piece.at);
  }
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }

 private:
  std::vector<Piece> pieces;
  size_t total = 0;
};

// Uninitialized memory that is aligned to cache lines.
template <class T>
struct Lines {
  explicit Lines(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    held = Kept::mine().take(bytes);
    if (!held.at) held = {std::aligned_alloc(64, bytes), bytes};
    if (!held.at) throw std::bad_alloc();
  }
  ~Lines() { Kept::mine().put(held); }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  T* get() const { return static_cast<T*>(held.at); }

 private:
  Kept::Piece held{nullptr, 0};
};

// A group of channels that are computed together: `count` channels, beginning with channel `first`. Their data are
// stored position by position (for example, pixel by pixel), with room for `pitch` channels per position. Blocks are
// stored one after the other. `before` is the sum of the pitches of the blocks before this block.
struct Block {
  int64_t first, count, pitch, before;
};
struct Blocks {
  std::vector<Block> list;
  // The sum of the pitches of all blocks.
  int64_t pitch = 0;
  void add(int64_t first, int64_t count, int64_t room) {
    list.push_back({first, count, room, pitch});
    pitch += room;
  }
};

// Divides the channels into blocks of at most `most` vectors of 16 channels, the last of which may have 8.
inline Blocks vectors(int64_t channels, int64_t most) {
  Blocks made;
  const int64_t halves = (channels + 7) / 8, blocks = (halves + 2 * most - 1) / (2 * most);
  const int64_t whole = blocks ? ((halves + blocks - 1) / blocks + 1) / 2 * 16 : 0;
  for (int64_t first = 0; first < channels; first += whole) {
    const int64_t count = channels - first < whole ? channels - first : whole;
    made.add(first, count, count <= 8 ? 8 : (count + 15) / 16 * 16);
  }
  return made;
}
// Divides the channels into as few blocks as possible. A block has at most 8 channels, and the blocks have about the
// same size. Kernels multiply each of these channels, one by one, with vectors of other channels (see `weight_tile`).
inline Blocks singles(int64_t channels) {
  Blocks made;
  const int64_t blocks = (channels + 7) / 8;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = channels * i / blocks;
    made.add(first, channels * (i + 1) / blocks - first, 8);
  }
  return made;
}

// Divides the channels into blocks of 8, or fewer in the last: a half of a 16-channel vector has a single block.
inline Blocks eights(int64_t channels) {
  Blocks made;
  for (int64_t first = 0; first < channels; first += 8) made.add(first, channels - first < 8 ? channels - first : 8, 8);
  return made;
}

inline int64_t rounded_to_eights(int64_t count) { return (count + 7) / 8 * 8; }

// The mask of the first `count` of 16 numbers, where `count` may be negative or above 16.
inline __mmask16 first_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
// Loads 16 numbers and converts them to float32. Numbers outside the mask become 0.
PF_PAIRS_INLINE __m512 load_numbers(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// Stores the pairs (x, y) of 8 or 16 channels as 32-bit numbers, with x in the lower half.
PF_PAIRS_INLINE void store_pairs(__m128i x, __m128i y, uint32_t* to) {
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(y), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(_mm256_cvtepu16_epi32(x), high));
}
PF_PAIRS_INLINE void store_pairs(__m256i x, __m256i y, uint32_t* to) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(x), high));
}

// Makes the pairs (pixel j, pixel j + distance) from a row of pixels, for `count` values of j. The first j is `from`,
// and each further j is larger by `step`. Pixels outside the row are replaced by 0. A pair is stored as one 32-bit
// number for each channel of the block.
PF_PAIRS inline void pack_pairs(const uint16_t* row, int64_t width, int64_t channels, const Block& block, int64_t from,
                                int64_t step, int64_t distance, int64_t count, uint32_t* to) {
  for (int64_t c = 0; c < block.pitch; c += 16) {
    const bool half = block.pitch == 8;
    const __mmask16 mask = first_of(block.count - c);
    const uint16_t* pixels = row + block.first + c;
    uint32_t* at = to + c;
    for (int64_t k = 0, j = from; k < count;) {
      if (j >= 0 && j + distance < width) {
        const int64_t inside = (width - 1 - distance - j) / step + 1, run = inside < count - k ? inside : count - k;
        const uint16_t *x = pixels + j * channels, *y = x + distance * channels;
        if (half) {
          for (int64_t i = 0; i < run; ++i, x += step * channels, y += step * channels, at += 8) {
            store_pairs(_mm_maskz_loadu_epi16(mask, x), _mm_maskz_loadu_epi16(mask, y), at);
          }
        } else {
          for (int64_t i = 0; i < run; ++i, x += step * channels, y += step * channels, at += block.pitch) {
            store_pairs(_mm256_maskz_loadu_epi16(mask, x), _mm256_maskz_loadu_epi16(mask, y), at);
          }
        }
        k += run;
        j += run * step;
        continue;
      }
      const __mmask16 low = j >= 0 && j < width ? mask : 0;
      const __mmask16 high = j + distance >= 0 && j + distance < width ? mask : 0;
      const uint16_t *x = low ? pixels + j * channels : pixels, *y = high ? pixels + (j + distance) * channels : pixels;
      if (half) {
        store_pairs(_mm_maskz_loadu_epi16(low, x), _mm_maskz_loadu_epi16(high, y), at);
      } else {
        store_pairs(_mm256_maskz_loadu_epi16(low, x), _mm256_maskz_loadu_epi16(high, y), at);
      }
      ++k, j += step, at += block.pitch;
    }
  }
}

}  // namespace pf::cpu::convolution

#endif

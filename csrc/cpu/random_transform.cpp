// Without fused multiply-adds the pixels have the same bits on every CPU.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/random_transform.h"

#include <algorithm>
#include <type_traits>

#include "philox.h"

namespace pf::cpu {
namespace {

// Pixels of a plane worked on at once; they stay in the cache. Where planes are read and written without gaps, longer
// stretches of each are faster.
constexpr int64_t chunk = 1024, long_chunk = 8192;
constexpr int64_t least_wide = 16;  // a block at least this wide is worked on as a run of pixels, not pixel by pixel

// The bits of a storage type: hiding a pixel is a matter of bits, whatever they mean.
template <int bytes>
struct word_of;
template <>
struct word_of<2> {
  using type = uint16_t;
};
template <>
struct word_of<4> {
  using type = uint32_t;
};
template <>
struct word_of<8> {
  using type = uint64_t;
};
template <class T>
using word_t = typename word_of<sizeof(T)>::type;

// Columns that are all seen, or all hidden.
struct Run {
  int64_t begin, length;
  bool seen;
};
// Rows of a plane, one after the other, that have the same runs.
struct Strip {
  int64_t rows, width;
  const Run* runs;
  int64_t count;
};

// Zeros where hidden; noise is that of the seen runs, one after the other, or null.
template <class T, class W = wide_t<T>>
PF_HD void transform_loop(const T* __restrict__ x, const float* __restrict__ noise, W sigma, Strip strip,
                          W* __restrict__ out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const T* from = x + row * strip.width + run.begin;
      W* to = out + row * strip.width + run.begin;
      if (!run.seen) {
        for (int64_t i = 0; i < run.length; ++i) to[i] = 0;
      } else if (noise == nullptr) {
        for (int64_t i = 0; i < run.length; ++i) to[i] = transformed<W>(load(from[i]), 0, 0);
      } else {
        for (int64_t i = 0; i < run.length; ++i) to[i] = transformed<W>(load(from[i]), noise[i], sigma);
        noise += run.length;
      }
    }
  }
}
// Adds to out, or with `first` assigns; of grad only what is seen is read.
template <bool first, class T, class W = wide_t<T>>
PF_HD void slope_loop(const T* __restrict__ x, const float* __restrict__ noise, W sigma, const W* __restrict__ grad,
                      Strip strip, W* __restrict__ out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const int64_t at = row * strip.width + run.begin;
      const T* from = x + at;
      const W* slope = grad + at;
      W* to = out + at;
      if (!run.seen) {
        if (first) {
          for (int64_t i = 0; i < run.length; ++i) to[i] = 0;
        }
      } else if (noise == nullptr) {
        for (int64_t i = 0; i < run.length; ++i) {
          to[i] = (first ? W(0) : to[i]) + transformed_slope<W>(load(from[i]), 0, 0, slope[i]);
        }
      } else {
        for (int64_t i = 0; i < run.length; ++i) {
          to[i] = (first ? W(0) : to[i]) + transformed_slope<W>(load(from[i]), noise[i], sigma, slope[i]);
        }
        noise += run.length;
      }
    }
  }
}
// The same value in all that is seen, and in all that is hidden.
template <class U>
PF_HD void mark_loop(U seen, U hidden, Strip strip, U* out) {
  for (int64_t row = 0; row < strip.rows; ++row) {
    for (int64_t r = 0; r < strip.count; ++r) {
      const Run run = strip.runs[r];
      const U value = run.seen ? seen : hidden;
      for (int64_t i = 0; i < run.length; ++i) out[row * strip.width + run.begin + i] = value;
    }
  }
}

template <class T, class W>
PF_HD void round_loop(const W* from, word_t<T>* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    store(rounded, static_cast<wide_t<T>>(from[i]));
    to[i] = bit_cast<word_t<T>>(rounded);
  }
}
// What each of `passes` passes from `first` on sees adds to the sum. `apart`: between passes; `stride`: between pixels.
template <int passes, class T, class W>
PF_HD void add_loop(const T* __restrict__ grad, int64_t apart, int64_t stride, const uint32_t* __restrict__ owner,
                    uint32_t first, W* __restrict__ sum, int64_t n) {
  const auto added = [=](int64_t i, int64_t at) PF_INLINE {
    W total = sum[i];
    for (int j = 0; j < passes; ++j) {
      const W g = static_cast<W>(load(grad[j * apart + at]));  // read in any case: this vectorises
      total += owner[i] == first + static_cast<uint32_t>(j) ? W(0) : g;
    }
    return total;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) sum[i] = added(i, i);
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] = added(i, i * stride);
  }
}
// Four passes at a time.
template <class T, class W>
PF_HD void add_passes(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first,
                      int64_t passes, W* sum, int64_t n) {
  for (; passes >= 4; passes -= 4, first += 4, grad += 4 * apart) {
    add_loop<4>(grad, apart, stride, owner, first, sum, n);
  }
  for (; passes > 0; --passes, ++first, grad += apart) add_loop<1>(grad, apart, stride, owner, first, sum, n);
}

// The same for rows of wide blocks of contiguous passes: what a pass does not see is not read. The passes of a pixel
// are added in their order, three at a time.
struct Blocks {
  const uint8_t* owners;
  int64_t columns, tall, wide;
};
template <class T, class W>
PF_HD void add_blocks_loop(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows,
                           W* sum) {
  const int64_t width = blocks.columns * blocks.wide;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* owners = blocks.owners + (first + row) / blocks.tall * blocks.columns;
    for (int64_t column = 0; column < blocks.columns; ++column) {
      const int64_t at = row * width + column * blocks.wide;
      W* __restrict__ to = sum + at;
      for (int64_t i = 0; i < blocks.wide; ++i) to[i] = 0;
      const T* seen[3];
      int count = 0;
      for (int64_t pass = 0; pass < passes; ++pass) {
        if (owners[column] == pass) continue;
        seen[count++] = grad + pass * apart + at;
        if (count < 3) continue;
        const T* __restrict__ a = seen[0], * __restrict__ b = seen[1], * __restrict__ c = seen[2];
        for (int64_t i = 0; i < blocks.wide; ++i) {
          to[i] = ((to[i] + static_cast<W>(load(a[i]))) + static_cast<W>(load(b[i]))) + static_cast<W>(load(c[i]));
        }
        count = 0;
      }
      for (int j = 0; j < count; ++j) {
        const T* __restrict__ a = seen[j];
        for (int64_t i = 0; i < blocks.wide; ++i) to[i] += static_cast<W>(load(a[i]));
      }
    }
  }
}

#define PF_LOOPS(T)                                                                                                   \
  PF_CLONES void transform(const T* x, const float* noise, wide_t<T> sigma, Strip strip, wide_t<T>* out) {            \
    transform_loop(x, noise, sigma, strip, out);                                                                      \
  }                                                                                                                   \
  PF_CLONES void slope(const T* x, const float* noise, wide_t<T> sigma, const wide_t<T>* grad, bool first,            \
                       Strip strip, wide_t<T>* out) {                                                                 \
    if (first) {                                                                                                      \
      slope_loop<true>(x, noise, sigma, grad, strip, out);                                                            \
    } else {                                                                                                          \
      slope_loop<false>(x, noise, sigma, grad, strip, out);                                                           \
    }                                                                                                                 \
  }                                                                                                                   \
  PF_CLONES void round_to(T, const float* __restrict__ from, word_t<T>* __restrict__ to, int64_t n) {                 \
    round_loop<T>(from, to, n);                                                                                       \
  }                                                                                                                   \
  PF_CLONES void round_to(T, const double* __restrict__ from, word_t<T>* __restrict__ to, int64_t n) {                \
    round_loop<T>(from, to, n);                                                                                       \
  }                                                                                                                   \
  PF_CLONES void add_seen(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first,        \
                          int64_t passes, float* sum, int64_t n) {                                                    \
    add_passes(grad, apart, stride, owner, first, passes, sum, n);                                                    \
  }                                                                                                                   \
  PF_CLONES void add_seen(const T* grad, int64_t apart, int64_t stride, const uint32_t* owner, uint32_t first,        \
                          int64_t passes, double* sum, int64_t n) {                                                   \
    add_passes(grad, apart, stride, owner, first, passes, sum, n);                                                    \
  }                                                                                                                   \
  PF_CLONES void add_blocks(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows, \
                            float* sum) {                                                                             \
    add_blocks_loop(grad, apart, passes, blocks, first, rows, sum);                                                   \
  }                                                                                                                   \
  PF_CLONES void add_blocks(const T* grad, int64_t apart, int64_t passes, Blocks blocks, int64_t first, int64_t rows, \
                            double* sum) {                                                                            \
    add_blocks_loop(grad, apart, passes, blocks, first, rows, sum);                                                   \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

// out[i * stride] = what `seen` or `hidden` says of pixel i.
template <class U, class Seen>
PF_HD void choose_loop(Seen seen, U hidden, const U* owner, U part, U* out, int64_t stride, int64_t n) {
  const auto chosen = [=](int64_t i) PF_INLINE {
    const U s = seen(i);
    return owner[i] == part ? hidden : s;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = chosen(i);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * stride] = chosen(i);
  }
}

#define PF_CHOICES(U)                                                                                             \
  PF_CLONES void hide(const U* __restrict__ t, const U* __restrict__ owner, U part, U* __restrict__ out,          \
                      int64_t stride, int64_t n) {                                                                \
    choose_loop([=](int64_t i) PF_INLINE { return t[i]; }, U(0), owner, part, out, stride, n);                    \
  }                                                                                                               \
  PF_CLONES void mark(U seen, U hidden, const U* __restrict__ owner, U part, U* __restrict__ out, int64_t stride, \
                      int64_t n) {                                                                                \
    choose_loop([=](int64_t) PF_INLINE { return seen; }, hidden, owner, part, out, stride, n);                    \
  }                                                                                                               \
  PF_CLONES void mark_runs(U seen, U hidden, Strip strip, U* out) { mark_loop(seen, hidden, strip, out); }
PF_CHOICES(uint16_t)
PF_CHOICES(uint32_t)
PF_CHOICES(uint64_t)

struct Images {
  int64_t batch, channels, height, width;
  int64_t plane() const { return height * width; }
};

struct Grid {
  int64_t rows, columns;
  int64_t tall, wide;  // pixels of a block
  int64_t blocks() const { return rows * columns; }
};
Grid grid_of(Images images, int64_t rows, int64_t columns) {
  return {rows, columns, images.height / rows, images.width / columns};
}

// How the work is cut: by runs where there is one pass, nothing to round, and blocks are wide and start with a group of
// the noise; else by owners of pixels, about `pixels` at once.
struct Plan {
  bool by_runs;
  int64_t tall, most_rows;  // a strip crosses no multiple of `tall` rows
  int64_t most;             // pixels
};
Plan plan_of(Images images, Grid grid, int64_t passes, bool rounds, bool channels_last, int64_t pixels) {
  const bool by_runs = passes == 1 && !rounds && !channels_last && grid.wide >= least_wide && grid.wide % 4 == 0;
  const int64_t tall = by_runs ? grid.tall : images.height;
  const int64_t rows = std::clamp((by_runs ? long_chunk : pixels) / images.width, int64_t{1}, tall);
  return {by_runs, tall, rows, rows * images.width};
}

// Owners of `rows` rows of pixels from `first` on, one after the other.
template <class U>
void owners_of_pixels(const uint8_t* owners, Grid grid, int64_t first, int64_t rows, U* out) {
  for (int64_t row = first; row < first + rows; ++row) {
    const uint8_t* of_row = owners + row / grid.tall * grid.columns;
    for (int64_t column = 0; column < grid.columns; ++column, out += grid.wide) {
      std::fill_n(out, grid.wide, U(of_row[column]));
    }
  }
}

// The runs of a row of blocks with these owners, of which `hidden` is hidden.
void find_runs(const uint8_t* owners, Grid grid, int64_t hidden, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t column = 0; column < grid.columns; ++column) {
    const bool seen = owners[column] != hidden;
    if (!runs.empty() && runs.back().seen == seen) {
      runs.back().length += grid.wide;
    } else {
      runs.push_back({column * grid.wide, grid.wide, seen});
    }
  }
}

// Normals of one sample and draw, for strips of at most `most` pixels; null without noise.
class Noise {
 public:
  Noise(Key key, bool any, int64_t most) : key_(key), any_(any), numbers_(most + 8), groups_(most / 4 + 1) {}

  // Of `count` consecutive elements.
  const float* consecutive(int64_t sample_id, int64_t draw, int64_t first, int64_t count) {
    if (!any_) return nullptr;
    const int64_t skip = first % 4;
    fill_groups(Distribution::normal, key_, static_cast<uint32_t>(draw), static_cast<uint32_t>(sample_id),
                Stream::transform_noise, first / 4, (skip + count + 3) / 4,
                reinterpret_cast<uint32_t*>(numbers_.data()));
    return numbers_.data() + skip;
  }

  // Of the seen runs of a strip that starts with element `first`; all are whole groups.
  const float* of_runs(int64_t sample_id, int64_t draw, int64_t first, Strip strip) {
    if (!any_) return nullptr;
    int64_t count = 0;
    for (int64_t row = 0; row < strip.rows; ++row) {
      for (int64_t r = 0; r < strip.count; ++r) {
        const Run run = strip.runs[r];
        if (!run.seen) continue;
        const auto group = static_cast<uint32_t>((first + row * strip.width + run.begin) / 4);
        for (int64_t i = 0; i < run.length / 4; ++i) groups_[count++] = group + static_cast<uint32_t>(i);
      }
    }
    fill_these(Distribution::normal, key_, static_cast<uint32_t>(draw), static_cast<uint32_t>(sample_id),
               Stream::transform_noise, groups_.data(), count, reinterpret_cast<uint32_t*>(numbers_.data()));
    return numbers_.data();
  }

 private:
  Key key_;
  bool any_;
  std::vector<float> numbers_;
  std::vector<uint32_t> groups_;
};

// f(image, first row, rows), a few rows of one image at a time, of [begin, end) rows of the whole batch.
template <class F>
void in_strips(Images images, Plan plan, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t first = begin % images.height;
    const int64_t rows = std::min({plan.most_rows, plan.tall - first % plan.tall, end - begin});
    f(begin / images.height, first, rows);
    begin += rows;
  }
}

void assign(Key key, uint32_t draw, uint32_t sample, int64_t missing, int64_t parts, int64_t blocks, uint8_t* out) {
  std::vector<uint32_t> keys((blocks + 3) / 4 * 4);
  fill_groups(Distribution::bits, key, draw, sample, Stream::mask, 0, (blocks + 3) / 4, keys.data());
  std::vector<uint64_t> order(blocks);  // by key, ties by index
  for (int64_t i = 0; i < blocks; ++i) order[i] = static_cast<uint64_t>(keys[i]) << 32 | static_cast<uint64_t>(i);
  std::sort(order.begin(), order.end());
  for (int64_t rank = 0; rank < blocks; ++rank) out[order[rank] & 0xffffffffu] = owner_of(rank, blocks, missing, parts);
}

Tensor assign_owners(Key key, const Tensor& ids, Grid grid, int64_t missing, int64_t parts, int64_t samples,
                     bool shared_mask) {
  const int64_t batch = ids.numel(), blocks = grid.blocks();
  Tensor owners = new_tensor({samples, batch, grid.rows, grid.columns}, ScalarType::Byte);
  const int64_t* named = data<int64_t>(ids);
  uint8_t* to = writable<uint8_t>(owners);
  const int64_t masks = shared_mask ? (batch > 0 ? samples : 0) : samples * batch;
  parallel_rows(masks, 32 * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!shared_mask) {
        assign(key, static_cast<uint32_t>(i / batch), static_cast<uint32_t>(named[i % batch]), missing, parts, blocks,
               to + i * blocks);
        continue;
      }
      uint8_t* first = to + i * batch * blocks;
      assign(key, static_cast<uint32_t>(i), 0, missing, parts, blocks, first);
      for (int64_t b = 1; b < batch; ++b) std::copy_n(first, blocks, first + b * blocks);
    }
  });
  return owners;
}

template <class T>
word_t<T> bits_of_one() {
  T one;
  store(one, 1.0f);
  return bit_cast<word_t<T>>(one);
}

std::tuple<Tensor, Tensor> random_transform(Tensor x, Tensor seed, Tensor sample_ids, double sigma, int64_t block,
                                            int64_t missing, int64_t parts, int64_t samples, bool shared_mask,
                                            ScalarType dtype, bool channels_last) {
  x = dense(x);
  const Tensor ids = dense(sample_ids);
  const Images images{x.size(0), x.size(1), x.size(2), x.size(3)};
  const Grid grid = grid_of(images, images.height / block, images.width / block);
  const Key key = key_of(*data<int64_t>(seed));
  const int64_t passes = parts == 0 ? 1 : parts, first_part = parts == 0 ? 1 : 0, planes = images.channels + 2;
  const int64_t plane = images.plane();
  const Plan plan = plan_of(images, grid, passes, dtype != wide_dtype(x.scalar_type()), channels_last, chunk);
  Tensor owners = assign_owners(key, ids, grid, missing, parts, samples, shared_mask);
  Tensor packed =
      new_images(samples * images.batch * passes, planes, images.height, images.width, dtype, channels_last);
  const uint8_t* owner_of_block = data<uint8_t>(owners);
  const int64_t* named = data<int64_t>(ids);
  // from a channel to the next, and from a pixel to the next
  const int64_t channel_stride = channels_last ? 1 : plane, stride = channels_last ? planes : 1;
  dispatch(x.scalar_type(), "random_transform", [&](auto in) {
    dispatch(dtype, "random_transform", [&](auto out) {
      using T = decltype(in);
      using W = wide_t<T>;
      using O = decltype(out);
      using U = word_t<O>;
      const T* from = data<T>(x);
      W* to = writable<W>(packed);  // by runs
      U* bits = writable<U>(packed);
      const U one = bits_of_one<O>();
      const int64_t cost = samples * images.width * (8 * images.channels + passes * planes);
      parallel_rows(images.batch * images.height, cost, [&](int64_t begin, int64_t end) {
        Noise noise(key, sigma != 0, plan.most);
        std::vector<W> t(plan.most);
        std::vector<U> rounded(plan.most), owner(plan.most);
        std::vector<Run> runs;
        in_strips(images, plan, begin, end, [&](int64_t image, int64_t first, int64_t rows) {
          const int64_t n = rows * images.width, pixel = first * images.width;
          for (int64_t draw = 0; draw < samples; ++draw) {
            const int64_t row = draw * images.batch + image;
            const uint8_t* of_image = owner_of_block + row * grid.blocks();
            const int64_t corner = row * passes * planes * plane + pixel * stride;  // of the first pass
            if (plan.by_runs) {
              find_runs(of_image + first / grid.tall * grid.columns, grid, first_part, runs);
              const Strip strip{rows, images.width, runs.data(), static_cast<int64_t>(runs.size())};
              for (int64_t c = 0; c < images.channels; ++c) {
                const int64_t at = c * plane + pixel;
                transform(from + image * images.channels * plane + at, noise.of_runs(named[image], draw, at, strip),
                          static_cast<W>(sigma), strip, to + corner + c * plane);
              }
              U* ones = bits + corner + images.channels * plane;
              mark_runs(one, one, strip, ones);
              mark_runs(U(0), one, strip, ones + plane);
              continue;
            }
            owners_of_pixels(of_image, grid, first, rows, owner.data());
            const Run whole{0, n, true};
            for (int64_t c = 0; c < images.channels; ++c) {
              const int64_t at = c * plane + pixel;
              transform(from + image * images.channels * plane + at, noise.consecutive(named[image], draw, at, n),
                        static_cast<W>(sigma), {1, n, &whole, 1}, t.data());
              round_to(out, t.data(), rounded.data(), n);
              for (int64_t i = 0; i < passes; ++i) {
                hide(rounded.data(), owner.data(), static_cast<U>(first_part + i),
                     bits + corner + i * planes * plane + c * channel_stride, stride, n);
              }
            }
            for (int64_t i = 0; i < passes; ++i) {
              U* ones = bits + corner + i * planes * plane + images.channels * channel_stride;
              mark(one, one, owner.data(), U(0), ones, stride, n);
              mark(U(0), one, owner.data(), static_cast<U>(first_part + i), ones + channel_stride, stride, n);
            }
          }
        });
      });
    });
  });
  return {packed, owners};
}

Tensor random_transform_backward(Tensor grad, Tensor x, Tensor owners, Tensor seed, Tensor sample_ids, double sigma,
                                 int64_t parts) {
  x = dense(x);
  owners = dense(owners);
  const bool channels_last = is_channels_last(grad);
  if (!channels_last) grad = dense(grad);
  const Tensor ids = dense(sample_ids);
  const Images images{x.size(0), x.size(1), x.size(2), x.size(3)};
  const Grid grid = grid_of(images, owners.size(2), owners.size(3));
  const Key key = key_of(*data<int64_t>(seed));
  const int64_t samples = owners.size(0), passes = parts == 0 ? 1 : parts, first_part = parts == 0 ? 1 : 0;
  const int64_t planes = images.channels + 2, plane = images.plane();
  const Plan plan = plan_of(images, grid, passes, grad.scalar_type() != wide_dtype(x.scalar_type()), channels_last,
                            channels_last ? chunk : long_chunk);
  const uint8_t* owner_of_block = data<uint8_t>(owners);
  const int64_t* named = data<int64_t>(ids);
  const int64_t channel_stride = channels_last ? 1 : plane, stride = channels_last ? planes : 1;
  Tensor result = new_like(x);
  dispatch(x.scalar_type(), "random_transform_backward", [&](auto in) {
    dispatch(grad.scalar_type(), "random_transform_backward", [&](auto out) {
      using T = decltype(in);
      using W = wide_t<T>;
      using O = decltype(out);
      constexpr bool same = std::is_same_v<T, W>;  // then sums are made where they go
      const T* from = data<T>(x);
      const O* slopes = data<O>(grad);
      const W* wide_slopes = data<W>(grad);  // by runs
      W* sums = writable<W>(result);
      auto* bits = writable<word_t<T>>(result);
      const int64_t cost = samples * images.width * images.channels * (8 + passes);
      parallel_rows(images.batch * images.height, cost, [&](int64_t begin, int64_t end) {
        Noise noise(key, sigma != 0, plan.most);
        std::vector<W> sum(plan.most), totals(same ? 0 : images.channels * plan.most);
        std::vector<uint32_t> owner(plan.most);
        std::vector<Run> runs;
        in_strips(images, plan, begin, end, [&](int64_t image, int64_t first, int64_t rows) {
          const int64_t n = rows * images.width, pixel = first * images.width;
          const int64_t at_image = image * images.channels * plane + pixel;
          const auto total = [&](int64_t c) {
            return same ? sums + at_image + c * plane : totals.data() + c * plan.most;
          };
          for (int64_t draw = 0; draw < samples; ++draw) {
            const int64_t row = draw * images.batch + image;
            const uint8_t* of_image = owner_of_block + row * grid.blocks();
            const int64_t corner = row * passes * planes * plane + pixel * stride;  // of the first pass
            if (plan.by_runs) {
              find_runs(of_image + first / grid.tall * grid.columns, grid, first_part, runs);
              const Strip strip{rows, images.width, runs.data(), static_cast<int64_t>(runs.size())};
              for (int64_t c = 0; c < images.channels; ++c) {
                slope(from + at_image + c * plane, noise.of_runs(named[image], draw, c * plane + pixel, strip),
                      static_cast<W>(sigma), wide_slopes + corner + c * plane, draw == 0, strip, total(c));
              }
              continue;
            }
            const bool by_blocks = passes > 1 && !channels_last && grid.wide >= least_wide;
            if (!by_blocks) owners_of_pixels(of_image, grid, first, rows, owner.data());
            const Run whole{0, n, true};
            for (int64_t c = 0; c < images.channels; ++c) {
              if (by_blocks) {
                add_blocks(slopes + corner + c * plane, planes * plane, passes,
                           {of_image, grid.columns, grid.tall, grid.wide}, first, rows, sum.data());
              } else {
                std::fill_n(sum.data(), n, W(0));
                add_seen(slopes + corner + c * channel_stride, planes * plane, stride, owner.data(),
                         static_cast<uint32_t>(first_part), passes, sum.data(), n);
              }
              slope(from + at_image + c * plane, noise.consecutive(named[image], draw, c * plane + pixel, n),
                    static_cast<W>(sigma), sum.data(), draw == 0, {1, n, &whole, 1}, total(c));
            }
          }
          if (!same) {
            for (int64_t c = 0; c < images.channels; ++c) round_to(in, total(c), bits + at_image + c * plane, n);
          }
        });
      });
    });
  });
  return result;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("random_transform", TORCH_BOX(&pf::cpu::random_transform));
  m.impl("random_transform_backward", TORCH_BOX(&pf::cpu::random_transform_backward));
}

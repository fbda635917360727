// Without fused multiply-adds, the pixels have the same bits on every CPU.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/random_transform.h"

#include <algorithm>
#include <type_traits>

#include "random_transform_plan.h"

namespace pf::cpu {
namespace {

// -- masks ------------------------------------------------------------------------------------------------------------

// The numbers that determine how the blocks of an image are divided between the passes. `blocks` is the number of
// blocks. The other two are arguments of the op.
struct Mask {
  int64_t blocks, masked_blocks, num_passes;
};

// Writes the owners of the blocks of one image. The owner follows from the rank of the block's random key. Blocks with
// equal keys are ranked by their index.
void assign(Key key, uint32_t draw, uint32_t sample, Mask mask, uint8_t* out) {
  const int64_t groups = (mask.blocks + 3) / 4;
  std::vector<uint32_t> keys(groups * 4);
  fill_groups(Distribution::bits, key, draw, sample, Stream::mask, 0, groups, keys.data());
  std::vector<uint64_t> order(mask.blocks);
  for (int64_t i = 0; i < mask.blocks; ++i) {
    order[i] = static_cast<uint64_t>(keys[i]) << 32 | static_cast<uint64_t>(i);
  }
  std::sort(order.begin(), order.end());
  for (int64_t rank = 0; rank < mask.blocks; ++rank) {
    out[order[rank] & 0xffffffffu] = owner_of(rank, mask.blocks, mask.masked_blocks, mask.num_passes);
  }
}

// Writes a mask for every draw and image.
void assign_each(Key key, const int64_t* sample_ids, int64_t samples, int64_t batch, Mask mask, uint8_t* out) {
  parallel_rows(samples * batch, 32 * mask.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto draw = static_cast<uint32_t>(i / batch), sample = static_cast<uint32_t>(sample_ids[i % batch]);
      assign(key, draw, sample, mask, out + i * mask.blocks);
    }
  });
}

// For every draw, writes one mask that all images share.
void assign_shared(Key key, int64_t samples, int64_t batch, Mask mask, uint8_t* out) {
  parallel_rows(batch > 0 ? samples : 0, 32 * mask.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t draw = begin; draw < end; ++draw) {
      uint8_t* first = out + draw * batch * mask.blocks;
      assign(key, static_cast<uint32_t>(draw), 0, mask, first);
      for (int64_t image = 1; image < batch; ++image) std::copy_n(first, mask.blocks, first + image * mask.blocks);
    }
  });
}

// -- forward ----------------------------------------------------------------------------------------------------------

template <class T>
word_t<T> bits_of_one() {
  T one;
  store(one, 1.0f);
  return bit_cast<word_t<T>>(one);
}

template <class In, class Out>
struct Forward {
  using W = wide_t<In>;
  using U = word_t<Out>;
  const Job& job;
  const In* images;
  Out* packed;
  // True if the result is contiguous and too large for the caches.
  bool streams;

  // Memory that belongs to one thread.
  struct Scratch {
    explicit Scratch(const Job& job)
        : noise(job),
          exact(job.most_pixels()),
          rounded(job.most_pixels()),
          owner(job.most_pixels()),
          staged(job.most_pixels()) {}
    Noise noise;
    std::vector<W> exact;
    std::vector<U> rounded, owner, staged;
    std::vector<Run> runs;
  };

  // Calls write(to), which writes n pixels of a pass. If `streams` is true, write() fills a buffer in the cache
  // instead, and the buffer is copied to `to` without using the caches.
  template <class Write>
  void put(U* to, int64_t n, Scratch& scratch, Write write) const {
    if (!streams) return write(to);
    write(scratch.staged.data());
    stream(to, scratch.staged.data(), n * static_cast<int64_t>(sizeof(U)));
  }

  U* bits(int64_t at) const { return reinterpret_cast<U*>(packed) + at; }

  // Writes one draw of a piece. Requires that Out is the dtype of the arithmetic.
  void by_runs(Piece piece, int64_t draw, Scratch& scratch) const {
    const int64_t corner = job.in_packed(piece, draw), plane = job.images.plane();
    const Strip strip = strip_of(job, piece, draw, scratch.runs);
    for (int64_t c = 0; c < job.images.channels; ++c) {
      transform(images + job.in_images(piece) + c * plane, scratch.noise.of_runs(piece, draw, c, strip),
                static_cast<W>(job.sigma), strip, reinterpret_cast<W*>(packed) + corner + c * plane);
    }
    const U one = bits_of_one<Out>();
    U* ones = bits(corner + job.images.channels * plane);
    mark_runs(one, one, strip, ones);
    mark_runs(U(0), one, strip, ones + plane);
  }

  // Writes one draw of a piece. Its pixels are transformed and rounded once, and then written for every pass.
  void by_owners(Piece piece, int64_t draw, Scratch& scratch) const {
    const int64_t n = job.pixels(piece), corner = job.in_packed(piece, draw);
    const int64_t stride = job.pixel_stride(), channel_stride = job.channel_stride();
    const U* owner = scratch.owner.data();
    owners_of_pixels(job, piece, draw, scratch.owner.data());
    const Run whole{.begin = 0, .length = n, .seen = true};
    const Strip strip{.rows = 1, .width = n, .runs = &whole, .count = 1};
    for (int64_t c = 0; c < job.images.channels; ++c) {
      transform(images + job.in_images(piece) + c * job.images.plane(), scratch.noise.of_pixels(piece, draw, c),
                static_cast<W>(job.sigma), strip, scratch.exact.data());
      round_to(Out{}, scratch.exact.data(), scratch.rounded.data(), n);
      for (int64_t i = 0; i < job.passes; ++i) {
        put(bits(corner + i * job.pass_stride() + c * channel_stride), n, scratch,
            [&](U* to) { hide(scratch.rounded.data(), owner, static_cast<U>(job.first_pass + i), to, stride, n); });
      }
    }
    const U one = bits_of_one<Out>();
    for (int64_t i = 0; i < job.passes; ++i) {
      U* ones = bits(corner + i * job.pass_stride() + job.images.channels * channel_stride);
      put(ones, n, scratch, [&](U* to) { mark(one, one, owner, U(0), to, stride, n); });
      put(ones + channel_stride, n, scratch,
          [&](U* to) { mark(U(0), one, owner, static_cast<U>(job.first_pass + i), to, stride, n); });
    }
  }

  void rows(int64_t begin, int64_t end) const {
    Scratch scratch(job);
    for_pieces(job, begin, end, [&](Piece piece) {
      for (int64_t draw = 0; draw < job.samples; ++draw) {
        if (job.strategy == Strategy::by_runs) {
          by_runs(piece, draw, scratch);
        } else {
          by_owners(piece, draw, scratch);
        }
      }
    });
    if (streams) streamed();
  }
};

std::tuple<Tensor, Tensor> random_transform(Tensor x, Tensor seed, Tensor sample_ids, double sigma, int64_t block,
                                            int64_t masked_blocks, int64_t num_passes, int64_t samples,
                                            bool shared_mask, ScalarType dtype, bool channels_last) {
  x = dense(x);
  const Tensor ids = dense(sample_ids);
  const Images images{.batch = x.size(0), .channels = x.size(1), .height = x.size(2), .width = x.size(3)};
  const Grid grid = grid_of(images, images.height / block, images.width / block);
  Tensor owners = new_tensor({samples, images.batch, grid.rows, grid.columns}, ScalarType::Byte);
  Job job{.images = images,
          .grid = grid,
          .samples = samples,
          .passes = num_passes == 0 ? 1 : num_passes,
          .first_pass = num_passes == 0 ? 1 : 0,
          .channels_last = channels_last,
          .key = key_of(*data<int64_t>(seed)),
          .sigma = sigma,
          .owners = data<uint8_t>(owners),
          .sample_ids = data<int64_t>(ids)};
  plan(job, dtype != wide_dtype(x.scalar_type()), false, chunk);
  const Mask mask{.blocks = grid.blocks(), .masked_blocks = masked_blocks, .num_passes = num_passes};
  if (shared_mask) {
    assign_shared(job.key, samples, images.batch, mask, writable<uint8_t>(owners));
  } else {
    assign_each(job.key, job.sample_ids, samples, images.batch, mask, writable<uint8_t>(owners));
  }
  Tensor packed =
      new_images(samples * images.batch * job.passes, job.planes(), images.height, images.width, dtype, channels_last);
  const int64_t cost = samples * images.width * (8 * images.channels + job.passes * job.planes());
  dispatch(x.scalar_type(), "random_transform", [&](auto in) {
    dispatch(dtype, "random_transform", [&](auto out) {
      using Out = decltype(out);
      const bool streams = !channels_last && packed.numel() * static_cast<int64_t>(sizeof(Out)) >= streamed_bytes;
      const Forward<decltype(in), Out> forward{job, data<decltype(in)>(x), writable<Out>(packed), streams};
      parallel_rows(images.batch * images.height, cost, [&](int64_t begin, int64_t end) { forward.rows(begin, end); });
    });
  });
  return {packed, owners};
}

// -- backward ---------------------------------------------------------------------------------------------------------

template <class In, class Grad>
struct Backward {
  using W = wide_t<In>;
  // If true, the gradient of x is summed in the result; otherwise in scratch memory, and rounded at the end.
  static constexpr bool in_place = std::is_same_v<In, W>;
  const Job& job;
  const In* images;
  const Grad* grad;
  In* result;

  // Memory that belongs to one thread.
  struct Scratch {
    explicit Scratch(const Job& job)
        : noise(job),
          of_passes(job.most_pixels()),
          totals(in_place ? 0 : job.images.channels * job.most_pixels()),
          owner(job.most_pixels()) {}
    Noise noise;
    std::vector<W> of_passes, totals;
    std::vector<uint32_t> owner;
    std::vector<Run> runs;
  };

  // Returns the memory in which the gradient of channel c of x is summed over all draws.
  W* total(Piece piece, int64_t c, Scratch& scratch) const {
    if constexpr (in_place) return result + job.in_images(piece) + c * job.images.plane();
    return scratch.totals.data() + c * job.most_pixels();
  }

  // Adds one draw of a piece. Requires that Grad is the dtype of the arithmetic.
  void by_runs(Piece piece, int64_t draw, Scratch& scratch) const {
    const int64_t plane = job.images.plane();
    const W* from = reinterpret_cast<const W*>(grad) + job.in_packed(piece, draw);
    const Strip strip = strip_of(job, piece, draw, scratch.runs);
    for (int64_t c = 0; c < job.images.channels; ++c) {
      slope(images + job.in_images(piece) + c * plane, scratch.noise.of_runs(piece, draw, c, strip),
            static_cast<W>(job.sigma), from + c * plane, draw == 0, strip, total(piece, c, scratch));
    }
  }

  // Sums the gradients of all passes for one channel.
  void sum_passes(Piece piece, int64_t draw, int64_t c, Scratch& scratch) const {
    const int64_t n = job.pixels(piece);
    const Grad* from = grad + job.in_packed(piece, draw) + c * job.channel_stride();
    W* sum = scratch.of_passes.data();
    if (job.strategy == Strategy::by_blocks) {
      const Blocks blocks{.owners = job.owners_of(piece, draw),
                          .columns = job.grid.columns,
                          .tall = job.grid.tall,
                          .wide = job.grid.wide};
      add_blocks(from, job.pass_stride(), job.passes, blocks, piece.first_row, piece.rows, sum);
    } else {
      std::fill_n(sum, n, W(0));
      add_seen(from, job.pass_stride(), job.pixel_stride(), scratch.owner.data(), static_cast<uint32_t>(job.first_pass),
               job.passes, sum, n);
    }
  }

  // Adds one draw of a piece. The passes are summed first, so that the noise is drawn only once.
  void by_sums(Piece piece, int64_t draw, Scratch& scratch) const {
    const int64_t n = job.pixels(piece);
    if (job.strategy == Strategy::by_owners) owners_of_pixels(job, piece, draw, scratch.owner.data());
    const Run whole{.begin = 0, .length = n, .seen = true};
    const Strip strip{.rows = 1, .width = n, .runs = &whole, .count = 1};
    for (int64_t c = 0; c < job.images.channels; ++c) {
      sum_passes(piece, draw, c, scratch);
      slope(images + job.in_images(piece) + c * job.images.plane(), scratch.noise.of_pixels(piece, draw, c),
            static_cast<W>(job.sigma), scratch.of_passes.data(), draw == 0, strip, total(piece, c, scratch));
    }
  }

  void round(Piece piece, Scratch& scratch) const {
    for (int64_t c = 0; c < job.images.channels; ++c) {
      auto* to = reinterpret_cast<word_t<In>*>(result) + job.in_images(piece) + c * job.images.plane();
      round_to(In{}, total(piece, c, scratch), to, job.pixels(piece));
    }
  }

  void rows(int64_t begin, int64_t end) const {
    Scratch scratch(job);
    for_pieces(job, begin, end, [&](Piece piece) {
      for (int64_t draw = 0; draw < job.samples; ++draw) {
        if (job.strategy == Strategy::by_runs) {
          by_runs(piece, draw, scratch);
        } else {
          by_sums(piece, draw, scratch);
        }
      }
      if (!in_place) round(piece, scratch);
    });
  }
};

Tensor random_transform_backward(Tensor grad, Tensor x, Tensor owners, Tensor seed, Tensor sample_ids, double sigma,
                                 int64_t num_passes) {
  x = dense(x);
  owners = dense(owners);
  const bool channels_last = is_channels_last(grad);
  if (!channels_last) grad = dense(grad);
  const Tensor ids = dense(sample_ids);
  const Images images{.batch = x.size(0), .channels = x.size(1), .height = x.size(2), .width = x.size(3)};
  Job job{.images = images,
          .grid = grid_of(images, owners.size(2), owners.size(3)),
          .samples = owners.size(0),
          .passes = num_passes == 0 ? 1 : num_passes,
          .first_pass = num_passes == 0 ? 1 : 0,
          .channels_last = channels_last,
          .key = key_of(*data<int64_t>(seed)),
          .sigma = sigma,
          .owners = data<uint8_t>(owners),
          .sample_ids = data<int64_t>(ids)};
  plan(job, grad.scalar_type() != wide_dtype(x.scalar_type()), true, channels_last ? chunk : long_chunk);
  Tensor result = new_like(x);
  const int64_t cost = job.samples * images.width * images.channels * (8 + job.passes);
  dispatch(x.scalar_type(), "random_transform_backward", [&](auto in) {
    dispatch(grad.scalar_type(), "random_transform_backward", [&](auto out) {
      using In = decltype(in);
      using Grad = decltype(out);
      const Backward<In, Grad> backward{job, data<In>(x), data<Grad>(grad), writable<In>(result)};
      parallel_rows(images.batch * images.height, cost, [&](int64_t begin, int64_t end) { backward.rows(begin, end); });
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

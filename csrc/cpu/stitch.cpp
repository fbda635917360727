#include "../core/stitch.h"

#include <algorithm>
#include <cstring>

#include "common.h"

namespace pf::cpu {
namespace {

int64_t size_of(ScalarType dtype) {
  int64_t bytes = 0;
  dispatch(dtype, "stitch", [&](auto tag) { bytes = sizeof(tag); });
  return bytes;
}

// For every pass, writes the elements of `row` (length n) that the pass owns, and zeros elsewhere. The outputs of two
// passes are `stride` elements apart. memcpy is not used, because few neighboring elements have the same owner.
PF_CLONES void share_out(const uint16_t* __restrict__ row, const uint16_t* __restrict__ owner, int64_t passes,
                         int64_t stride, uint16_t* __restrict__ out, int64_t n) {
  for (int64_t pass = 0; pass < passes; ++pass, out += stride) {
    // Owners are below 256, so later passes own nothing.
    const auto part = static_cast<uint16_t>(std::min<int64_t>(pass, 256));
    for (int64_t i = 0; i < n; ++i) {
      // The value is read in any case, so that the loop is vectorized.
      const uint16_t value = row[i];
      out[i] = owner[i] == part ? value : uint16_t(0);
    }
  }
}

// Divides the stitched images into runs of bytes. A run is the part of a row of pixels that lies in one block, for one
// channel (in channels_last, for all channels). Each run is copied from one pass.
struct Runs {
  // `rows` is the number of rows of runs in an image. In channels_last, a row of runs has all channels.
  int64_t images, rows, height;
  // The size of a run.
  int64_t bytes;
  Blocks blocks;

  int64_t row_bytes() const { return bytes * blocks.columns; }
  int64_t image_bytes() const { return bytes * blocks.columns * rows; }
};

Runs runs_of(const Tensor& images, const Tensor& owners, bool channels_last) {
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t grid_rows = owners.size(2), columns = owners.size(3), wide = width / columns;
  return {owners.size(0) * owners.size(1),
          channels_last ? height : channels * height,
          height,
          size_of(images.scalar_type()) * wide * (channels_last ? channels : 1),
          {height / grid_rows, wide, columns}};
}

// Calls f(image, row of runs, owners of its blocks) on PyTorch's threads. Each thread has its own copy of f.
template <class F>
void for_each_row(const Runs& runs, const Tensor& owners, const F& f) {
  const uint8_t* of_block = data<uint8_t>(owners);
  const int64_t blocks = owners.size(2) * owners.size(3);
  parallel_rows(runs.images * runs.rows, runs.row_bytes() / 4, [&](int64_t begin, int64_t end) {
    F own = f;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / runs.rows, row = i % runs.rows;
      own(image, row, of_block + image * blocks + runs.blocks.of(row % runs.height, 0));
    }
  });
}

Tensor stitch(Tensor images, Tensor owners, int64_t passes) {
  const bool channels_last = is_channels_last(images);
  if (!channels_last) images = dense(images);
  owners = dense(owners);
  const Runs runs = runs_of(images, owners, channels_last);
  Tensor out =
      new_images(runs.images, images.size(1), images.size(2), images.size(3), images.scalar_type(), channels_last);
  const auto* from = data<uint8_t>(images);
  auto* to = writable<uint8_t>(out);
  for_each_row(runs, owners, [&](int64_t image, int64_t row, const uint8_t* owner) {
    // `first` is the start of the row in the first pass.
    const uint8_t* first = from + image * passes * runs.image_bytes() + row * runs.row_bytes();
    uint8_t* run = to + image * runs.image_bytes() + row * runs.row_bytes();
    for (int64_t column = 0; column < runs.blocks.columns; ++column, first += runs.bytes, run += runs.bytes) {
      if (owner[column] < passes) {
        std::memcpy(run, first + owner[column] * runs.image_bytes(), runs.bytes);
      } else {
        std::memset(run, 0, runs.bytes);
      }
    }
  });
  return out;
}

Tensor stitch_backward(Tensor grad, Tensor owners, int64_t passes) {
  const bool channels_last = is_channels_last(grad);
  if (!channels_last) grad = dense(grad);
  owners = dense(owners);
  const Runs runs = runs_of(grad, owners, channels_last);
  Tensor out =
      new_images(runs.images * passes, grad.size(1), grad.size(2), grad.size(3), grad.scalar_type(), channels_last);
  // The elements of every dtype consist of whole 16-bit words.
  const auto* from = data<uint16_t>(grad);
  auto* to = writable<uint16_t>(out);
  const int64_t words = runs.row_bytes() / 2, image_words = runs.image_bytes() / 2;
  std::vector<uint16_t> of_words(words);
  // The owners for which of_words was filled. Consecutive rows mostly have the same owners.
  const uint8_t* known = nullptr;
  for_each_row(runs, owners, [=](int64_t image, int64_t row, const uint8_t* owner) mutable {
    if (owner != known) {
      for (int64_t column = 0; column < runs.blocks.columns; ++column) {
        std::fill_n(of_words.data() + column * runs.bytes / 2, runs.bytes / 2, uint16_t(owner[column]));
      }
      known = owner;
    }
    share_out(from + image * image_words + row * words, of_words.data(), passes, image_words,
              to + image * passes * image_words + row * words, words);
  });
  return out;
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) {
  m.impl("stitch", TORCH_BOX(&pf::cpu::stitch));
  m.impl("stitch_backward", TORCH_BOX(&pf::cpu::stitch_backward));
}

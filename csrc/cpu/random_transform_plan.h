// Plans one call of random_transform: how the images are divided into pieces, where a piece lies in each tensor, and
// which noise a piece needs.
#pragma once

#include <algorithm>

#include "philox.h"
#include "random_transform_loops.h"

namespace pf::cpu {
namespace {

// The numbers of pixels of a plane that are computed together. These pixels fit into the cache. `long_chunk` is faster
// if planes are read and written without gaps.
constexpr int64_t chunk = 1024, long_chunk = 8192;
// Blocks that are narrower than this are always processed pixel by pixel (`by_owners`, see Strategy).
constexpr int64_t least_wide = 16;

struct Images {
  int64_t batch, channels, height, width;
  int64_t plane() const { return height * width; }
};

struct Grid {
  int64_t rows, columns;
  // The size of a block in pixels.
  int64_t tall, wide;
  int64_t blocks() const { return rows * columns; }
};
Grid grid_of(Images images, int64_t rows, int64_t columns) {
  return {.rows = rows, .columns = columns, .tall = images.height / rows, .wide = images.width / columns};
}

// A few consecutive rows of one image. A thread processes one piece at a time.
struct Piece {
  int64_t image, first_row, rows;
};

// The ways to find the hidden pixels:
// - by_runs finds runs of columns, which are the same in every row of a block. For hidden pixels, nothing is drawn,
// computed or read.
// - by_blocks processes each block as a whole, and does not read the pass that hides the block. Only the backward uses
// it.
// - by_owners reads the owner of each pixel from a map. It works for every layout, dtype and block size.
enum class Strategy { by_runs, by_blocks, by_owners };

// The arguments of a call, and the sizes and strides of its tensors. There is one packed image, with channels + 2
// planes, for each draw, image and pass. The packed images are stored in this order: [draw, image, pass].
struct Job {
  Images images;
  Grid grid;
  Strategy strategy;
  // A piece does not cross a multiple of this number of rows.
  int64_t strip_rows;
  // The largest number of rows in a piece.
  int64_t most_rows;
  int64_t samples, passes;
  // The owner of the blocks that the first pass hides.
  int64_t first_pass;
  bool channels_last;
  Key key;
  double sigma;
  // The owners of the blocks, [draw, image, block].
  const uint8_t* owners;
  // The ids of the images, [image].
  const int64_t* sample_ids;

  int64_t planes() const { return images.channels + 2; }
  // The strides count elements of the packed images.
  int64_t pixel_stride() const { return channels_last ? planes() : 1; }
  int64_t channel_stride() const { return channels_last ? 1 : images.plane(); }
  int64_t pass_stride() const { return planes() * images.plane(); }

  int64_t most_pixels() const { return most_rows * images.width; }
  int64_t first_pixel(Piece piece) const { return piece.first_row * images.width; }
  int64_t pixels(Piece piece) const { return piece.rows * images.width; }
  // in_images returns the position at which the piece begins in channel 0 of the images. in_packed returns the position
  // at which it begins in the packed images, in channel 0 of its first pass.
  int64_t in_images(Piece piece) const { return piece.image * images.channels * images.plane() + first_pixel(piece); }
  int64_t in_packed(Piece piece, int64_t draw) const {
    return (draw * images.batch + piece.image) * passes * pass_stride() + first_pixel(piece) * pixel_stride();
  }
  const uint8_t* owners_of(Piece piece, int64_t draw) const {
    return owners + (draw * images.batch + piece.image) * grid.blocks();
  }
};

// Chooses the strategy and the size of a piece. by_runs requires a single pass, a result that needs neither rounding
// nor transposition, and wide blocks that begin at a group of the noise (four numbers). For the other strategies a
// piece has about `pixels` pixels.
void plan(Job& job, bool rounds, bool has_block_loop, int64_t pixels) {
  const bool wide = !job.channels_last && job.grid.wide >= least_wide;
  job.strategy = wide && job.passes == 1 && !rounds && job.grid.wide % 4 == 0 ? Strategy::by_runs
                 : wide && job.passes > 1 && has_block_loop                   ? Strategy::by_blocks
                                                                              : Strategy::by_owners;
  const bool by_runs = job.strategy == Strategy::by_runs;
  job.strip_rows = by_runs ? job.grid.tall : job.images.height;
  job.most_rows = std::clamp((by_runs ? long_chunk : pixels) / job.images.width, int64_t{1}, job.strip_rows);
}

// Calls f(piece) for the pieces of the rows begin .. end - 1. Rows are counted through all images of the batch.
template <class F>
void for_pieces(const Job& job, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t first = begin % job.images.height;
    const int64_t rows = std::min({job.most_rows, job.strip_rows - first % job.strip_rows, end - begin});
    f(Piece{.image = begin / job.images.height, .first_row = first, .rows = rows});
    begin += rows;
  }
}

// Writes the owner of every pixel of a piece.
template <class U>
void owners_of_pixels(const Job& job, Piece piece, int64_t draw, U* out) {
  const uint8_t* owners = job.owners_of(piece, draw);
  const Grid grid = job.grid;
  for (int64_t row = piece.first_row; row < piece.first_row + piece.rows; ++row) {
    const uint8_t* of_row = owners + row / grid.tall * grid.columns;
    for (int64_t column = 0; column < grid.columns; ++column, out += grid.wide) {
      std::fill_n(out, grid.wide, U(of_row[column]));
    }
  }
}

// Returns the piece as a strip of runs. All rows of the piece must be in one row of blocks. The strip points into
// `runs`.
Strip strip_of(const Job& job, Piece piece, int64_t draw, std::vector<Run>& runs) {
  const Grid grid = job.grid;
  const uint8_t* owners = job.owners_of(piece, draw) + piece.first_row / grid.tall * grid.columns;
  runs.clear();
  for (int64_t column = 0; column < grid.columns; ++column) {
    const bool seen = owners[column] != job.first_pass;
    if (!runs.empty() && runs.back().seen == seen) {
      runs.back().length += grid.wide;
    } else {
      runs.push_back({.begin = column * grid.wide, .length = grid.wide, .seen = seen});
    }
  }
  return {
      .rows = piece.rows, .width = job.images.width, .runs = runs.data(), .count = static_cast<int64_t>(runs.size())};
}

// Draws the normal numbers for a piece of an image, draw and channel; null if there is no noise.
class Noise {
 public:
  explicit Noise(const Job& job) : job_(job), numbers_(job.most_pixels() + 8), groups_(job.most_pixels() / 4 + 1) {}

  // Draws a number for every pixel.
  const float* of_pixels(Piece piece, int64_t draw, int64_t channel) {
    if (job_.sigma == 0) return nullptr;
    const int64_t first = first_element(piece, channel), skip = first % 4;
    fill_groups(Distribution::normal, job_.key, static_cast<uint32_t>(draw), sample(piece), Stream::transform_noise,
                first / 4, (skip + job_.pixels(piece) + 3) / 4, reinterpret_cast<uint32_t*>(numbers_.data()));
    return numbers_.data() + skip;
  }

  // Draws numbers for the visible runs only, without gaps. Every run consists of whole groups of four numbers.
  const float* of_runs(Piece piece, int64_t draw, int64_t channel, Strip strip) {
    if (job_.sigma == 0) return nullptr;
    const int64_t first = first_element(piece, channel);
    int64_t count = 0;
    for (int64_t row = 0; row < strip.rows; ++row) {
      for (int64_t r = 0; r < strip.count; ++r) {
        const Run run = strip.runs[r];
        if (!run.seen) continue;
        const auto group = static_cast<uint32_t>((first + row * strip.width + run.begin) / 4);
        for (int64_t i = 0; i < run.length / 4; ++i) groups_[count++] = group + static_cast<uint32_t>(i);
      }
    }
    fill_these(Distribution::normal, job_.key, static_cast<uint32_t>(draw), sample(piece), Stream::transform_noise,
               groups_.data(), count, reinterpret_cast<uint32_t*>(numbers_.data()));
    return numbers_.data();
  }

 private:
  int64_t first_element(Piece piece, int64_t channel) const {
    return channel * job_.images.plane() + job_.first_pixel(piece);
  }
  uint32_t sample(Piece piece) const { return static_cast<uint32_t>(job_.sample_ids[piece.image]); }

  const Job& job_;
  std::vector<float> numbers_;
  std::vector<uint32_t> groups_;
};

}  // namespace
}  // namespace pf::cpu

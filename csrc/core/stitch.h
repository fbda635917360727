// Finds the source of each pixel in a stitched image. purify_fast/ops/stitch.py has the definition.
#pragma once

#include "math.h"

namespace pf {

// Images that are divided into blocks: a block has `tall` x `wide` pixels, and there are `columns` blocks in a row.
struct Blocks {
  int64_t tall, wide, columns;

  // The index of the block that contains a pixel. Blocks are counted row by row.
  PF_INLINE int64_t of(int64_t row, int64_t column) const { return row / tall * columns + column / wide; }
};

}  // namespace pf

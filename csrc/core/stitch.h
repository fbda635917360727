// Where a pixel of a stitched image comes from (purify_fast/ops/stitch.py is the definition).
#pragma once

#include "math.h"

namespace pf {

// Images of `tall` x `wide` pixels a block, on a grid of `columns` blocks a row.
struct Blocks {
  int64_t tall, wide, columns;

  // The block of a pixel, counted row by row.
  PF_INLINE int64_t of(int64_t row, int64_t column) const { return row / tall * columns + column / wide; }
};

}  // namespace pf

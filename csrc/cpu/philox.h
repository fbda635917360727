// Fills memory with random numbers. Used by the philox op and by the ops that draw random numbers themselves.
#pragma once

#include "../core/philox.h"
#include "common.h"

namespace pf::cpu {

struct Rows {
  Key key;
  const int64_t* sample_ids;
  int64_t draws, first_draw;
  uint32_t stream;
};

// Writes the groups of four elements first .. first + count - 1 of a sample id and a draw, contiguous.
void fill_groups(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, int64_t first,
                 int64_t count, uint32_t* out);
// Like `fill_groups`, for a list of groups in any order.
void fill_these(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, const uint32_t* groups,
                int64_t count, uint32_t* out);

// Writes the rows begin .. end - 1 with `numel` elements each, where row = sample * draws + draw. `out` is contiguous.
void fill_rows(Distribution kind, const Rows& rows, int64_t begin, int64_t end, int64_t numel, uint32_t* out);

}  // namespace pf::cpu

// Fills rows of the random stream; shared by the philox op and by the ops that draw inside.
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

// Groups first .. first + count - 1 of one sample and draw, four elements each, one after the other in out.
void fill_groups(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, int64_t first,
                 int64_t count, uint32_t* out);
// The same of these groups, in any order.
void fill_these(Distribution kind, Key key, uint32_t draw, uint32_t sample, Stream stream, const uint32_t* groups,
                int64_t count, uint32_t* out);

// Rows begin .. end - 1 (row = sample * draws + draw) of `numel` elements each, one after the other in out.
void fill_rows(Distribution kind, const Rows& rows, int64_t begin, int64_t end, int64_t numel, uint32_t* out);

}  // namespace pf::cpu

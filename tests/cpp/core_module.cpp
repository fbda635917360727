// The random numbers of csrc/core as a Python module, for the tests in tests/test_core.py. It is not part of the
// package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "core/philox.h"

namespace {

std::vector<uint32_t> draw_group(int kind, int64_t seed, uint32_t group, uint32_t draw, uint32_t sample,
                                 uint32_t stream) {
  std::vector<uint32_t> out(4);
  pf::draw_group(static_cast<pf::Distribution>(kind), pf::key_of(seed), group, draw, sample, stream, out.data());
  return out;
}

}  // namespace

PYBIND11_MODULE(purify_fast_core, m) { m.def("draw_group", &draw_group); }

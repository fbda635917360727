// The random numbers and elementary functions of csrc/core as a Python module, for the property tests in
// tests/test_core.py. It is not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "core/math.h"
#include "core/philox.h"

namespace py = pybind11;

namespace {

std::vector<uint32_t> draw_group(int kind, int64_t seed, uint32_t group, uint32_t draw, uint32_t sample,
                                 uint32_t stream) {
  std::vector<uint32_t> out(4);
  pf::draw_group(static_cast<pf::Distribution>(kind), pf::key_of(seed), group, draw, sample, stream, out.data());
  return out;
}

template <class T>
float round_to(float x) {
  T stored;
  pf::store(stored, x);
  return pf::load(stored);
}

}  // namespace

PYBIND11_MODULE(purify_fast_core, m) {
  m.def("draw_group", &draw_group);
  m.def("exp", py::vectorize([](float x) { return pf::exp(x); }));
  m.def("expm1", py::vectorize([](float x) { return pf::expm1(x); }));
  m.def("log", py::vectorize([](float x) { return pf::log(x); }));
  m.def("log1p_unit", py::vectorize([](float x) { return pf::log1p_unit(x); }));
  m.def("round_half", py::vectorize(&round_to<pf::half>));
}

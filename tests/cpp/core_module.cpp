// csrc/core as a Python module, for the property tests in tests/test_core.py. Not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "core/aggregate.h"
#include "core/apgd_step.h"
#include "core/contextual_attention.h"
#include "core/gated_elu.h"
#include "core/hyperplane_projection.h"
#include "core/noisy_replay.h"
#include "core/pgd_step.h"
#include "core/philox.h"
#include "core/random_transform.h"
#include "core/reconstruction_loss.h"
#include "core/representation_distance.h"
#include "core/sample_latent.h"
#include "core/stitch.h"
#include "cpu/moved_rows.h"

namespace py = pybind11;

namespace {

template <class W>
using Array = py::array_t<W, py::array::c_style | py::array::forcecast>;

// A matrix whose row n is the sum of nine terms, which f(matrix, grid, n, masks, terms) finds in x [cells, cells].
template <class W, class F>
Array<W> sums_of_rows(const Array<W>& x, pf::Grid grid, F f) {
  const pf::cpu::Masks<W> masks(grid);
  const int64_t cells = grid.cells(), size = masks.size(), room = pf::cpu::reach(grid);
  std::vector<W> memory(cells * size + 2 * room), row(size);
  for (int64_t n = 0; n < cells; ++n) std::copy_n(x.data() + n * cells, cells, memory.data() + room + n * size);
  Array<W> out({cells, cells});
  for (int64_t n = 0; n < cells; ++n) {
    pf::cpu::Term<W> terms[9];
    f(pf::cpu::Padded<W>{memory.data() + room, size}, grid, n, masks, terms);
    pf::cpu::sum_terms<9>(terms, row.data(), size);
    std::copy_n(row.data(), cells, out.mutable_data() + n * cells);
  }
  return out;
}

std::vector<uint32_t> draw_group(int kind, int64_t seed, uint32_t group, uint32_t draw, uint32_t sample,
                                 uint32_t stream) {
  std::vector<uint32_t> out(4);
  pf::draw_group(static_cast<pf::Distribution>(kind), pf::key_of(seed), group, draw, sample, stream, out.data());
  return out;
}

template <class W>
void bind(py::module_& m, const char* suffix) {
  const auto name = [&](const char* base) { return std::string(base) + suffix; };
  // [samples, classes] -> [classes]
  m.def(name("aggregate").c_str(), [](int method, Array<W> logits) {
    const int64_t samples = logits.shape(0), classes = logits.shape(1);
    std::vector<W> tile(logits.data(), logits.data() + logits.size()), scratch(pf::aggregate_scratch_rows * classes);
    Array<W> out(classes);
    pf::aggregate_tile(static_cast<pf::Aggregation>(method), tile.data(), samples, 1, classes, classes,
                       out.mutable_data(), scratch.data());
    return out;
  });
  m.def(name("aggregate_backward").c_str(), [](int method, Array<W> grad, Array<W> logits) {
    const int64_t samples = logits.shape(0), classes = logits.shape(1);
    std::vector<W> g(grad.data(), grad.data() + grad.size()), scratch(pf::aggregate_scratch_rows * classes);
    Array<W> out({samples, classes});
    std::copy(logits.data(), logits.data() + logits.size(), out.mutable_data());
    pf::aggregate_tile_backward(static_cast<pf::Aggregation>(method), out.mutable_data(), g.data(), samples, 1, classes,
                                classes, scratch.data());
    return out;
  });
  // one sample [n]
  m.def(name("pgd_step").c_str(), [](Array<W> x, Array<W> grad, Array<W> x_nat, W alpha, W eps, int norm, W lo, W hi) {
    const pf::PgdStep<W> step{alpha, eps, lo, hi};
    Array<W> out(x.size());
    if (static_cast<pf::Norm>(norm) == pf::Norm::l2) {
      pf::pgd_step_l2(x.data(), grad.data(), x_nat.data(), out.mutable_data(), x.size(), step);
    } else {
      for (py::ssize_t i = 0; i < x.size(); ++i) {
        out.mutable_data()[i] = pf::pgd_step_linf(x.data()[i], grad.data()[i], x_nat.data()[i], step);
      }
    }
    return out;
  });
  m.def(name("pgd_step_l1").c_str(),
        [](Array<W> x, Array<W> grad, Array<W> x_nat, W alpha, W eps, int64_t k, W lo, W hi) {
          Array<W> out(x.size());
          std::vector<W> scratch(3 * x.size());
          pf::pgd_step_l1(x.data(), grad.data(), x_nat.data(), out.mutable_data(), x.size(),
                          pf::PgdStep<W>{alpha, eps, lo, hi}, k, scratch.data());
          return out;
        });
  m.def(name("apgd_step").c_str(), [](Array<W> x, Array<W> grad, Array<W> x_nat, Array<W> previous, W alpha, W eps,
                                      W momentum, int norm, W lo, W hi) {
    const pf::ApgdStep<W> step{{alpha, eps, lo, hi}, momentum, 1 - momentum};
    Array<W> out(x.size());
    if (static_cast<pf::Norm>(norm) == pf::Norm::l2) {
      std::vector<W> scratch(x.size());
      pf::apgd_step_l2(x.data(), grad.data(), x_nat.data(), previous.data(), out.mutable_data(), x.size(), step,
                       scratch.data());
    } else {
      for (py::ssize_t i = 0; i < x.size(); ++i) {
        out.mutable_data()[i] =
            pf::apgd_step_linf(x.data()[i], grad.data()[i], x_nat.data()[i], previous.data()[i], step);
      }
    }
    return out;
  });
  m.def(name("hyperplane_projection").c_str(), [](Array<W> x, Array<W> w, W b, int norm, W lo, W hi) {
    Array<W> out(x.size());
    std::vector<W> scratch(2 * x.size());
    pf::hyperplane_projection(x.data(), w.data(), out.mutable_data(), x.size(), static_cast<pf::Norm>(norm),
                              pf::Plane<W>{b, lo, hi}, scratch.data());
    return out;
  });
  m.def(name("reconstruction_loss").c_str(), [](Array<W> logits, Array<W> target) {
    return pf::reconstruction_loss(logits.data(), target.data(), logits.size());
  });
  m.def(name("reconstruction_loss_slope").c_str(),
        py::vectorize([](W logit, W target) { return pf::reconstruction_loss_slope(logit, target); }));
  // one sample [n] twice -> (distance, scale, along)
  m.def(name("representation_distance").c_str(), [](int kind, Array<W> student, Array<W> teacher) {
    const pf::Measured d =
        pf::representation_distance(static_cast<pf::Distance>(kind), student.data(), teacher.data(), student.size());
    return std::array<double, 3>{d.distance, d.scale, d.along};
  });
  m.def(name("replayed").c_str(),
        py::vectorize([](W x, float uniform, W eps, W lo, W hi) { return pf::replayed(x, uniform, eps, lo, hi); }));
  m.def(name("gated_elu").c_str(), py::vectorize([](W a, W b) { return pf::gated_elu(a, b); }));
  m.def(name("gated_elu_slope").c_str(), [](W a, W b) {
    const auto slope = pf::gated_elu_slope(a, b);
    return std::make_pair(slope.a, slope.b);
  });
  // rows of a [cells, cells] matrix
  m.def(name("window").c_str(), [](Array<W> x, int64_t height, int64_t width, std::array<int, 4> moves) {
    return sums_of_rows<W>(
        x, {height, width},
        [&](const auto& matrix, pf::Grid grid, int64_t n, const auto& masks, pf::cpu::Term<W>* terms) {
          neighbour_terms(matrix, 0, grid, n, masks, terms);
          for (int k = 0; k < 9; ++k) {
            const int down = k / 3 - 1, right = k % 3 - 1;
            if (down < moves[0] || down > moves[1] || right < moves[2] || right > moves[3])
              terms[k].mask = masks.none();
          }
        });
  });
  m.def(name("fuse").c_str(), [](Array<W> x, int64_t height, int64_t width, bool by_columns) {
    return sums_of_rows<W>(
        x, {height, width},
        [&](const auto& matrix, pf::Grid grid, int64_t n, const auto& masks, pf::cpu::Term<W>* terms) {
          for (int k = 0; k < 9; ++k) terms[k] = {matrix.at(n, 0), masks.none()};
          if (by_columns) {
            column_terms(matrix, grid, n, masks, terms);
          } else {
            row_terms(matrix, grid.cells(), n, masks, terms);
          }
        });
  });
  m.def(name("attention").c_str(), [](Array<W> scores, Array<W> keep, W scale) {
    Array<W> out(scores.size());
    std::copy_n(scores.data(), scores.size(), out.mutable_data());
    pf::attention_row(out.mutable_data(), keep.data(), scale, scores.size());
    return out;
  });
  m.def(name("divergence").c_str(),
        [](Array<W> mu, Array<W> logvar) { return pf::divergence(mu.data(), logvar.data(), mu.size()); });
  m.def(name("transformed").c_str(),
        py::vectorize([](W x, W noise, W sigma) { return pf::transformed(x, noise, sigma); }));
  m.def(name("transformed_slope").c_str(),
        py::vectorize([](W x, W noise, W sigma, W grad) { return pf::transformed_slope(x, noise, sigma, grad); }));
  m.def(name("latent").c_str(), py::vectorize([](W mu, W logvar, W noise) { return pf::latent(mu, logvar, noise); }));
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
  m.def("owner_of", &pf::owner_of);
  m.def("block_of", [](int64_t tall, int64_t wide, int64_t columns, int64_t row, int64_t column) {
    return pf::Blocks{tall, wide, columns}.of(row, column);
  });
  m.def("exp", py::vectorize([](float x) { return pf::exp(x); }));
  m.def("expm1", py::vectorize([](float x) { return pf::expm1(x); }));
  m.def("log", py::vectorize([](float x) { return pf::log(x); }));
  m.def("log1p_unit", py::vectorize([](float x) { return pf::log1p_unit(x); }));
  m.def("round_half", py::vectorize(&round_to<pf::half>));
  m.def("round_bfloat16", py::vectorize(&round_to<pf::bfloat16>));
  bind<float>(m, "");
  bind<double>(m, "_double");
}

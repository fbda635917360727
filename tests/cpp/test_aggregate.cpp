#include <vector>

#include "check.h"
#include "core/aggregate.h"

namespace {

using pf::Aggregation;

// Aggregates the logits [samples][classes] of one image.
template <class W>
std::vector<W> run(Aggregation method, std::vector<W> logits, int classes) {
  const int64_t samples = static_cast<int64_t>(logits.size()) / classes;
  std::vector<W> out(classes), scratch(pf::aggregate_scratch_rows * classes);
  pf::aggregate_tile(method, logits.data(), samples, 1, classes, classes, out.data(), scratch.data());
  return out;
}

template <class W>
std::vector<W> gradient(Aggregation method, std::vector<W> logits, std::vector<W> grad) {
  const int64_t classes = static_cast<int64_t>(grad.size()), samples = static_cast<int64_t>(logits.size()) / classes;
  std::vector<W> scratch(pf::aggregate_scratch_rows * classes);
  pf::aggregate_tile_backward(method, logits.data(), grad.data(), samples, 1, classes, classes, scratch.data());
  return logits;
}

// Three classes and two samples.
void published_example() {
  const std::vector<double> logits{1, 0, -1, .5, .2, -.3};
  const auto check_all = [&](Aggregation method, std::vector<double> wanted, double tolerance) {
    const auto out = run(method, logits, 3);
    for (int i = 0; i < 3; ++i) CHECK_NEAR(out[i], wanted[i], tolerance);
  };
  check_all(Aggregation::lse, {std::log(4.367003), std::log(2.221403), std::log(1.108698)}, 1e-6);
  check_all(Aggregation::peel, {std::log(0.865463), std::log(0.101257), std::log(0.033280)}, 1e-4);
  check_all(Aggregation::mean, {.75, .1, -.65}, 1e-12);
  check_all(Aggregation::probability, {.7389, .0998, -.6312}, 1e-4);
  check_all(Aggregation::vote, {2, 0, 0}, 0);
  const auto even = run<double>(Aggregation::peel, {0, 1, 0, 1, 0, 0}, 3);
  CHECK_NEAR(std::exp(even[0]), 0.458847, 1e-6);
  CHECK_NEAR(std::exp(even[2]), 0.082305, 1e-6);
}

// Ten classes and eight samples, with logits (t, 0, ..., 0). The published form is infinite from t = 2 on.
void saturation() {
  for (auto [t, wanted] : {std::pair{2.0f, -51.112f}, std::pair{3.0f, -152.684f}, std::pair{100.0f, 0.0f}}) {
    std::vector<float> logits(80, 0.0f);
    for (int k = 0; k < 8; ++k) logits[10 * k] = t;
    const auto out = run(Aggregation::peel, logits, 10);
    if (t < 100) CHECK_NEAR(out[1], wanted, 2e-3);
    for (float value : out) CHECK(pf::finite(value));
    for (float value : gradient(Aggregation::peel, logits, std::vector<float>{-1, 0, 0, 0, 0, 1, 0, 0, 0, 0})) {
      CHECK(pf::finite(value));
    }
  }
  std::vector<float> logits(80, 0.0f);
  for (int k = 0; k < 8; ++k) logits[10 * k] = 1;
  CHECK_NEAR(run(Aggregation::peel, logits, 10)[0], -9.656e-6, 1e-6);
}

void tangent() {
  float slope;
  CHECK_NEAR(pf::tangent_exp(70.0f, slope) / std::exp(70.0), 1, 1e-6);
  const float at = slope;
  CHECK_NEAR(pf::tangent_exp(72.0f, slope) / (3 * std::exp(70.0)), 1, 1e-6);
  CHECK(slope == at);
  CHECK(pf::finite(pf::tangent_exp(1e8f, slope)));
  CHECK(std::isnan(pf::tangent_exp(NAN, slope)));
}

void special_values() {
  for (auto method : {Aggregation::lse, Aggregation::peel, Aggregation::mean, Aggregation::probability}) {
    CHECK(std::isnan(run<float>(method, {0, NAN, 0, 1}, 2)[1]));
  }
  CHECK(run<float>(Aggregation::lse, {-INFINITY, 0, -INFINITY, 0}, 2)[0] == -INFINITY);
  CHECK(run<float>(Aggregation::lse, {INFINITY, 0, 0, 0}, 2)[0] == INFINITY);
  // NaN counts as the largest number, like in torch.argmax.
  CHECK(run<float>(Aggregation::vote, {0, 1, NAN, 1}, 2)[0] == 1);
  // Among equal numbers the first wins.
  CHECK(run<float>(Aggregation::vote, {3, 3}, 2)[0] == 1);
  for (float value : run<float>(Aggregation::probability, {1000, -1000, 900, -900}, 2)) CHECK(pf::finite(value));
}

// Compares with central differences in float64.
void gradients() {
  const std::vector<double> logits{.3, -1.2, 2, .7, 1.5, -.4, -.9, .1, .6}, grad{.5, -1, .25};
  for (auto method : {Aggregation::lse, Aggregation::peel, Aggregation::mean, Aggregation::probability}) {
    const auto analytic = gradient(method, logits, grad);
    for (size_t i = 0; i < logits.size(); ++i) {
      auto up = logits, down = logits;
      up[i] += 1e-5;
      down[i] -= 1e-5;
      const auto high = run(method, up, 3), low = run(method, down, 3);
      double slope = 0;
      for (int c = 0; c < 3; ++c) slope += grad[c] * (high[c] - low[c]) / 2e-5;
      CHECK_NEAR(analytic[i], slope, 1e-6 * (1 + std::abs(slope)));
    }
  }
}

}  // namespace

int main() {
  published_example();
  saturation();
  tangent();
  special_values();
  gradients();
  return failures > 0;
}

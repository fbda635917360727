#include <vector>

#include "check.h"
#include "core/apgd_step.h"

namespace {

constexpr pf::ApgdStep<float> step{{0.1f, 0.3f, 0.0f, 1.0f}, 0.75f, 0.25f};
constexpr pf::ApgdStep<float> first{{0.1f, 0.3f, 0.0f, 1.0f}, 1.0f, 0.0f};

void linf() {
  CHECK_NEAR(pf::apgd_step_linf(0.5f, 2.0f, 0.5f, 0.5f, first), 0.6, 1e-7);
  CHECK_NEAR(pf::apgd_step_linf(0.5f, 2.0f, 0.5f, 0.5f, step), 0.575, 1e-7);
  // The momentum adds a quarter of the last move.
  CHECK_NEAR(pf::apgd_step_linf(0.5f, 2.0f, 0.5f, 0.42f, step), 0.595, 1e-7);
  // The momentum also acts if the gradient points back.
  CHECK_NEAR(pf::apgd_step_linf(0.5f, -2.0f, 0.5f, 0.42f, step), 0.445, 1e-7);
  // The box limits the step.
  CHECK(pf::apgd_step_linf(0.95f, 1.0f, 0.9f, 0.5f, step) == 1.0f);
  // The ball limits the step.
  CHECK(pf::apgd_step_linf(0.79f, 1.0f, 0.5f, 0.5f, step) == 0.5f + 0.3f);
  for (float g : {0.0f, NAN, INFINITY, -INFINITY}) {
    CHECK(pf::apgd_step_linf(0.5f, g, 0.5f, 0.5f, step) == 0.5f);
    // Only the momentum moves the element.
    CHECK_NEAR(pf::apgd_step_linf(0.5f, g, 0.5f, 0.46f, step), 0.51, 1e-7);
  }
  CHECK(std::isnan(pf::apgd_step_linf(NAN, 1.0f, 0.5f, 0.5f, step)));
  CHECK(std::isnan(pf::apgd_step_linf(0.5f, 1.0f, NAN, 0.5f, step)));
  CHECK(std::isnan(pf::apgd_step_linf(0.5f, 1.0f, 0.5f, NAN, step)));
}

void l2() {
  const int n = 37;
  std::vector<float> x(n), grad(n), natural(n, 0.5f), previous(n), out(n), scratch(n);
  const auto run = [&](const pf::ApgdStep<float>& how) {
    pf::apgd_step_l2(x.data(), grad.data(), natural.data(), previous.data(), out.data(), n, how, scratch.data());
  };
  // The squares of some of these scales underflow or overflow.
  for (float scale : {1e-40f, 1e-30f, 1.0f, 1e30f}) {
    x = previous = natural;
    for (int i = 0; i < n; ++i) grad[i] = scale * static_cast<float>(std::sin(i + 1.0));
    // All steps have the same direction, so these are distances along it.
    double at = 0, before = 0;
    for (int steps = 1; steps <= 10; ++steps) {
      run(steps == 1 ? first : step);
      const double moved = std::fmin(at + 0.1, 0.3) - at;
      const double next = steps == 1 ? 0.1 : std::fmin(at + 0.75 * moved + 0.25 * (at - before), 0.3);
      before = at;
      at = next;
      double square = 0;
      for (int i = 0; i < n; ++i) square += (out[i] - 0.5) * (out[i] - 0.5);
      CHECK_NEAR(std::sqrt(square), at, 1e-4);
      previous = x;
      x = out;
    }
  }
  x = previous = natural;
  // Such a gradient does not move the sample.
  for (float bad : {0.0f, NAN, INFINITY}) {
    grad.assign(n, bad == 0.0f ? 0.0f : 1.0f);
    grad[n - 1] = bad;
    run(step);
    for (int i = 0; i < n; ++i) CHECK(out[i] == 0.5f);
  }
  grad.assign(n, 1.0f);
  previous[3] = NAN;
  run(step);
  CHECK(std::isnan(out[3]) && !std::isnan(out[4]));
}

}  // namespace

int main() {
  linf();
  l2();
  return failures > 0;
}

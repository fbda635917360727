#include <vector>

#include "check.h"
#include "core/pgd_step.h"

namespace {

constexpr pf::PgdStep<float> step{0.1f, 0.3f, 0.0f, 1.0f};

void linf() {
  CHECK(pf::pgd_step_linf(0.5f, 2.0f, 0.5f, step) == 0.5f + 0.1f);
  CHECK(pf::pgd_step_linf(0.5f, -1e-45f, 0.5f, step) == 0.5f - 0.1f);
  CHECK(pf::pgd_step_linf(0.5f, 0.0f, 0.5f, step) == 0.5f);
  // The box limits the step.
  CHECK(pf::pgd_step_linf(0.95f, 1.0f, 0.9f, step) == 1.0f);
  // The ball limits the step.
  CHECK(pf::pgd_step_linf(0.9f, 1.0f, 0.5f, step) == 0.5f + 0.3f);
  for (float g : {NAN, INFINITY, -INFINITY}) CHECK(pf::pgd_step_linf(0.5f, g, 0.5f, step) == 0.5f);
  CHECK(std::isnan(pf::pgd_step_linf(NAN, 1.0f, 0.5f, step)));
  CHECK(std::isnan(pf::pgd_step_linf(0.5f, 1.0f, NAN, step)));
}

void l2() {
  const int n = 37;
  std::vector<float> x(n), grad(n), natural(n), out(n);
  // The squares of some of these scales underflow or overflow.
  for (float scale : {1e-40f, 1e-30f, 1.0f, 1e30f}) {
    for (int i = 0; i < n; ++i) {
      natural[i] = x[i] = 0.5f;
      grad[i] = scale * static_cast<float>(std::sin(i + 1.0));
    }
    for (int steps = 1; steps <= 10; ++steps) {
      pf::pgd_step_l2(x.data(), grad.data(), natural.data(), out.data(), n, step);
      double square = 0;
      for (int i = 0; i < n; ++i) square += (out[i] - 0.5) * (out[i] - 0.5);
      CHECK_NEAR(std::sqrt(square), std::fmin(0.1 * steps, 0.3), 1e-4);
      x = out;
    }
  }
  x.assign(n, 0.5f);
  // Such a gradient does not move the sample.
  for (float bad : {0.0f, NAN, INFINITY}) {
    grad.assign(n, bad == 0.0f ? 0.0f : 1.0f);
    grad[n - 1] = bad;
    pf::pgd_step_l2(x.data(), grad.data(), natural.data(), out.data(), n, step);
    for (int i = 0; i < n; ++i) CHECK(out[i] == 0.5f);
  }
  grad.assign(n, 1.0f);
  x[3] = NAN;
  pf::pgd_step_l2(x.data(), grad.data(), natural.data(), out.data(), n, step);
  CHECK(std::isnan(out[3]) && !std::isnan(out[4]));
}

void largest() {
  const std::vector<float> x{3.0f, 0.0f, 1e-45f, 2.0f, 2.0f, 1e30f};
  const auto reach = [&](int64_t k) {
    const float least = pf::reached_by(k, x.data(), 6, 1e30f);
    int count = 0;
    for (float value : x) count += value >= least;
    return count;
  };
  CHECK(reach(1) == 1);
  CHECK(reach(2) == 2);
  // Two numbers are equal.
  CHECK(reach(3) == 4);
  CHECK(reach(4) == 4);
  CHECK(reach(5) == 5);
  // A 0 is never selected.
  CHECK(reach(6) == 5);
  const std::vector<float> zeros(4);
  CHECK(pf::reached_by(2, zeros.data(), 4, 0.0f) > 0.0f);
}

void l1() {
  const int n = 37, k = 5;
  std::vector<float> x(n, 0.5f), grad(n), natural(n, 0.5f), out(n), scratch(3 * n);
  for (float scale : {1e-40f, 1e-30f, 1.0f, 1e30f}) {
    x.assign(n, 0.5f);
    for (int i = 0; i < n; ++i) grad[i] = scale * static_cast<float>((i % 2 ? 1 : -1) * (i + 1));
    for (int steps = 1; steps <= 10; ++steps) {
      pf::pgd_step_l1(x.data(), grad.data(), natural.data(), out.data(), n, step, k, scratch.data());
      double size = 0;
      for (int i = 0; i < n; ++i) {
        size += std::abs(out[i] - 0.5);
        CHECK(i < n - k ? out[i] == 0.5f : (out[i] > 0.5f) == (i % 2 == 1));
      }
      CHECK_NEAR(size, std::fmin(0.1 * steps, 0.3), 1e-5);
      x = out;
    }
  }
  // The projection onto ball and box uses all of eps: the first coordinate can move only 0.1, so the others move
  // further.
  const std::vector<float> from{0.9f, 0.5f, 0.5f}, to{2.0f, 1.1f, 0.2f}, still(3);
  pf::pgd_step_l1(to.data(), still.data(), from.data(), out.data(), 3, {0.1f, 0.5f, 0.0f, 1.0f}, 1, scratch.data());
  CHECK(out[0] == 1.0f);
  CHECK_NEAR(out[1], 0.85, 2e-7);
  CHECK_NEAR(out[2], 0.45, 2e-7);
  x.assign(n, 0.5f);
  // Such a gradient does not move the sample.
  for (float bad : {0.0f, NAN, INFINITY}) {
    grad.assign(n, bad == 0.0f ? 0.0f : 1.0f);
    grad[n - 1] = bad;
    pf::pgd_step_l1(x.data(), grad.data(), natural.data(), out.data(), n, step, k, scratch.data());
    for (int i = 0; i < n; ++i) CHECK(out[i] == 0.5f);
  }
  grad.assign(n, 1.0f);
  x[3] = natural[5] = NAN;
  pf::pgd_step_l1(x.data(), grad.data(), natural.data(), out.data(), n, step, k, scratch.data());
  for (int i = 0; i < n; ++i) CHECK(std::isnan(out[i]) == (i == 3 || i == 5));
}

}  // namespace

int main() {
  linf();
  l2();
  largest();
  l1();
  return failures > 0;
}

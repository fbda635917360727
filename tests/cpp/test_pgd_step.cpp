#include <vector>

#include "check.h"
#include "core/pgd_step.h"

namespace {

constexpr pf::PgdStep<float> step{0.1f, 0.3f, 0.0f, 1.0f};

void linf() {
  CHECK(pf::pgd_step_linf(0.5f, 2.0f, 0.5f, step) == 0.5f + 0.1f);
  CHECK(pf::pgd_step_linf(0.5f, -1e-45f, 0.5f, step) == 0.5f - 0.1f);
  CHECK(pf::pgd_step_linf(0.5f, 0.0f, 0.5f, step) == 0.5f);
  CHECK(pf::pgd_step_linf(0.95f, 1.0f, 0.9f, step) == 1.0f);        // the box
  CHECK(pf::pgd_step_linf(0.9f, 1.0f, 0.5f, step) == 0.5f + 0.3f);  // the ball
  for (float g : {NAN, INFINITY, -INFINITY}) CHECK(pf::pgd_step_linf(0.5f, g, 0.5f, step) == 0.5f);
  CHECK(std::isnan(pf::pgd_step_linf(NAN, 1.0f, 0.5f, step)));
  CHECK(std::isnan(pf::pgd_step_linf(0.5f, 1.0f, NAN, step)));
}

void l2() {
  const int n = 37;
  std::vector<float> x(n), grad(n), natural(n), out(n);
  for (float scale : {1e-40f, 1e-30f, 1.0f, 1e30f}) {  // squares of these vanish, or overflow
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
  for (float bad : {0.0f, NAN, INFINITY}) {  // nothing moves
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

}  // namespace

int main() {
  linf();
  l2();
  return failures > 0;
}

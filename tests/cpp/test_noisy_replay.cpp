#include "check.h"
#include "core/noisy_replay.h"

namespace {

template <class W>
void values() {
  CHECK(pf::replayed(W(0.5), 0.75f, W(0.25), W(0), W(1)) == W(0.625));
  CHECK(pf::replayed(W(0.5), 0.5f, W(0.25), W(0), W(1)) == W(0.5));
  CHECK(pf::replayed(W(0.125), 0.0f, W(0.25), W(0), W(1)) == 0);
  CHECK(pf::replayed(W(0.875), 0x0.ffffffp0f, W(0.25), W(0), W(1)) == 1);
  CHECK(std::isnan(pf::replayed(W(NAN), 0.5f, W(0.25), W(0), W(1))));
  CHECK(std::isnan(pf::replayed(W(0.5), 0.25f, W(NAN), W(0), W(1))));
  // Rounding never moves a pixel out of the ball.
  for (int i = 0; i < 1000; ++i) {
    const W x = W(i) / 999, eps = W(8) / 255;
    const W least = pf::replayed(x, 0.0f, eps, W(-1), W(2)), most = pf::replayed(x, 0x0.ffffffp0f, eps, W(-1), W(2));
    CHECK(least == x - eps && most <= x + eps);
  }
}

// Checks drifts of 0, 0.10, 0.1339, 0.1340 and 0.5 with the threshold 1 - cos(30 degrees).
void mask() {
  const float tau = 0.1339746f;
  CHECK(!pf::is_replayed(0.0f, tau) && !pf::is_replayed(0.10f, tau) && !pf::is_replayed(0.1339f, tau));
  CHECK(pf::is_replayed(0.1340f, tau) && pf::is_replayed(0.5f, tau));
  CHECK(!pf::is_replayed(tau, tau) && !pf::is_replayed(NAN, tau) && !pf::is_replayed(0.5f, NAN));
}

}  // namespace

int main() {
  values<float>();
  values<double>();
  mask();
  return failures > 0;
}

#include "check.h"
#include "core/diffusion_step.h"

namespace {

template <class W>
void values() {
  const pf::StepCoefficients<W> k{W(2), W(-1), W(1), W(0.5), W(0.25), W(3), W(-2), W(2)};
  CHECK(pf::stepped(W(0.5), W(0.5), k) == W(0.375));
  // The image is clipped on both sides. The term of the state is not clipped.
  CHECK(pf::stepped(W(4), W(0), k) == W(1.5) && pf::stepped(W(-4), W(0), k) == W(-1.5));
  CHECK(std::isnan(pf::stepped(W(NAN), W(0), k)) && std::isnan(pf::stepped(W(0), W(NAN), k)));
  // Both ends of the clip pass the gradient. A NaN image has gradient 0.
  CHECK(pf::image_slope(W(0.5), W(0), W(8), k) == 4 && pf::image_slope(W(-0.5), W(0), W(8), k) == 4);
  CHECK(pf::image_slope(W(0.625), W(0), W(8), k) == 0 && pf::image_slope(W(NAN), W(0), W(8), k) == 0);
  pf::StepCoefficients<W> open = k;
  open.clip = W(INFINITY);
  CHECK(pf::stepped(W(4), W(0), open) == W(5) && pf::image_slope(W(4), W(0), W(8), open) == 4);
}

// For v = -1, 0 and 1 the deviation is exp(-1), 1 and exp(1), times the coefficient of the noise.
void variances() {
  const pf::StepCoefficients<double> k{1, 1, 1, 1, 1, 3, -2, 2};
  CHECK_NEAR(pf::learned_deviation(-1.0, k), 3 * std::exp(-1.0), 1e-12);
  CHECK_NEAR(pf::learned_deviation(0.0, k), 3, 1e-12);
  CHECK_NEAR(pf::learned_deviation(1.0, k), 3 * std::exp(1.0), 1e-12);
  const double h = 1e-6, noise = 0.7, grad = 5;
  const double difference = (pf::learned_deviation(0.3 + h, k) - pf::learned_deviation(0.3 - h, k)) / (2 * h);
  CHECK_NEAR(pf::learned_slope(0.3, noise, grad, k), grad * noise * difference, 1e-6);
}

}  // namespace

int main() {
  values<float>();
  values<double>();
  variances();
  return failures > 0;
}

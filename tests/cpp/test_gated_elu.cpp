#include <initializer_list>

#include "check.h"
#include "core/gated_elu.h"

int main() {
  CHECK_NEAR(pf::gated_elu(1.0f, 1.0f), 0.7310586, 1e-7);
  CHECK_NEAR(pf::gated_elu(-1.0f, 0.0f), -0.3160603, 1e-7);
  CHECK_NEAR(pf::gated_elu(-1.0, 0.0), (std::exp(-1.0) - 1) / 2, 1e-16);
  for (double a : {-20.0, -1.0, -1e-6, 0.0, 1e-6, 2.0}) {
    for (double b : {-80.0, -3.0, 0.0, 3.0, 40.0}) {
      const double gate = 1 / (1 + std::exp(-b)), rest = 1 / (1 + std::exp(b)), elu = a > 0 ? a : std::expm1(a);
      CHECK(ulps(pf::gated_elu(static_cast<float>(a), static_cast<float>(b)), pf::gated_elu<double>(float(a), b)) < 6);
      const auto slope = pf::gated_elu_slope(a, b);
      CHECK_NEAR(slope.a, gate * (a > 0 ? 1 : std::exp(a)), 1e-15);
      CHECK_NEAR(slope.b, elu * gate * rest, 1e-14);
      const auto single = pf::gated_elu_slope(static_cast<float>(a), static_cast<float>(b));
      const auto truth = pf::gated_elu_slope<double>(float(a), b);
      // No digits are lost for large |a| and |b|.
      CHECK(ulps(single.a, truth.a) < 6 && ulps(single.b, truth.b) < 8);
    }
  }
  CHECK(pf::gated_elu(1000.0f, 1000.0f) == 1000.0f && pf::gated_elu(-1000.0f, 1000.0f) == -1.0f);
  CHECK(std::isnan(pf::gated_elu(NAN, 0.0f)) && std::isnan(pf::gated_elu(0.5f, NAN)));
  CHECK(std::isnan(pf::gated_elu_slope(NAN, 0.0f).a) && std::isnan(pf::gated_elu_slope(0.5f, NAN).b));
  return failures > 0;
}

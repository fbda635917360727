#include <vector>

#include "check.h"
#include "core/reconstruction_loss.h"

int main() {
  // For p = (0.5, 0.25) and x = (1, 0) the loss is 0.980829.
  const double logits[] = {0, -std::log(3.0)}, target[] = {1, 0};
  CHECK_NEAR(pf::reconstruction_loss(logits, target, 2), 0.980829, 1e-6);
  // If p = 0.5 everywhere, the loss is n ln 2 for every target.
  std::vector<float> zeros(3072, 0.0f), images(3072);
  for (int i = 0; i < 3072; ++i) images[i] = static_cast<float>(i % 256) / 255;
  CHECK_NEAR(pf::reconstruction_loss(zeros.data(), images.data(), 3072), 2129.348, 1e-3);
  // These logits neither overflow nor lose digits.
  for (float l : {-1000.0f, -20.0f, 20.0f, 1000.0f}) {
    const float t = l > 0 ? 1.0f : 0.0f;
    CHECK_NEAR(pf::reconstruction_loss_term(l, t), std::exp(-std::abs(static_cast<double>(l))), 1e-15);
    CHECK(pf::reconstruction_loss_term(l, 1 - t) == std::abs(l));
    CHECK_NEAR(pf::reconstruction_loss_slope(l, 0.5f), l > 0 ? 0.5 : -0.5, 1e-7);
  }
  CHECK(std::isnan(pf::reconstruction_loss_term(NAN, 0.5f)) && std::isnan(pf::reconstruction_loss_term(0.5f, NAN)));
  return failures > 0;
}

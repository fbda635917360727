#include "check.h"
#include "core/sample_latent.h"

int main() {
  const double mu[] = {1, 0}, logvar[] = {0, std::log(4.0)}, zeros[] = {0, 0};
  CHECK_NEAR(pf::divergence(mu, logvar, 2), 1.306853, 1e-6);
  CHECK(pf::divergence(zeros, zeros, 2) == 0);
  // Near logvar = 0 the term is v^2 / 2. In float32, exp(v) - v - 1 would be 0.
  CHECK_NEAR(pf::divergence_term(0.0f, 1e-3f), std::expm1(1e-3) - 1e-3, 1e-10);
  CHECK_NEAR(pf::latent(1.0f, std::log(4.0f), 3.0f), 7, 1e-6);
  CHECK_NEAR(pf::latent_mu_slope(2.0, 3.0, 5.0), 13, 0);
  CHECK_NEAR(pf::latent_logvar_slope(std::log(4.0), 3.0, 5.0, 7.0), (5 * 3 * 2 + 7 * 3) / 2.0, 1e-12);
  CHECK(pf::divergence_term(0.0f, -INFINITY) == INFINITY);
  CHECK(std::isnan(pf::divergence_term(NAN, 0.0f)) && std::isnan(pf::latent(0.0f, NAN, 1.0f)));
  return failures > 0;
}

#include <array>
#include <vector>

#include "check.h"
#include "core/attack_loss.h"

namespace {

using pf::AttackLoss;

// The results for a row. `t` is the target class, or -1.
struct Found {
  std::vector<float> gradient;
  float loss, wrong;
};

Found found(std::vector<float> logits, int64_t y, AttackLoss kind, int64_t t = -1, float sign = 1) {
  Found out{std::vector<float>(logits.size()), 0, 0};
  const int64_t labels[] = {y, t}, n = static_cast<int64_t>(logits.size());
  std::vector<float> row(pf::padded(n));
  const pf::AttackRows<float> rows{logits.data(),       labels,    t < 0 ? 1 : 2, n, kind, sign,
                                   out.gradient.data(), &out.loss, &out.wrong};
  pf::attack_loss(rows, 0, 1, row.data());
  return out;
}

}  // namespace

int main() {
  // log softmax of (log 1, log 2, log 5) is log of (1, 2, 5) / 8.
  const std::vector<float> logs = {0, std::log(2.0f), std::log(5.0f)};
  auto ce = found(logs, 1, AttackLoss::ce, -1, -1);
  CHECK_NEAR(ce.loss, std::log(0.25f), 1e-7);
  CHECK(ce.wrong == 1);
  const std::array<double, 3> shares = {0.125, -0.75, 0.625};
  for (int i = 0; i < 3; ++i) CHECK_NEAR(ce.gradient[i], -shares[i], 1e-7);
  // Where the model is sure, no digits are lost, and the loss has a slope below every number that exp can compute.
  for (float sure : {6.0f, 30.0f, 61.0f}) {
    ce = found({sure, 0}, 0, AttackLoss::ce);
    const double loss = std::log1p(std::exp(-static_cast<double>(sure))), slope = -std::expm1(-loss);
    CHECK_NEAR(ce.loss / loss, 1, 1e-6);
    CHECK_NEAR(ce.gradient[1] / slope, 1, 1e-6);
    CHECK(ce.gradient[0] == -ce.gradient[1] && ce.wrong == 0);
  }
  CHECK(found({1e30f, 0}, 0, AttackLoss::ce).gradient[1] > 2e-27f);
  CHECK(found({5, -INFINITY}, 0, AttackLoss::ce).loss == 0);
  CHECK(std::isnan(found({5, NAN}, 0, AttackLoss::ce).gradient[0]));

  // Equal logits share the gradient, and the first of them decides.
  CHECK((found({3, 3, 1}, 2, AttackLoss::margin).gradient == std::vector<float>{0.5f, 0.5f, -1}));
  CHECK(found({3, 3, 1}, 0, AttackLoss::margin).wrong == 0 && found({3, 3, 1}, 1, AttackLoss::margin).wrong == 1);
  CHECK_NEAR(found({0, 2, 4, 6}, 0, AttackLoss::scaled_margin).loss, 6 / std::sqrt(5.0), 1e-6);
  // m / w = 4 / 3, and its gradient is (g - (m / w) (1, 0, -1)) / w with g = (1, -1, 0) for y = 1.
  auto dlr = found({4, 0, 1, 2}, 1, AttackLoss::dlr);
  CHECK_NEAR(dlr.loss, 4.0 / 3, 1e-6);
  const std::array<double, 4> slopes = {-1.0 / 9, -1.0 / 3, 4.0 / 9, 0};
  for (int i = 0; i < 4; ++i) CHECK_NEAR(dlr.gradient[i], slopes[i], 1e-6);
  CHECK((found({1, 2, 3}, 0, AttackLoss::margin_targeted, 0).gradient == std::vector<float>(3, 0)));
  CHECK_NEAR(found({4, 0, 1, 2}, 0, AttackLoss::dlr_targeted, 3).loss, -2 / 3.5, 1e-6);
  return failures > 0;
}

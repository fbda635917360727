#include <vector>

#include "check.h"
#include "core/contextual_attention.h"

int main() {
  std::vector<float> row(37), keep(37, 1.0f), scores(37);
  for (int i = 0; i < 37; ++i) row[i] = scores[i] = static_cast<float>(i % 7) * 30;
  keep[6] = 0;
  pf::attention_row(row.data(), keep.data(), 10.0f, 37);
  double total = 0;
  for (int i = 0; i < 37; ++i) total += row[i];
  CHECK(row[6] == 0);
  // Five scores are the largest, and one of them is hidden. So each of the other four has a weight of 1/4.
  CHECK_NEAR(total, 1, 1e-6);
  CHECK_NEAR(row[13], 0.25, 1e-6);
  scores[20] = NAN;
  pf::attention_row(scores.data(), keep.data(), 10.0f, 37);
  for (float weight : scores) CHECK(std::isnan(weight));

  // The sum of weight times slope is 1.25.
  double weights[] = {0.25, 0.5, 0}, slopes[] = {1, 2, 100};
  pf::attention_row_backward(slopes, weights, 10.0, 3);
  CHECK_NEAR(slopes[0], 10 * 0.25 * (1 - 1.25), 1e-15);
  CHECK_NEAR(slopes[1], 10 * 0.5 * (2 - 1.25), 1e-15);
  CHECK(slopes[2] == 0);
  return failures > 0;
}

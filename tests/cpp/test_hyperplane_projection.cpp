#include <vector>

#include "check.h"
#include "core/hyperplane_projection.h"

namespace {

template <class W>
std::vector<W> moves(const std::vector<W>& x, const std::vector<W>& w, W b, pf::Norm norm) {
  const auto n = static_cast<int64_t>(x.size());
  std::vector<W> out(n), scratch(2 * n);
  pf::hyperplane_projection(x.data(), w.data(), out.data(), n, norm, pf::Plane<W>{b, 0, 1}, scratch.data());
  return out;
}

void by_hand() {
  // The second coordinate reaches the border after a move of 0.1, and the others move on. In linf, 1 * t + 2 * 0.1 + 3
  // * t = 1.4.
  const std::vector<double> x{0.2, 0.9, 0.2}, w{1, 2, 3};
  const double b = 0.2 + 1.8 + 0.6 + 1.4;
  const auto linf = moves(x, w, b, pf::Norm::linf), l2 = moves(x, w, b, pf::Norm::l2),
             l1 = moves(x, w, b, pf::Norm::l1);
  CHECK_NEAR(linf[0], 0.3, 1e-15);
  CHECK_NEAR(linf[1], 0.1, 1e-15);
  CHECK_NEAR(linf[2], 0.3, 1e-15);
  // In l2, t + 0.2 + 9 t = 1.4.
  CHECK_NEAR(l2[0], 0.12, 1e-15);
  CHECK_NEAR(l2[1], 0.1, 1e-15);
  CHECK_NEAR(l2[2], 0.36, 1e-15);
  CHECK(l1[0] == 0 && l1[1] == 0);
  CHECK_NEAR(l1[2], 1.4 / 3, 1e-15);
  // The plane is on the other side, and in l1 two slopes are equal.
  const auto back = moves<double>({0.5, 0.5, 0.5}, {-2, 2, 1}, 0.5 - 1.2, pf::Norm::l1);
  CHECK_NEAR(back[0], 0.3, 1e-15);
  CHECK_NEAR(back[1], -0.3, 1e-15);
  CHECK(back[2] == 0);
}

void degenerate() {
  for (const auto norm : {pf::Norm::linf, pf::Norm::l2, pf::Norm::l1}) {
    const std::vector<float> x{0.25f, 0.5f, 1.0f};
    for (const float out : moves<float>(x, {0, 0, 0}, 3, norm)) CHECK(out == 0);
    // The plane contains x.
    for (const float out : moves<float>(x, {1, 2, 4}, 5.25f, norm)) CHECK(out == 0);
    for (const float out : moves<float>(x, {1, 1, 1}, NAN, norm)) CHECK(out == 0);
    for (const float out : moves<float>({0.5f, NAN, 0.5f}, {1, 1, 1}, 3, norm)) CHECK(out == 0);
    const auto corner = moves<float>(x, {1, -1, 1}, 99, norm);
    CHECK(corner[0] == 0.75f && corner[1] == -0.5f && corner[2] == 0);
    const auto some = moves<float>(x, {1, NAN, INFINITY}, 0.5f, norm);
    CHECK(some[0] == 0.25f && some[1] == 0 && some[2] == 0);
    for (const float size : {1e-42f, 1e-30f, 1e30f, 1e38f}) {
      for (const float out : moves<float>({0.5f, 0.5f}, {size, size}, 1.5f * size, norm)) CHECK_NEAR(out, 0.25, 1e-3);
    }
  }
}

void scale() {
  CHECK(pf::scale_of(1.5f) == 1.0f && pf::scale_of(0.5f) == 2.0f && pf::scale_of(4.0) == 0.25);
  CHECK(pf::scale_of(0.0f) == 0x1p126f && pf::scale_of(3e38f) == 0x1p-126f);
}

}  // namespace

int main() {
  by_hand();
  degenerate();
  scale();
  return failures > 0;
}

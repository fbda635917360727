#include <vector>

#include "check.h"
#include "core/representation_distance.h"

namespace {

using pf::Distance;

struct Fact {
  int n;
  double u[3], v[3], abs_cosine, angular;
};
constexpr Fact facts[] = {
    {2, {1, 0}, {1, 0}, 0, 0},
    {2, {1, 0}, {0, 1}, 1, 0.5},
    {2, {1, 0}, {-1, 0}, 0, 1},
    {2, {1, 0}, {1, 1}, 0.2928932188, 0.25},
    {2, {3, 4}, {4, 3}, 0.04, 0.0903344706},
    {3, {1, 2, 3}, {4, 5, 6}, 0.0253681538, 0.0718508583},
    {3, {2, 0, 0}, {1, 1, 1}, 0.4226497308, 0.3040867240},
};

void published_values() {
  for (const Fact& f : facts) {
    CHECK_NEAR(pf::representation_distance(Distance::abs_cosine, f.u, f.v, f.n).distance, f.abs_cosine, 1e-10);
    CHECK_NEAR(pf::representation_distance(Distance::angular, f.u, f.v, f.n).distance, f.angular, 1e-10);
  }
  const float u[] = {3, 4}, v[] = {4, 3};
  const pf::Measured d = pf::representation_distance(Distance::abs_cosine, u, v, 2);
  CHECK_NEAR(d.scale * (4 - d.along * 3), -0.0448, 1e-9);
  CHECK_NEAR(d.scale * (3 - d.along * 4), 0.0336, 1e-9);
  CHECK_NEAR(pf::representation_slope(3.0f, 4.0f, static_cast<float>(d.scale), static_cast<float>(d.along)), -0.0448,
             1e-7);
  CHECK_NEAR(pf::representation_distance(Distance::cosine, facts[2].u, facts[2].v, 2).distance, 2, 0);
  const pf::Measured l2 = pf::representation_distance(Distance::l2, u, v, 2);
  CHECK_NEAR(l2.distance, std::sqrt(2.0), 1e-15);
  CHECK_NEAR(l2.scale * (4 - l2.along * 3), -std::sqrt(0.5), 1e-7);
}

// The lengths differ in the number of lanes, blocks and remaining elements.
template <class T>
void sums() {
  for (int n : {1, 5, 31, 32, 33, 64, 2047, 2048, 2049, 5000}) {
    std::vector<T> u(n), v(n);
    double dot = 0, uu = 0, vv = 0, square = 0;
    for (int i = 0; i < n; ++i) {
      pf::store(u[i], static_cast<pf::wide_t<T>>(std::sin(i + 1.0)));
      pf::store(v[i], static_cast<pf::wide_t<T>>(std::cos(3 * i + 2.0)));
      const double a = pf::load(u[i]), b = pf::load(v[i]);
      dot += a * b;
      uu += a * a;
      vv += b * b;
      square += (a - b) * (a - b);
    }
    const pf::Products p = pf::products(u.data(), v.data(), n);
    CHECK_NEAR(p.dot, dot, 2e-7 * n);
    CHECK_NEAR(p.uu, uu, 2e-7 * uu);
    CHECK_NEAR(p.vv, vv, 2e-7 * vv);
    CHECK_NEAR(pf::square_distance(u.data(), v.data(), n), square, 1e-6 * square);
    // At u = v the distance and its gradient are exactly 0.
    for (int kind = 0; kind < 4; ++kind) {
      const pf::Measured same = pf::representation_distance(static_cast<Distance>(kind), u.data(), u.data(), n);
      CHECK(same.distance == 0 && same.along == 1);
    }
  }
}

void special_values() {
  const int n = 40;
  // The squares of `huge` overflow.
  const std::vector<float> zero(n, 0.0f), tiny(n, 1e-35f), one(n, 1.0f), huge(n, 1e25f);
  std::vector<float> bad(n, 1.0f);
  bad[n - 1] = NAN;
  for (int i = 0; i < 3; ++i) {
    const auto kind = static_cast<Distance>(i);
    const auto measure = [&](const std::vector<float>& u, const std::vector<float>& v) {
      return pf::representation_distance(kind, u.data(), v.data(), n);
    };
    for (const auto& x : {zero, tiny}) {
      for (const pf::Measured& d : {measure(x, one), measure(one, x)}) {
        CHECK(d.distance == (kind == Distance::angular ? 0.5 : 1) && d.scale == 0 && d.along == 0);
      }
    }
    for (const auto& x : {bad, huge}) {
      for (const pf::Measured& d : {measure(x, one), measure(one, x)}) {
        CHECK(std::isnan(d.distance) && std::isnan(d.scale));
      }
    }
    CHECK(std::isnan(measure(zero, bad).distance));
  }
  CHECK(pf::euclidean(0).scale == 0 && std::isnan(pf::euclidean(NAN).scale) && std::isnan(pf::euclidean(NAN).distance));
  // The slope of arccos is exact for a sine of at least 0.01, and bounded below that.
  for (double sine : {0.5, 0.02, 0.005, 1e-5, 0.0}) {
    const double u[] = {2 * std::sqrt(1 - sine * sine), 2 * sine}, v[] = {3, 0};
    const pf::Measured d = pf::representation_distance(Distance::angular, u, v, 2);
    const double length = std::hypot(d.scale * (v[0] - d.along * u[0]), d.scale * (v[1] - d.along * u[1]));
    CHECK_NEAR(length, std::fmin(sine / 0.01, 1) / (2 * 3.14159265358979), 1e-9);
  }
}

}  // namespace

int main() {
  published_values();
  sums<float>();
  sums<double>();
  sums<pf::half>();
  sums<pf::bfloat16>();
  special_values();
  return failures > 0;
}

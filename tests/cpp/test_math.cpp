#include <cstring>
#include <vector>

#include "check.h"
#include "core/math.h"

namespace {

constexpr float inf = INFINITY, nan_value = NAN;

// The largest error in ulp over a dense grid.
template <class F, class G>
double worst(double from, double to, F f, G truth) {
  double most = 0;
  const int steps = 2000003;
  for (int i = 0; i <= steps; ++i) {
    const float x = static_cast<float>(from + (to - from) * i / steps);
    most = std::fmax(most, ulps(f(x), truth(static_cast<double>(x))));
  }
  return most;
}

void polynomials() {
  const auto sine = [](float x) {
    float s, c;
    pf::sincos_turn(x, s, c);
    return s;
  };
  const auto cosine = [](float x) {
    float s, c;
    pf::sincos_turn(x, s, c);
    return c;
  };
  CHECK(worst(-105, 90, [](float x) { return pf::exp(x); }, [](double x) { return std::exp(x); }) <= 2);
  CHECK(worst(-1, 1, [](float x) { return pf::exp(x); }, [](double x) { return std::exp(x); }) <= 1);
  CHECK(worst(-30, 88.7, [](float x) { return pf::expm1(x); }, [](double x) { return std::expm1(x); }) <= 2);
  CHECK(worst(-1e-3, 1e-3, [](float x) { return pf::expm1(x); }, [](double x) { return std::expm1(x); }) <= 2);
  CHECK(worst(1e-45, 4, [](float x) { return pf::log(x); }, [](double x) { return std::log(x); }) <= 2);
  CHECK(worst(0.99, 1.01, [](float x) { return pf::log(x); }, [](double x) { return std::log(x); }) <= 2);
  CHECK(worst(1, 3e38, [](float x) { return pf::log(x); }, [](double x) { return std::log(x); }) <= 2);
  CHECK(worst(0, 1, [](float x) { return pf::log1p_unit(x); }, [](double x) { return std::log1p(x); }) <= 2);
  CHECK(worst(0, 1e-6, [](float x) { return pf::log1p_unit(x); }, [](double x) { return std::log1p(x); }) <= 2);
  CHECK(worst(0, 6.2831855, sine, [](double x) { return std::sin(x); }) <= 2);
  CHECK(worst(0, 6.2831855, cosine, [](double x) { return std::cos(x); }) <= 2);
  CHECK(worst(-87.33, 0, [](float x) { return pf::exp_unit(x); }, [](double x) { return std::exp(x); }) <= 2);
  CHECK(worst(
            -87.33, 0, [](float x) { return pf::exp_units(x).minus_one; }, [](double x) { return std::expm1(x); }) <=
        2);
  CHECK(
      worst(-1e-3, 0, [](float x) { return pf::exp_units(x).minus_one; }, [](double x) { return std::expm1(x); }) <= 2);
  CHECK(
      worst(-87.33, 100, [](float x) { return pf::sigmoid(x); }, [](double x) { return 1 / (1 + std::exp(-x)); }) <= 3);
}

void special_values() {
  CHECK(pf::exp(inf) == inf);
  CHECK(pf::exp(-inf) == 0);
  CHECK(pf::exp(89.0f) == inf);
  // The result is subnormal.
  CHECK(pf::exp(-100.0f) > 0);
  CHECK(std::isnan(pf::exp(nan_value)));
  CHECK(pf::exp_unit(0.0f) == 1);
  CHECK(pf::exp_unit(-inf) == 0);
  // The exact result is subnormal.
  CHECK(pf::exp_unit(-88.0f) == 0);
  CHECK(std::isnan(pf::exp_unit(nan_value)));
  CHECK(pf::exp_units(-inf).minus_one == -1);
  CHECK(pf::exp_units(-1e-45f).minus_one == -1e-45f);
  CHECK(std::isnan(pf::exp_units(nan_value).minus_one));
  CHECK(pf::expm1(inf) == inf);
  CHECK(pf::expm1(-inf) == -1);
  CHECK(pf::expm1(0.0f) == 0);
  CHECK(pf::expm1(1e-45f) == 1e-45f);
  CHECK(std::isnan(pf::expm1(nan_value)));
  CHECK(pf::log(0.0f) == -inf);
  CHECK(pf::log(inf) == inf);
  CHECK(pf::log(1.0f) == 0);
  CHECK(std::isnan(pf::log(-1.0f)));
  CHECK(std::isnan(pf::log(nan_value)));
  CHECK(std::isnan(pf::sigmoid(nan_value)));
  CHECK(std::isnan(pf::max_nan(nan_value, 1.0f)) && std::isnan(pf::max_nan(1.0f, nan_value)));
  CHECK(std::isnan(pf::min_nan(nan_value, 1.0f)) && std::isnan(pf::min_nan(1.0f, nan_value)));
  CHECK(std::isnan(pf::clamp_nan(nan_value, 0.0f, 1.0f)));
  CHECK(!pf::finite(inf) && !pf::finite(-inf) && !pf::finite(nan_value) && pf::finite(3.4e38f));
}

// Every 16-bit number is unchanged after a conversion to float and back. The middle between two adjacent numbers rounds
// to even.
template <class T>
void sixteen_bits(uint32_t infinity) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T stored{static_cast<uint16_t>(bits)};
    const float value = pf::load(stored);
    T back;
    pf::store(back, value);
    if ((bits & 0x7fff) > infinity) {
      CHECK(std::isnan(value) && (back.bits & 0x7fff) > infinity);
      continue;
    }
    CHECK(back.bits == bits);
    if ((bits & 0x7fff) + 1 < infinity) {
      const float next = pf::load(T{static_cast<uint16_t>(bits + 1)});
      const float middle = static_cast<float>((static_cast<double>(value) + next) / 2);
      pf::store(back, middle);
      CHECK(back.bits == (bits & 1 ? bits + 1 : bits));
      pf::store(back, std::nextafter(middle, next));
      CHECK(back.bits == bits + 1);
    }
  }
  T top;
  pf::store(top, 3.4028235e38f);
  CHECK(top.bits == infinity);
}

void sums() {
  for (int n : {0, 1, 15, 16, 17, 1023, 1024, 1025, 5000}) {
    const double sum = pf::ordered_sum<float>(n, [](int64_t i) { return static_cast<float>(i % 7) * 0.1f; });
    double truth = 0;
    for (int i = 0; i < n; ++i) truth += static_cast<double>(static_cast<float>(i % 7) * 0.1f);
    CHECK_NEAR(sum, truth, 3e-7 * truth);
  }
}

}  // namespace

int main() {
  polynomials();
  special_values();
  sixteen_bits<pf::half>(0x7c00);
  sixteen_bits<pf::bfloat16>(0x7f80);
  sums();
  return failures > 0;
}

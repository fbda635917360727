// Checks for tests. A failed check prints its line, and makes main() return 1.
#pragma once

#include <cmath>
#include <cstdio>

inline int failures = 0;

inline void check(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  std::printf("%s:%d: failed: %s\n", file, line, text);
  ++failures;
}

inline void check_near(double value, double wanted, double tolerance, const char* text, const char* file, int line) {
  if (std::abs(value - wanted) <= tolerance) return;
  std::printf("%s:%d: failed: %s = %.9g, wanted %.9g within %.2g\n", file, line, text, value, wanted, tolerance);
  ++failures;
}

// The error in units of the last place (ulp) of the float nearest to `truth`.
inline double ulps(float value, double truth) {
  const float nearest = static_cast<float>(truth);
  if (std::isnan(truth)) return std::isnan(value) ? 0 : 1e9;
  if (value == nearest) return 0;
  if (std::isinf(nearest) || std::isinf(value)) return 1e9;
  const float size = std::fmax(std::abs(nearest), 1.17549435e-38f);
  return std::abs(value - truth) / (std::nextafter(size, INFINITY) - size);
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
#define CHECK_NEAR(value, wanted, tolerance) check_near((value), (wanted), (tolerance), #value, __FILE__, __LINE__)

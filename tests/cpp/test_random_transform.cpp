#include "check.h"
#include "core/random_transform.h"

namespace {

// Checks noise, clip and scale, in this order, with sigma = 0.25.
template <class W>
void values() {
  const W x[] = {0, 0.25, 0.5, 1}, noise[] = {-1, 1, 2, 1}, wanted[] = {-1, 0, 1, 1};
  for (int i = 0; i < 4; ++i) CHECK(pf::transformed(x[i], noise[i], W(0.25)) == wanted[i]);
  CHECK(pf::transformed(W(0.75), W(5), W(0)) == W(0.5));
  CHECK(pf::transformed(W(INFINITY), W(1), W(0.25)) == 1 && pf::transformed(W(-INFINITY), W(1), W(0.25)) == -1);
  CHECK(std::isnan(pf::transformed(W(NAN), W(1), W(0.25))));
}

template <class W>
void slopes() {
  const W x[] = {0, 1, 0.5, W(-0.1), W(1.1)}, wanted[] = {6, 6, 6, 0, 0};
  for (int i = 0; i < 5; ++i) CHECK(pf::transformed_slope(x[i], W(7), W(0), W(3)) == wanted[i]);
  // The noise moves the pixel beyond the end of the clip.
  CHECK(pf::transformed_slope(W(0.5), W(3), W(0.25), W(1)) == 0);
  CHECK(pf::transformed_slope(W(1.25), W(-1), W(0.25), W(1)) == 2);
  CHECK(pf::transformed_slope(W(NAN), W(0), W(1), W(1)) == 0);
  CHECK(pf::transformed_slope(W(2), W(0), W(1), W(NAN)) == 0);
}

void owners() {
  int missing = 0, of_part[4] = {};
  for (int rank = 0; rank < 64; ++rank) {
    const uint8_t owner = pf::owner_of(rank, 64, 16, 0), part = pf::owner_of(rank, 64, 16, 4);
    CHECK(owner == (rank < 16));
    missing += owner;
    CHECK(part == rank / 16);
    ++of_part[part];
    CHECK(pf::owner_of(rank, 64, 16, 1) == 0 && pf::owner_of(rank, 64, 16, 64) == rank);
  }
  CHECK(missing == 16);
  for (int count : of_part) CHECK(count == 16);
  CHECK(pf::owner_of(254, 255, 0, 255) == 254);
}

}  // namespace

int main() {
  values<float>();
  values<double>();
  slopes<float>();
  slopes<double>();
  owners();
  return failures > 0;
}

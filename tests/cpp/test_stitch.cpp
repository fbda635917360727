#include "check.h"
#include "core/stitch.h"

int main() {
  const pf::Blocks square{32, 32, 8}, oblong{3, 2, 7};
  CHECK(square.of(0, 0) == 0 && square.of(31, 31) == 0 && square.of(31, 32) == 1 && square.of(32, 31) == 8);
  CHECK(square.of(255, 255) == 63);
  int pixels[21] = {};
  for (int row = 0; row < 9; ++row) {
    for (int column = 0; column < 14; ++column) ++pixels[oblong.of(row, column)];
  }
  for (int count : pixels) CHECK(count == 6);
  return failures > 0;
}

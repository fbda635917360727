#include <vector>

#include "check.h"
#include "cpu/moved_rows.h"
#include "cpu/patch_norms.h"
#include "cpu/pixels.h"

using namespace pf::cpu;
using pf::Grid;

// Makes numbers that are all different. Sums of a few of them are different too.
template <class T>
static std::vector<T> numbers(int64_t count) {
  std::vector<T> x(count);
  for (int64_t k = 0; k < count; ++k) pf::store(x[k], static_cast<pf::wide_t<T>>(std::sin(1.0 + 3.7 * k)));
  return x;
}

static bool on_grid(Grid grid, int64_t cell, int down, int right) {
  const int64_t y = cell / grid.width + down, column = cell % grid.width + right;
  return y >= 0 && y < grid.height && column >= 0 && column < grid.width;
}

// The sum of x at (n, i), with both shifted by each step of the rows top .. bottom and the columns left .. right.
template <class T>
static double window(const T* x, Grid grid, int64_t n, int64_t i, int top, int bottom, int left, int right) {
  double sum = 0;
  for (int down = top; down <= bottom; ++down) {
    for (int beside = left; beside <= right; ++beside) {
      const int64_t shift = down * grid.width + beside;
      if (!on_grid(grid, n, down, beside) || !on_grid(grid, i, down, beside)) continue;
      sum += static_cast<double>(pf::load(x[(n + shift) * grid.cells() + i + shift]));
    }
  }
  return sum;
}

// Checks the sums for some of several contiguous matrices, so that there are other numbers on both sides.
template <class T, class W = pf::wide_t<T>>
static void check_dense(Grid grid, double tolerance) {
  const int64_t cells = grid.cells(), square = cells * cells;
  const auto x = numbers<T>(8 * square);
  const Masks<W> masks(grid);
  const Dense<T> dense(x.data(), 8, grid);
  const int64_t size = masks.size();
  std::vector<W> row(4 * size);
  for (const int64_t first : {int64_t{0}, int64_t{3}, int64_t{7}}) {
    for (int64_t n = 0; n < cells; ++n) {
      Term<T> terms[9];
      neighbour_terms(dense, first * cells, grid, n, masks, terms);
      sum_terms<9>(terms, row.data(), size);
      for (int64_t i = 0; i < cells; ++i) {
        CHECK_NEAR(row[i], window(x.data() + first * square, grid, n, i, -1, 1, -1, 1), tolerance);
      }
      for (int64_t i = cells; i < size; ++i) CHECK(row[i] == 0);
    }
  }
  for (const int64_t first : {int64_t{0}, int64_t{4}}) {
    for (int64_t n = 0; n < cells; ++n) {
      Term<T> terms[16];
      phase_terms(dense, first * cells, grid, n, masks, terms);
      sum_terms<16>(terms, row.data(), size);
      for (int64_t i = 0; i < cells; ++i) {
        double sum = 0;
        for (int p = 0; p < 4; ++p) {
          const T* phase = x.data() + (first + p) * square;
          sum += window(phase, grid, n, i, -(p / 2), 1 - p / 2, -(p % 2), 1 - p % 2);
        }
        CHECK_NEAR(row[i], sum, 2 * tolerance);
      }
    }
  }
}

// Checks the sums for a matrix in scratch memory. Everything that must not be used is NaN.
static void check_padded(Grid grid) {
  const int64_t cells = grid.cells(), room = reach(grid);
  const auto x = numbers<double>(cells * cells);
  const Masks<double> masks(grid);
  const int64_t size = masks.size();
  std::vector<double> memory(cells * size + 2 * room, NAN), row(4 * size);
  double* scratch = memory.data() + room;
  for (int64_t n = 0; n < cells; ++n) {
    for (int64_t i = 0; i < cells; ++i) scratch[n * size + i] = x[n * cells + i];
  }
  const Padded<double> padded{scratch, size};
  const auto at = [&](int64_t n, int64_t i) { return x[n * cells + i]; };
  const auto by_column = [&](int64_t cell) { return cell % grid.width * grid.height + cell / grid.width; };
  const auto by_row = [&](int64_t k) { return k % grid.height * grid.width + k / grid.height; };
  for (int64_t n = 0; n < cells; ++n) {
    Term<double> terms[9];
    row_terms(padded, cells, n, masks, terms);
    sum_terms<3>(terms, row.data(), size);
    for (int64_t i = 0; i < cells; ++i) {
      double sum = at(n, i);
      if (n > 0 && i > 0) sum += at(n - 1, i - 1);
      if (n < cells - 1 && i < cells - 1) sum += at(n + 1, i + 1);
      CHECK_NEAR(row[i], sum, 1e-14);
    }
    column_terms(padded, grid, n, masks, terms);
    sum_terms<5>(terms, row.data(), size);
    for (int64_t i = 0; i < cells; ++i) {
      const int64_t k = by_column(n), j = by_column(i);
      double sum = at(n, i);
      if (k > 0 && j > 0) sum += at(by_row(k - 1), by_row(j - 1));
      if (k < cells - 1 && j < cells - 1) sum += at(by_row(k + 1), by_row(j + 1));
      CHECK_NEAR(row[i], sum, 1e-14);
    }
    neighbour_terms(padded, 0, grid, n, masks, terms);
    quarter_terms(terms, row.data(), size);
    for (int p = 0; p < 4; ++p) {
      for (int64_t i = 0; i < cells; ++i) {
        const double sum = window(x.data(), grid, n, i, p / 2 - 1, p / 2, p % 2 - 1, p % 2);
        CHECK_NEAR(row[p * size + i], sum / 4, 1e-14);
      }
    }
  }
}

static void check_pixels(int64_t height, int64_t width) {
  const int64_t cells = height * width, apart = cells + 3;
  const auto x = numbers<float>(4 * cells), first = numbers<float>(cells);
  std::vector<float> phases(4 * apart), back(4 * cells);
  split_plane(x.data(), phases.data(), height, width, apart);
  for (int64_t i = 0; i < 4 * cells; ++i) {
    const int64_t y = i / (2 * width), j = i % (2 * width);
    CHECK(phases[(y % 2 * 2 + j % 2) * apart + y / 2 * width + j / 2] == x[i]);
  }
  join_plane(phases.data(), phases.data(), back.data(), height, width, apart);
  CHECK(back == x);
  join_plane(first.data(), phases.data(), back.data(), height, width, apart);
  for (int64_t i = 0; i < 4 * cells; ++i) {
    const int64_t y = i / (2 * width), j = i % (2 * width);
    CHECK(back[i] == (y % 2 == 0 && j % 2 == 0 ? first[y / 2 * width + j / 2] : x[i]));
  }
}

// Compares the slopes of a weighted sum of the inverse norms with differences.
static void check_norms(Grid grid) {
  const int64_t cells = grid.cells();
  const auto pixels = numbers<double>(cells), weights = numbers<double>(2 * cells);
  const auto measured = [&](const std::vector<double>& values, double* inverse) {
    std::vector<double> products(cells * cells);
    for (int64_t i = 0; i < cells; ++i) products[i * (cells + 1)] = values[i] * values[i];
    inverse_norms(products.data(), grid, inverse);
    double sum = 0;
    for (int64_t i = 0; i < cells; ++i) sum += weights[cells + i] * inverse[i];
    return sum;
  };
  std::vector<double> inverse(cells), spare(cells), through(weights.begin() + cells, weights.end());
  std::vector<double> slopes(cells * cells, 1.0);
  measured(pixels, inverse.data());
  add_norm_slopes(through.data(), inverse.data(), grid, slopes.data());
  for (int64_t i = 0; i < cells; ++i) {
    auto more = pixels, less = pixels;
    more[i] += 1e-6, less[i] -= 1e-6;
    const double slope = (measured(more, spare.data()) - measured(less, spare.data())) / 2e-6;
    CHECK_NEAR((slopes[i * (cells + 1)] - 1) * pixels[i], slope, 1e-6 * (1 + std::abs(slope)));
  }
  std::vector<double> nothing(cells * cells), none(cells, 2.0), flat(cells * cells);
  inverse_norms(nothing.data(), grid, inverse.data());
  add_norm_slopes(none.data(), inverse.data(), grid, flat.data());
  for (int64_t i = 0; i < cells; ++i) CHECK_NEAR(inverse[i], 1e4, 1e-8);
  CHECK(flat == nothing);
}

static void check_transpose(int64_t n) {
  const auto x = numbers<double>(n * n);
  auto sum = x;
  add_transpose(sum.data(), n);
  for (int64_t i = 0; i < n * n; ++i) CHECK(sum[i] == x[i] + x[i % n * n + i / n]);
}

int main() {
  for (const auto& grid : {Grid{3, 5}, {5, 3}, {1, 4}, {4, 1}, {1, 1}, {2, 2}, {4, 4}, {1, 17}, {6, 8}}) {
    check_dense<double>(grid, 1e-14);
    check_dense<float>(grid, 2e-6);
    check_dense<pf::bfloat16>(grid, 2e-6);
    check_dense<pf::half>(grid, 2e-6);
    check_padded(grid);
    check_norms(grid);
    check_transpose(grid.cells());
  }
  for (const int64_t width : {1, 2, 4, 7, 8, 16}) check_pixels(3, width);
  return failures > 0;
}

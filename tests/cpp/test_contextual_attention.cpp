#include <vector>

#include "check.h"
#include "core/contextual_attention.h"

// Entry (n, i) is told from all others, and from sums of few of them.
static std::vector<double> numbers(int64_t cells) {
  std::vector<double> x(cells * cells);
  for (size_t k = 0; k < x.size(); ++k) x[k] = std::sin(1.0 + 3.7 * static_cast<double>(k));
  return x;
}

// The cell in column-major order, and back.
static int64_t column_major(pf::Grid grid, int64_t cell) { return cell % grid.width * grid.height + cell / grid.width; }

static void check_grid(pf::Grid grid) {
  const int64_t cells = grid.cells();
  const auto x = numbers(cells);
  std::vector<double> inner(2 * cells), row(cells);
  pf::inner_columns(grid, inner.data());
  const auto on_grid = [&](int64_t cell, int down, int right) {
    const int64_t y = cell / grid.width + down, column = cell % grid.width + right;
    return y >= 0 && y < grid.height && column >= 0 && column < grid.width;
  };
  for (const pf::Window window : {pf::all_neighbours, pf::spread_window(0, 1), pf::gather_window(0, 1)}) {
    for (int64_t n = 0; n < cells; ++n) {
      for (auto& value : row) value = 0;
      pf::add_window(row.data(), x.data(), grid, n, window, inner.data());
      for (int64_t i = 0; i < cells; ++i) {
        double sum = 0;
        for (int down = window.top; down <= window.bottom; ++down) {
          for (int right = window.left; right <= window.right; ++right) {
            const int64_t shift = down * grid.width + right;
            if (on_grid(n, down, right) && on_grid(i, down, right)) sum += x[(n + shift) * cells + i + shift];
          }
        }
        CHECK_NEAR(row[i], sum, 1e-14);
      }
    }
  }
  std::vector<double> transposed(cells * cells), expected(cells * cells);
  for (int64_t n = 0; n < cells; ++n) {
    for (int64_t i = 0; i < cells; ++i) {
      transposed[column_major(grid, n) * cells + column_major(grid, i)] = x[n * cells + i];
    }
  }
  const pf::Grid turned{grid.width, grid.height};
  for (int64_t n = 0; n < cells; ++n) {  // by columns is by rows of what is ordered by columns
    pf::fuse_columns(row.data(), x.data(), grid, n);
    std::vector<double> other(cells);
    pf::fuse_rows(other.data(), transposed.data(), turned, column_major(grid, n));
    for (int64_t i = 0; i < cells; ++i) CHECK_NEAR(row[i], other[column_major(grid, i)], 1e-14);
    pf::fuse_rows(row.data(), x.data(), grid, n);
    for (int64_t i = 0; i < cells; ++i) {
      double sum = x[n * cells + i];
      if (n > 0 && i > 0) sum += x[(n - 1) * cells + i - 1];
      if (n < cells - 1 && i < cells - 1) sum += x[(n + 1) * cells + i + 1];
      CHECK_NEAR(row[i], sum, 1e-14);
    }
  }
}

int main() {
  for (const auto& grid : {pf::Grid{3, 5}, {5, 3}, {1, 4}, {4, 1}, {1, 1}, {2, 2}}) check_grid(grid);

  std::vector<float> row(37), keep(37, 1.0f), scores(37);
  for (int i = 0; i < 37; ++i) row[i] = scores[i] = static_cast<float>(i % 7) * 30;
  keep[6] = 0;
  pf::attention_row(row.data(), keep.data(), 10.0f, 37);
  double total = 0;
  for (int i = 0; i < 37; ++i) total += row[i];
  CHECK(row[6] == 0);
  CHECK_NEAR(total, 1, 1e-6);  // four others are as large as any
  CHECK_NEAR(row[13], 0.25, 1e-6);
  scores[20] = NAN;
  pf::attention_row(scores.data(), keep.data(), 10.0f, 37);
  for (float weight : scores) CHECK(std::isnan(weight));

  double weights[] = {0.25, 0.5, 0}, slopes[] = {1, 2, 100};  // 1.25 along the weights
  pf::attention_row_backward(slopes, weights, 10.0, 3);
  CHECK_NEAR(slopes[0], 10 * 0.25 * (1 - 1.25), 1e-15);
  CHECK_NEAR(slopes[1], 10 * 0.5 * (2 - 1.25), 1e-15);
  CHECK(slopes[2] == 0);
  return failures > 0;
}

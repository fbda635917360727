// The blocks of csrc/core/decode_samples.h on the host: the program of the GPU kernel, a warp's 32 lanes in turn, with
// the matrix instruction's fragments as PTX documents them. Shared memory starts as NaN and is checked for its bounds.
#pragma once

#include <limits>
#include <stdexcept>
#include <vector>

#include "core/decoder_plan.h"

namespace pf::decoder {

template <class E, class S>
struct HostMachine {
  using Element = E;
  using Sum = S;
  static constexpr int lanes = 32;
  struct Rows {
    S v[8];
  };
  struct Weights {
    S v[8];
  };

  std::vector<E> shared;

  explicit HostMachine(int elements) : shared(elements) {
    for (E& x : shared) store(x, std::numeric_limits<S>::quiet_NaN());
  }

  template <class F>
  void each(F f) {
    for (int lane = 0; lane < lanes; ++lane) f(lane, lane);
  }
  template <class F>
  void for_threads(int n, F f) {
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  void for_warps(int n, F f) {
    for (int i = n - 1; i >= 0; --i) f(i);  // in any order
  }
  void barrier() {}

  void put(int at, S value) { store(shared.at(at), value); }
  void put_pair(int at, S a, S b) {
    if (at % 2 != 0) throw std::logic_error("a pair is stored at an odd place");
    put(at, a);
    put(at + 1, b);
  }
  void copy(int at, const E* from) {
    if (at % 8 != 0) throw std::logic_error("16 bytes are stored at an odd place");
    for (int i = 0; i < 8; ++i) shared.at(at + i) = from[i];
  }
  void write_pair(E* to, S a, S b) {
    store(to[0], a);
    store(to[1], b);
  }
  S read(const Image& image, int64_t at) { return static_cast<S>(static_cast<const double*>(image.data)[at]); }
  void write(const Image& image, int64_t at, S value) {
    static_cast<double*>(image.data)[at] = static_cast<double>(value);
  }

  Weights load_weights(const E* from) {
    Weights w;
    for (int i = 0; i < 8; ++i) w.v[i] = load(from[i]);
    return w;
  }
  // ldmatrix.x4: lane l says where row l % 8 of matrix l / 8 begins, and gets row l / 4 of each
  template <class At>
  void load_rows(Rows (&a)[lanes], At at) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 8; ++i) a[lane].v[i] = load(shared.at(at(i / 2 * 8 + lane / 4) + lane % 4 * 2 + i % 2));
    }
  }
  template <class Sums, class B>
  void multiply(Sums sums, const Rows (&a)[lanes], B b, int half) {
    S left[16][16], right[16][8];
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 8; ++i) left[a_row(lane, i)][a_channel(lane, i)] = a[lane].v[i];
      for (int i = 0; i < 4; ++i) right[b_channel(lane, i)][b_column(lane)] = b(lane).v[4 * half + i];
    }
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        S sum = sums(lane)[i];
        for (int k = 0; k < 16; ++k) sum += left[c_row(lane, i)][k] * right[k][c_column(lane, i)];
        sums(lane)[i] = sum;
      }
    }
  }
};

// A launch: every block of the grid, one after the other.
template <class E, class S>
void launch_on_host(const Task<HostMachine<E, S>>& task) {
  for (int64_t i = 0; i < blocks_of(task); ++i) {
    HostMachine<E, S> machine(task.segment.elements());
    Block<HostMachine<E, S>> block{};
    set_block(block, task, i);
    run(machine, block);
  }
}

}  // namespace pf::decoder

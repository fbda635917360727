// Computes the shortest move to a hyperplane within a box. purify_fast/ops/hyperplane_projection.py has the definition.
#pragma once

#include "pgd_step.h"

namespace pf {

template <class W>
struct Plane {
  W offset, lo, hi;
};

// Returns the power of two that scales `peak` into [1, 2), or, if this power is not a normal float, the nearest power
// of two that is a normal float.
template <class W>
PF_INLINE W scale_of(W peak) {
  constexpr int mantissa = std::numeric_limits<W>::digits - 1;
  // Twice the bias of the exponent.
  constexpr bits_t<W> twice = 2 * (std::numeric_limits<W>::max_exponent - 1);
  const bits_t<W> exponent = bit_cast<bits_t<W>>(peak) >> mantissa;
  const bits_t<W> normal = exponent < 1 ? 1 : (exponent > twice - 1 ? twice - 1 : exponent);
  return bit_cast<W>((twice - normal) << mantissa);
}

// One row. slope: the absolute value of each coordinate of the normal w. room: the distance from each coordinate of x
// to the border of the box, in the direction of the move. gap: |b - <w, x>| for the plane <w, x> = b. w and b are
// first multiplied by scale_of(max |w_i|), which does not change the plane.
template <class W>
struct Way {
  const W *slope, *room;
  W gap;
};

// Finds the t at which the plane is reached, by Newton's method. For linf (`Alike`) a coordinate moves by t, and for l2
// by t * slope, but at most by its room. Its progress to the plane is slope * move. Each iteration computes the next t
// from two sums: `filled`, the progress of the coordinates at the border of the box, and `rate`, the progress of the
// other coordinates per unit of t. t grows until no further coordinate reaches the border.
template <bool Alike, class W>
PF_INLINE W newton_step(Way<W> way, int64_t n) {
  const W *slope = way.slope, *room = way.room;
  W reached = -1, next = 0;
  while (next > reached) {
    const W t = reached = next;
    const W filled = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
      const W gain = slope[i] * room[i];
      return t * (Alike ? W(1) : slope[i]) < room[i] ? W(0) : gain;
    });
    const W rate = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
      const W unit = Alike ? W(1) : slope[i], gain = slope[i] * unit;
      return t * unit < room[i] ? gain : W(0);
    });
    // The result is infinite if all coordinates are at the border and the plane is not reached.
    next = (way.gap - filled) / rate;
  }
  return reached;
}

// For l1, coordinates with a larger slope move first. `least` is the slope at which the plane is reached. Coordinates
// with exactly this slope move by the fraction `share` of their room.
template <class W>
struct Threshold {
  W least, share;
};
template <class W>
PF_INLINE Threshold<W> threshold(Way<W> way, int64_t n, W peak) {
  const W *slope = way.slope, *room = way.room;
  const auto from = [=](W least) PF_INLINED_LAMBDA {
    return ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
      const W gain = slope[i] * room[i];
      return slope[i] >= least ? gain : W(0);
    });
  };
  // `low` and `high` are the bits of two slopes. If all coordinates with slope >= high move, the plane is not reached.
  // If all coordinates with slope >= low move, the plane is reached, or low is 0.
  bits_t<W> low = 0, high = bit_cast<bits_t<W>>(peak) + 1;
  while (high - low > 1) {
    const bits_t<W> middle = low + (high - low) / 2;
    (from(bit_cast<W>(middle)) >= way.gap ? low : high) = middle;
  }
  const W least = bit_cast<W>(low);
  const W edge = ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W gain = slope[i] * room[i];
    return slope[i] == least ? gain : W(0);
  });
  const W share = edge > 0 ? (way.gap - from(bit_cast<W>(high))) / edge : W(0);
  return {least, clamp_nan(share, W(0), W(1))};
}

// Computes the move of one row with n elements. `scratch` has room for 2 n numbers.
template <class T, class W = wide_t<T>>
PF_INLINE void hyperplane_projection(const T* x, const T* w, T* out, int64_t n, Norm norm, Plane<W> plane, W* scratch) {
  W *slope = scratch, *room = scratch + n;
  const W lo = plane.lo, hi = plane.hi;
  const auto normal = [=](int64_t i) PF_INLINED_LAMBDA {
    const W value = load(w[i]);
    return finite(value) ? value : W(0);
  };
  store_all(slope, n, [=](int64_t i) PF_INLINED_LAMBDA { return abs(normal(i)); });
  const W highest = largest_size(slope, n), scale = scale_of(highest);
  for (int64_t i = 0; i < n; ++i) slope[i] *= scale;
  const W gap = plane.offset * scale -
                ordered_sum<W>(n, [=](int64_t i) PF_INLINED_LAMBDA { return normal(i) * scale * load(x[i]); });
  // normal * side has the sign of the coordinate's move. `side` is a number, because two conditions do not vectorize.
  const W side = gap < 0 ? W(-1) : W(1);
  const auto ahead = [=](int64_t i) PF_INLINED_LAMBDA { return normal(i) * side; };
  store_all(room, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W at = load(x[i]), free = ahead(i) < 0 ? at - lo : hi - at;
    return (slope[i] > 0) & (free > 0) ? free : W(0);
  });

  const Way<W> way{slope, room, gap == gap ? abs(gap) : W(0)};
  if (norm == Norm::l1) {
    const Threshold<W> found = threshold(way, n, highest * scale);
    store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
      const W part = slope[i] == found.least ? found.share : W(0);
      const W size = room[i] * (slope[i] > found.least ? W(1) : part);
      return ahead(i) < 0 ? -size : size;
    });
    return;
  }
  const bool alike = norm == Norm::linf;
  const W t = alike ? newton_step<true>(way, n) : newton_step<false>(way, n);
  store_all(out, n, [=](int64_t i) PF_INLINED_LAMBDA {
    const W wish = t * (alike ? W(1) : slope[i]), size = wish < room[i] ? wish : room[i];
    return ahead(i) < 0 ? -size : size;
  });
}

}  // namespace pf

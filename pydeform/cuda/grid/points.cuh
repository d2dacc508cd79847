// Where a query samples (docs/math/grid.md, eq. 1 to 5): along each axis some pixels, the taps, each with a weight; it
// reads the product of the axes. The twin of cpu/grid/places.py: the same operations in the same order, none fused, so
// that both backends put a point on the same side of every pixel.
//
// The struct GridGeometry stands before all headers: core/source.py. An image has fewer than 2^31 pixels, and fewer
// numbers in the grid; I is the type for places in whole arrays. TGrid is the type of the grid: T, or float where T is
// a half type, with the same Compute.
#pragma once
#include "sampling/axes.cuh"

constexpr int BILINEAR = 0, NEAREST = 1, BICUBIC = 2;  // `mode`
constexpr int ZEROS = 0, BORDER = 1, REFLECTION = 2;   // and `padding`, as in _grid_geometry.py
constexpr int GRID_THREADS = 256;

template <int MODE> constexpr int TAP_BITS = MODE == NEAREST ? 0 : MODE == BILINEAR ? 1 : 2;
template <int MODE> constexpr int TAPS = 1 << TAP_BITS<MODE>;             // along an axis,
template <int MODE> constexpr int ALL_TAPS = 1 << AXES * TAP_BITS<MODE>;  // and of a point

PYDEFORM_DEVICE float round_even(float v) { return rintf(v); }
PYDEFORM_DEVICE double round_even(double v) { return rint(v); }
PYDEFORM_DEVICE float rest_of(float v, float divisor) { return fmodf(v, divisor); }  // both are exact
PYDEFORM_DEVICE double rest_of(double v, double divisor) { return fmod(v, divisor); }

// One axis -----------------------------------------------------------------------------------------------------------

// Eq. 3: the position that stands for `at` between mirrors at -back and at `span` beyond it. Each reflection turns the
// slope.
template <class A> PYDEFORM_DEVICE A mirrored(A at, A back, A span, A& slope) {
  if (at != at || is_infinite(at)) return not_a_number<A>();  // nothing is infinity's mirror image
  if (span == 0) {
    slope = 0;
    return 0;
  }
  A from = at + back;
  if (from < 0) {
    from = -from;
    slope = -slope;
  }
  const A rest = rest_of(from, 2 * span);
  if (rest <= span) return rest - back;
  slope = -slope;
  return 2 * span - rest - back;
}

// Eq. 2: the position that stands for one outside; where it does not move any more, the slope becomes 0.
template <class A> PYDEFORM_DEVICE A padded(A at, int axis, const GridGeometry& g, A& slope) {
  if (g.padding == ZEROS) return at;
  if (g.padding == REFLECTION) at = mirrored(at, (A)g.back, (A)g.span[axis], slope);
  const A last = (A)(g.in_size[axis] - 1);
  if (at <= 0 || at >= last) slope = 0;
  return at <= 0 ? (A)0 : at >= last ? last : at;
}

// Eq. 1 to 3: the position of a number of the grid, and its derivative by that number. Bicubic pads its taps instead.
template <class A> struct Source {
  A at, slope;
};
template <int MODE, class A> PYDEFORM_DEVICE Source<A> source_of(A number, A start, int axis, const GridGeometry& g) {
  const A half = (A)g.half[axis];  // 0 in an image of one pixel, where infinity would be lost
  const A pixel = start + (times(number + (A)g.shift, half) - (A)g.back);
  Source<A> source{is_infinite(number) ? number : pixel, half};
  if (MODE != BICUBIC) source.at = padded(source.at, axis, g, source.slope);
  return source;
}

// Eq. 4, cubic convolution with a = -3/4: the weight of a pixel by its distance, up to 1 and from 1 to 2; and its
// derivative.
template <class A> PYDEFORM_DEVICE A cubic_near(A d) { return ((A)1.25 * d - (A)2.25) * d * d + 1; }
template <class A> PYDEFORM_DEVICE A cubic_far(A d) { return (((A)-0.75 * d + (A)3.75) * d - 6) * d + 3; }
template <class A> PYDEFORM_DEVICE A cubic_near_slope(A d) { return ((A)3.75 * d - (A)4.5) * d; }
template <class A> PYDEFORM_DEVICE A cubic_far_slope(A d) { return ((A)-2.25 * d + (A)7.5) * d - 6; }

// Of the pixels at -1, 0, 1 and 2 from `within`, 0 to 1.
template <class A> PYDEFORM_DEVICE void cubic_weights(A (&weight)[4], A within) {
  weight[0] = cubic_far(within + 1);
  weight[1] = cubic_near(within);
  weight[2] = cubic_near(1 - within);
  weight[3] = cubic_far(2 - within);
}
template <class A> PYDEFORM_DEVICE void cubic_slopes(A (&slope)[4], A within) {
  slope[0] = cubic_far_slope(within + 1);
  slope[1] = cubic_near_slope(within);
  slope[2] = -cubic_near_slope(1 - within);
  slope[3] = -cubic_far_slope(2 - within);
}

// A whole position's pixel, or -1; also for NaN.
template <class A> PYDEFORM_DEVICE int pixel_at(A whole, int size) {
  return in_range(whole, (A)0, size) ? (int)whole : -1;
}

// Eq. 4.
template <class A, int MODE> struct Taps {
  int pixel[TAPS<MODE>];                    // -1: there is none
  A weight[TAPS<MODE>], slope[TAPS<MODE>];  // slope: the weight's derivative by the position,
  A by_number;                              // and that of the position by the number

  PYDEFORM_DEVICE void find(A number, A start, int axis, const GridGeometry& g) {
    const int size = g.in_size[axis];
    const Source<A> source = source_of<MODE>(number, start, axis, g);
    by_number = source.slope;
    if constexpr (MODE == NEAREST) {
      pixel[0] = pixel_at(round_even(source.at), size);
      weight[0] = 1;
      slope[0] = 0;
    } else if constexpr (MODE == BILINEAR) {
      const A lowest = lowest_coordinate<A>(TORCHVISION);
      const bool inside = in_range(source.at, lowest, size);
      const AxisCorners<A> corners = axis_corners(inside ? source.at : lowest, size, TORCHVISION);
#pragma unroll
      for (int far = 0; far < 2; far++) {
        pixel[far] = corners.exists[far] ? corners.pixel[far] : -1;
        weight[far] = far ? corners.place : 1 - corners.place;
        slope[far] = far ? 1 : -1;
      }
    } else {
      const A down = round_down(source.at);
      const A within = is_infinite(source.at) ? (A)0 : source.at - down;
      cubic_weights(weight, within);
      cubic_slopes(slope, within);
#pragma unroll
      for (int k = 0; k < TAPS<MODE>; k++) {
        A unused = 0;
        pixel[k] = pixel_at(padded(down + (A)(k - 1), axis, g, unused), size);
      }
    }
  }
};

// All axes -----------------------------------------------------------------------------------------------------------

// Eq. 5. Taps of a point are numbered with the last axis the fastest.
template <class A, int MODE> struct Point {
  Taps<A, MODE> along[AXES];
  A nothing;  // 0; NaN where a coordinate is: then no pixel is read

  // That of an axis which has part in tap k.
  static constexpr PYDEFORM_DEVICE int tap(int k, int axis) {
    return k >> (AXES - 1 - axis) * TAP_BITS<MODE> & (TAPS<MODE> - 1);
  }
  // In its image, or -1.
  PYDEFORM_DEVICE int pixel(int k, const GridGeometry& g) const {
    int place = 0;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      const int at = along[a].pixel[tap(k, a)];
      place = place < 0 || at < 0 ? -1 : place * g.in_size[a] + at;
    }
    return place;
  }
  // The product of all axes but one.
  PYDEFORM_DEVICE A weight(int k, int without = -1) const {
    A product = 1;
#pragma unroll
    for (int a = 0; a < AXES; a++)
      if (a != without) product *= along[a].weight[tap(k, a)];
    return product;
  }
  // Eq. 7: the derivative by the number of an axis. The slopes along it add up to 0, so that differences of dots will do:
  // equal ones leave exactly nothing.
  PYDEFORM_DEVICE A slope(const A (&dot)[ALL_TAPS<MODE>], int axis) const {
    A sum = nothing;
#pragma unroll
    for (int k = 0; k < ALL_TAPS<MODE>; k++) {
      if (tap(k, axis)) continue;
      A part = 0;
#pragma unroll
      for (int t = 1; t < TAPS<MODE>; t++)
        part += along[axis].slope[t] * (dot[k + (t << (AXES - 1 - axis) * TAP_BITS<MODE>)] - dot[k]);
      sum += weight(k, axis) * part;
    }
    return along[axis].by_number * sum;
  }
};

// A query of some image, counted through all images.
template <class I> struct Query {
  int image, own;  // its number in the image
  PYDEFORM_DEVICE Query(I number, const GridGeometry& g)
      : image((int)(number / g.queries)), own((int)(number - (I)image * g.queries)) {}

  // Of its number along the first axis, without number_first.
  PYDEFORM_DEVICE I number_place(const GridGeometry& g) const {
    return (I)image * g.queries * AXES + (I)own * g.number_step;
  }
  PYDEFORM_DEVICE I plane(int channel, const GridGeometry& g) const { return (I)image * g.channels + channel; }

  template <class A, int MODE, class TGrid>
  PYDEFORM_DEVICE Point<A, MODE> point(const TGrid* __restrict__ grid, const GridGeometry& g) const {
    int start[AXES] = {};
    if (g.moves) take_apart(start, own, g.in_size);
    Point<A, MODE> point;
    point.nothing = 0;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      const A number = to_float(grid[number_place(g) + g.number_first[a]]);
      point.along[a].find(number, (A)start[a], a, g);
      if (number != number) point.nothing = not_a_number<A>();
    }
    return point;
  }
};

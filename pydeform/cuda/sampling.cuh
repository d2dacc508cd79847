// Where a tap samples: four corners, their weights, and the place within the cell (docs/math/deform_conv2d.md, eq. 2).
// The twin of cpu/_sampling.py: the same tests in the same order, so both backends agree on every border and kink.
#pragma once
#include "primitives.cuh"

constexpr int DCNV2 = 1, DCNV1 = 2;  // the index of a border rule in BOUNDARIES of _geometry.py; 0 is torchvision's

// Coordinates, weights and sums: double for double, float for the rest.
template <class T> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};
template <class T> using Compute = typename ComputeOf<T>::type;

PYDEFORM_DEVICE float round_down(float v) { return floorf(v); }
PYDEFORM_DEVICE double round_down(double v) { return floor(v); }
PYDEFORM_DEVICE bool is_infinite(float v) { return fabsf(v) > 0x1.fffffep127f; }
PYDEFORM_DEVICE bool is_infinite(double v) { return fabs(v) > 0x1.fffffffffffffp1023; }

// A sample with a coordinate below this one is outside; at and above it the corners decide.
template <class A> PYDEFORM_DEVICE A lowest_coordinate(int boundary);
template <> PYDEFORM_DEVICE float lowest_coordinate<float>(int boundary) {
  // dcnv2: the number after -1, which itself is outside with derivative 0. dcnv1: nothing is read before the image.
  // torchvision: at -1 the corner at 0 has weight 0 and the derivative from the right.
  return boundary == DCNV2 ? -0x1.fffffep-1f : boundary == DCNV1 ? 0.f : -2.f;
}
template <> PYDEFORM_DEVICE double lowest_coordinate<double>(int boundary) {
  return boundary == DCNV2 ? -0x1.fffffffffffffp-1 : boundary == DCNV1 ? 0. : -2.;
}

// Corners in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1): the pixel's number in its image, -1 outside.
template <class A> struct Sample {
  int corner[4];
  A y, x;  // within the cell, from 0 to 1
};

// No index is formed from a coordinate that is not known to be in range. NaN makes y and x NaN and all corners -1, so
// that whatever is made of them is NaN and nothing is read; an infinite coordinate is outside.
template <class A> PYDEFORM_DEVICE Sample<A> locate(A y, A x, const Geometry& g) {
  const A low = lowest_coordinate<A>(g.boundary);
  const bool inside = y >= low && y < (A)g.in_size[0] && x >= low && x < (A)g.in_size[1];  // false for NaN
  const A ys = inside ? y : low, xs = inside ? x : low;
  const A fy = round_down(ys), fx = round_down(xs);
  const int y0 = (int)fy, x0 = (int)fx;
  // dcnv1 repeats the last row and column instead of fading to zero: there both corners are one pixel.
  const int repeated = g.boundary == DCNV1;
  const int y1 = min(y0 + 1, g.in_size[0] - repeated), x1 = min(x0 + 1, g.in_size[1] - repeated);
  const bool row0 = inside && y0 >= 0, row1 = inside && y1 >= 0 && y1 < g.in_size[0];
  const bool column0 = x0 >= 0, column1 = x1 >= 0 && x1 < g.in_size[1];
  Sample<A> s;
  s.corner[0] = row0 && column0 ? y0 * g.in_size[1] + x0 : -1;
  s.corner[1] = row0 && column1 ? y0 * g.in_size[1] + x1 : -1;
  s.corner[2] = row1 && column0 ? y1 * g.in_size[1] + x0 : -1;
  s.corner[3] = row1 && column1 ? y1 * g.in_size[1] + x1 : -1;
  const bool broken = y != y || x != x;
  s.y = broken ? y + x : ys - fy;
  s.x = broken ? y + x : xs - fx;
  return s;
}

// Weights of the four corners, times m. With an infinite m they make NaN of a sample that has a corner without weight or
// a pixel of 0: such a sample is multiplied by m after it is made, with weights times 1.
template <class A> PYDEFORM_DEVICE void corner_weights(A (&w)[4], A y, A x, A m) {
  const A above = ((A)1 - y) * m, below = y * m, left = (A)1 - x;
  w[0] = above * left;
  w[1] = above * x;
  w[2] = below * left;
  w[3] = below * x;
}

// From the four dot products with the corners to those with the sample and its derivatives along y and x.
template <class A> PYDEFORM_DEVICE void dots_of_corners(const A (&d)[4], A y, A x, A& value, A& along_y, A& along_x) {
  const A above = (A)1 - y, left = (A)1 - x;
  value = above * left * d[0] + above * x * d[1] + y * left * d[2] + y * x * d[3];
  along_y = left * (d[2] - d[0]) + x * (d[3] - d[1]);
  along_x = above * (d[1] - d[0]) + y * (d[3] - d[2]);
}

// The sampling point of output pixel (oy, ox), and where its numbers lie. Where a kernel has a type TOffset, that is the
// type of offset and of its gradient: T, or float where T is a half type, with the same Compute.
template <class T, class I, class TOffset = T> struct Offsets {
  const TOffset* __restrict__ offset;  // (N, offset_groups, K, 2, P)
  const T* __restrict__ mask;          // (N, offset_groups, K, P), or null: 1 everywhere

  // p is the output pixel within its image, (y, x) where the tap would read it without an offset.
  PYDEFORM_DEVICE Sample<Compute<T>> at(int b, int og, int tap, int p, int y, int x, Compute<T>& m,
                                        const Geometry& g) const {
    using A = Compute<T>;
    const I pixels = (I)g.out_size[0] * g.out_size[1];
    const I k = ((I)b * g.offset_groups + og) * (g.kernel[0] * g.kernel[1]) + tap;
    m = mask ? to_float(mask[k * pixels + p]) : (A)1;
    return locate((A)y + to_float(offset[2 * k * pixels + p]), (A)x + to_float(offset[(2 * k + 1) * pixels + p]), g);
  }
  // (row, column) is the place of tap (0, 0) of the kernel for the pixel.
  PYDEFORM_DEVICE Sample<Compute<T>> sample(int b, int og, int tap, int p, int row, int column, Compute<T>& m,
                                            const Geometry& g) const {
    return at(b, og, tap, p, row + tap / g.kernel[1] * g.dilation[0], column + tap % g.kernel[1] * g.dilation[1], m, g);
  }
};

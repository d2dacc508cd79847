// What a coordinate names along an axis: two pixels and the place between them; and the corners of a cell, which are the
// product of the axes, the last one fastest. No geometry is known here.
// The twin of cpu/sampling: the same tests in the same order, so both backends agree on every border and kink.
//
// `AXES` stands before all headers: core/source.py.
#pragma once
#include "core/numbers.cuh"

constexpr int TORCHVISION = 0, DCNV2 = 1, DCNV1 = 2;  // the index of a border rule in BOUNDARIES of _geometry.py

constexpr int CORNERS = 1 << AXES;  // of a cell

// Whether a corner is on the far side of its cell along an axis: a bit of its number.
constexpr PYDEFORM_DEVICE int is_far(int corner, int axis) { return corner >> (AXES - 1 - axis) & 1; }

// One axis -----------------------------------------------------------------------------------------------------------

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

template <class A> PYDEFORM_DEVICE bool in_range(A coordinate, A lowest, int size) {  // false for NaN
  return coordinate >= lowest && coordinate < (A)size;
}

// The two pixels of a coordinate that is in range, whether the image has them, and the place between them, 0 to 1.
template <class A> struct AxisCorners {
  int pixel[2];
  bool exists[2];
  A place;
};

template <class A> PYDEFORM_DEVICE AxisCorners<A> axis_corners(A coordinate, int size, int boundary) {
  const A down = round_down(coordinate);
  const int near = (int)down;
  // dcnv1 repeats the last pixel instead of fading to zero: there both are one.
  const int far = min(near + 1, size - (boundary == DCNV1));
  return {{near, far}, {near >= 0, far >= 0 && far < size}, coordinate - down};
}

// All axes -----------------------------------------------------------------------------------------------------------

PYDEFORM_DEVICE int product_of(const int (&size)[AXES]) {
  int product = size[0];
#pragma unroll
  for (int a = 1; a < AXES; a++) product *= size[a];
  return product;
}

// From a place in row-major order to its coordinates, and back.
PYDEFORM_DEVICE void take_apart(int (&at)[AXES], int place, const int (&size)[AXES]) {
#pragma unroll
  for (int a = AXES - 1; a > 0; a--) {
    const int rest = place / size[a];
    at[a] = place - rest * size[a];
    place = rest;
  }
  at[0] = place;
}
PYDEFORM_DEVICE int place_of(const int (&at)[AXES], const int (&size)[AXES]) {
  int place = at[0];
#pragma unroll
  for (int a = 1; a < AXES; a++) place = place * size[a] + at[a];
  return place;
}
PYDEFORM_DEVICE bool is_inside(const int (&at)[AXES], const int (&size)[AXES]) {
  bool inside = true;
#pragma unroll
  for (int a = 0; a < AXES; a++) inside = inside && at[a] >= 0 && at[a] < size[a];
  return inside;
}

// Weights of the corners, times m. With an infinite m they make NaN of a sample that has a corner without weight or a
// pixel of 0: such a sample is multiplied by m after it is made, with weights times 1.
template <class A> PYDEFORM_DEVICE void corner_weights(A (&w)[CORNERS], const A (&within)[AXES], A m) {
  w[0] = m;
#pragma unroll
  for (int a = 0; a < AXES; a++)
#pragma unroll
    for (int k = (1 << a) - 1; k >= 0; k--) {
      const A before = w[k];
      w[2 * k] = before * ((A)1 - within[a]);
      w[2 * k + 1] = before * within[a];
    }
}

// From the dot products with the corners to those with the sample and with its derivative along each axis.
template <class A>
PYDEFORM_DEVICE void dots_of_corners(const A (&dot)[CORNERS], const A (&within)[AXES], A& value, A (&along)[AXES]) {
  A w[CORNERS];
  corner_weights(w, within, (A)1);
  value = w[0] * dot[0];
#pragma unroll
  for (int k = 1; k < CORNERS; k++) value += w[k] * dot[k];
#pragma unroll
  for (int a = 0; a < AXES; a++) {
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {  // edges of the cell along the axis, each with its weight by the other axes
      if (is_far(k, a)) continue;
      // A NaN comes in with the other axes' weights. A single axis has none.
      A edge = AXES == 1 && within[0] != within[0] ? within[0] : (A)1;
#pragma unroll
      for (int b = 0; b < AXES; b++)
        if (b != a) edge *= is_far(k, b) ? within[b] : (A)1 - within[b];
      const A part = edge * (dot[k + (1 << (AXES - 1 - a))] - dot[k]);
      along[a] = k ? along[a] + part : part;
    }
  }
}

// Types of sums, and what is asked of numbers everywhere.
#pragma once
#include "core/primitives.cuh"

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

PYDEFORM_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

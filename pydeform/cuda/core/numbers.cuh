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

template <class A> PYDEFORM_DEVICE A not_a_number() { return (A)__uint_as_float(0x7fc00000u); }

// v between 0 and limit, rounded down. NaN gives 0.
template <class A> PYDEFORM_DEVICE int clamped(A v, int limit) {
  return v >= (A)limit ? limit : v > 0 ? min((int)v, limit) : 0;
}

// A product that is never fused with an addition: all kernels, and the CPU, put a point on the same side of a border.
PYDEFORM_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
PYDEFORM_DEVICE double times(double a, double b) { return __dmul_rn(a, b); }

PYDEFORM_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

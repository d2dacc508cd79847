// Where a tap samples: the corners of a cell, their weights, and the place in it (docs/math/deform_conv2d.md, eq. 2).
//
// `AXES`, `ACTIVE` and the struct Geometry stand before all headers: core/source.py.
#pragma once
#include "sampling/axes.cuh"

PYDEFORM_DEVICE int taps_of(const Geometry& g) { return product_of(g.kernel); }
// Of an image: fewer than 2^31.
template <class I> PYDEFORM_DEVICE I in_pixels_of(const Geometry& g) { return product_of(g.in_size); }
template <class I> PYDEFORM_DEVICE I out_pixels_of(const Geometry& g) { return product_of(g.out_size); }

// Corners in the order (near, near), (near, far), (far, near), (far, far): the pixel's number in its image, -1 outside.
template <class A> struct Sample {
  int corner[CORNERS];
  A within[AXES];  // place in the cell along each axis, from 0 to 1
};

// No index is formed from a coordinate that is not known to be in range. NaN makes all of `within` NaN and all corners
// -1, so that whatever is made of them is NaN and nothing is read; an infinite coordinate is outside.
template <class A> PYDEFORM_DEVICE Sample<A> locate(const A (&at)[AXES], const Geometry& g) {
  const A lowest = lowest_coordinate<A>(g.boundary);
  bool inside = true, broken = false;
  A sum = at[0];
#pragma unroll
  for (int a = 0; a < AXES; a++) {
    inside = inside && in_range(at[a], lowest, g.in_size[a]);
    broken = broken || at[a] != at[a];
    if (a > 0) sum += at[a];
  }
  Sample<A> s;
  s.corner[0] = inside ? 0 : -1;
#pragma unroll
  for (int a = 0; a < AXES; a++) {
    const AxisCorners<A> c = axis_corners(inside ? at[a] : lowest, g.in_size[a], g.boundary);
    s.within[a] = broken ? sum : c.place;
#pragma unroll
    for (int k = (1 << a) - 1; k >= 0; k--) {
      const int before = s.corner[k];
#pragma unroll
      for (int far = 0; far < 2; far++)
        s.corner[2 * k + far] = before >= 0 && c.exists[far] ? before * g.in_size[a] + c.pixel[far] : -1;
    }
  }
  return s;
}

// What kernels write of the offset's gradient: each sample's, or, ACTIVE, sums over a block's pixels.
template <class TOffset, bool SUMMED> struct OffsetGradientOf {
  using type = TOffset;
};
template <class TOffset> struct OffsetGradientOf<TOffset, true> {
  using type = Compute<TOffset>;
};
template <class TOffset> using OffsetGradient = typename OffsetGradientOf<TOffset, ACTIVE>::type;

// The sampling point of a tap for an output pixel, and where its numbers lie. Where a kernel has a type TOffset, that is
// the type of offset and of its gradient: T, or float where T is a half type, with the same Compute.
template <class T, class I, class TOffset = T> struct Offsets {
  const TOffset* __restrict__ offset;  // (N, offset_groups, K, AXES, P), or ACTIVE: (offset_groups, K, AXES)
  const T* __restrict__ mask;          // (N, offset_groups, K, P), or null: 1 everywhere

  // p is the output pixel within its image, `regular` where the tap would read it without an offset.
  PYDEFORM_DEVICE Sample<Compute<T>> at(int b, int og, int tap, int p, const int (&regular)[AXES], Compute<T>& m,
                                        const Geometry& g) const {
    using A = Compute<T>;
    const I pixels = out_pixels_of<I>(g);
    const I k = ((I)b * g.offset_groups + og) * taps_of(g) + tap;
    m = mask ? to_float(mask[k * pixels + p]) : (A)1;
    A moved[AXES];
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      const I place = ACTIVE ? (I)(og * taps_of(g) + tap) * AXES + a : (AXES * k + a) * pixels + p;
      moved[a] = (A)regular[a] + to_float(offset[place]);
    }
    return locate(moved, g);
  }
  // `origin` is the place of the kernel's first tap for the pixel.
  PYDEFORM_DEVICE Sample<Compute<T>> sample(int b, int og, int tap, int p, const int (&origin)[AXES], Compute<T>& m,
                                            const Geometry& g) const {
    int regular[AXES];
    take_apart(regular, tap, g.kernel);
#pragma unroll
    for (int a = 0; a < AXES; a++) regular[a] = origin[a] + regular[a] * g.dilation[a];
    return at(b, og, tap, p, regular, m, g);
  }
};

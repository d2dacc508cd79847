// What one tap of an output pixel reads: the chunks of its corners in the channels-last copy, and their blend.
#pragma once
#include "conv/places.cuh"
#include "core/chunks.cuh"

// Where a tap reads. ADJOINT is the transpose of PLAIN: a gradient's pixels in the places of an image's.
constexpr int PLAIN = 0, DEFORMED = 1, ADJOINT = 2;
template <int READS> constexpr int PIXELS_READ = READS == DEFORMED ? CORNERS : 1;

// corner: first chunk of the pixel, or of the zeros behind the last; weight: or, of an infinite mask, that and `within`
template <class A, class I, int READS> struct Tap {
  I corner[PIXELS_READ<READS>];
  A weight[PIXELS_READ<READS>];
};

// `in_kernel`: the tap's place there.
template <class T, class I, int READS, class TOffset>
PYDEFORM_DEVICE Tap<Compute<T>, I, READS> locate_tap(const Offsets<T, I, TOffset>& offsets, const OutputPixel& pixel,
                                                     int og, int tap, const int (&in_kernel)[AXES], const Geometry& g,
                                                     I chunks) {
  using A = Compute<T>;
  Tap<A, I, READS> t;
  const I image = in_pixels_of<I>(g), zeros = g.batch * image * chunks, start = pixel.b * image;
  int at[AXES];
#pragma unroll
  for (int a = 0; a < AXES; a++) at[a] = pixel.origin[a] + in_kernel[a] * g.dilation[a];
  if constexpr (READS == DEFORMED) {
    A m;
    const Sample<A> s = offsets.at(pixel.b, og, tap, pixel.p, at, m, g);
#pragma unroll
    for (int k = 0; k < CORNERS; k++) t.corner[k] = s.corner[k] < 0 ? zeros : (start + s.corner[k]) * chunks;
    corner_weights(t.weight, s.within, m);
    if (is_infinite(m)) {
      t.weight[0] = m;
#pragma unroll
      for (int a = 0; a < AXES; a++) t.weight[1 + a] = s.within[a];
    }
  } else {
    bool inside = true;
    if constexpr (READS == ADJOINT) {  // the pixel whose tap read this one
      take_apart(at, pixel.p, g.out_size);
#pragma unroll
      for (int a = 0; a < AXES; a++) {
        at[a] += g.pad[a] - in_kernel[a] * g.dilation[a];
        inside = inside && at[a] % g.stride[a] == 0;
        at[a] /= g.stride[a];
      }
    }
    inside = inside && is_inside(at, g.in_size);
    t.corner[0] = inside ? (start + place_of(at, g.in_size)) * chunks : zeros;
    t.weight[0] = 1;
  }
  return t;
}

// What stands for a pixel that does not exist.
template <class T, class I, int READS> PYDEFORM_DEVICE Tap<Compute<T>, I, READS> no_tap(const Geometry& g, I chunks) {
  Tap<Compute<T>, I, READS> t;
#pragma unroll
  for (int k = 0; k < PIXELS_READ<READS>; k++) {
    t.corner[k] = g.batch * in_pixels_of<I>(g) * chunks;
    t.weight[k] = 0;
  }
  return t;
}

// The 16 bytes of channels of one sample, from those of its corners. Of an infinite mask times the zeros behind the
// channels that exist, which `count_channels` counts, zeros stay.
template <class T, class I, int READS, class Count>
PYDEFORM_DEVICE uint4 blend(const Tap<Compute<T>, I, READS>& t, const uint4 (&corner)[PIXELS_READ<READS>],
                            Count count_channels) {
  if constexpr (READS != DEFORMED) {
    return corner[0];
  } else {
    constexpr int E = 16 / sizeof(T);
    const Compute<T> m = t.weight[0];
    Compute<T> w[CORNERS];
#pragma unroll
    for (int k = 0; k < CORNERS; k++) w[k] = t.weight[k];
    if (is_infinite(m)) {
      Compute<T> within[AXES];
#pragma unroll
      for (int a = 0; a < AXES; a++) within[a] = t.weight[1 + a];
      corner_weights(w, within, (Compute<T>)1);
    }
    Compute<T> sum[E];
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {
      Compute<T> v[E];
      unpack<T>(v, corner[k]);
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] = k ? sum[e] + w[k] * v[e] : w[0] * v[e];
    }
    if (is_infinite(m)) {
      const int channels = count_channels();
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] = e < channels ? m * sum[e] : (Compute<T>)0;
    }
    return pack<T>(sum);
  }
}

template <class T, class I, int PIXELS>
PYDEFORM_DEVICE void load_corners(uint4 (&corner)[PIXELS], const T* __restrict__ channel, const I (&place)[PIXELS]) {
#pragma unroll
  for (int k = 0; k < PIXELS; k++) corner[k] = load16(channel + (long long)place[k] * (16 / sizeof(T)));
}

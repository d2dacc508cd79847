// Samples at the points of a grid (docs/math/grid.md, eq. 5), and the part of the input's gradient that each of them
// gives back (eq. 6), added in no order.
//
// Images are read as they lie, channels first: threads that are neighbours have queries that are, whose pixels mostly
// lie together, too. A thread locates its query once for all channels that it has.
#pragma once
#include "grid/points.cuh"

// On a multiprocessor.
template <class T, class I> constexpr int GRID_BLOCKS = sizeof(T) == 8 || sizeof(I) == 8 ? 2 : 4;

// What a thread reads of each channel.
template <class A, int MODE> struct Reads {
  int pixel[ALL_TAPS<MODE>];  // -1: none
  A weight[ALL_TAPS<MODE>];
  PYDEFORM_DEVICE Reads(const Point<A, MODE>& point, const GridGeometry& g) {
#pragma unroll
    for (int k = 0; k < ALL_TAPS<MODE>; k++) {
      pixel[k] = point.pixel(k, g);
      weight[k] = point.weight(k);
    }
  }
};

// Eq. 5: output (N, C, queries) = sum of weight * pixel.
// Owner: one thread per (image, query) and row of the launch grid, which has each so many-th channel.
template <class T, class I, int MODE, class TGrid = T>
__global__ void __launch_bounds__(GRID_THREADS, GRID_BLOCKS<T, I>)
    sample_points(const T* __restrict__ input, const TGrid* __restrict__ grid, T* __restrict__ output, GridGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * GRID_THREADS + threadIdx.x, pixels = product_of(g.in_size);
  if (i >= (I)g.batch * g.queries) return;
  const Query<I> query(i, g);
  const Point<A, MODE> point = query.template point<A, MODE>(grid, g);
  const Reads<A, MODE> reads(point, g);
  for (int c = blockIdx.y; c < g.channels; c += gridDim.y) {
    const T* const image = input + query.plane(c, g) * pixels;
    A sum = point.nothing;
#pragma unroll
    for (int k = 0; k < ALL_TAPS<MODE>; k++)
      if (reads.pixel[k] >= 0) sum += reads.weight[k] * to_float(image[reads.pixel[k]]);
    output[query.plane(c, g) * g.queries + query.own] = from_float<T>(sum);
  }
}

// Eq. 6: sums (N, C, pixels) += weight * grad_output, by atomics.
// Owner: as above.
template <class T, class I, int MODE, class TGrid = T>
__global__ void __launch_bounds__(GRID_THREADS, GRID_BLOCKS<T, I>)
    scatter_points(const T* __restrict__ grad_output, const TGrid* __restrict__ grid, Compute<T>* __restrict__ sums,
                   GridGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * GRID_THREADS + threadIdx.x, pixels = product_of(g.in_size);
  if (i >= (I)g.batch * g.queries) return;
  const Query<I> query(i, g);
  const Reads<A, MODE> reads(query.template point<A, MODE>(grid, g), g);
  for (int c = blockIdx.y; c < g.channels; c += gridDim.y) {
    A* const image = sums + query.plane(c, g) * pixels;
    const A grad = to_float(grad_output[query.plane(c, g) * g.queries + query.own]);
#pragma unroll
    for (int k = 0; k < ALL_TAPS<MODE>; k++)
      if (reads.pixel[k] >= 0) atomicAdd(image + reads.pixel[k], reads.weight[k] * grad);
  }
}

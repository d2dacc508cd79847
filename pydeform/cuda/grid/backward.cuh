// The grid's gradient (docs/math/grid.md, eq. 7), without atomics: every number has one owner, which sums in one order.
#pragma once
#include "grid/points.cuh"

// Eq. 7: grad_grid = sum of slope * (sum over channels of grad_output * pixel).
// Owner: `slices` threads of a block have a query of an image, each of them every so many-th channel; the first one
// adds up what they find.
template <class T, class I, int MODE, class TGrid = T>
__global__ void __launch_bounds__(GRID_THREADS, 2)
    point_gradients(const T* __restrict__ grad_output, const T* __restrict__ input, const TGrid* __restrict__ grid,
                    TGrid* __restrict__ grad_grid, GridGeometry g, int slices) {
  using A = Compute<T>;
  PYDEFORM_SHARED(A, parts, AXES * GRID_THREADS);
  const int lanes = GRID_THREADS / slices, slice = threadIdx.x / lanes, lane = threadIdx.x - slice * lanes;
  const I i = (I)blockIdx.x * lanes + lane, count = (I)g.batch * g.queries, pixels = product_of(g.in_size);
  const Query<I> query(min(i, count - 1), g);
  const Point<A, MODE> point = query.template point<A, MODE>(grid, g);
  int pixel[ALL_TAPS<MODE>];
  A dot[ALL_TAPS<MODE>];
#pragma unroll
  for (int k = 0; k < ALL_TAPS<MODE>; k++) {
    pixel[k] = point.pixel(k, g);
    dot[k] = 0;
  }
  for (int c = MODE == NEAREST ? g.channels : slice; c < g.channels; c += slices) {  // of nearest all slopes are 0
    const T* const image = input + query.plane(c, g) * pixels;
    const A grad = to_float(grad_output[query.plane(c, g) * g.queries + query.own]);
#pragma unroll
    for (int k = 0; k < ALL_TAPS<MODE>; k++)  // a gradient that is not finite makes NaN of the zeros outside
      dot[k] += grad * (pixel[k] >= 0 ? to_float(image[pixel[k]]) : (A)0);
  }
#pragma unroll
  for (int a = 0; a < AXES; a++) parts[a * GRID_THREADS + threadIdx.x] = point.slope(dot, a);
  __syncthreads();
  if (slice > 0 || i >= count) return;
#pragma unroll
  for (int a = 0; a < AXES; a++) {
    A sum = parts[a * GRID_THREADS + lane];
    for (int s = 1; s < slices; s++) sum += parts[a * GRID_THREADS + s * lanes + lane];
    grad_grid[query.number_place(g) + g.number_first[a]] = from_float<TGrid>(sum);
  }
}

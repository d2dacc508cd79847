// The input's gradient (docs/math/grid.md, eq. 6) without float atomics: each pixel gathers from the taps on it.
//
// As conv/gather.cuh and gather/cells.cuh do, but by pixels instead of cells, since padding takes the taps of a cell
// anywhere: taps are sorted by counting into bins, one for each image and pixel; each bin is then sorted by the taps'
// numbers, and a pixel adds what its bin holds in that order. A chunk has `count` queries from `first` on, of all
// images; tap k of its query q is number q * ALL_TAPS + k, below 2^31. A pixel goes on with the sum that it has from
// the chunks before, so that chunks change no bit.
#pragma once
#include "core/sums.cuh"
#include "grid/points.cuh"

constexpr int GATHERED_CHANNELS = 4;  // sums that a thread has at a time

// Taps of each bin, for eq. 6: adds them to counts[bin + 1], so that running totals of counts are where bins start.
// Owner: one thread per query of the chunk.
template <class T, class I, int MODE, class TGrid = T>
__global__ void __launch_bounds__(GRID_THREADS)
    count_taps(const TGrid* __restrict__ grid, int* __restrict__ counts, GridGeometry g, I first, I count) {
  const I i = (I)blockIdx.x * GRID_THREADS + threadIdx.x;
  if (i >= count) return;
  const Query<I> query(first + i, g);
  const Point<Compute<T>, MODE> point = query.template point<Compute<T>, MODE>(grid, g);
  const I bins = (I)(query.image - (int)(first / g.queries)) * product_of(g.in_size);
#pragma unroll
  for (int k = 0; k < ALL_TAPS<MODE>; k++) {
    const int pixel = point.pixel(k, g);
    if (pixel >= 0) atomicAdd(counts + (bins + pixel) + 1, 1);
  }
}

// Numbers of taps into their bins, for eq. 6, at any place that is left there: counts[bin + 1] goes down to 0. And
// their weights, by their numbers.
// Owner: as above.
template <class T, class I, int MODE, class TGrid = T>
__global__ void __launch_bounds__(GRID_THREADS)
    fill_taps(const TGrid* __restrict__ grid, int* __restrict__ counts, const I* __restrict__ starts,
              int* __restrict__ ids, Compute<T>* __restrict__ weights, GridGeometry g, I first, I count) {
  const I i = (I)blockIdx.x * GRID_THREADS + threadIdx.x;
  if (i >= count) return;
  const Query<I> query(first + i, g);
  const Point<Compute<T>, MODE> point = query.template point<Compute<T>, MODE>(grid, g);
  const I bins = (I)(query.image - (int)(first / g.queries)) * product_of(g.in_size);
#pragma unroll
  for (int k = 0; k < ALL_TAPS<MODE>; k++) {
    const int pixel = point.pixel(k, g);
    if (pixel < 0) continue;
    const I bin = bins + pixel, id = i * ALL_TAPS<MODE> + k;
    ids[starts[bin] + atomicAdd(counts + bin + 1, -1) - 1] = (int)id;
    weights[id] = point.weight(k);
  }
}

// Eq. 6: sums (N, C, pixels) += sum of weight * grad_output.
// Owner: one thread per (image of the chunk, pixel) and row of the launch grid, which has some channels.
template <class T, class I, int MODE>
__global__ void __launch_bounds__(GRID_THREADS)
    gather_taps(const T* __restrict__ grad_output, const I* __restrict__ starts, const int* __restrict__ ids,
                const Compute<T>* __restrict__ weights, Compute<T>* __restrict__ sums, GridGeometry g, I first,
                int images) {
  using A = Compute<T>;
  const I bin = (I)blockIdx.x * GRID_THREADS + threadIdx.x, pixels = product_of(g.in_size);
  if (bin >= images * pixels) return;
  const int slot = (int)(bin / pixels), image = (int)(first / g.queries) + slot;
  const I begin = first - (I)image * g.queries;  // the query in its image of the chunk's first one
  for (int c = blockIdx.y * GATHERED_CHANNELS; c < g.channels; c += gridDim.y * GATHERED_CHANNELS) {
    const I plane = (I)image * g.channels + c;
    A* const target = sums + plane * pixels + (bin - slot * pixels);
    A sum[GATHERED_CHANNELS];
#pragma unroll
    for (int r = 0; r < GATHERED_CHANNELS; r++) sum[r] = c + r < g.channels ? target[r * pixels] : (A)0;
    for (I place = starts[bin]; place < starts[bin + 1]; place++) {
      const int id = ids[place];
      const T* const grad = grad_output + plane * g.queries + (begin + id / ALL_TAPS<MODE>);
#pragma unroll
      for (int r = 0; r < GATHERED_CHANNELS; r++)
        if (c + r < g.channels) sum[r] += weights[id] * to_float(grad[(I)r * g.queries]);
    }
#pragma unroll
    for (int r = 0; r < GATHERED_CHANNELS; r++)
      if (c + r < g.channels) target[r * pixels] = sum[r];
  }
}

// The value's gradient (docs/math/gather.md, eq. 5) without float atomics: each pixel gathers from the samples near it.
//
// As conv/gather.cuh does: samples are sorted by counting into bins, one for each image, places of a group, and cell
// between pixels of a map; each bin is then sorted by the samples' numbers, and a pixel adds what the four cells around it
// hold in that order. A chunk has `queries` queries from `first` on, of all images; sample s of its query q is number
// q * samples + s, below 2^31.
#pragma once
#include "core/sums.cuh"
#include "gather/points.cuh"

constexpr int CELL_CHANNELS = 4;  // sums that a lane has at a time

struct Chunk {
  int first, queries;
  int cells;  // of an image
  PYDEFORM_DEVICE int first_image(const GatherGeometry& g) const { return first / g.queries; }
};

// The bin of thread i's sample, or -1; `id` is its number.
template <class T, class I, class TReference, class TLocation>
PYDEFORM_DEVICE I bin_of_sample(I i, int& id, const Samples<T, I, TLocation, TReference>& samples, const Chunk& chunk) {
  const GatherGeometry& g = samples.g;
  const I of_group = (I)chunk.queries * g.samples;
  const int group = (int)(i / of_group);
  id = (int)(i - group * of_group);
  const int q = id / g.samples;
  const Query<Compute<T>, I> query((I)chunk.first + q, g);
  const Point<Compute<T>> point = samples.at(query, group, samples.table[id - q * g.samples]);
  const I slot = (I)(query.image - chunk.first_image(g)) * g.location_groups + group;
  return point.reads() ? slot * chunk.cells + point.cell : -1;
}

// Samples of each bin, for eq. 5.
// Owner: one thread per (places of a group, query of the chunk, sample).
// Adds 1 to counts[bin + 1], so that running totals of counts are where bins start.
template <class T, class I, class TReference = T, class TLocation = T>
__global__ void __launch_bounds__(GATHER_THREADS)
    count_points(const TLocation* __restrict__ locations, const TReference* __restrict__ reference,
                 const SampleRow<Compute<T>>* __restrict__ table, int* __restrict__ counts, GatherGeometry g,
                 Chunk chunk) {
  const I i = (I)blockIdx.x * GATHER_THREADS + threadIdx.x;
  if (i >= (I)g.location_groups * chunk.queries * g.samples) return;
  int id;
  const I bin =
      bin_of_sample(i, id, Samples<T, I, TLocation, TReference>{locations, nullptr, reference, table, g}, chunk);
  if (bin >= 0) atomicAdd(counts + bin + 1, 1);
}

// Numbers of samples into their bins, for eq. 5.
// Owner: as above.
// Writes one place of ids, any that its bin has left: counts[bin + 1] goes down to 0.
template <class T, class I, class TReference = T, class TLocation = T>
__global__ void __launch_bounds__(GATHER_THREADS)
    fill_cells(const TLocation* __restrict__ locations, const TReference* __restrict__ reference,
               const SampleRow<Compute<T>>* __restrict__ table, int* __restrict__ counts, const I* __restrict__ starts,
               int* __restrict__ ids, GatherGeometry g, Chunk chunk) {
  const I i = (I)blockIdx.x * GATHER_THREADS + threadIdx.x;
  if (i >= (I)g.location_groups * chunk.queries * g.samples) return;
  int id;
  const I bin =
      bin_of_sample(i, id, Samples<T, I, TLocation, TReference>{locations, nullptr, reference, table, g}, chunk);
  if (bin >= 0) ids[starts[bin] + atomicAdd(counts + bin + 1, -1) - 1] = id;
}

// Eq. 6: what makes weights of logits, for all queries and groups of the chunk.
// Owner: one thread per (query of the chunk, group).
template <class T, class I>
__global__ void __launch_bounds__(GATHER_THREADS)
    softmax_sums(const T* __restrict__ logits, const SampleRow<Compute<T>>* __restrict__ table,
                 Softmax<Compute<T>>* __restrict__ sums, GatherGeometry g, Chunk chunk) {
  const I i = (I)blockIdx.x * GATHER_THREADS + threadIdx.x;
  const I some = min(i, (I)chunk.queries * g.groups - 1);
  const Samples<T, I, T, T> samples{nullptr, logits, nullptr, table, g};
  const Softmax<Compute<T>> found = samples.softmax(chunk.first + some / g.groups, (int)(some % g.groups), 0, 1);
  if (i == some) sums[i] = found;
}

// Eq. 5: accumulator (N, S, groups, channels) += sum of weight * share of the corner * grad_output. softmax may be null:
// weights are given.
// Owner: one warp per (image of the chunk, group, pixel), its lanes on the channels of the group. It locates the samples of
// the cells around the pixel 32 at a time, and passes them around.
template <class T, class I, class TLocation = T, class TReference = T>
__global__ void __launch_bounds__(GATHER_THREADS, 2)
    gather_cells(const T* __restrict__ grad_output, const TLocation* __restrict__ locations,
                 const T* __restrict__ weights, const TReference* __restrict__ reference,
                 const SampleRow<Compute<T>>* __restrict__ table, const Softmax<Compute<T>>* __restrict__ softmax,
                 const I* __restrict__ starts, const int* __restrict__ ids, Compute<T>* __restrict__ accumulator,
                 GatherGeometry g, Chunk chunk, int images, int maps) {
  using A = Compute<T>;
  const I warp = (I)blockIdx.x * (GATHER_THREADS / 32) + threadIdx.x / 32;
  if (warp >= (I)images * g.groups * g.pixels) return;
  const int lane = threadIdx.x % 32;
  const int slot = (int)(warp / g.pixels), group = slot % g.groups, image = slot / g.groups;
  const int p = (int)(warp - (I)slot * g.pixels);
  int m = g.samples + maps - 1;  // the pixel's map
  while (m > g.samples && table[m].first_pixel > p) m--;
  const int width = table[m].size[1], y = (p - table[m].first_pixel) / width, x = p - table[m].first_pixel - y * width;
  const I bins =
      ((I)image * g.location_groups + (g.location_groups > 1 ? group : 0)) * chunk.cells + table[m].first_cell;
  const Samples<T, I, TLocation, TReference> samples{locations, weights, reference, table, g};
  const I pitch = (I)g.groups * g.channels;
  A* const target = accumulator + ((I)(chunk.first_image(g) + image) * g.pixels + p) * pitch + (I)group * g.channels;
  for (int c = lane; c - lane < g.channels; c += 32 * CELL_CHANNELS) {
    A sum[CELL_CHANNELS] = {};
    for (int above = 1; above >= 0; above--) {
      // The cells before and behind a pixel on the last axis follow each other, and so do their samples.
      const I bin = bins + (I)(y + 1 - above) * (width + 1) + x, last = starts[bin + 2];
      for (I start = starts[bin]; start < last; start += 32) {
        I place = 0;
        A factor = 0;
        if (start + lane < last) {
          const int id = ids[start + lane], q = id / g.samples;
          const Query<A, I> query((I)chunk.first + q, g);
          const SampleRow<A> row = table[id - q * g.samples];
          const Point<A> point =
              samples.point(query, group, row, softmax ? softmax[(I)q * g.groups + group] : Softmax<A>{0, 0});
          A w[CORNERS];
          corner_weights(w, point.within, point.weight);
#pragma unroll
          for (int k = 0; k < CORNERS; k++)
            if (point.reads(k) && point.pixel(k) == p) factor = w[k];
          place = query.number * pitch + (I)group * g.channels;
        }
        const int some = (int)min(last - start, (I)32);
        for (int j = 0; j < some; j++) {
          const A one = __shfl_sync(0xffffffffu, factor, j);
          const T* const grad = grad_output + __shfl_sync(0xffffffffu, place, j);
#pragma unroll
          for (int r = 0; r < CELL_CHANNELS; r++)
            if (c + 32 * r < g.channels) sum[r] += one * to_float(grad[c + 32 * r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < CELL_CHANNELS; r++)
      if (c + 32 * r < g.channels) target[c + 32 * r] += sum[r];
  }
}

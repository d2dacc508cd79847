// The input's gradient (eq. 5) without float atomics: each pixel gathers from the samples near it.
//
// A sample lies in a cell between pixels, four in a plane; the floor of its coordinates names it, from -1 to size - 1 on
// each axis. The samples of a chunk (some output pixels, some taps) are sorted into bins by counting: one bin for each
// image, offset group and cell. Where a sample lands within its bin depends on the schedule, so each bin is then sorted by
// the samples' numbers. A pixel adds what the cells around it hold in that order: the same bits on every run.
//
// A chunk has `count` output pixels from `first` on, of the flattened (b, p), and taps [tap0, tap0 + taps). Its samples
// are numbered (tap - tap0) * count + pixel, below 2^31; starts[bin] is the place in ids of a bin's first sample. An
// image, of the input or the output, has fewer than 2^31 pixels; I is the type for places in whole arrays.
#pragma once
#include "conv/places.cuh"
#include "core/sums.cuh"

constexpr int GATHER_THREADS = 256;
constexpr int GATHER_BLOCKS = 2;  // on a multiprocessor: left to itself, ptxas spills in order to fit in four
constexpr int LANE_CHANNELS = 4;  // sums that a lane has at a time

// Of an image, row by row: one more than pixels on each axis.
PYDEFORM_DEVICE int cells_of_image(const Geometry& g) {
  int cells = 1;
#pragma unroll
  for (int a = 0; a < AXES; a++) cells *= g.in_size[a] + 1;
  return cells;
}

// Place among those of an image of the cell that has this pixel as that corner.
PYDEFORM_DEVICE int cell_at(const int (&pixel)[AXES], int corner, const Geometry& g) {
  int cell = 0;
#pragma unroll
  for (int a = 0; a < AXES; a++) cell = cell * (g.in_size[a] + 1) + (pixel[a] - is_far(corner, a) + 1);
  return cell;
}

// That of a sample's cell, or -1 if it reads no pixel.
template <class A> PYDEFORM_DEVICE int cell_of(const Sample<A>& s, const Geometry& g) {
#pragma unroll
  for (int j = 0; j < CORNERS; j++) {
    if (s.corner[j] < 0) continue;
    // The first corner that is inside, so never one of dcnv1's repeated ones: those follow the pixel that they repeat.
    int pixel[AXES];
    take_apart(pixel, s.corner[j], g.in_size);
    return cell_at(pixel, j, g);
  }
  return -1;
}

// The bin of thread i's sample, or -1; `id` is its number.
template <class T, class I>
PYDEFORM_DEVICE I bin_of(I i, int& id, const Offsets<T, I>& offsets, const Geometry& g, I first, I count, int tap0,
                         int taps) {
  const int og = (int)(i / (count * taps));
  id = (int)(i - og * (count * taps));
  const int tap = (int)(id / count);
  const OutputPixel pixel(first + (id - tap * count), g);
  Compute<T> m;
  const int cell = cell_of(offsets.sample(pixel.b, og, tap0 + tap, pixel.p, pixel.origin, m, g), g);
  const int image = pixel.b - (int)(first / out_pixels_of<I>(g));  // of those that the chunk touches
  return cell < 0 ? -1 : ((I)image * g.offset_groups + og) * cells_of_image(g) + cell;
}

// Samples of each bin, for eq. 5.
// Owner: one thread per (og, tap, pixel of the chunk). Reads its offsets.
// Adds 1 to counts[bin + 1], so that running totals of counts are where bins start.
template <class T, class I>
__global__ void __launch_bounds__(GATHER_THREADS) count_samples(const T* __restrict__ offset, int* __restrict__ counts,
                                                                Geometry g, I first, I count, int tap0, int taps) {
  const I i = (I)blockIdx.x * GATHER_THREADS + threadIdx.x;
  if (i >= g.offset_groups * taps * count) return;
  int id;
  const I bin = bin_of<T, I>(i, id, {offset, nullptr}, g, first, count, tap0, taps);
  if (bin >= 0) atomicAdd(counts + bin + 1, 1);
}

// Numbers of samples into their bins, for eq. 5.
// Owner: one thread per (og, tap, pixel of the chunk). Reads its offsets.
// Writes one place of ids, any that its bin has left: counts[bin + 1] goes down to 0.
template <class T, class I>
__global__ void __launch_bounds__(GATHER_THREADS)
    fill_bins(const T* __restrict__ offset, int* __restrict__ counts, const I* __restrict__ starts,
              int* __restrict__ ids, Geometry g, I first, I count, int tap0, int taps) {
  const I i = (I)blockIdx.x * GATHER_THREADS + threadIdx.x;
  if (i >= g.offset_groups * taps * count) return;
  int id;
  const I bin = bin_of<T, I>(i, id, {offset, nullptr}, g, first, count, tap0, taps);
  if (bin >= 0) ids[starts[bin] + atomicAdd(counts + bin + 1, -1) - 1] = id;
}

// Eq. 5: accumulator (N, P, channels) += sum of mask * corner weight * columns (taps, count, channels).
// Owner: one warp per (image of the chunk, og, input pixel), its lanes on the memory channels of og. Reads the samples
// of the cells around the pixel, which the lanes locate 32 at a time and pass around. Writes its channels there.
template <class T, class I, class TOffset = T>
__global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS)
    gather_bins(const Compute<T>* __restrict__ columns, const TOffset* __restrict__ offset, const T* __restrict__ mask,
                const I* __restrict__ starts, const int* __restrict__ ids, Compute<T>* __restrict__ accumulator,
                Geometry g, int channels, int images, I first, I count, int tap0) {
  using A = Compute<T>;
  const I in_pixels = in_pixels_of<I>(g);
  const I warp = (I)blockIdx.x * (GATHER_THREADS / 32) + threadIdx.x / 32;
  if (warp >= images * g.offset_groups * in_pixels) return;
  const int lane = threadIdx.x % 32;
  const int slot = (int)(warp / in_pixels), og = slot % g.offset_groups;  // slot: (image of the chunk, og)
  const int p = (int)(warp - slot * in_pixels);
  int at[AXES];
  take_apart(at, p, g.in_size);
  const int b = (int)(first / out_pixels_of<I>(g)) + slot / g.offset_groups;
  const int width = channels / g.offset_groups;
  const Offsets<T, I, TOffset> offsets{offset, mask};
  for (int q0 = 0; q0 < width; q0 += 32 * LANE_CHANNELS) {
    const int q = q0 + lane;
    A sum[LANE_CHANNELS] = {};
    for (int far = CORNERS - 1; far > 0; far -= 2) {
      // The cells before and behind a pixel on the last axis follow each other, and so do their samples.
      const I bin = (I)slot * cells_of_image(g) + cell_at(at, far, g);
      const I last = starts[bin + 2];
      for (I start = starts[bin]; start < last; start += 32) {
        I place = 0;
        A weight = 0;
        if (start + lane < last) {
          const int id = ids[start + lane], tap = (int)(id / count);
          const OutputPixel pixel(first + (id - tap * count), g);
          A m, w[CORNERS];
          const Sample<A> s = offsets.sample(b, og, tap0 + tap, pixel.p, pixel.origin, m, g);
          corner_weights(w, s.within, m);
#pragma unroll
          for (int j = 0; j < CORNERS; j++)
            if (s.corner[j] == p) weight += w[j];  // dcnv1 has a pixel in more than one corner
          place = (I)id * channels + og * width;
        }
        const int samples = (int)min(last - start, (I)32);
        for (int j = 0; j < samples; j++) {
          const A factor = __shfl_sync(0xffffffffu, weight, j);
          const A* column = columns + __shfl_sync(0xffffffffu, place, j);
#pragma unroll
          for (int r = 0; r < LANE_CHANNELS; r++)
            if (q + 32 * r < width) sum[r] += factor * column[q + 32 * r];
        }
      }
    }
    A* target = accumulator + ((I)b * in_pixels + p) * channels + og * width;
#pragma unroll
    for (int r = 0; r < LANE_CHANNELS; r++)
      if (q + 32 * r < width) target[q + 32 * r] += sum[r];
  }
}

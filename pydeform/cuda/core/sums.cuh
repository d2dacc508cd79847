// What sums need besides additions: an order of what is added, so that every run gives the same bits, and a rounding at
// their end. Sorted bins are those of conv/gather.cuh and gather/cells.cuh.
#pragma once
#include "core/numbers.cuh"

constexpr int SUMS_THREADS = 256;
constexpr int SHORT_BIN = 32;  // samples: longer bins are not sorted by insertion, whose time is quadratic

PYDEFORM_DEVICE void insertion_sort(int* ids, int n) {
  for (int i = 1; i < n; i++) {
    const int id = ids[i];
    int j = i;
    for (; j > 0 && ids[j - 1] > id; j--) ids[j] = ids[j - 1];
    ids[j] = id;
  }
}

// In place and never quadratic, for offsets that send many samples to one point.
PYDEFORM_DEVICE void heap_sort(int* ids, int n) {
  for (int unheaped = n / 2, length = n; length > 1;) {
    int id;
    if (unheaped > 0) {
      id = ids[--unheaped];
    } else {  // the largest moves behind the heap
      id = ids[--length];
      ids[length] = ids[0];
    }
    int hole = unheaped;
    for (int child; (child = 2 * hole + 1) < length; hole = child) {
      if (child + 1 < length && ids[child + 1] > ids[child]) child++;
      if (ids[child] <= id) break;
      ids[hole] = ids[child];
    }
    ids[hole] = id;
  }
}

// The order of the sums.
// Owner: one thread per bin. Reads and writes the ids of its bin, to ascending order.
template <class I>
__global__ void __launch_bounds__(SUMS_THREADS) sort_bins(const I* __restrict__ starts, int* __restrict__ ids, I bins) {
  const I bin = (I)blockIdx.x * SUMS_THREADS + threadIdx.x;
  if (bin >= bins) return;
  const I start = starts[bin];
  const int n = (int)(starts[bin + 1] - start);
  if (n <= SHORT_BIN) {
    insertion_sort(ids + start, n);
  } else {
    heap_sort(ids + start, n);
  }
}

// Rounds sums to the type of the result.
// Owner: one thread per element.
template <class T, class I>
__global__ void __launch_bounds__(SUMS_THREADS, 2)
    convert(const Compute<T>* __restrict__ sums, T* __restrict__ result, I count) {
  const I i = (I)blockIdx.x * SUMS_THREADS + threadIdx.x;
  if (i < count) result[i] = from_float<T>(sums[i]);
}

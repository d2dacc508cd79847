// Kernels of boxes that are turned: their numbers, what they reach, and means over their bins (docs/math/roi.md, eq. 14,
// 15, 5 and 6), by warps on a channels-last copy, or by threads on the input as it is. As in forward.cuh, but a warp lists
// points, not rows and columns. There are no offsets, masks, groups of channels or classes.
#pragma once
#include "roi/forward.cuh"
#include "roi/turned.cuh"

// Eq. 14, so that an angle's sine is taken once: turned (R, TURNED_NUMBERS).
// Owner: one thread per box.
template <class T, class TBoxes = T>
__global__ void __launch_bounds__(ROI_THREADS)
    turn_boxes(const TBoxes* __restrict__ boxes, Compute<T>* __restrict__ turned, RoiGeometry g) {
  const int r = blockIdx.x * ROI_THREADS + threadIdx.x;
  if (r < g.boxes) turn_box(boxes + (long long)r * 6, turned + (long long)r * TURNED_NUMBERS, g);
}

// What box_bounds writes, or more: no point is looked at.
// Owner: one thread per box.
template <class T>
__global__ void __launch_bounds__(ROI_THREADS)
    turned_bounds(const Compute<T>* __restrict__ turned, int* __restrict__ bounds, RoiGeometry g) {
  using A = Compute<T>;
  const int r = blockIdx.x * ROI_THREADS + threadIdx.x;
  if (r >= g.boxes) return;
  const TurnedBox<A> box = read_turned(turned, r);
  const A sin = magnitude(box.sin), cos = magnitude(box.cos);
  const A size_y = magnitude(box.size_y) / 2, size_x = magnitude(box.size_x) / 2;
  // A point that counts reads pixels less than two away; and rounding.
  const A rounding = 16 * epsilon<A>() * (magnitude(box.y) + magnitude(box.x) + size_y + size_x) + 2;
  const A half_y = size_y * cos + size_x * sin + rounding, half_x = size_y * sin + size_x * cos + rounding;
  const int y0 = clamped(box.y - half_y, g.in_h), y1 = clamped(round_up(box.y + half_y), g.in_h);
  const int x0 = clamped(box.x - half_x, g.in_w), x1 = clamped(round_up(box.x + half_x), g.in_w);
  bounds[r] = box.broken || box.outside || y0 >= y1 || x0 >= x1 ? -1 : box.image;
  bounds[g.boxes + r] = y0;
  bounds[2 * g.boxes + r] = y1;
  bounds[3 * g.boxes + r] = x0;
  bounds[4 * g.boxes + r] = x1;
}

// A point in the image, moved to its pixels.
template <class A> struct TurnedPoint {
  int pixel;
  bool has_right, has_below;  // neighbours that the image has
  A part_y, part_x;           // weights of these
  PYDEFORM_DEVICE void put(A y, A x, const RoiGeometry& g) {
    const Reading<A> row(y, g.in_h, g), column(x, g.in_w, g);
    pixel = row.lower * g.in_w + column.lower;
    has_below = row.upper > row.lower;
    has_right = column.upper > column.lower;
    part_y = row.part;
    part_x = column.part;
  }
};

// sum += the value at a point, of a chunk of channels; the first pixel has them at `source`.
template <class T, class I, class A, int E>
PYDEFORM_DEVICE void add_point(A (&sum)[E], const TurnedPoint<A>& point, const T* source, int pitch, int in_w) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const bool right = k & 1, below = k & 2;
    if ((right && !point.has_right) || (below && !point.has_below)) continue;
    const A weight = (below ? point.part_y : 1 - point.part_y) * (right ? point.part_x : 1 - point.part_x);
    A v[E];
    unpack<T>(v, load16(source + (I)(point.pixel + (below ? in_w : 0) + (right ? 1 : 0)) * pitch));
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] += weight * v[e];
  }
}

// Owner: as pool_bins. The lanes of a warp look at 32 points at once, of one row of points or, where rows are short, of some.
template <class T, class I>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 2)
    pool_turned(const T* __restrict__ image, const Compute<T>* __restrict__ turned, T* __restrict__ output,
                RoiGeometry g, RoiImages images, int pitch, int lanes, int span) {
  using A = Compute<T>;
  constexpr int E = 16 / sizeof(T);
  using Point = TurnedPoint<A>;
  PYDEFORM_DYNAMIC_SHARED(T, stage);  // [channel][bin]
  PYDEFORM_SHARED(Point, shared_points, ROI_WARPS * 32);
  const int bins = g.pooled_h * g.pooled_w, parts = ceil_div(bins, span), runs = ceil_div(pitch / E, lanes);
  const int part = blockIdx.x % parts, run = blockIdx.x / parts % runs, r = blockIdx.x / (parts * runs);
  const TurnedBox<A> box = read_turned(turned, r);
  if (!images.have(box)) return;

  const int lane = threadIdx.x % 32, chunk = lane % lanes, sub = lane / lanes, at_once = 32 / lanes;
  const int bin0 = part * span, some = min(span, bins - bin0);
  const int channel0 = run * lanes * E, channel = channel0 + chunk * E;
  const T* const source = image + (I)(box.image - images.first) * g.in_h * g.in_w * pitch + channel;
  Point* const points = shared_points + threadIdx.x / 32 * 32;
  const Window window = {0, g.in_h, 0, g.in_w};
  for (int k = threadIdx.x / 32; k < some; k += ROI_WARPS) {
    const TurnedBin<A> bin(box, bin0 + k, window, g);
    const int across = max(min(bin.x.points, 32), 1), down = 32 / across;
    A sum[E] = {};
    for (int i0 = 0; i0 < bin.y.points; i0 += down) {
      const int i = i0 + lane / across;
      const bool is_row = lane / across < down && i < bin.y.points;
      const A v = bin.y.at(i, g);
      int begin = 0, end = bin.x.points;
      if (down == 1) bin.crossing(v, begin, end, g);
      A row[E] = {};  // sums of sums lose far less than one over all points
      for (int j = begin + lane % across; j - lane % across < end; j += across) {
        A y, x;
        const bool counts = is_row && j < end && bin.point(v, j, y, x, g);
        const unsigned all = __ballot_sync(0xffffffffu, counts);
        __syncwarp();  // all have read the points before these
        if (counts) points[__popc(all & ((1u << lane) - 1))].put(y, x, g);
        __syncwarp();
        if (channel >= pitch) continue;
        for (int n = sub; n < __popc(all); n += at_once) add_point<T, I>(row, points[n], source, pitch, g.in_w);
      }
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] += row[e];
    }
    for (int other = lanes; other < 32; other *= 2) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], other);
    }
    if (sub == 0) {
#pragma unroll
      for (int e = 0; e < E; e++) stage[(chunk * E + e) * some + k] = from_float<T>(sum[e] / bin.count);
    }
  }
  __syncthreads();
  const int count = min(lanes * E, g.out_channels - channel0) * some;
  T* const target = output + ((I)r * g.out_channels + channel0) * bins + bin0;
  for (int i = threadIdx.x; i < count; i += ROI_THREADS) target[i / some * bins + i % some] = stage[i];
}

// What pool_turned computes, on the input as it is (N, C, H, W).
// Owner: as pool_direct.
template <class T, class I>
__global__ void __launch_bounds__(ROI_THREADS, 2)
    pool_turned_direct(const T* __restrict__ input, const Compute<T>* __restrict__ turned, T* __restrict__ output,
                       RoiGeometry g) {
  using A = Compute<T>;
  const I n = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  const int bins = g.pooled_h * g.pooled_w;
  if (n >= (I)g.boxes * g.out_channels * bins) return;
  const I number = n / bins;
  const int place = (int)(n - number * bins), r = (int)(number / g.out_channels);
  const TurnedBox<A> box = read_turned(turned, r);
  const TurnedBin<A> bin(box, place, Window{0, g.in_h, 0, g.in_w}, g);
  const T* const plane = plane_of<T, I>(input, box.image, (int)(number - (I)r * g.out_channels), place, g);
  A sum = 0;
  for (int i = 0; i < bin.y.points; i++) {
    const A v = bin.y.at(i, g);
    int begin, end;
    bin.crossing(v, begin, end, g);
    A row = 0;  // as above
    for (int j = begin; j < end; j++) {
      A y, x, value, along_y, along_x;
      if (!bin.point(v, j, y, x, g)) continue;
      read_point(plane, Reading<A>(y, g.in_h, g), Reading<A>(x, g.in_w, g), g.in_w, value, along_y, along_x);
      row += value;
    }
    sum += row;
  }
  output[n] = from_float<T>(sum / bin.count);
}

// Means over bins (docs/math/roi.md, eq. 5 and 6): by warps on a channels-last copy, or by threads on the input as it is.
//
// The copy's pixels have a unit of channels for each (group, class), each of `pitch` channels, a multiple of 16 bytes: a
// bin of one class reads one unit of each of its pixels. An image has fewer than 2^31 pixels; I is the type for places
// in whole arrays. The weights are separable, so a warp makes two lists, of rows and of columns, and reads their product.
// TBoxes and TOffset are the types of boxes and offset: T, or float where T is a half type, with the same Compute.
#pragma once
#include "core/chunks.cuh"
#include "core/copies.cuh"
#include "roi/bins.cuh"

constexpr int ROI_THREADS = 256, ROI_WARPS = ROI_THREADS / 32;

template <class A> struct __align__(2 * sizeof(A)) RoiTap {
  typename PixelOf<A>::type pixel;  // row or column
  A weight;
};
template <class A> struct RoiSlope {
  typename PixelOf<A>::type pixel;
  A weight, slope;
};
// What a bin reads at pixel k; false: it does not.
template <class A> PYDEFORM_DEVICE bool read_tap(RoiTap<A>& tap, const Axis<A>& a, int k, const RoiGeometry& g) {
  A weight[1], slope[1];
  const bool reads = weights_of<1>(a, k, weight, slope, g);
  tap = {k, weight[0]};
  return reads;
}
template <class A> PYDEFORM_DEVICE bool read_tap(RoiSlope<A>& tap, const Axis<A>& a, int k, const RoiGeometry& g) {
  A weight[1], slope[1];
  const bool reads = weights_of<1>(a, k, weight, slope, g);
  tap = {k, weight[0], slope[0]};
  return reads;
}
template <class A> PYDEFORM_DEVICE bool read_tap(RoiEdge<A>& tap, const Axis<A>& a, int k, const RoiGeometry& g) {
  return read_edge(tap, a, k, g);
}

// A bin as a warp reads it: lanes 0 to 15 have its rows, the others its columns. Every lane of the warp calls all of it.
template <class A> struct WarpBin {
  const Axis<A>* half;  // the axis of this half of the warp, in shared memory, as registers are needed for sums
  A count;              // as in Bin
  bool broken, outside;
  int top, bottom, left, right;  // the pixels it reads are within these, the last two excluded

  PYDEFORM_DEVICE bool is_x() const { return threadIdx.x & 16; }
  PYDEFORM_DEVICE bool reads() const { return top < bottom && left < right; }
  template <class T, class I>
  PYDEFORM_DEVICE void read(Axis<A>* axes, const RoiBox<A>& box, const T* __restrict__ offset, int r, int place,
                            int label, const RoiGeometry& g) {
    const int py = place / g.pooled_w, px = place - py * g.pooled_w;
    const Move<A> m = read_move<T, I>(box, offset, r, py, px, label, g);
    const Axis<A> axis =
        read_axis(is_x() ? box.x : box.y, is_x() ? m.x : m.y, is_x() ? px : py, is_x() ? g.pooled_w : g.pooled_h,
                  is_x() ? g.in_w : g.in_h, m.broken || m.outside, g);
    __syncwarp();  // all have read the bin before this one
    half = axes + threadIdx.x / 16;
    if (threadIdx.x % 16 == 0) axes[threadIdx.x / 16] = axis;
    count = count_of(axis.count, __shfl_xor_sync(0xffffffffu, axis.count, 16), m, g);
    broken = m.broken;
    outside = m.outside;
    top = __shfl_sync(0xffffffffu, axis.low, 0);
    bottom = __shfl_sync(0xffffffffu, axis.high, 0);
    left = __shfl_sync(0xffffffffu, axis.low, 16);
    right = __shfl_sync(0xffffffffu, axis.high, 16);
    __syncwarp();
  }
  // Of 16 rows from y on and 16 columns from x on, those that the bin reads: rows into taps, columns into taps + 16.
  template <class Tap>
  PYDEFORM_DEVICE void list(Tap* taps, int y, int x, int& rows, int& columns, const RoiGeometry& g) const {
    const int lane = threadIdx.x % 32, k = (is_x() ? x : y) + lane % 16;
    Tap tap;
    const bool reads = k < half->high && read_tap(tap, *half, k, g);
    const unsigned all = __ballot_sync(0xffffffffu, reads);
    const unsigned before = all & ((1u << lane) - 1) & (is_x() ? 0xffff0000u : 0xffffu);
    if (reads) taps[lane / 16 * 16 + __popc(before)] = tap;
    rows = __popc(all & 0xffffu);
    columns = __popc(all >> 16);
  }
};

// Which images a launch has a copy of. A box without an image belongs to the first launch.
struct RoiImages {
  int first, number;
  template <class AnyBox> PYDEFORM_DEVICE bool have(const AnyBox& box) const {
    return box.broken ? first == 0 : box.image >= first && box.image < first + number;
  }
};

// Owner: a block has one box, `lanes` 16-byte chunks of the channels of one class, and `span` bins, a warp one bin at a
// time: `lanes` lanes on the chunks of a pixel, 32 / lanes pixels at once. Results are turned in shared memory
// (lanes * 16 * span bytes), so that bins, which lie side by side, are written together.
template <class T, class I, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 3)
    pool_bins(const T* __restrict__ image, const TBoxes* __restrict__ boxes, const TOffset* __restrict__ offset,
              const T* __restrict__ mask, T* __restrict__ output, RoiGeometry g, RoiImages images, int pitch, int lanes,
              int span) {
  using A = Compute<T>;
  constexpr int E = 16 / sizeof(T);
  PYDEFORM_DYNAMIC_SHARED(T, stage);  // [channel][bin]
  PYDEFORM_SHARED(RoiTap<A>, taps, ROI_WARPS * 32);
  const int bins = g.pooled_h * g.pooled_w, per_class = g.out_channels / g.classes;
  const int parts = ceil_div(bins, span), runs = ceil_div(pitch / E, lanes);
  const int part = blockIdx.x % parts, run = blockIdx.x / parts % runs, label = blockIdx.x / (parts * runs) % g.classes;
  const int r = blockIdx.x / (parts * runs * g.classes);
  PYDEFORM_SHARED(Axis<A>, axes, ROI_WARPS * 2);
  PYDEFORM_SHARED(RoiBox<A>, shared_box, 1);
  if (threadIdx.x == 0) *shared_box = read_box(boxes, r, g);
  __syncthreads();
  const RoiBox<A>& box = *shared_box;
  if (!images.have(box)) return;

  const int lane = threadIdx.x % 32, chunk = lane % lanes, sub = lane / lanes, at_once = 32 / lanes;
  const int bin0 = part * span, some = min(span, bins - bin0);
  const I memory = (I)g.group_h * g.group_w * g.classes * pitch;
  const int channel0 = run * lanes * E, channel = channel0 + chunk * E;
  RoiTap<A>*const rows = taps + threadIdx.x / 32 * 32, *const columns = rows + 16;
  for (int k = threadIdx.x / 32; k < some; k += ROI_WARPS) {
    WarpBin<A> bin;
    bin.template read<TOffset, I>(axes, box, offset, r, bin0 + k, label, g);
    const int unit = group_of_bin(bin0 + k, g) * g.classes + label;
    const T* const source =
        image + (I)(box.image - images.first) * g.in_h * g.in_w * memory + (I)unit * pitch + channel;
    A sum[E] = {};
    for (int y = bin.top; y < bin.bottom; y += 16) {
      for (int x = bin.left; x < bin.right; x += 16) {
        int many_rows, many;
        __syncwarp();
        bin.list(rows, y, x, many_rows, many, g);
        __syncwarp();
        if (many == 0 || channel >= pitch) continue;
        int i = sub / many, j = sub - i * many;
        const int next_i = at_once / many, next_j = at_once - next_i * many;
        const int turns = (many_rows * many - sub + at_once - 1) / at_once;
#pragma unroll 2
        for (int turn = 0; turn < turns; turn++) {
          const RoiTap<A> row = rows[i], column = columns[j];
          const uint4 packed = load16(source + ((I)row.pixel * g.in_w + column.pixel) * memory);
          const A weight = row.weight * column.weight;
          A v[E];
          unpack<T>(v, packed);
#pragma unroll
          for (int e = 0; e < E; e++) sum[e] += weight * v[e];
          i += next_i;
          j += next_j;
          if (j >= many) i++, j -= many;
        }
      }
    }
    for (int other = lanes; other < 32; other *= 2) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], other);
    }
    if (sub == 0) {
      const A factor = mask_of<T, I>(mask, r, bin0 + k, g);
#pragma unroll
      for (int e = 0; e < E; e++) stage[(chunk * E + e) * some + k] = from_float<T>(factor * (sum[e] / bin.count));
    }
  }
  __syncthreads();
  const int count = min(lanes * E, per_class - channel0) * some;
  T* const target = output + ((I)r * g.out_channels + label * per_class + channel0) * bins + bin0;
  for (int i = threadIdx.x; i < count; i += ROI_THREADS)
    target[some == bins ? i : i / some * bins + i % some] = stage[i];
}

// Where output channel c reads: the plane of its input channel.
template <class T, class I>
PYDEFORM_DEVICE const T* plane_of(const T* input, int image, int c, int place, const RoiGeometry& g) {
  const int groups = g.group_h * g.group_w, k = c * groups + group_of_bin(place, g);
  return input + ((I)image * g.in_channels + k) * ((I)g.in_h * g.in_w);
}

// The value at a point, rows first.
template <class A, class T>
PYDEFORM_DEVICE void read_point(const T* plane, const Reading<A>& y, const Reading<A>& x, int in_w, A& value,
                                A& along_y, A& along_x) {
  const T *upper_row = plane + (long long)y.lower * in_w, *lower_row = plane + (long long)y.upper * in_w;
  const A a = to_float(upper_row[x.lower]), b = to_float(upper_row[x.upper]), c = to_float(lower_row[x.lower]),
          d = to_float(lower_row[x.upper]);
  const A above = (x.number - x.part) * a + x.part * b, below = (x.number - x.part) * c + x.part * d;
  value = (y.number - y.part) * above + y.part * below;
  along_y = y.slope * (below - above);
  along_x = x.slope * ((y.number - y.part) * (b - a) + y.part * (d - c));
}

// Sums over what a bin reads of one plane: values, and the derivatives of points.
template <class A, class T>
PYDEFORM_DEVICE void read_all(const T* plane, const Bin<A>& bin, const RoiGeometry& g, A& value, A& along_y,
                              A& along_x) {
  if (g.points | SURFACE) {
    for (int i = 0; i < readings(bin.y); i++) {
      const Reading<A> y = reading(bin.y, i, g);
      A row = 0, row_y = 0, row_x = 0;  // sums of sums lose far less than one over all points
      for (int j = 0; j < readings(bin.x); j++) {
        const Reading<A> x = reading(bin.x, j, g);
        if (y.number == 0 || x.number == 0) continue;
        A one, one_y, one_x;
        read_point(plane, y, x, g.in_w, one, one_y, one_x);
        row += one;
        row_y += one_y;
        row_x += one_x;
      }
      value += row;
      along_y += row_y;
      along_x += row_x;
    }
    return;
  }
  for (int y = bin.y.low; y < bin.y.high; y++) {
    A row = 0;
    for (int x = bin.x.low; x < bin.x.high; x++) row += to_float(plane[(long long)y * g.in_w + x]);
    value += row;
  }
}

// What pool_bins computes, on the input as it is (N, C, H, W): for classes of few channels, or few boxes on large
// images.
// Owner: one thread per (r, c, bin), neighbours on neighbouring bins.
template <class T, class I, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, 2)
    pool_direct(const T* __restrict__ input, const TBoxes* __restrict__ boxes, const TOffset* __restrict__ offset,
                const T* __restrict__ mask, T* __restrict__ output, RoiGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  const int bins = g.pooled_h * g.pooled_w;
  if (i >= (I)g.boxes * g.out_channels * bins) return;
  const I row = i / bins;
  const int place = (int)(i - row * bins), r = (int)(row / g.out_channels), c = (int)(row - (I)r * g.out_channels);
  const RoiBox<A> box = read_box(boxes, r, g);
  const Bin<A> bin = read_bin<TOffset, I>(box, offset, r, place, c / (g.out_channels / g.classes), g);
  A sum = 0, along_y = 0, along_x = 0;
  read_all(plane_of<T, I>(input, box.image, c, place, g), bin, g, sum, along_y, along_x);
  output[i] = from_float<T>(mask_of<T, I>(mask, r, place, g) * (sum / bin.count));
}

// The largest value that a bin reads, eq. 5 with `is_max`, and where it was found: two numbers that the gradient takes
// from winners (R, bins, C, 2), the row and column of a pixel or the coordinates of a point, moved into the image; -1
// where no pixel is read. output and winners may be null.
// Owner: one thread per (r, c, bin), as above. Points that do not count have the value 0: one stands for all that come
// before the first that counts, and one for all that come after one of its row or of all.
//
// Calls take(value, y, x, j, k) for all of them, j and k the numbers of a point as a candidate on each axis.
template <class A, class T, class Take>
PYDEFORM_DEVICE void for_each_point(const T* plane, const Bin<A>& bin, const RoiGeometry& g, Take take) {
  const Axis<A>&y = bin.y, &x = bin.x;
  const bool any = !bin.broken && !bin.outside && y.count > 0 && x.count > 0;
  if (any && ((y.walk | x.walk) & BEFORE)) take(0, -1, -1, 0, 0);
  if (any && x.points > 0) {
    for (unsigned j = 0; j < candidates(y); j++) {
      A place_y, place_x;
      if (!candidate(y, j, place_y, g)) continue;
      const Reading<A> to_y(place_y, g.in_h, g);
      for (unsigned k = 0; k < candidates(x); k++) {
        if (!candidate(x, k, place_x, g)) continue;
        const Reading<A> to_x(place_x, g.in_w, g);
        A value, along_y, along_x;
        read_point(plane, to_y, to_x, g.in_w, value, along_y, along_x);
        take(value, (A)to_y.lower + to_y.part, (A)to_x.lower + to_x.part, j, k);
      }
      if (x.walk & AFTER) take(0, -1, -1, 0, 0);
    }
  }
  if (any && (y.walk & AFTER)) take(0, -1, -1, 0, 0);
}

// The first of the largest values so far, NaN over all.
template <class A> struct Best {
  bool found = false;
  A value = 0;
  PYDEFORM_DEVICE bool take(A other) {
    if (found && !(other > value || (other != other && value == value))) return false;
    found = true;
    value = other;
    return true;
  }
};

template <bool POINTS, class A> struct WinnerOf {
  using type = int;
};
template <class A> struct WinnerOf<true, A> {
  using type = A;
};

template <class T, class I, bool POINTS, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, 2)
    pool_largest(const T* __restrict__ input, const TBoxes* __restrict__ boxes, const TOffset* __restrict__ offset,
                 const T* __restrict__ mask, T* __restrict__ output,
                 typename WinnerOf<POINTS, Compute<T>>::type* __restrict__ winners, RoiGeometry g) {
  using A = Compute<T>;
  using Winner = typename WinnerOf<POINTS, A>::type;
  const I i = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  const int bins = g.pooled_h * g.pooled_w;
  if (i >= (I)g.boxes * g.out_channels * bins) return;
  const I row = i / bins;
  const int place = (int)(i - row * bins), r = (int)(row / g.out_channels), c = (int)(row - (I)r * g.out_channels);
  const RoiBox<A> box = read_box(boxes, r, g);
  const Bin<A> bin = read_bin<TOffset, I>(box, offset, r, place, c / (g.out_channels / g.classes), g);
  const T* const plane = plane_of<T, I>(input, box.image, c, place, g);
  Best<A> best;
  Winner at_y = -1, at_x = -1;
  auto take = [&](A value, Winner y, Winner x, unsigned, unsigned) {
    if (best.take(value)) at_y = y, at_x = x;
  };
  if constexpr (POINTS) {
    for_each_point(plane, bin, g, take);
  } else {
    for (int y = bin.y.low; y < bin.y.high; y++)
      for (int x = bin.x.low; x < bin.x.high; x++) take(to_float(plane[(long long)y * g.in_w + x]), y, x, 0, 0);
  }
  if (output) output[i] = from_float<T>(bin.broken ? not_a_number<A>() : mask_of<T, I>(mask, r, place, g) * best.value);
  if (winners) {
    const I at = 2 * (((I)r * bins + place) * g.out_channels + c);
    winners[at] = at_y;
    winners[at + 1] = at_x;
  }
}

// Gradients of the RoI operators (docs/math/roi.md, eq. 7 to 9, 12 and 13), without atomics: every result has one owner, which sums
// in one order, so a run's bits never differ.
//
// `grads` is grad_output as (R, bins, classes, pitch): a class's channels side by side, with room for `pitch` of them.
#pragma once
#include "roi/forward.cuh"
#include "roi/rotated.cuh"

constexpr int TILE_H = 2, TILE_W = 8;  // pixels of one thread of input_gradient
constexpr int AHEAD = 4;               // loads of one thread on their way at once
constexpr int BOUNDS = 5;
constexpr int MEAN = 0, LARGEST_PIXEL = 1, LARGEST_POINT = 2, TURNED_MEAN = 3;

// The pixels that the bins of a box read: bounds (BOUNDS, R) are the image, -1 if none is read, then the first row, the
// last and one, the first column, the last and one.
// Owner: one warp per box, its lanes on bins. Reads the box's offsets; offset may be null.
template <class T, class I, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, 2)
    box_bounds(const TBoxes* __restrict__ boxes, const TOffset* __restrict__ offset, int* __restrict__ bounds,
               RoiGeometry g) {
  using A = Compute<T>;
  const int r = blockIdx.x * ROI_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (r >= g.boxes) return;
  const RoiBox<A> box = read_box(boxes, r, g);
  const int bins = g.pooled_h * g.pooled_w;
  int y0 = g.in_h, y1 = 0, x0 = g.in_w, x1 = 0;
  for (int label = 0; label < g.classes; label++) {
    for (int place = lane; place < bins; place += 32) {
      const Bin<A> bin = read_bin<TOffset, I>(box, offset, r, place, label, g);
      if (bin.y.low >= bin.y.high || bin.x.low >= bin.x.high) continue;
      y0 = min(y0, bin.y.low), y1 = max(y1, bin.y.high);
      x0 = min(x0, bin.x.low), x1 = max(x1, bin.x.high);
    }
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    y0 = min(y0, __shfl_xor_sync(0xffffffffu, y0, other)), y1 = max(y1, __shfl_xor_sync(0xffffffffu, y1, other));
    x0 = min(x0, __shfl_xor_sync(0xffffffffu, x0, other)), x1 = max(x1, __shfl_xor_sync(0xffffffffu, x1, other));
  }
  if (lane > 0) return;
  bounds[r] = y0 < y1 ? box.image : -1;
  bounds[g.boxes + r] = y0;
  bounds[2 * g.boxes + r] = y1;
  bounds[3 * g.boxes + r] = x0;
  bounds[4 * g.boxes + r] = x1;
}

// A bin that reads pixels of a tile. Its order and size let it be loaded 16 bytes at a time.
template <class A> struct __align__(16) TileBin {
  A x[TILE_W], y[TILE_H];           // weights of the tile's columns and rows
  A factor;                         // mask / count
  typename PixelOf<A>::type reads;  // a bit for each row, then for each column
  long long place;                  // r * bins + bin
  int unit;                         // of channels, (group, class)
  int unused;
};

// Of a turned box, whose weights are no products.
template <class A> struct __align__(16) TurnedTileBin {
  A w[TILE_H * TILE_W];
  A factor;                         // 1 / count
  typename PixelOf<A>::type reads;  // a bit for each pixel
  long long place;
  int unit;
  int unused;
};
template <int READS, class A> struct TileBinOf {
  using type = TileBin<A>;
};
template <class A> struct TileBinOf<TURNED_MEAN, A> {
  using type = TurnedTileBin<A>;
};
template <int READS, class A> struct BoxOf {
  using type = RoiBox<A>;
};
template <class A> struct BoxOf<TURNED_MEAN, A> {
  using type = TurnedBox<A>;
};

template <class T, class A>
PYDEFORM_DEVICE void get_box(RoiBox<A>& box, const T* __restrict__ boxes, int r, const RoiGeometry& g) {
  box = read_box(boxes, r, g);
}
template <class A>
PYDEFORM_DEVICE void get_box(TurnedBox<A>& box, const A* __restrict__ turned, int r, const RoiGeometry&) {
  box = read_turned(turned, r);
}

// Weights of what the bin `place` of box r reads in the tile whose first pixel is (y0, x0); `entry.reads` is 0 before.
template <bool IS_MEAN, class T, class I, class TOffset, class A>
PYDEFORM_DEVICE void weigh_tile(TileBin<A>& entry, const RoiBox<A>& box, const TOffset* __restrict__ offset,
                                const T* __restrict__ mask, int r, int place, int label, int y0, int x0,
                                const RoiGeometry& g) {
  const Bin<A> bin = read_bin<TOffset, I>(box, offset, r, place, label, g);
  if (bin.y.low >= y0 + TILE_H || bin.y.high <= y0 || bin.x.low >= x0 + TILE_W || bin.x.high <= x0) return;
  A slope_y[TILE_H], slope_x[TILE_W];
  const unsigned rows = weights_of<TILE_H>(bin.y, y0, entry.y, slope_y, g);
  const unsigned columns = rows ? weights_of<TILE_W>(bin.x, x0, entry.x, slope_x, g) : 0;
  if (columns) entry.reads = rows | columns << TILE_H;
  entry.factor = mask_of<T, I>(mask, r, place, g) / (IS_MEAN ? bin.count : (A)1);
}

// Sums over the rows of its points, each of which is a sum of its own, since that loses far less than one over all.
template <bool, class T, class I, class TOffset, class A>
PYDEFORM_DEVICE void weigh_tile(TurnedTileBin<A>& entry, const TurnedBox<A>& box, const TOffset*, const T*, int,
                                int place, int, int y0, int x0, const RoiGeometry& g) {
  const TurnedBin<A> bin(box, place, Window{y0, y0 + TILE_H, x0, x0 + TILE_W}, g);
#pragma unroll
  for (int k = 0; k < TILE_H * TILE_W; k++) entry.w[k] = 0;
  for (int i = 0; i < bin.y.points; i++) {
    const A v = bin.y.at(i, g);
    A row[TILE_H * TILE_W] = {};
    int begin, end;
    bin.crossing(v, begin, end, g);
    for (int j = begin; j < end; j++) {
      A y, x;
      if (!bin.point(v, j, y, x, g)) continue;
      const Reading<A> rows(y, g.in_h, g), columns(x, g.in_w, g);
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        const bool below = corner & 2, right = corner & 1;
        const int ky = (below ? rows.upper : rows.lower) - y0, kx = (right ? columns.upper : columns.lower) - x0;
        const A weight = (below ? rows.part : 1 - rows.part) * (right ? columns.part : 1 - columns.part);
        if (ky < 0 || ky >= TILE_H || kx < 0 || kx >= TILE_W) continue;
        entry.reads |= 1 << (ky * TILE_W + kx);
#pragma unroll
        for (int k = 0; k < TILE_H * TILE_W; k++) row[k] += k == ky * TILE_W + kx ? weight : (A)0;
      }
    }
#pragma unroll
    for (int k = 0; k < TILE_H * TILE_W; k++) entry.w[k] += row[k];
  }
  entry.factor = 1 / bin.count;
}

// Adds what bin b gives to the pixels of a tile in one channel, whose grad_output * mask / count is v.
template <class A> PYDEFORM_DEVICE void add_mean(A (&sum)[TILE_H * TILE_W], const TileBin<A>& b, A v) {
  if (is_finite(v)) {  // then a weight of 0 changes nothing where the bin reads nothing
#pragma unroll
    for (int i = 0; i < TILE_H; i++) {
      const A w = v * b.y[i];
#pragma unroll
      for (int j = 0; j < TILE_W; j++) sum[i * TILE_W + j] += w * b.x[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
#pragma unroll
    for (int j = 0; j < TILE_W; j++)
      if (b.reads >> i & b.reads >> (TILE_H + j) & 1) sum[i * TILE_W + j] += v * b.y[i] * b.x[j];
  }
}

template <class A> PYDEFORM_DEVICE void add_mean(A (&sum)[TILE_H * TILE_W], const TurnedTileBin<A>& b, A v) {
#pragma unroll
  for (int k = 0; k < TILE_H * TILE_W; k++)
    if (b.reads >> k & 1) sum[k] += v * b.w[k];
}

// The same where only the pixel, or the point, that won has a gradient. (y0, x0): the tile's first pixel.
template <class A, class Winner>
PYDEFORM_DEVICE void add_largest(A (&sum)[TILE_H * TILE_W], const Winner* winner, int y0, int x0, A v,
                                 const RoiGeometry& g) {
  const Winner y = winner[0], x = winner[1];
  if (y < 0) return;
  const Reading<A> rows((A)y, g.in_h, g), columns((A)x, g.in_w, g);
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
#pragma unroll
    for (int j = 0; j < TILE_W; j++) {
      const bool a = y0 + i == rows.lower, b = y0 + i == rows.upper, c = x0 + j == columns.lower,
                 d = x0 + j == columns.upper;
      const A row = (a ? 1 - rows.part : (A)0) + (b ? rows.part : (A)0);
      const A column = (c ? 1 - columns.part : (A)0) + (d ? columns.part : (A)0);
      if ((a || b) && (c || d)) sum[i * TILE_W + j] += v * row * column;
    }
  }
}
template <class A>
PYDEFORM_DEVICE void add_largest(A (&sum)[TILE_H * TILE_W], const int* winner, int y0, int x0, A v,
                                 const RoiGeometry&) {
  const int y = winner[0] - y0, x = winner[1] - x0;  // -1 is never in the tile
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
#pragma unroll
    for (int j = 0; j < TILE_W; j++)
      if (y == i && x == j) sum[i * TILE_W + j] += v;
  }
}

// Eq. 7. READS: MEAN, and winners is null; TURNED_MEAN, and boxes are those of turn_boxes; or what the numbers are that
// pool_largest wrote to winners.
// Owner: a block has TILE_H x TILE_W pixels of one image and a run of blockDim.x channels, one channel a thread, in the
// order (group, class, channel of the class). Its threads look for boxes that reach the tile, each warp lists the bins of
// one of them, and all add these up, in the order of boxes and bins.
template <class T, class I, int READS, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 2)
    input_gradient(const T* __restrict__ grads, const TBoxes* __restrict__ boxes, const TOffset* __restrict__ offset,
                   const T* __restrict__ mask, const int* __restrict__ bounds,
                   const typename WinnerOf<READS == LARGEST_POINT, Compute<T>>::type* __restrict__ winners,
                   T* __restrict__ grad_input, RoiGeometry g, int pitch) {
  using A = Compute<T>;
  constexpr int PIXELS = TILE_H * TILE_W, ROW = TILE_W + 1;
  PYDEFORM_SHARED(int, hits, ROI_THREADS);
  PYDEFORM_SHARED(int, counts, ROI_WARPS);
  using Entry = typename TileBinOf<READS, A>::type;
  PYDEFORM_SHARED(Entry, entries, ROI_WARPS * 32);
  using Box = typename BoxOf<READS, A>::type;
  PYDEFORM_SHARED(Box, warp_boxes, ROI_WARPS);
  A* const stage = (A*)entries;  // when these are used up
  static_assert(sizeof(Entry) * ROI_WARPS * 32 >= sizeof(A) * ROI_THREADS * ROW, "");
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x, warps = threads / 32;
  const int bins = g.pooled_h * g.pooled_w, per_class = g.out_channels / g.classes;
  const int groups = g.group_h * g.group_w, runs = ceil_div(g.in_channels, threads);
  const int tiles_x = ceil_div(g.in_w, TILE_W), tiles_y = ceil_div(g.in_h, TILE_H);
  const int run = blockIdx.x % runs, tile = blockIdx.x / runs % (tiles_y * tiles_x);
  const int image = blockIdx.x / runs / (tiles_y * tiles_x);
  const int y0 = tile / tiles_x * TILE_H, x0 = tile % tiles_x * TILE_W;
  const int q0 = run * threads, q = q0 + thread, last = min(q0 + threads, g.in_channels) - 1;
  const int unit0 = q0 / per_class, unit1 = last / per_class;
  const int labels = min(g.classes, unit1 - unit0 + 1);  // classes that the run has channels of
  const int unit = q <= last ? q / per_class : -1, label = unit % g.classes, within = q - unit * per_class;
  A sum[PIXELS] = {};

  for (int r0 = 0; r0 < g.boxes; r0 += threads) {
    const int r = r0 + thread;
    const bool hit = r < g.boxes && bounds[r] == image && bounds[g.boxes + r] < y0 + TILE_H &&
                     bounds[2 * g.boxes + r] > y0 && bounds[3 * g.boxes + r] < x0 + TILE_W &&
                     bounds[4 * g.boxes + r] > x0;
    const unsigned all = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) counts[warp] = __popc(all);
    __syncthreads();
    int before = 0, found = 0;
    for (int w = 0; w < warps; w++) {
      before += w < warp ? counts[w] : 0;
      found += counts[w];
    }
    if (hit) hits[before + __popc(all & ((1u << lane) - 1))] = r;
    __syncthreads();
    for (int h = 0; h < found; h += warps) {
      const int own = h + warp < found ? hits[h + warp] : -1;
      if (lane == 0) get_box(warp_boxes[warp], boxes, max(own, 0), g);
      __syncwarp();
      for (int first = 0; first < labels * bins; first += 32) {
        const int item = first + lane, bin_label = (unit0 + item / bins) % g.classes, place = item % bins;
        const int bin_unit = group_of_bin(place, g) * g.classes + bin_label;
        Entry entry;
        entry.reads = 0;
        if (own >= 0 && item < labels * bins && bin_unit >= unit0 && bin_unit <= unit1) {
          weigh_tile<READS == MEAN, T, I>(entry, warp_boxes[warp], offset, mask, own, place, bin_label, y0, x0, g);
          entry.place = (long long)own * bins + place;
          entry.unit = bin_unit;
          entry.unused = 0;
        }
        const unsigned listed = __ballot_sync(0xffffffffu, entry.reads != 0);
        if (entry.reads) entries[warp * 32 + __popc(listed & ((1u << lane) - 1))] = entry;
        if (lane == 0) counts[warp] = __popc(listed);
        __syncthreads();
        for (int w = 0; w < warps; w++) {
          const int count = counts[w];
          for (int e0 = 0; e0 < count; e0 += AHEAD) {
            A v[AHEAD];
            bool mine[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {  // all are on their way before the first is needed
              const int e = w * 32 + min(e0 + k, count - 1);
              mine[k] = e0 + k < count && entries[e].unit == unit;
              const I place = ((I)entries[e].place * g.classes + label) * pitch + within;
              v[k] = mine[k] ? to_float(grads[place]) : (A)0;
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
              if (!mine[k]) continue;
              const Entry b = entries[w * 32 + e0 + k];
              if constexpr (READS == MEAN || READS == TURNED_MEAN) {
                add_mean(sum, b, v[k] * b.factor);
              } else {
                const I winner = (I)b.place * g.out_channels + label * per_class + within;
                add_largest(sum, winners + 2 * winner, y0, x0, v[k] * b.factor, g);
              }
            }
          }
        }
        __syncthreads();
      }
    }
  }

  // Eight threads write the eight pixels of a row, which lie side by side in memory.
  const int rows = min(TILE_H, g.in_h - y0), width = min(TILE_W, g.in_w - x0);
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < TILE_W; j++) stage[thread * ROW + j] = sum[i * TILE_W + j];
    __syncthreads();
    for (int k = thread; k < (last - q0 + 1) * TILE_W && i < rows; k += threads) {
      const int column = k % TILE_W, at = k / TILE_W, to = q0 + at, to_unit = to / per_class;
      const int c = to_unit % g.classes * per_class + (to - to_unit * per_class);  // output channel
      const int channel = c * groups + to_unit / g.classes;
      const I plane = (I)image * g.in_channels + channel;
      if (column < width)
        grad_input[(plane * g.in_h + y0 + i) * g.in_w + x0 + column] = from_float<T>(stage[at * ROW + column]);
    }
  }
}

// What one bin of a class adds to eq. 8 and 9: sums over its channels of grad_output times the value and the derivatives.
template <class AnyBin, class A, class I>
PYDEFORM_DEVICE void put_gradients(const AnyBin& bin, const RoiBox<A>& box, A value, A along_y, A along_x, A mask,
                                   A* offsets, A* masks, I at, const RoiGeometry& g) {
  const A nothing = bin.broken ? not_a_number<A>() : (A)0;
  const bool sound = !bin.broken && bin.reads();
  if (masks) masks[at] = sound ? value / bin.count : nothing;
  if (!offsets) return;
  const A scale = mask * (A)g.offset_scale / bin.count;
  offsets[2 * at] = sound ? along_x * scale * box.x.size : nothing;  // not scale * size, which may overflow
  offsets[2 * at + 1] = sound ? along_y * scale * box.y.size : nothing;
}

// Per bin and class, offsets (R, bins, classes, 2), x first, and masks (R, bins, classes); either may be null.
// Owner: one warp per (r, bin, class), `lanes` lanes on the chunks of a pixel of the channels-last copy, as pool_bins.
template <class T, class I, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 2 : 3)
    bin_gradients(const T* __restrict__ grads, const T* __restrict__ image, const TBoxes* __restrict__ boxes,
                  const TOffset* __restrict__ offset, const T* __restrict__ mask, Compute<T>* __restrict__ offsets,
                  Compute<T>* __restrict__ masks, RoiGeometry g, RoiImages images, int pitch, int lanes) {
  using A = Compute<T>;
  constexpr int E = 16 / sizeof(T);
  PYDEFORM_SHARED(Axis<A>, axes, ROI_WARPS * 2);
  PYDEFORM_SHARED(RoiSlope<A>, taps, ROI_WARPS * 32);
  const int bins = g.pooled_h * g.pooled_w;
  const I at = (I)blockIdx.x * ROI_WARPS + threadIdx.x / 32, pair = at / g.classes;
  if (at >= (I)g.boxes * bins * g.classes) return;
  const int label = (int)(at - pair * g.classes), r = (int)(pair / bins), place = (int)(pair - (I)r * bins);
  const RoiBox<A> box = read_box(boxes, r, g);
  if (!images.have(box)) return;

  const int lane = threadIdx.x % 32, chunk = lane % lanes, sub = lane / lanes, at_once = 32 / lanes;
  const I memory = (I)g.group_h * g.group_w * g.classes * pitch;
  WarpBin<A> bin;
  bin.template read<TOffset, I>(axes, box, offset, r, place, label, g);
  const int unit = group_of_bin(place, g) * g.classes + label;
  const T* const source = image + (I)(box.image - images.first) * g.in_h * g.in_w * memory + (I)unit * pitch;
  RoiSlope<A>*const rows = taps + threadIdx.x / 32 * 32, *const columns = rows + 16;
  A value = 0, along_y = 0, along_x = 0;
  for (int y = bin.top; y < bin.bottom; y += 16) {
    for (int x = bin.left; x < bin.right; x += 16) {
      int many_rows, many;
      __syncwarp();
      bin.list(rows, y, x, many_rows, many, g);
      __syncwarp();
      if (many == 0) continue;
      const int turns = (many_rows * many - sub + at_once - 1) / at_once;
      const int next_i = at_once / many, next_j = at_once - next_i * many;
      for (int channel = chunk * E; channel < pitch; channel += lanes * E) {
        A grad[E];
        unpack<T>(grad, load16(grads + at * pitch + channel));
        int i = sub / many, j = sub - i * many;
#pragma unroll 2
        for (int turn = 0; turn < turns; turn++) {
          const RoiSlope<A> row = rows[i], column = columns[j];
          A v[E], dot = 0;
          unpack<T>(v, load16(source + ((I)row.pixel * g.in_w + column.pixel) * memory + channel));
#pragma unroll
          for (int e = 0; e < E; e++) dot += grad[e] * v[e];
          value += row.weight * column.weight * dot;
          along_y += row.slope * column.weight * dot;
          along_x += row.weight * column.slope * dot;
          i += next_i;
          j += next_j;
          if (j >= many) i++, j -= many;
        }
      }
    }
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, other);
    along_y += __shfl_xor_sync(0xffffffffu, along_y, other);
    along_x += __shfl_xor_sync(0xffffffffu, along_x, other);
  }
  if (lane == 0)
    put_gradients(bin, box, value, along_y, along_x, mask_of<T, I>(mask, r, place, g), offsets, masks, at, g);
}

// What bin_gradients computes, on the input as it is (N, C, H, W), as pool_direct.
// Owner: one thread per (r, bin, class).
template <class T, class I, class TBoxes = T, class TOffset = T>
__global__ void __launch_bounds__(ROI_THREADS, 2)
    bin_gradients_direct(const T* __restrict__ grads, const T* __restrict__ input, const TBoxes* __restrict__ boxes,
                         const TOffset* __restrict__ offset, const T* __restrict__ mask,
                         Compute<T>* __restrict__ offsets, Compute<T>* __restrict__ masks, RoiGeometry g, int pitch) {
  using A = Compute<T>;
  const int bins = g.pooled_h * g.pooled_w, per_class = g.out_channels / g.classes;
  const I at = (I)blockIdx.x * ROI_THREADS + threadIdx.x, pair = at / g.classes;
  if (at >= (I)g.boxes * bins * g.classes) return;
  const int label = (int)(at - pair * g.classes), r = (int)(pair / bins), place = (int)(pair - (I)r * bins);
  const RoiBox<A> box = read_box(boxes, r, g);
  const Bin<A> bin = read_bin<TOffset, I>(box, offset, r, place, label, g);
  A value = 0, along_y = 0, along_x = 0;
  for (int c = 0; c < per_class; c++) {
    const A grad = to_float(grads[at * pitch + c]);
    A one = 0, one_y = 0, one_x = 0;
    read_all(plane_of<T, I>(input, box.image, label * per_class + c, place, g), bin, g, one, one_y, one_x);
    value += grad * one;
    along_y += grad * one_y;
    along_x += grad * one_x;
  }
  put_gradients(bin, box, value, along_y, along_x, mask_of<T, I>(mask, r, place, g), offsets, masks, at, g);
}

// Eq. 9: sums over the bins of each cell.
// Owner: one thread per element of grad_offset (R, 2*classes, part_h, part_w).
template <class T, class I>
__global__ void __launch_bounds__(ROI_THREADS)
    offset_gradient(const Compute<T>* __restrict__ offsets, T* __restrict__ grad_offset, RoiGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  const int cells = g.part_h * g.part_w;
  if (i >= (I)g.boxes * 2 * g.classes * cells) return;
  const I row = i / cells, r = row / (2 * g.classes);
  const int cell = (int)(i - row * cells), ty = cell / g.part_w, tx = cell - ty * g.part_w;
  const int channel = (int)(row - r * 2 * g.classes);
  const int y0 = first_bin(ty, g.part_h, g.pooled_h), y1 = first_bin(ty + 1, g.part_h, g.pooled_h);
  const int x0 = first_bin(tx, g.part_w, g.pooled_w), x1 = first_bin(tx + 1, g.part_w, g.pooled_w);
  A sum = 0;
  for (int py = y0; py < y1; py++)
    for (int px = x0; px < x1; px++)
      sum += offsets[(r * (g.pooled_h * g.pooled_w) + py * g.pooled_w + px) * 2 * g.classes + channel];
  grad_offset[i] = from_float<T>(sum);
}

// Eq. 8: sums over the classes.
// Owner: one thread per element of grad_mask (R, 1, pooled_h, pooled_w).
template <class T, class I>
__global__ void __launch_bounds__(ROI_THREADS)
    mask_gradient(const Compute<T>* __restrict__ masks, T* __restrict__ grad_mask, RoiGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  if (i >= (I)g.boxes * g.pooled_h * g.pooled_w) return;
  A sum = 0;
  for (int label = 0; label < g.classes; label++) sum += masks[i * g.classes + label];
  grad_mask[i] = from_float<T>(sum);
}

// What changes at the four edges of a bin: sums over its channels of grad_output times the derivative by its top, bottom,
// left and right.
template <class A> struct EdgeSums {
  A top, bottom, left, right;
  PYDEFORM_DEVICE EdgeSums() { top = bottom = left = right = 0; }
  PYDEFORM_DEVICE void add(const RoiEdge<A>& y, const RoiEdge<A>& x, A dot) {
    top += y.by_start * x.weight * dot;
    bottom += y.by_end * x.weight * dot;
    left += y.weight * x.by_start * dot;
    right += y.weight * x.by_end * dot;
  }
  PYDEFORM_DEVICE void add_other_lanes() {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      top += __shfl_xor_sync(0xffffffffu, top, other);
      bottom += __shfl_xor_sync(0xffffffffu, bottom, other);
      left += __shfl_xor_sync(0xffffffffu, left, other);
      right += __shfl_xor_sync(0xffffffffu, right, other);
    }
  }
  // What box_gradient takes from edges (R, bins, 4), for a bin of a mean over `count`.
  template <class AnyBin> PYDEFORM_DEVICE void put(A* edges, const AnyBin& bin, A count) const {
    const A nothing = bin.broken ? not_a_number<A>() : (A)0;
    const bool sound = !bin.broken && bin.reads();
    edges[0] = sound ? top / count : nothing;
    edges[1] = sound ? bottom / count : nothing;
    edges[2] = sound ? left / count : nothing;
    edges[3] = sound ? right / count : nothing;
  }
};

// Eq. 12 of each bin: edges (R, bins, 4), of operators whose bins all read the same channels.
// Owner: one warp per (r, bin), as bin_gradients.
template <class T, class I, class TBoxes = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 2)
    edge_gradients(const T* __restrict__ grads, const T* __restrict__ image, const TBoxes* __restrict__ boxes,
                   Compute<T>* __restrict__ edges, RoiGeometry g, RoiImages images, int pitch, int lanes) {
  using A = Compute<T>;
  constexpr int E = 16 / sizeof(T);
  PYDEFORM_SHARED(Axis<A>, axes, ROI_WARPS * 2);
  PYDEFORM_SHARED(RoiEdge<A>, taps, ROI_WARPS * 32);
  const int bins = g.pooled_h * g.pooled_w;
  const I at = (I)blockIdx.x * ROI_WARPS + threadIdx.x / 32;
  if (at >= (I)g.boxes * bins) return;
  const int r = (int)(at / bins), place = (int)(at - (I)r * bins);
  const RoiBox<A> box = read_box(boxes, r, g);
  if (!images.have(box)) return;

  const int lane = threadIdx.x % 32, chunk = lane % lanes, sub = lane / lanes, at_once = 32 / lanes;
  WarpBin<A> bin;
  bin.template read<TBoxes, I>(axes, box, nullptr, r, place, 0, g);
  const T* const source = image + (I)(box.image - images.first) * g.in_h * g.in_w * pitch;
  RoiEdge<A>*const rows = taps + threadIdx.x / 32 * 32, *const columns = rows + 16;
  EdgeSums<A> sums;
  for (int y = bin.top; y < bin.bottom; y += 16) {
    for (int x = bin.left; x < bin.right; x += 16) {
      int many_rows, many;
      __syncwarp();
      bin.list(rows, y, x, many_rows, many, g);
      __syncwarp();
      if (many == 0) continue;
      for (int channel = chunk * E; channel < pitch; channel += lanes * E) {
        A grad[E];
        unpack<T>(grad, load16(grads + at * pitch + channel));
        for (int i = sub; i < many_rows * many; i += at_once) {
          const RoiEdge<A> row = rows[i / many], column = columns[i % many];
          A v[E], dot = 0;
          unpack<T>(v, load16(source + ((I)row.pixel * g.in_w + column.pixel) * pitch + channel));
#pragma unroll
          for (int e = 0; e < E; e++) dot += grad[e] * v[e];
          sums.add(row, column, dot);
        }
      }
    }
  }
  sums.add_other_lanes();
  if (lane == 0) sums.put(edges + 4 * at, bin, bin.count);
}

// What edge_gradients computes, on the input as it is (N, C, H, W).
// Owner: one thread per (r, bin).
template <class T, class I, class TBoxes = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 2)
    edge_gradients_direct(const T* __restrict__ grads, const T* __restrict__ input, const TBoxes* __restrict__ boxes,
                          Compute<T>* __restrict__ edges, RoiGeometry g, int pitch) {
  using A = Compute<T>;
  const int bins = g.pooled_h * g.pooled_w;
  const I at = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  if (at >= (I)g.boxes * bins) return;
  const int r = (int)(at / bins), place = (int)(at - (I)r * bins);
  const RoiBox<A> box = read_box(boxes, r, g);
  const Bin<A> bin = read_bin<TBoxes, I>(box, nullptr, r, place, 0, g);
  const I pixels = (I)g.in_h * g.in_w;
  const T* const planes = input + (I)box.image * g.in_channels * pixels;
  EdgeSums<A> sums;
  for (int y = bin.y.low; y < bin.y.high; y++) {
    RoiEdge<A> row, column;
    if (!read_edge(row, bin.y, y, g)) continue;
    for (int x = bin.x.low; x < bin.x.high; x++) {
      if (!read_edge(column, bin.x, x, g)) continue;
      A dot = 0;
      for (int c = 0; c < g.out_channels; c++)
        dot += to_float(grads[at * pitch + c]) * to_float(planes[c * pixels + (I)y * g.in_w + x]);
      sums.add(row, column, dot);
    }
  }
  sums.put(edges + 4 * at, bin, bin.count);
}

// The same of maxima of points: of each channel the point that has won.
// Owner: one warp per (r, bin), its lanes on channels.
template <class T, class I, class TBoxes = T>
__global__ void __launch_bounds__(ROI_THREADS, sizeof(T) == 8 ? 1 : 2)
    edge_gradients_of_largest(const T* __restrict__ grads, const T* __restrict__ input,
                              const TBoxes* __restrict__ boxes, Compute<T>* __restrict__ edges, RoiGeometry g,
                              int pitch) {
  using A = Compute<T>;
  const int bins = g.pooled_h * g.pooled_w;
  const I at = (I)blockIdx.x * ROI_WARPS + threadIdx.x / 32;
  if (at >= (I)g.boxes * bins) return;
  const int r = (int)(at / bins), place = (int)(at - (I)r * bins);
  const RoiBox<A> box = read_box(boxes, r, g);
  const Bin<A> bin = read_bin<TBoxes, I>(box, nullptr, r, place, 0, g);
  EdgeSums<A> sums;
  for (int c = threadIdx.x % 32; c < g.out_channels; c += 32) {
    const T* const plane = plane_of<T, I>(input, box.image, c, place, g);
    Best<A> best;
    A at_y = -1;
    unsigned winner_y = 0, winner_x = 0;
    for_each_point(plane, bin, g, [&](A value, A y, A, unsigned j, unsigned k) {
      if (best.take(value)) at_y = y, winner_y = j, winner_x = k;
    });
    if (at_y < 0) continue;
    A y, x, value, along_y, along_x;
    candidate(bin.y, winner_y, y, g);
    candidate(bin.x, winner_x, x, g);
    read_point(plane, Reading<A>(y, g.in_h, g), Reading<A>(x, g.in_w, g), g.in_w, value, along_y, along_x);
    const A grad = to_float(grads[at * pitch + c]);
    const A late_y = late_of(bin.y, point_of_candidate(bin.y, winner_y), g);
    const A late_x = late_of(bin.x, point_of_candidate(bin.x, winner_x), g);
    sums.top += grad * along_y * (1 - late_y);
    sums.bottom += grad * along_y * late_y;
    sums.left += grad * along_x * (1 - late_x);
    sums.right += grad * along_x * late_x;
  }
  sums.add_other_lanes();
  if (threadIdx.x % 32 == 0) sums.put(edges + 4 * at, bin, bin.broken ? not_a_number<A>() : (A)1);
}

// Eq. 13: sums over the bins of a box, in their order.
// Owner: one thread per element of grad_boxes (R, 5).
template <class T, class I, class TBoxes = T>
__global__ void __launch_bounds__(ROI_THREADS)
    box_gradient(const TBoxes* __restrict__ boxes, const Compute<T>* __restrict__ edges,
                 TBoxes* __restrict__ grad_boxes, RoiGeometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * ROI_THREADS + threadIdx.x;
  if (i >= (I)g.boxes * 5) return;
  const int r = (int)(i / 5), column = (int)(i - (I)r * 5);
  if (column == 0) {
    grad_boxes[i] = from_float<TBoxes>((A)0);
    return;
  }
  const bool is_x = column % 2, is_end = column > 2;
  const int bins = g.pooled_h * g.pooled_w, pooled = is_x ? g.pooled_w : g.pooled_h;
  const A scale = (A)g.spatial_scale, begin = to_float(boxes[i - is_end * 2]), end = to_float(boxes[i + !is_end * 2]);
  const bool least = times(end, scale) - times(begin, scale) < (A)g.least_size;  // least_size: the end moves nothing
  A sum = 0;
  for (int place = 0; place < bins; place++) {
    const int p = is_x ? place % g.pooled_w : place / g.pooled_w;
    const A* const edge = edges + 4 * ((I)r * bins + place) + 2 * is_x;
    const A first = is_end ? (A)p / (A)pooled : (A)(pooled - p) / (A)pooled;
    const A last = is_end ? (A)(p + 1) / (A)pooled : (A)(pooled - p - 1) / (A)pooled;
    sum += least ? edge[0] + edge[1] : edge[0] * first + edge[1] * last;
  }
  grad_boxes[i] = from_float<TBoxes>(sum * (least && is_end ? (A)0 : scale));
}

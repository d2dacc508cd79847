// Backward of a convolution to its offset, mask and input. Nothing is kept from the forward: samples are taken again.
// Equations are those of docs/math/deform_conv2d.md. Gradients come as channels-last copies, groups padded to a depth.
#pragma once
#include "conv/taps.cuh"
#include "core/product.cuh"

// What a tap reads, as in Tap; but gradients need the place and the mask themselves, not the weights made of them.
template <class A, class I> struct Point {
  I corner[CORNERS];  // first chunk of the pixel, or of the zeros behind the last
  A within[AXES], m;  // place within the cell, mask
};

template <class A> struct alignas(16) Chunk {
  A v[16 / sizeof(A)];
};
// p += w * v, in no order that anybody knows.
PYDEFORM_DEVICE void add_anywhere(float* p, const Chunk<float>& c, float w) {
  red_add4(p, w * c.v[0], w * c.v[1], w * c.v[2], w * c.v[3]);
}
PYDEFORM_DEVICE void add_anywhere(double* p, const Chunk<double>& c, double w) {
  atomicAdd(p, w * c.v[0]);
  atomicAdd(p + 1, w * c.v[1]);
}

// A block of backward_data: its pixels and tap, and what a thread has of them once the column gradients are staged: a
// chunk of the channels, of every ROWS-th pixel. `slots` are units along the tile, each with an offset group of its own.
// What several parts need is a field: where each computes it again, instances take up to 28 registers more.
template <class P, class I> struct DataTile {
  using T = typename P::T;
  using A = typename P::Acc;
  static constexpr int E = P::E, LANES = P::BN / E, ROWS = P::THREADS / LANES, TURNS = P::BM / ROWS;
  static constexpr int PITCH = P::BN + 8, QUADS = P::BN / 2 + 4;
  static constexpr int N = 16 / sizeof(A), PARTS = E / N;  // sums in 16 bytes, such pieces of a thread's channels
  static_assert(P::PARTS == 1 && 32 % LANES == 0 && P::BM % ROWS == 0, "a row's threads are of one warp");
  static constexpr int PIPELINE = 2 * (P::BM + P::BN) * P::ROW, STAGED = P::BM * PITCH * (int)sizeof(A);  // bytes
  using Dots = A[TURNS][CORNERS];

  const Geometry& g;
  const Channels& c;
  A* const staged;            // [BM][PITCH], in the place of the product's tiles after it is done with them
  Point<A, I>* const points;  // [slots][BM], behind both
  const int slots, tap, tap0, taps, kernel, lane, row, slot;  // lane, row, slot: the thread's
  const I m0, first, count, end, pixels, memory, zeros;

  PYDEFORM_DEVICE DataTile(const Geometry& g, const Channels& c, unsigned char* shared, int slots, I first, I count,
                           int tap0, int taps)
      : g(g),
        c(c),
        staged(reinterpret_cast<A*>(shared)),
        points(reinterpret_cast<Point<A, I>*>(shared + (PIPELINE > STAGED ? PIPELINE : STAGED))),
        slots(slots),
        tap(tap0 + (int)(blockIdx.x % taps)),
        tap0(tap0),
        taps(taps),
        kernel(taps_of(g)),
        lane(threadIdx.x % LANES),
        row(threadIdx.x / LANES),
        slot(lane * slots / LANES),
        m0(first + (I)(blockIdx.x / taps) * P::BM),
        first(first),
        count(count),
        end(first + count),
        pixels(out_pixels_of<I>(g)),
        memory(g.groups * c.units * c.pitch),
        zeros(g.batch * in_pixels_of<I>(g) * (memory / E)) {}

  PYDEFORM_DEVICE Place place_of_slot(int group, int block, int slot) const {
    return Place(group, block * P::BN + slot * (P::BN / slots), c);
  }
  // Where a thread reads two pieces, the second ones lie behind all the first, so that a warp reads without conflicts.
  static PYDEFORM_DEVICE int staged_at(int r, int n) {
    return r * PITCH + (PARTS == 2 ? n / N % 2 * QUADS + n / E * N + n % N : n);
  }

  // A thread locates the sampling points of pixel m, which is its own, or of some of its slots.
  template <class TOffset>
  PYDEFORM_DEVICE void locate_points(const Offsets<T, I, TOffset>& offsets, const OutputPixel& pixel, I m, int group,
                                     int block) const {
    const int tid = threadIdx.x;
    const I chunks = memory / E;
    for (int slot = tid / P::BM; slot < slots; slot += P::THREADS / P::BM) {
      const Place place = place_of_slot(group, block, slot);
      Point<A, I> t{};
#pragma unroll
      for (int k = 0; k < CORNERS; k++) t.corner[k] = zeros;
      if (m < end && place.valid) {
        const Sample<A> s = offsets.sample(pixel.b, place.offset_group(g, c), tap, pixel.p, pixel.origin, t.m, g);
#pragma unroll
        for (int k = 0; k < CORNERS; k++)
          t.corner[k] = s.corner[k] < 0 ? zeros : (pixel.b * in_pixels_of<I>(g) + s.corner[k]) * chunks;
#pragma unroll
        for (int a = 0; a < AXES; a++) t.within[a] = s.within[a];
      }
      points[slot * P::BM + tid % P::BM] = t;
    }
  }

  PYDEFORM_DEVICE void stage(const typename P::Sums& product) const {
    const int thread = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < P::MI; i++)
#pragma unroll
      for (int j = 0; j < P::NJ; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          *reinterpret_cast<Pair<A>*>(
              staged + staged_at(P::row() + 16 * i + thread / 4 + 8 * h, P::column() + 8 * j + thread % 4 * 2)) = {
              product.of[i][j][2 * h], product.of[i][j][2 * h + 1]};
  }

  // Eq. 3 and 4 of one offset group, whose dots of column gradient and corners `width` threads of a row add up; then
  // dots are 0 again.
  template <class TOffset>
  PYDEFORM_DEVICE void write_dots(Dots& dot, int width, int og, bool valid, OffsetGradient<TOffset>* grad_offset,
                                  T* grad_mask) const {
    A total[AXES] = {};
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
      for (int k = 0; k < CORNERS; k++)
        for (int step = width / 2; step; step /= 2) dot[turn][k] += __shfl_xor_sync(0xffffffffu, dot[turn][k], step);
      const int r = row + turn * ROWS;
      const I at = m0 + r;
      if (lane % width == 0 && valid && at < end) {
        const Point<A, I>& t = points[slot * P::BM + r];
        A value, along[AXES];
        dots_of_corners(dot[turn], t.within, value, along);
        const I b = at / pixels, p = at - b * pixels, k = ((I)b * g.offset_groups + og) * kernel + tap;
        if (grad_mask) grad_mask[k * pixels + p] = from_float<T>(value);
#pragma unroll
        for (int a = 0; a < AXES; a++) {
          if constexpr (ACTIVE)
            total[a] += t.m * along[a];
          else if (grad_offset)
            grad_offset[(AXES * k + a) * pixels + p] = from_float<TOffset>(t.m * along[a]);
        }
      }
#pragma unroll
      for (int k = 0; k < CORNERS; k++) dot[turn][k] = 0;
    }
    if constexpr (ACTIVE)
      if (grad_offset) write_total(total, width, og, valid, grad_offset);
  }

  // The block's sum of `total`, of an offset that all pixels share.
  PYDEFORM_DEVICE void write_total(A (&total)[AXES], int width, int og, bool valid, A* grad_offset) const {
    const int tid = threadIdx.x;
#pragma unroll
    for (int a = 0; a < AXES; a++)
      for (int step = LANES; step < 32; step *= 2) total[a] += __shfl_xor_sync(0xffffffffu, total[a], step);
    __syncthreads();  // all have read their points: now warps leave their sums there
    Point<A, I>* const warps = points + slot * P::BM;
    if (tid % 32 / LANES == 0 && lane % width == 0)
#pragma unroll
      for (int a = 0; a < AXES; a++) warps[tid / 32].within[a] = total[a];
    __syncthreads();
    if (row > 0 || lane % width > 0 || !valid) return;
    const I blocks = gridDim.x / taps, first_part = ((I)og * taps + (tap - tap0)) * AXES;
#pragma unroll
    for (int a = 0; a < AXES; a++) {
      A sum = 0;
      for (int w = 0; w < P::THREADS / 32; w++) sum += warps[w].within[a];
      grad_offset[(first_part + a) * blocks + blockIdx.x / taps] = sum;
    }
  }

  // What the staged column gradients of a block of channels give: dots with the corners, if `dots`, and the input's part
  // (eq. 5) into `sums`, which may be null.
  template <bool STORE>
  PYDEFORM_DEVICE void use(Dots& dot, bool dots, int group, int block, const T* __restrict__ image,
                           A* __restrict__ sums) const {
    // Neighbours whose channels are of one unit exchange pieces, so that what a warp adds at once lies together.
    const bool exchange = !STORE && PARTS == 2 && sums && c.pitch % (2 * E) == 0, odd = lane % 2;
    const Place place(group, block * P::BN + lane * E, c);
    const int q = place.memory(c);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int r = row + turn * ROWS;
      const I at = m0 + r;
      Chunk<A> v[PARTS];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        v[part] = *reinterpret_cast<const Chunk<A>*>(staged + staged_at(r, lane * E + part * N));
      Chunk<A> other;
      if (exchange) {
#pragma unroll
        for (int e = 0; e < N; e++) other.v[e] = __shfl_xor_sync(0xffffffffu, odd ? v[0].v[e] : v[PARTS - 1].v[e], 1);
      }
      if (!place.valid || at >= end) continue;
      const Point<A, I>& t = points[slot * P::BM + r];
      if (dots) add_dots(dot[turn], v, image + q, t);
      if (!sums) continue;
      if constexpr (STORE) {
        Chunk<A>* column = reinterpret_cast<Chunk<A>*>(sums + ((I)(tap - tap0) * count + (at - first)) * memory + q);
#pragma unroll
        for (int part = 0; part < PARTS; part++) column[part] = v[part];
      } else {
        add_to_corners(sums + q, v, other, exchange, odd, t);
      }
    }
  }

  // `channel`: the thread's chunk of pixel 0.
  static PYDEFORM_DEVICE void add_dots(A (&dot)[CORNERS], const Chunk<A> (&v)[PARTS], const T* __restrict__ channel,
                                       const Point<A, I>& t) {
    uint4 corner[CORNERS];
    load_corners<T, I>(corner, channel, t.corner);
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {
      A pixel_value[E];
      unpack<T>(pixel_value, corner[k]);
#pragma unroll
      for (int e = 0; e < E; e++) dot[k] += v[e / N].v[e % N] * pixel_value[e];
    }
  }

  // `other` is a piece of the neighbour's, in exchange for one of ours.
  PYDEFORM_DEVICE void add_to_corners(A* channel, Chunk<A> (&v)[PARTS], const Chunk<A>& other, bool exchange, bool odd,
                                      const Point<A, I>& t) const {
    A w[CORNERS];
    corner_weights(w, t.within, t.m);
    if (exchange) {
#pragma unroll
      for (int e = 0; e < N; e++) {  // by selection: an index that depends on the thread would leave the registers
        v[0].v[e] = odd ? other.v[e] : v[0].v[e];
        v[PARTS - 1].v[e] = odd ? v[PARTS - 1].v[e] : other.v[e];
      }
    }
    const int shift = exchange && odd ? -N : 0, stride = exchange ? E : N;
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {
      if (t.corner[k] == zeros) continue;
      A* p = channel + (size_t)t.corner[k] * E + shift;
#pragma unroll
      for (int part = 0; part < PARTS; part++) add_anywhere(p + part * stride, v[part], w[k]);
    }
  }
};

// Gradients of offset and mask (eq. 3, 4) and of the input (eq. 5) from one tap's column gradient, which is a product
// of grad_output and weight and stays in shared memory.
// Owner: a block has BM output pixels of [first, first + count) and one tap, all channels: it alone writes their
// grad_offset and grad_mask; ACTIVE: the sum over its pixels, to grad_offset[og][tap - tap0][axis][block of pixels]. The
// input's gradient is added to by atomics; or, STORE, the column gradient is written to `sums` as
// columns[tap - tap0][pixel - first][channel] for conv/gather.cuh, without any.
template <class P, class I, bool STORE, class TOffset = typename P::T>
__global__ void __launch_bounds__(P::THREADS, sizeof(typename P::T) == 2 ? 2 : 1)
    backward_data(const typename P::T* __restrict__ gradient, const typename P::T* __restrict__ image,
                  const TOffset* __restrict__ offset, const typename P::T* __restrict__ mask,
                  const typename P::T* __restrict__ weight, OffsetGradient<TOffset>* __restrict__ grad_offset,
                  typename P::T* __restrict__ grad_mask, typename P::Acc* __restrict__ sums, Geometry g, Channels c,
                  int padded_outputs, int slots, I first, I count, int tap0, int taps) {
  using T = typename P::T;
  using A = typename P::Acc;
  using Tile = DataTile<P, I>;
  constexpr int A_BYTES = P::BM * P::ROW, B_BYTES = P::BN * P::ROW, E = P::E;
  PYDEFORM_DYNAMIC_SHARED(unsigned char, shared);

  const int tid = threadIdx.x, steps = padded_outputs / P::DEPTH;
  const bool dots = grad_offset || grad_mask;
  const Offsets<T, I, TOffset> offsets{offset, mask};
  const Tile own(g, c, shared, slots, first, count, tap0, taps);
  const I m0 = own.m0, end = own.end;

  const I m = m0 + tid % P::BM;  // the pixel whose sampling points this thread locates
  const OutputPixel pixel(m < end ? m : first, g);
  // A thread copies one chunk of each COPY_ROWS-th row; the weight is packed as the tiles of the steps.
  constexpr int COPY_ROWS = P::THREADS / P::CHUNKS;
  static_assert(P::BM % COPY_ROWS == 0 && COPY_ROWS % 8 == 0, "a thread's rows are swizzled alike");
  const int copied_at = P::at(tid / P::CHUNKS, tid % P::CHUNKS);
  const I copied = m0 + tid / P::CHUNKS;  // its first row
  const size_t pixel_stride = (size_t)g.groups * padded_outputs;
  const T* const gradient_row = gradient + (copied < end ? copied : first) * pixel_stride + tid % P::CHUNKS * E;
  const unsigned char* const weight_tile = reinterpret_cast<const unsigned char*>(weight) + tid * 16;
  auto load = [&](int tile, int s) {
    unsigned char *a_tile = shared + (s & 1) * A_BYTES + copied_at,
                  *b_tile = shared + 2 * A_BYTES + (s & 1) * B_BYTES + copied_at;
    const T* row = gradient_row + tile / c.blocks * padded_outputs + s * P::DEPTH;
#pragma unroll
    for (int i = 0; i < P::BM; i += COPY_ROWS) {
      const bool valid = copied + i < end;
      cp_async16(a_tile + i * P::ROW, valid ? row + i * pixel_stride : gradient, valid);
    }
    const unsigned char* from = weight_tile + ((size_t)(own.tap * g.groups * c.blocks + tile) * steps + s) * B_BYTES;
#pragma unroll
    for (int i = 0; i < B_BYTES; i += P::THREADS * 16) cp_async16(b_tile + i, from + i, true);
    cp_async_commit();
  };
  A dot[Tile::TURNS][CORNERS] = {};

  int located = -1;  // offset group of the points, where a block of channels has one
#pragma unroll 1
  for (int tile = 0; tile < g.groups * c.blocks; tile++) {
    const int group = tile / c.blocks, block = tile - group * c.blocks,
              og = Place(group, block * P::BN, c).offset_group(g, c);
    load(tile, 0);
    if (slots > 1 || og != located) {
      if (slots == 1 && dots && located >= 0)
        own.template write_dots<TOffset>(dot, Tile::LANES, located, true, grad_offset, grad_mask);
      __syncthreads();
      own.locate_points(offsets, pixel, m, group, block);
      located = og;
    }
    typename P::Sums product;
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
      cp_async_wait<0>();
      P::ready();
      __syncthreads();
      if (s + 1 < steps) load(tile, s + 1);
      P::issue(product, shared + (s & 1) * A_BYTES, shared + 2 * A_BYTES + (s & 1) * B_BYTES);
      P::wait(product);
    }
    __syncthreads();
    own.stage(product);
    __syncthreads();
    own.template use<STORE>(dot, dots, group, block, image, sums);
    if (slots > 1 && dots) {
      const Place place = own.place_of_slot(group, block, own.slot);
      own.template write_dots<TOffset>(dot, Tile::LANES / slots, place.offset_group(g, c), place.valid, grad_offset,
                                       grad_mask);
    }
    __syncthreads();
  }
  if (slots == 1 && dots) own.template write_dots<TOffset>(dot, Tile::LANES, located, true, grad_offset, grad_mask);
}

// The weight as the tiles that backward_data loads: [tap][group][block][step][channel][output], zeros where a channel
// or an output does not exist.
// Owner: a block has 256 / depth channels of a tile, at every tap; a thread one output of a channel.
template <class P, class I>
__global__ void __launch_bounds__(256)
    pack_weight_columns(const typename P::T* __restrict__ weight, typename P::T* __restrict__ packed, Geometry g,
                        Channels c, int steps) {
  using T = typename P::T;
  const int kernel = taps_of(g), summed = g.in_channels / g.groups, group_outputs = g.out_channels / g.groups;
  const int k = threadIdx.x % P::DEPTH, n = blockIdx.y * (256 / P::DEPTH) + threadIdx.x / P::DEPTH;
  const int tile = blockIdx.x / steps, o = (blockIdx.x - tile * steps) * P::DEPTH + k, group = tile / c.blocks;
  const Place place(0, (tile - group * c.blocks) * P::BN + n, c);
  const bool valid = place.unit < c.units && place.within < c.unit && o < group_outputs;
  const I from = ((I)(group * group_outputs + o) * summed + place.unit * c.unit + place.within) * kernel;
  const I stride = (I)g.groups * c.blocks * steps * (P::BN * P::DEPTH);
  T* to = packed + (I)blockIdx.x * (P::BN * P::DEPTH) + n * P::DEPTH + k;
  for (int tap = 0; tap < kernel; tap++) to[tap * stride] = valid ? weight[from + tap] : T{};
}

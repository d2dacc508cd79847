// Forward of a convolution with or without offsets (eq. 1): samples go from registers to shared memory to the product
// and never to device memory. The steps of a tile run over (block of channels, tap), the tap inside, so that the first
// level of cache has a block's neighbourhood when the next tap comes back to it.
#pragma once
#include "conv/taps.cuh"
#include "core/product.cuh"

// A step of a tile: which block of channels, which tap. The last three steps' taps are kept, in places 0 to 2.
struct Cursor {
  int block, tap, at[AXES], place;  // at: the tap in the kernel
  PYDEFORM_DEVICE Cursor(int s, const Geometry& g) : place(0) {
    block = s / taps_of(g);
    tap = s - block * taps_of(g);
    take_apart(at, tap, g.kernel);
  }
  PYDEFORM_DEVICE void next_place() { place = place == 2 ? 0 : place + 1; }
  PYDEFORM_DEVICE bool next(const Geometry& g) {  // true: a new block
    next_place();
    tap++;
#pragma unroll
    for (int a = AXES - 1; a >= 0; a--) {
      if (++at[a] < g.kernel[a]) return false;
      at[a] = 0;
    }
    tap = 0;
    block++;
    return true;
  }
};

// The taps of a step for the pixels of a tile: each thread has one pixel, and one slot or more of it. A slot is a unit
// along the depth.
template <class P, class I, int READS, class TOffset>
PYDEFORM_DEVICE void locate_slots(Tap<Compute<typename P::T>, I, READS>* taps,
                                  const Offsets<typename P::T, I, TOffset>& offsets, const OutputPixel& pixel,
                                  bool exists, int group, const Cursor& step, int slots, I chunks, const Geometry& g,
                                  const Channels& c) {
  using T = typename P::T;
  const int tid = threadIdx.x;
  for (int slot = tid / P::BM; slot < slots; slot += P::THREADS / P::BM) {
    const Place place(group, step.block * P::DEPTH + slot * (P::DEPTH / slots), c);
    Tap<Compute<T>, I, READS> t = no_tap<T, I, READS>(g, chunks);
    if (exists && place.valid)
      t = locate_tap<T, I, READS>(offsets, pixel, READS == DEFORMED ? place.offset_group(g, c) : 0, step.tap, step.at,
                                  g, chunks);
    taps[(step.place * slots + slot) * P::BM + tid % P::BM] = t;
  }
}

// The packed weight, whose tiles follow each other as the steps do: the next 16 bytes of a thread's first row.
template <class P> struct WeightTiles {
  const unsigned char* next;
  PYDEFORM_DEVICE void load(unsigned char* tile) {
    constexpr int BYTES = P::PARTS * P::BN * P::ROW;
#pragma unroll
    for (int i = 0; i < BYTES; i += P::THREADS * 16) cp_async16(tile + i, next + i, true);
    cp_async_commit();
    next += BYTES;
  }
};

// The sums of a tile, from pixel m0 and output n0 of the group on, into output or, if it is not null, into this slice of
// partial. Each warp turns eight of its columns at a time in shared memory, so that threads next to each other write
// pixels next to each other.
template <class P, class I>
PYDEFORM_DEVICE void write_tile(const typename P::Sums& sums, unsigned char* shared,
                                const typename P::T* __restrict__ bias, typename P::T* __restrict__ output,
                                typename P::Acc* __restrict__ partial, I m0, int n0, int group, const Geometry& g) {
  const I pixels = out_pixels_of<I>(g), all = g.batch * pixels;
  const int tid = threadIdx.x, group_outputs = g.out_channels / g.groups;
  constexpr int PITCH = P::WM + 4, SPAN = P::WM < 32 ? P::WM : 32, SPANS = P::WM / SPAN;
  const int lane = tid & 31;
  typename P::Acc* const turned = reinterpret_cast<typename P::Acc*>(shared) + tid / 32 * 8 * PITCH;
  size_t target[SPANS];  // of channel 0
  const I at = m0 + P::row() + lane % SPAN;
#pragma unroll
  for (int i = 0; i < SPANS; i++) {
    const I mine = at + i * SPAN, b = mine / pixels;
    target[i] = partial ? (size_t)blockIdx.y * g.out_channels * all + mine
                        : (size_t)(b * g.out_channels) * pixels + (mine - b * pixels);
  }
  const size_t stride = partial ? all : pixels;
#pragma unroll
  for (int j = 0; j < P::NJ; j++) {
#pragma unroll
    for (int i = 0; i < P::MI; i++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        turned[(lane % 4 * 2 + k % 2) * PITCH + i * 16 + lane / 4 + k / 2 * 8] = sums.of[i][j][k];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i += 32 / SPAN) {
      const int r = i + lane / SPAN, n = n0 + P::column() + j * 8 + r, o = group * group_outputs + n;
      if (n >= group_outputs) continue;
      const typename P::Acc shift = bias && !partial ? to_float(bias[o]) : (typename P::Acc)0;
#pragma unroll
      for (int k = 0; k < SPANS; k++) {
        if (at + k * SPAN >= all) continue;
        const typename P::Acc sum = turned[r * PITCH + lane % SPAN + k * SPAN];
        if (partial)
          partial[target[k] + o * stride] = sum;
        else
          output[target[k] + o * stride] = from_float<typename P::T>(sum + shift);
      }
    }
    __syncwarp();
  }
}

// Owner: a block has BM output pixels x BN output channels of a group, of slice blockIdx.y of the steps.
// Reads the channels-last image and the packed weight; writes its part of output, or of the partial sums.
// No atomics: the same bits on each run.
template <class P, class I, int READS, class TOffset = typename P::T>
__global__ void __launch_bounds__(P::THREADS, 1)
    forward(const typename P::T* __restrict__ image, const TOffset* __restrict__ offset,
            const typename P::T* __restrict__ mask, const typename P::T* __restrict__ weight,
            const typename P::T* __restrict__ bias, typename P::T* __restrict__ output,
            typename P::Acc* __restrict__ partial, Geometry g, Channels c, int tiles_n, int slots) {
  using T = typename P::T;
  using Tap = ::Tap<Compute<T>, I, READS>;
  constexpr int PIXELS = PIXELS_READ<READS>;
  constexpr int A_BYTES = P::PARTS * P::BM * P::ROW, B_BYTES = P::PARTS * P::BN * P::ROW;
  constexpr int TASKS = P::BM * P::CHUNKS / P::THREADS, ROWS = P::THREADS / P::CHUNKS;
  // A thread's samples wait in registers for the next step; in three dimensions these have room for one, which does not.
  constexpr int KEPT = PIXELS > 4 ? 1 : TASKS;
  static_assert(P::THREADS % P::BM == 0 && P::BM % ROWS == 0 && ROWS % 8 == 0, "a thread's rows are swizzled alike");
  PYDEFORM_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char *const a_tiles = shared, *const b_tiles = shared + 2 * A_BYTES;
  Tap* const taps = reinterpret_cast<Tap*>(shared + 2 * (A_BYTES + B_BYTES));  // [3][slots][BM]

  const int tid = threadIdx.x;
  const int steps = c.blocks * taps_of(g);
  const int tile_n = blockIdx.x % tiles_n, group = blockIdx.x / tiles_n % g.groups, n0 = tile_n * P::BN;
  const I m0 = (I)(blockIdx.x / (tiles_n * g.groups)) * P::BM, all = g.batch * out_pixels_of<I>(g);
  const int first = (int)((long long)steps * blockIdx.y / gridDim.y),
            end = (int)((long long)steps * (blockIdx.y + 1) / gridDim.y);
  const I chunks = (I)g.groups * c.units * c.pitch / P::E;
  const Offsets<T, I, TOffset> offsets{offset, mask};

  const I m = m0 + tid % P::BM;
  const OutputPixel pixel(m < all ? m : (I)0, g);
  Cursor located(first, g);
  auto locate_step = [&]() {
    locate_slots<P, I, READS>(taps, offsets, pixel, m < all, group, located, slots, chunks, g, c);
    located.next(g);
  };
  WeightTiles<P> weights{reinterpret_cast<const unsigned char*>(weight) +
                         ((size_t)(group * tiles_n + tile_n) * steps + first) * B_BYTES + tid * 16};
  const int row = tid / P::CHUNKS, column = tid % P::CHUNKS, slot = column * slots / P::CHUNKS,
            own = P::at(row, column);
  auto load_weight = [&](int stage) { weights.load(b_tiles + stage * B_BYTES + own); };
  // A thread blends one chunk of 16 bytes of each ROWS-th row.
  const Tap* const own_taps = taps + slot * P::BM + row;
  Cursor gathered(first, g);
  const T* channel = nullptr;
  auto enter_block = [&]() {
    const Place place(group, gathered.block * P::DEPTH + column * P::E, c);
    channel = place.valid ? image + place.memory(c) : nullptr;
  };
  uint4 corner[KEPT][PIXELS];
  auto load_samples = [&](int first) {
    if (channel) {
#pragma unroll
      for (int i = 0; i < KEPT; i++)
        load_corners<T, I>(corner[i], channel, own_taps[gathered.place * slots * P::BM + (first + i) * ROWS].corner);
    } else {
#pragma unroll
      for (int i = 0; i < KEPT; i++)
#pragma unroll
        for (int k = 0; k < PIXELS; k++) corner[i][k] = make_uint4(0, 0, 0, 0);
    }
  };
  auto next_tap = [&]() {
    if (gathered.next(g)) enter_block();
  };
  auto gather = [&]() {
    if constexpr (KEPT == TASKS) {
      load_samples(0);
      next_tap();
    }
  };
  int stored = 0;  // place of the taps
  auto store_samples = [&](int s, int stage) {
    auto count_channels = [&]() {
      const Place place(group, s / taps_of(g) * P::DEPTH + column * P::E, c);
      return place.valid ? c.unit - place.within : 0;
    };
#pragma unroll
    for (int i = 0; i < TASKS; i++) {
      if constexpr (KEPT < TASKS) load_samples(i);
      P::put(a_tiles + stage * A_BYTES + own + i * ROWS * P::ROW,
             blend<T, I, READS>(own_taps[stored * slots * P::BM + i * ROWS], corner[i % KEPT], count_channels));
    }
    if constexpr (KEPT < TASKS) next_tap();
    stored = stored == 2 ? 0 : stored + 1;
  };

  typename P::Sums sums;
  for (int s = first; s < min(first + 3, end); s++) locate_step();
  enter_block();
  load_weight(0);
  __syncthreads();
  gather();
  store_samples(first, 0);
  if (first + 1 < end) gather();
  cp_async_wait<0>();
  P::ready();
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int left = end - first; left > 0; left--) {
    if (left > 1) load_weight(stage ^ 1);
    P::issue(sums, a_tiles + stage * A_BYTES, b_tiles + stage * B_BYTES);
    if (left > 1) store_samples(end - left + 1, stage ^ 1);
    if (left > 2) gather();  // on its way during the rest of this step and the next product
    if (left > 3) locate_step();
    cp_async_wait<0>();
    P::ready();
    P::wait(sums);
    __syncthreads();
    stage ^= 1;
  }

  write_tile<P, I>(sums, shared, bias, output, partial, m0, n0, group, g);
}

// Owner: one thread per output element. Adds the slices in their order, then the bias.
template <class T, class I>
__global__ void __launch_bounds__(256) sum_slices(const Compute<T>* __restrict__ partial, const T* __restrict__ bias,
                                                  T* __restrict__ output, Geometry g, int slices) {
  const I pixels = out_pixels_of<I>(g), all = g.batch * pixels, i = (I)blockIdx.x * 256 + threadIdx.x;
  if (i >= all * g.out_channels) return;
  const I o = i / all, m = i - o * all, b = m / pixels;
  Compute<T> sum = 0;
  for (int s = 0; s < slices; s++) sum += partial[((I)s * g.out_channels + o) * all + m];
  output[(b * g.out_channels + o) * pixels + (m - b * pixels)] = from_float<T>(bias ? sum + to_float(bias[o]) : sum);
}

// The weight as the tiles that `forward` loads: [group][tile of outputs][block][tap][part][row][depth], zeros where an
// output or a channel does not exist. Rows are output channels and the summed axis input channels; for ADJOINT the
// geometry is that of the transposed convolution, while the weight stays as it is.
// Owner: a block has 256 / depth rows of a tile of one block of channels, at every tap; a thread one place of a row.
template <class P, class I, int READS>
__global__ void __launch_bounds__(256)
    pack_weight(const typename P::T* __restrict__ weight, typename P::T* __restrict__ packed, Geometry g, Channels c,
                int tiles_n) {
  using T = typename P::T;
  const int kernel = taps_of(g), group_outputs = g.out_channels / g.groups, summed = g.in_channels / g.groups;
  const int k = threadIdx.x % P::DEPTH, r = blockIdx.y * (256 / P::DEPTH) + threadIdx.x / P::DEPTH;
  const int tile = blockIdx.x / c.blocks, block = blockIdx.x - tile * c.blocks, group = tile / tiles_n,
            n = (tile - group * tiles_n) * P::BN + r;
  const Place place(0, block * P::DEPTH + k, c);
  const int q = place.unit * c.unit + place.within;  // channel of the group
  const bool valid = place.unit < c.units && place.within < c.unit && n < group_outputs;
  const I from = READS == ADJOINT ? ((I)(group * summed + q) * group_outputs + n) * kernel
                                  : ((I)(group * group_outputs + n) * summed + q) * kernel;
  T* to = packed + (I)blockIdx.x * kernel * (P::PARTS * P::BN * P::DEPTH) + r * P::DEPTH + k;
  for (int tap = 0; tap < kernel; tap++, to += P::PARTS * P::BN * P::DEPTH) {
    const T v = valid ? weight[from + tap] : T{};
    if constexpr (P::PARTS == 2) {
      to[0] = tf32_high(v);
      to[P::BN * P::DEPTH] = v - tf32_high(v);
    } else {
      to[0] = v;
    }
  }
}

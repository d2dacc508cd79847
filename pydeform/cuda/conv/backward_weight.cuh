// Backward of a convolution to its weight. Samples are taken again, as in backward_data.cuh.
#pragma once
#include "conv/taps.cuh"
#include "core/product.cuh"

// The sums of a tile, from output o0 of the group on, into this slice of partial; `add`: to what is there.
template <class P, class I>
PYDEFORM_DEVICE void write_weight_tile(const typename P::Sums& product, typename P::Acc* __restrict__ partial, int o0,
                                       int tap, int group, int block, int add, const Geometry& g, const Channels& c) {
  using A = typename P::Acc;
  const int group_outputs = g.out_channels / g.groups, kernel = taps_of(g);
  const int lane = threadIdx.x & 31, width = c.blocks * P::BN;
#pragma unroll
  for (int i = 0; i < P::MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int o = o0 + P::row() + i * 16 + lane / 4 + 8 * h;
      if (o >= group_outputs) continue;
      A* out = partial + (((I)blockIdx.y * kernel + tap) * g.out_channels + group * group_outputs + o) * width +
               block * P::BN;
#pragma unroll
      for (int j = 0; j < P::NJ; j++) {
        Pair<A>& sum = *reinterpret_cast<Pair<A>*>(out + P::column() + 8 * j + lane % 4 * 2);
        const Pair<A> before = add ? sum : Pair<A>{};
        sum = {before.v[0] + product.of[i][j][2 * h], before.v[1] + product.of[i][j][2 * h + 1]};
      }
    }
}

// Gradient of the weight (eq. 6): grad_output times samples, summed over pixels.
// Owner: a block has BM outputs of a group x BN input channels of it at one tap, over slice blockIdx.y of the pixels.
// Writes partial[slice][tap][output][channel]; `add`: adds to what is there. No atomics.
template <class P, class I, int READS, class TOffset = typename P::T>
__global__ void __launch_bounds__(P::THREADS, 1)
    backward_weight(const typename P::T* __restrict__ gradient, const typename P::T* __restrict__ image,
                    const TOffset* __restrict__ offset, const typename P::T* __restrict__ mask,
                    typename P::Acc* __restrict__ partial, Geometry g, Channels c, int padded_outputs, int tiles_o,
                    int slots, int add) {
  using T = typename P::T;
  using A = typename P::Acc;
  using Tap = ::Tap<A, I, READS>;
  constexpr int PIXELS = PIXELS_READ<READS>, E = P::E, DEPTH = P::DEPTH;
  constexpr int A_CHUNKS = P::BM / E, B_CHUNKS = P::BN / E, A_BYTES = DEPTH * A_CHUNKS * 16,
                B_BYTES = DEPTH * B_CHUNKS * 16;
  constexpr int TASKS = DEPTH * B_CHUNKS / P::THREADS, ROWS = P::THREADS / B_CHUNKS;
  constexpr int KEPT = PIXELS > 4 ? 1 : TASKS;  // as in `forward`
  static_assert(TASKS > 0 && DEPTH * B_CHUNKS % P::THREADS == 0 && P::THREADS % B_CHUNKS == 0, "threads divide evenly");
  PYDEFORM_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char *const a_tiles = shared, *const b_tiles = shared + 2 * A_BYTES;
  Tap* const taps = reinterpret_cast<Tap*>(shared + 2 * (A_BYTES + B_BYTES));  // [3][slots][DEPTH]

  const int tid = threadIdx.x, kernel = taps_of(g);
  int place_of_block = blockIdx.x;
  const int o0 = place_of_block % tiles_o * P::BM;
  place_of_block /= tiles_o;
  const int tap = place_of_block % kernel;
  place_of_block /= kernel;
  const int block = place_of_block % c.blocks, group = place_of_block / c.blocks;
  int in_kernel[AXES];
  take_apart(in_kernel, tap, g.kernel);
  const I all = g.batch * out_pixels_of<I>(g), steps = (all + DEPTH - 1) / DEPTH;
  const I first = (I)((long long)steps * blockIdx.y / gridDim.y),
          end = (I)((long long)steps * (blockIdx.y + 1) / gridDim.y);
  const I chunks = (I)g.groups * c.units * c.pitch / E;
  const Offsets<T, I, TOffset> offsets{offset, mask};

  auto locate_step = [&](I s) {
    for (int i = tid; i < DEPTH * slots; i += P::THREADS) {
      const int r = i % DEPTH, slot = i / DEPTH;
      const Place place(group, block * P::BN + slot * (P::BN / slots), c);
      const I m = s * DEPTH + r;
      Tap t = no_tap<T, I, READS>(g, chunks);
      if (m < all && place.valid)
        t = locate_tap<T, I, READS>(offsets, OutputPixel(m, g), READS == DEFORMED ? place.offset_group(g, c) : 0, tap,
                                    in_kernel, g, chunks);
      taps[((int)(s % 3) * slots + slot) * DEPTH + r] = t;
    }
  };
  // A thread copies one chunk of each COPY_ROWS-th pixel.
  constexpr int COPY_ROWS = P::THREADS / A_CHUNKS;
  static_assert(DEPTH % COPY_ROWS == 0 && COPY_ROWS % P::PERIOD == 0 && ROWS % P::PERIOD == 0,
                "a thread's rows are swizzled alike");
  const int copied = tid / A_CHUNKS, own = P::template at<P::BM>(copied, tid % A_CHUNKS);
  const bool in_group = o0 + tid % A_CHUNKS * E < padded_outputs;
  const size_t pixel_stride = (size_t)g.groups * padded_outputs;
  const T* gradient_row =
      gradient + (size_t)(first * DEPTH + copied) * pixel_stride + group * padded_outputs + o0 + tid % A_CHUNKS * E;
  I left = in_group ? all - first * DEPTH - copied : 0;  // pixels from the thread's first one on
  auto load_gradient = [&](int stage) {
    unsigned char* tile = a_tiles + stage * A_BYTES + own;
#pragma unroll
    for (int i = 0; i < DEPTH; i += COPY_ROWS)
      cp_async16(tile + i * A_CHUNKS * 16, i < left ? gradient_row + i * pixel_stride : gradient, i < left);
    cp_async_commit();
    gradient_row += DEPTH * pixel_stride;
    left -= DEPTH;
  };
  const int column = tid % B_CHUNKS, row = tid / B_CHUNKS, slot = column * slots / B_CHUNKS;
  const int target = P::template at<P::BN>(row, column);
  const Place place(group, block * P::BN + column * E, c);
  const T* const channel = place.valid ? image + place.memory(c) : nullptr;
  uint4 corner[KEPT][PIXELS] = {};
  auto load_samples = [&](I s, int i0) {
    if (!channel) return;
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      load_corners<T, I>(corner[i], channel,
                         taps[((int)(s % 3) * slots + slot) * DEPTH + row + (i0 + i) * ROWS].corner);
  };
  auto gather = [&](I s) {
    if constexpr (KEPT == TASKS) load_samples(s, 0);
  };
  auto store_samples = [&](I s) {
#pragma unroll
    for (int i = 0; i < TASKS; i++) {
      if constexpr (KEPT < TASKS) load_samples(s, i);
      const uint4 sample =
          blend<T, I, READS>(taps[((int)(s % 3) * slots + slot) * DEPTH + row + i * ROWS], corner[i % KEPT],
                             [&]() { return place.valid ? c.unit - place.within : 0; });
      *reinterpret_cast<uint4*>(b_tiles + (int)(s & 1) * B_BYTES + target + i * ROWS * B_CHUNKS * 16) = sample;
    }
  };

  typename P::Sums product;
  if (first < end) {
    for (I s = first; s < min(first + 3, end); s++) locate_step(s);
    load_gradient((int)(first & 1));
    __syncthreads();
    gather(first);
    store_samples(first);
    if (first + 1 < end) gather(first + 1);
    cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll 1
  for (I s = first; s < end; s++) {
    if (s + 1 < end) load_gradient((int)(s + 1 & 1));
    P::issue(product, a_tiles + (int)(s & 1) * A_BYTES, b_tiles + (int)(s & 1) * B_BYTES);
    if (s + 1 < end) store_samples(s + 1);
    if (s + 2 < end) gather(s + 2);
    if (s + 3 < end) locate_step(s + 3);
    cp_async_wait<0>();
    __syncthreads();
  }

  write_weight_tile<P, I>(product, partial, o0, tap, group, block, add, g, c);
}

// Owner: one thread per (output, channel), all taps. Adds the slices in their order.
template <class T, class I>
__global__ void __launch_bounds__(256) sum_weight(const Compute<T>* __restrict__ partial, T* __restrict__ grad_weight,
                                                  Geometry g, Channels c, int width, int slices) {
  const int kernel = taps_of(g), summed = g.in_channels / g.groups;
  const I i = (I)blockIdx.x * 256 + threadIdx.x;
  if (i >= (I)g.out_channels * summed) return;
  const int o = (int)(i / summed), q = (int)(i - (I)o * summed);
  const I place = (I)o * width + q / c.unit * c.padded + q % c.unit, step = (I)g.out_channels * width;
  for (int tap = 0; tap < kernel; tap++) {
    Compute<T> sum = 0;
    for (int s = 0; s < slices; s++) sum += partial[((I)s * kernel + tap) * step + place];
    grad_weight[i * kernel + tap] = from_float<T>(sum);
  }
}

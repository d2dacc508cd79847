// Forward of a convolution with or without offsets (eq. 1): samples go from registers to shared memory to the product
// and never to device memory. The steps of a tile run over (block of channels, tap), the tap inside, so that the first
// level of cache has a block's neighbourhood when the next tap comes back to it.
#pragma once
#include "channels.cuh"
#include "product.cuh"

// Where a tap reads. ADJOINT is the transpose of PLAIN: a gradient's pixels in the places of an image's.
constexpr int PLAIN = 0, DEFORMED = 1, ADJOINT = 2;

template <class A, class I, int READS> struct Tap {  // corner: first chunk of the pixel, -1 outside
  I corner[READS == DEFORMED ? 4 : 1];
  A weight[READS == DEFORMED ? 4 : 1];
};

template <class T, class I, int READS>
PYDEFORM_DEVICE Tap<Compute<T>, I, READS> locate_tap(const Offsets<T, I>& offsets, const OutputPixel& pixel, int og, int tap,
                                                     const Geometry& g, I chunks) {
  using A = Compute<T>;
  Tap<A, I, READS> t;
  const I image = (I)pixel.b * g.in_h * g.in_w;
  if constexpr (READS == DEFORMED) {
    A m;
    const Sample<A> s = offsets.sample(pixel.b, og, tap, pixel.p, pixel.row, pixel.column, m, g);
#pragma unroll
    for (int k = 0; k < 4; k++) t.corner[k] = s.corner[k] < 0 ? -1 : (image + s.corner[k]) * chunks;
    corner_weights(t.weight, s.y, s.x, m);
  } else {
    const int shift_y = tap / g.kernel_w * g.dilation_h, shift_x = tap % g.kernel_w * g.dilation_w;
    int y = pixel.row + shift_y, x = pixel.column + shift_x;
    bool inside = true;
    if constexpr (READS == ADJOINT) {  // the pixel whose tap read this one
      const int oy = pixel.p / g.out_w;
      y = oy + g.pad_h - shift_y;
      x = pixel.p - oy * g.out_w + g.pad_w - shift_x;
      inside = y % g.stride_h == 0 && x % g.stride_w == 0;
      y /= g.stride_h;
      x /= g.stride_w;
    }
    inside = inside && y >= 0 && y < g.in_h && x >= 0 && x < g.in_w;
    t.corner[0] = inside ? (image + (I)y * g.in_w + x) * chunks : -1;
    t.weight[0] = 1;
  }
  return t;
}

// The 16 bytes of channels of one sample, from those of its corners.
template <class T, class I, int READS>
PYDEFORM_DEVICE uint4 blend(const Tap<Compute<T>, I, READS>& t, const uint4 (&corner)[READS == DEFORMED ? 4 : 1]) {
  if constexpr (READS != DEFORMED) {
    return corner[0];
  } else {
    constexpr int E = 16 / sizeof(T);
    Compute<T> sum[E];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      Compute<T> v[E];
      unpack<T>(v, corner[k]);
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] = k ? sum[e] + t.weight[k] * v[e] : t.weight[0] * v[e];
    }
    return pack<T>(sum);
  }
}

template <class T, class I, int CORNERS>
PYDEFORM_DEVICE void load_corners(uint4 (&corner)[CORNERS], const T* __restrict__ image, const I (&place)[CORNERS], bool valid, int chunk) {
#pragma unroll
  for (int k = 0; k < CORNERS; k++)
    corner[k] = valid && place[k] >= 0 ? load16(image + (size_t)(place[k] + chunk) * (16 / sizeof(T))) : make_uint4(0, 0, 0, 0);
}

// Owner: a block has BM output pixels x BN output channels of a group, of slice blockIdx.y of the steps.
// Reads the channels-last image and the packed weight; writes its part of output, or of the partial sums.
// No atomics: the same bits on each run.
template <class P, class I, int READS>
__global__ void __launch_bounds__(P::THREADS)
    forward(const typename P::T* __restrict__ image, const typename P::T* __restrict__ offset, const typename P::T* __restrict__ mask,
            const typename P::T* __restrict__ weight, const typename P::T* __restrict__ bias, typename P::T* __restrict__ output,
            typename P::Acc* __restrict__ partial, Geometry g, Channels c, int tiles_n, int slots) {
  using T = typename P::T;
  using Point = Tap<Compute<T>, I, READS>;
  constexpr int CORNERS = READS == DEFORMED ? 4 : 1;
  constexpr int A_BYTES = P::PARTS * P::BM * P::ROW, B_BYTES = P::PARTS * P::BN * P::ROW;
  constexpr int TASKS = P::BM * P::CHUNKS / P::THREADS, ROWS = P::THREADS / P::CHUNKS;
  static_assert(P::THREADS % P::BM == 0 && P::BM * P::CHUNKS % P::THREADS == 0, "threads divide evenly");
  PYDEFORM_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char *const a_tiles = shared, *const b_tiles = shared + 2 * A_BYTES;
  Point* const taps = reinterpret_cast<Point*>(shared + 2 * (A_BYTES + B_BYTES));  // [3][slots][BM]

  const int tid = threadIdx.x;
  const int group_outputs = g.out_channels / g.groups, kernel = g.kernel_h * g.kernel_w, steps = c.blocks * kernel;
  const int tile_n = blockIdx.x % tiles_n, group = blockIdx.x / tiles_n % g.groups, n0 = tile_n * P::BN;
  const I m0 = (I)(blockIdx.x / (tiles_n * g.groups)) * P::BM, pixels = (I)g.out_h * g.out_w, all = g.batch * pixels;
  const int first = (int)((long long)steps * blockIdx.y / gridDim.y), end = (int)((long long)steps * (blockIdx.y + 1) / gridDim.y);
  const I chunks = (I)g.groups * c.units * c.pitch / P::E;
  const Offsets<T, I> offsets{offset, mask};

  const I m = m0 + tid % P::BM;  // the pixel whose taps this thread locates
  const OutputPixel pixel(m < all ? m : (I)0, g);
  auto locate_step = [&](int s) {
    const int block = s / kernel, tap = s - block * kernel;
    for (int slot = tid / P::BM; slot < slots; slot += P::THREADS / P::BM) {
      const Place place(group, block * P::DEPTH + slot * (P::DEPTH / slots), c);
      Point t;
#pragma unroll
      for (int k = 0; k < CORNERS; k++) {
        t.corner[k] = -1;
        t.weight[k] = 0;
      }
      if (m < all && place.valid)
        t = locate_tap<T, I, READS>(offsets, pixel, READS == DEFORMED ? place.offset_group(g, c) : 0, tap, g, chunks);
      taps[(s % 3 * slots + slot) * P::BM + tid % P::BM] = t;
    }
  };
  const T* const weight_rows = weight + (size_t)(group * group_outputs + n0) * steps * P::DEPTH;
  auto load_weight = [&](int s) {
#pragma unroll
    for (int part = 0; part < P::PARTS; part++) {
      const T* rows = weight_rows + (size_t)part * g.out_channels * steps * P::DEPTH + (size_t)s * P::DEPTH;
      unsigned char* tile = b_tiles + (s & 1) * B_BYTES + part * P::BN * P::ROW;
      for (int i = tid; i < P::BN * P::CHUNKS; i += P::THREADS) {
        const int r = i / P::CHUNKS, chunk = i % P::CHUNKS;
        const bool valid = n0 + r < group_outputs;
        cp_async16(tile + P::at(r, chunk), valid ? rows + (size_t)r * steps * P::DEPTH + chunk * P::E : weight, valid);
      }
    }
    cp_async_commit();
  };
  const int column = tid % P::CHUNKS, row = tid / P::CHUNKS, slot = column * slots / P::CHUNKS;
  auto gather = [&](int s, uint4(&corner)[TASKS][CORNERS]) {
    const Place place(group, s / kernel * P::DEPTH + column * P::E, c);
    const int chunk = place.memory(c) / P::E;
#pragma unroll
    for (int i = 0; i < TASKS; i++)
      load_corners<T, I>(corner[i], image, taps[(s % 3 * slots + slot) * P::BM + row + i * ROWS].corner, place.valid, chunk);
  };
  auto store_samples = [&](int s, const uint4(&corner)[TASKS][CORNERS]) {
#pragma unroll
    for (int i = 0; i < TASKS; i++)
      P::put(a_tiles + (s & 1) * A_BYTES, row + i * ROWS, column,
             blend<T, I, READS>(taps[(s % 3 * slots + slot) * P::BM + row + i * ROWS], corner[i]));
  };

  typename P::Acc acc[P::MI][P::NJ][4] = {};
  uint4 corner[TASKS][CORNERS];
  for (int s = first; s < min(first + 3, end); s++) locate_step(s);
  load_weight(first);
  __syncthreads();
  gather(first, corner);
  store_samples(first, corner);
  if (first + 1 < end) gather(first + 1, corner);
  cp_async_wait<0>();
  P::ready();
  __syncthreads();
#pragma unroll 1
  for (int s = first; s < end; s++) {
    if (s + 1 < end) load_weight(s + 1);
    P::issue(acc, a_tiles + (s & 1) * A_BYTES, b_tiles + (s & 1) * B_BYTES);
    if (s + 1 < end) store_samples(s + 1, corner);
    if (s + 2 < end) gather(s + 2, corner);  // on its way during the rest of this step and the next product
    if (s + 3 < end) locate_step(s + 3);
    cp_async_wait<0>();
    P::ready();
    P::wait(acc);
    __syncthreads();
  }

  // Each warp turns eight of its columns at a time, so that threads next to each other write pixels next to each other.
  constexpr int PITCH = P::WM + 4;
  const int lane = tid & 31;
  typename P::Acc* const turned = reinterpret_cast<typename P::Acc*>(shared) + tid / 32 * 8 * PITCH;
#pragma unroll
  for (int j = 0; j < P::NJ; j++) {
#pragma unroll
    for (int i = 0; i < P::MI; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) turned[(lane % 4 * 2 + k % 2) * PITCH + i * 16 + lane / 4 + k / 2 * 8] = acc[i][j][k];
    __syncwarp();
    for (int i = lane; i < 8 * P::WM; i += 32) {
      const int n = n0 + P::column() + j * 8 + i / P::WM;
      const I at = m0 + P::row() + i % P::WM;
      if (at >= all || n >= group_outputs) continue;
      const int o = group * group_outputs + n;
      const typename P::Acc sum = turned[i / P::WM * PITCH + i % P::WM];
      if (partial) {
        partial[((I)blockIdx.y * g.out_channels + o) * all + at] = sum;
      } else {
        const I b = at / pixels;
        output[(b * g.out_channels + o) * pixels + (at - b * pixels)] = from_float<T>(bias ? sum + to_float(bias[o]) : sum);
      }
    }
    __syncwarp();
  }
}

// Owner: one thread per output element. Adds the slices in their order, then the bias.
template <class T, class I>
__global__ void __launch_bounds__(256) sum_slices(const Compute<T>* __restrict__ partial, const T* __restrict__ bias, T* __restrict__ output, Geometry g, int slices) {
  const I pixels = (I)g.out_h * g.out_w, all = g.batch * pixels, i = (I)blockIdx.x * 256 + threadIdx.x;
  if (i >= all * g.out_channels) return;
  const I o = i / all, m = i - o * all, b = m / pixels;
  Compute<T> sum = 0;
  for (int s = 0; s < slices; s++) sum += partial[((I)s * g.out_channels + o) * all + m];
  output[(b * g.out_channels + o) * pixels + (m - b * pixels)] = from_float<T>(bias ? sum + to_float(bias[o]) : sum);
}

// The weight as rows of the product's second tile: [part][row][block][tap][DEPTH], zeros where a unit is padded.
// Rows are output channels and the summed axis input channels; the other way round for ADJOINT, where `c` counts outputs.
// Owner: one thread per element of a part.
template <class T, class I, int READS, int PARTS>
__global__ void __launch_bounds__(256) pack_weight(const T* __restrict__ weight, T* __restrict__ packed, Geometry g, Channels c, int depth) {
  const int kernel = g.kernel_h * g.kernel_w, rows = g.out_channels, group_rows = rows / g.groups, summed = g.in_channels / g.groups;
  const I i = (I)blockIdx.x * 256 + threadIdx.x, size = (I)rows * c.blocks * kernel * depth;
  if (i >= size) return;
  const int k = (int)(i % depth), tap = (int)(i / depth % kernel), block = (int)(i / depth / kernel % c.blocks);
  const int r = (int)(i / depth / kernel / c.blocks), group = r / group_rows;
  const Place place(0, block * depth + k, c);
  const int q = place.unit * c.unit + place.within;  // of the group
  T v{};
  if (place.unit < c.units && place.within < c.unit)
    v = READS == ADJOINT ? weight[((I)(group * summed + q) * group_rows + (r - group * group_rows)) * kernel + tap]
                         : weight[((I)r * summed + q) * kernel + tap];
  if constexpr (PARTS == 2) {
    const float high = tf32_high(v);
    packed[i] = high;
    packed[i + size] = v - high;
  } else {
    packed[i] = v;
  }
}

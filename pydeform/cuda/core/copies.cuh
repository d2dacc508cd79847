// Channels-last copies and back.
//
// Between (N, C, P), where a unit's channels follow each other or come `cells` apart (channel (a*unit + i)*cells + cell is
// channel i of unit (cell, a)), and (N, P, all), where all = units * pitch. A block turns 64 pixels x 128 bytes of channels
// in shared memory, and more of them where the grid has no more blocks. A thread has two pixels of a chunk, which is the
// channels in 16 bytes.
#pragma once
#include "core/numbers.cuh"

constexpr int TURN_CHUNKS = 8, TURN_HALF = 32;  // chunks of a pixel; pixels in each half of a tile

// Place of chunk c of row r: neither do eight rows of a chunk meet in a bank, nor eight chunks of a row.
PYDEFORM_DEVICE int turned(int r, int c) { return r * TURN_CHUNKS + (c ^ r % TURN_CHUNKS); }

// The channels of (N, C, P) in the chunk that begins at channel q of memory. They are of one unit: a unit has whole
// chunks, or memory has all channels as they come.
struct ChunkChannels {
  int first, step, count;  // count < 1: none
  PYDEFORM_DEVICE ChunkChannels(int q, int channels, int unit, int pitch, int cells)
      : first(q), step(cells), count(channels - q) {
    if (cells == 1 && (pitch == unit || channels == unit)) return;  // needs no division
    const int u = q / pitch, within = q - u * pitch, units = channels / unit, cell = u / (units / cells);
    first = ((u - cell * (units / cells)) * unit + within) * cells + cell;
    count = u < units ? unit - within : 0;
  }
};

// Which pixel lies on which row of a tile. A thread's two are on the same row of both halves. In (N, C, P) they are
// neighbours, in one access, where it allows that; or else each half is a run of pixels.
struct TilePixels {
  bool pairs;
  int along, across;  // pixels from a row to the next, and from half to half
  template <class T, class I>
  PYDEFORM_DEVICE TilePixels(const T* array, I pixels)
      : pairs(pixels % 2 == 0 && reinterpret_cast<size_t>(array) % (2 * sizeof(T)) == 0),
        along(pairs ? 2 : 1),
        across(pairs ? 1 : TURN_HALF) {}
};

// Two pixels of a channel, and the chunk that one of them makes of several channels, as bits.
template <int BYTES> struct Pixels;
template <> struct Pixels<2> {
  using One = uint16_t;
  using Two = uint32_t;
  static PYDEFORM_DEVICE Two join(One a, One b) { return a | (Two)b << 16; }
  static PYDEFORM_DEVICE uint4 chunk(const Two (&v)[8], int half) {
    const uint32_t bytes = half ? 0x7632 : 0x5410;
    return make_uint4(__byte_perm(v[0], v[1], bytes), __byte_perm(v[2], v[3], bytes), __byte_perm(v[4], v[5], bytes),
                      __byte_perm(v[6], v[7], bytes));
  }
};
template <> struct Pixels<4> {
  using One = uint32_t;
  using Two = uint2;
  static PYDEFORM_DEVICE Two join(One a, One b) { return make_uint2(a, b); }
  static PYDEFORM_DEVICE uint4 chunk(const Two (&v)[4], int half) {
    return half ? make_uint4(v[0].y, v[1].y, v[2].y, v[3].y) : make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
  }
};
template <> struct Pixels<8> {
  using One = uint2;
  using Two = uint4;
  static PYDEFORM_DEVICE Two join(One a, One b) { return make_uint4(a.x, a.y, b.x, b.y); }
  static PYDEFORM_DEVICE uint4 chunk(const Two (&v)[2], int half) {
    return half ? make_uint4(v[0].z, v[0].w, v[1].z, v[1].w) : make_uint4(v[0].x, v[0].y, v[1].x, v[1].y);
  }
};

// (N, C, P) -> (N, P, all), and behind the last pixel one more, of zeros: all that is outside.
// Owner: a block has its tiles, and one column of blocks the zeros.
template <class T, class I>
__global__ void __launch_bounds__(256)
    to_channels_last(const T* __restrict__ input, T* __restrict__ output, int images, int channels, I pixels, int all,
                     int unit, int pitch, int cells) {
  using P = Pixels<sizeof(T)>;
  using One = typename P::One;
  using Two = typename P::Two;
  constexpr int V = 16 / sizeof(T), WIDTH = TURN_CHUNKS * V;
  PYDEFORM_SHARED(uint4, tile, 2 * TURN_HALF * TURN_CHUNKS);
  uint4* const other = tile + TURN_HALF * TURN_CHUNKS;
  const int low = threadIdx.x % 32, high = threadIdx.x / 32, row = threadIdx.x / 8, column = threadIdx.x % 8;
  const TilePixels at(input, pixels);
  const bool chunks = all % V == 0;
  const I p0 = (I)blockIdx.x * (2 * TURN_HALF), near = p0 + low * at.along, far = near + at.across;
  for (I q0 = (I)blockIdx.y * WIDTH; q0 < all; q0 += (I)gridDim.y * WIDTH) {
    const ChunkChannels from((int)q0 + high * V, channels, unit, pitch, cells);
    for (I b = blockIdx.z; b < images; b += gridDim.z) {
      const One* source = reinterpret_cast<const One*>(input);
      const int place = turned(low, high);
      if (from.count < V) {
#pragma unroll 1
        for (int k = 0; k < V; k++) {
          One a{}, c{};
          if (k < from.count && near < pixels) {
            const I start = (b * channels + from.first + k * from.step) * pixels;
            a = source[start + near];
            if (far < pixels) c = source[start + far];
          }
          reinterpret_cast<One*>(tile + place)[k] = a;
          reinterpret_cast<One*>(other + place)[k] = c;
        }
      } else if (near < pixels) {
        Two v[V];
        source += (b * channels + from.first) * pixels;
        const I step = from.step * pixels;
        if (at.pairs) {
#pragma unroll
          for (int k = 0; k < V; k++, source += step) v[k] = __ldg(reinterpret_cast<const Two*>(source + near));
        } else {
#pragma unroll
          for (int k = 0; k < V; k++, source += step)
            v[k] = P::join(__ldg(source + near), far < pixels ? __ldg(source + far) : One{});
        }
        tile[place] = P::chunk(v, 0);
        other[place] = P::chunk(v, 1);
      }
      __syncthreads();
      if (chunks) {
        const I p = p0 + row * at.along;
        if (p < pixels && q0 + column * V < all) {
          uint4* const target = reinterpret_cast<uint4*>(output + (b * pixels + p) * all + q0) + column;
          *target = tile[turned(row, column)];
          if (p + at.across < pixels) target[(I)at.across * all / V] = other[turned(row, column)];
        }
      } else {
#pragma unroll 1
        for (int r = high; r < 2 * TURN_HALF; r += 8) {
          const I p = p0 + r % TURN_HALF * at.along + r / TURN_HALF * at.across;
#pragma unroll 1
          for (int q = low; q < WIDTH; q += 32)
            if (p < pixels && q0 + q < all)
              output[(b * pixels + p) * all + q0 + q] = reinterpret_cast<const T*>(tile + turned(r, q / V))[q % V];
        }
      }
      __syncthreads();
    }
    if (blockIdx.x == 0 && blockIdx.z == 0 && threadIdx.x < WIDTH && q0 + threadIdx.x < all)
      output[images * pixels * all + q0 + threadIdx.x] = T{};
  }
}

// A chunk of sums.
template <class A> struct ChunkOfSums;
template <> struct ChunkOfSums<float> {
  using type = float4;
  static PYDEFORM_DEVICE void unpack(float (&a)[4], float4 v) { a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w; }
};
template <> struct ChunkOfSums<double> {
  using type = double2;
  static PYDEFORM_DEVICE void unpack(double (&a)[2], double2 v) { a[0] = v.x, a[1] = v.y; }
};

template <class T> PYDEFORM_DEVICE void store2(T* p, float a, float b) {
  *reinterpret_cast<uint32_t*>(p) = pack2<T>(a, b);
}
PYDEFORM_DEVICE void store2(float* p, float a, float b) { *reinterpret_cast<float2*>(p) = make_float2(a, b); }
PYDEFORM_DEVICE void store2(double* p, double a, double b) { *reinterpret_cast<double2*>(p) = make_double2(a, b); }

// (N, P, all) of sums -> (N, C, P). Owner: a block has its tiles.
template <class T, class I>
__global__ void __launch_bounds__(256)
    to_channels_first(const Compute<T>* __restrict__ input, T* __restrict__ output, int images, int channels, I pixels,
                      int all, int unit, int pitch) {
  using A = Compute<T>;
  using Chunk = typename ChunkOfSums<A>::type;
  constexpr int V = 16 / sizeof(A), WIDTH = TURN_CHUNKS * V;
  PYDEFORM_SHARED(Chunk, tile, 2 * TURN_HALF * TURN_CHUNKS);
  Chunk* const other = tile + TURN_HALF * TURN_CHUNKS;
  const int low = threadIdx.x % 32, high = threadIdx.x / 32, row = threadIdx.x / 8, column = threadIdx.x % 8;
  const TilePixels at(output, pixels);
  const bool chunks = all % V == 0;
  const I p0 = (I)blockIdx.x * (2 * TURN_HALF), near = p0 + low * at.along, far = near + at.across;
  for (I q0 = (I)blockIdx.y * WIDTH; q0 < all; q0 += (I)gridDim.y * WIDTH) {
    const ChunkChannels to((int)q0 + high * V, channels, unit, pitch, 1);
    for (I b = blockIdx.z; b < images; b += gridDim.z) {
      if (chunks) {
        const I p = p0 + row * at.along;
        Chunk a{}, c{};
        if (p < pixels && q0 + column * V < all) {
          const Chunk* const source = reinterpret_cast<const Chunk*>(input + (b * pixels + p) * all + q0) + column;
          a = __ldg(source);
          if (p + at.across < pixels) c = __ldg(source + (I)at.across * all / V);
        }
        tile[turned(row, column)] = a;
        other[turned(row, column)] = c;
      } else {
#pragma unroll 1
        for (int r = high; r < 2 * TURN_HALF; r += 8) {
          const I p = p0 + r % TURN_HALF * at.along + r / TURN_HALF * at.across;
          if (low < WIDTH)
            reinterpret_cast<A*>(tile + turned(r, low / V))[low % V] =
                p < pixels && q0 + low < all ? input[(b * pixels + p) * all + q0 + low] : A{};
        }
      }
      __syncthreads();
      if (near < pixels && to.count > 0) {
        T* target = output + (b * channels + to.first) * pixels;
        A a[V], c[V];
        ChunkOfSums<A>::unpack(a, tile[turned(low, high)]);
        ChunkOfSums<A>::unpack(c, other[turned(low, high)]);
        if (at.pairs && to.count >= V) {
#pragma unroll
          for (int k = 0; k < V; k++) store2(target + k * pixels + near, a[k], c[k]);
        } else {
#pragma unroll
          for (int k = 0; k < V; k++) {
            if (k >= to.count) break;
            target[k * pixels + near] = from_float<T>(a[k]);
            if (far < pixels) target[k * pixels + far] = from_float<T>(c[k]);
          }
        }
      }
      __syncthreads();
    }
  }
}

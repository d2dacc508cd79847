// Products of two tiles in shared memory, one policy for each way that a device multiplies.
//
// A policy P multiplies A (BM rows) by B (BN rows), both of P::ROW bytes of the summed axis, and adds to what the threads
// hold: sums.of[i][j][2*h + e] is row P::row() + 16*i + lane/4 + 8*h, column P::column() + 8*j + 2*(lane%4) + e.
// issue() may return before the product is done; wait() does not. put() stores 16 bytes of A, at(row, chunk) of a tile.
#pragma once
#include "core/chunks.cuh"

// Chunk c of 16 bytes of row r lies where eight consecutive rows of one chunk fill all banks.
PYDEFORM_DEVICE int swizzle64(int r, int c) { return r * 64 + ((c ^ (r >> 1 & 3)) << 4); }
PYDEFORM_DEVICE int swizzle128(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// Tensor cores add in float32 but drop what does not fit, toward zero: a sum of thousands of small steps would lose 10 to
// 100 times what float32 loses by rounding to nearest. So where float keeps its accuracy, tensor cores add up a few
// products from zero (a k-step of Mma, four of Wgmma), and ordinary additions do the rest.
template <class Acc, int MI, int NJ> struct Sums {
  Acc of[MI][NJ][4] = {};
};

// What all policies share but the product: BM x BN outputs, of which each warp has WM x WN.
template <class T_, int BM_, int BN_, int WM_, int WN_, int ROW_> struct Tiling {
  using T = T_;
  using Acc = Compute<T>;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, ROW = ROW_;
  static constexpr int THREADS = BM / WM * (BN / WN) * 32, MI = WM / 16, NJ = WN / 8;
  static constexpr int E = 16 / sizeof(T), CHUNKS = ROW / 16, DEPTH = ROW / sizeof(T);
  static constexpr int PARTS = 1;  // tiles of A and of B that a product takes: 2 when values are split in two
  static PYDEFORM_DEVICE int row() { return (int)threadIdx.x / 32 % (BM / WM) * WM; }
  static PYDEFORM_DEVICE int column() { return (int)threadIdx.x / 32 / (BM / WM) * WN; }
  static PYDEFORM_DEVICE int at(int r, int c) { return ROW == 64 ? swizzle64(r, c) : swizzle128(r, c); }
  static PYDEFORM_DEVICE void put(unsigned char* a, const uint4& v) { *reinterpret_cast<uint4*>(a) = v; }
  using Sums = ::Sums<Acc, MI, NJ>;
  static PYDEFORM_DEVICE void ready() {}
  static PYDEFORM_DEVICE void wait(Sums&) {}
};

// mma.sync, one warp at a time. PASSES is 3 where float keeps its accuracy: a value is the sum of what tf32 sees of it
// and a rest, and only the product of two rests, 2^-22 of the whole, is left out.
template <class T, int BM, int BN, int WM, int WN, int PASSES = 1> struct Mma : Tiling<T, BM, BN, WM, WN, 64> {
  using Base = Tiling<T, BM, BN, WM, WN, 64>;
  using Base::at, Base::MI, Base::NJ;

  static PYDEFORM_DEVICE void issue(typename Base::Sums& sums, const unsigned char* a_tile,
                                    const unsigned char* b_tile) {
    const int lane = threadIdx.x & 31, m0 = Base::row(), n0 = Base::column();
    constexpr int AT_ONCE = PASSES == 3 ? 1 : 2;  // of more, ptxas keeps more sums of three than there are registers
#pragma unroll AT_ONCE
    for (int k = 0; k < 2; k++) {  // two chunks of 16 bytes are one k-step of the tensor cores, whatever the type
      uint32_t b[NJ / 2][4];
#pragma unroll
      for (int j = 0; j < NJ / 2; j++)
        ldmatrix_x4(b[j], b_tile + at(n0 + j * 16 + (lane & 7) + (lane >> 4 << 3), 2 * k + (lane >> 3 & 1)));
#pragma unroll
      for (int i = 0; i < MI; i++) {
        uint32_t a[4];
        ldmatrix_x4(a, a_tile + at(m0 + i * 16 + (lane & 15), 2 * k + (lane >> 4)));
        multiply(sums.of[i], a, b);
      }
    }
  }

  // One row of 16 x 8 tiles; b[j] holds the two halves of tiles 2j and 2j + 1.
  static PYDEFORM_DEVICE void multiply(float (&acc)[NJ][4], const uint32_t (&a)[4], const uint32_t (&b)[NJ / 2][4]) {
    if constexpr (PASSES == 3) {
      uint32_t high[4], rest[4];
      split(high, rest, a);
#pragma unroll
      for (int j = 0; j < NJ / 2; j++) {
        uint32_t b_high[4], b_rest[4];
        split(b_high, b_rest, b[j]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float part[4];
          mma_from_zero<T>(part, rest, b_high[2 * h], b_high[2 * h + 1]);
          mma<T>(part, high, b_rest[2 * h], b_rest[2 * h + 1]);
          mma<T>(part, high, b_high[2 * h], b_high[2 * h + 1]);
#pragma unroll
          for (int e = 0; e < 4; e++) acc[2 * j + h][e] += part[e];
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < NJ; j++) mma<T>(acc[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  static PYDEFORM_DEVICE void split(uint32_t (&high)[4], uint32_t (&rest)[4], const uint32_t (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float value = __uint_as_float(v[i]), seen = tf32_high(value);
      high[i] = __float_as_uint(seen);
      rest[i] = __float_as_uint(value - seen);
    }
  }
};

// Plain multiply-adds, for double and for types that a device's tensor cores do not have.
template <class T, int BM, int BN, int WM, int WN> struct Fma : Tiling<T, BM, BN, WM, WN, 64> {
  using Base = Tiling<T, BM, BN, WM, WN, 64>;
  using Base::at, Base::MI, Base::NJ, Base::E;
  using A = Compute<T>;

  static PYDEFORM_DEVICE void issue(typename Base::Sums& sums, const unsigned char* a_tile,
                                    const unsigned char* b_tile) {
    const int lane = threadIdx.x & 31, m0 = Base::row() + lane / 4, n0 = Base::column() + lane % 4 * 2;
#pragma unroll 1
    for (int c = 0; c < Base::CHUNKS; c++) {
      A a[MI][2][E];
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          unpack<T>(a[i][h], *reinterpret_cast<const uint4*>(a_tile + at(m0 + 16 * i + 8 * h, c)));
#pragma unroll
      for (int j = 0; j < NJ; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          A b[E];
          unpack<T>(b, *reinterpret_cast<const uint4*>(b_tile + at(n0 + 8 * j + e, c)));
#pragma unroll
          for (int i = 0; i < MI; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int k = 0; k < E; k++) sums.of[i][j][2 * h + e] += a[i][h][k] * b[k];
        }
    }
  }
};

// Products summed over the rows of both tiles, A (DEPTH x BM) and B (DEPTH x BN): for the gradient of the weight.

template <class T_, int BM_, int BN_, int WM_, int WN_> struct TurnedTiling {
  using T = T_;
  using Acc = Compute<T>;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, DEPTH = sizeof(T) == 2 ? 64 : 32;
  static constexpr int THREADS = BM / WM * (BN / WN) * 32, MI = WM / 16, NJ = WN / 8, E = 16 / sizeof(T);
  static PYDEFORM_DEVICE int row() { return (int)threadIdx.x / 32 % (BM / WM) * WM; }
  static PYDEFORM_DEVICE int column() { return (int)threadIdx.x / 32 / (BM / WM) * WN; }
  using Sums = ::Sums<Acc, MI, NJ>;
  static constexpr int PERIOD = sizeof(T) == 2 ? 8 : 4;  // rows after which chunks are swizzled alike
  // Chunk c of row k of a tile `width` elements wide. The rows that a warp reads at once, 8 of 16-bit chunks or 4 of
  // 32-bit elements of two chunks, lie in different banks.
  template <int width> static PYDEFORM_DEVICE int at(int k, int c) {
    return k * width * (int)sizeof(T) + ((c ^ (sizeof(T) == 2 ? k & 7 : (k & 3) << 1)) << 4);
  }
  template <int width> static PYDEFORM_DEVICE const T& element(const unsigned char* tile, int k, int i) {
    return *reinterpret_cast<const T*>(tile + at<width>(k, i / E) + i % E * (int)sizeof(T));
  }
};

template <class T, int BM, int BN, int WM, int WN, int PASSES = 1> struct TurnedMma : TurnedTiling<T, BM, BN, WM, WN> {
  using Base = TurnedTiling<T, BM, BN, WM, WN>;
  using Base::MI, Base::NJ, Base::E;

  static PYDEFORM_DEVICE void issue(typename Base::Sums& sums, const unsigned char* a_tile,
                                    const unsigned char* b_tile) {
    const int lane = threadIdx.x & 31, m0 = Base::row(), n0 = Base::column();
    constexpr int AT_ONCE = PASSES == 3 ? 1 : Base::DEPTH / (2 * E);
#pragma unroll AT_ONCE
    for (int k = 0; k < Base::DEPTH; k += 2 * E) {
      uint32_t b[NJ / 2][4];
#pragma unroll
      for (int j = 0; j < NJ / 2; j++) load_b(b[j], b_tile, k, n0 + 16 * j, lane);
#pragma unroll
      for (int i = 0; i < MI; i++) {
        uint32_t a[4];
        load_a(a, a_tile, k, m0 + 16 * i, lane);
        Mma<T, BM, BN, WM, WN, PASSES>::multiply(sums.of[i], a, b);
      }
    }
  }
  static PYDEFORM_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int k, int m, int lane) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(a, tile + Base::template at<BM>(k + (lane & 7) + (lane >> 4 << 3), m / E + (lane >> 3 & 1)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = __float_as_uint(Base::template element<BM>(tile, k + lane % 4 + i / 2 * 4, m + lane / 4 + i % 2 * 8));
    }
  }
  static PYDEFORM_DEVICE void load_b(uint32_t (&b)[4], const unsigned char* tile, int k, int n, int lane) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(b, tile + Base::template at<BN>(k + (lane & 7) + (lane >> 3 & 1) * 8, n / E + (lane >> 4)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        b[i] = __float_as_uint(Base::template element<BN>(tile, k + lane % 4 + i % 2 * 4, n + lane / 4 + i / 2 * 8));
    }
  }
};

template <class T, int BM, int BN, int WM, int WN> struct TurnedFma : TurnedTiling<T, BM, BN, WM, WN> {
  using Base = TurnedTiling<T, BM, BN, WM, WN>;
  using Base::MI, Base::NJ;
  using A = Compute<T>;

  static PYDEFORM_DEVICE void issue(typename Base::Sums& sums, const unsigned char* a_tile,
                                    const unsigned char* b_tile) {
    const int lane = threadIdx.x & 31, m0 = Base::row() + lane / 4, n0 = Base::column() + lane % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < Base::DEPTH; k++) {
      A a[MI][2];
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) a[i][h] = to_float(Base::template element<BM>(a_tile, k, m0 + 16 * i + 8 * h));
#pragma unroll
      for (int j = 0; j < NJ; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const A b = to_float(Base::template element<BN>(b_tile, k, n0 + 8 * j + e));
#pragma unroll
          for (int i = 0; i < MI; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) sums.of[i][j][2 * h + e] += a[i][h] * b;
        }
    }
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// wgmma, a warpgroup of four warps on 64 rows: reads both tiles from shared memory while the warps go on.
// SPLIT: float at float accuracy, as in Mma; each tile is two, what tf32 sees of the values and then the rests.
template <class T, int BM, int BN, bool SPLIT = false> struct Wgmma : Tiling<T, BM, BN, 16, BN, 128> {
  using Base = Tiling<T, BM, BN, 16, BN, 128>;
  using Base::at, Base::NJ, Base::ROW;
  static constexpr int PARTS = SPLIT ? 2 : 1;
  static constexpr int K_BYTES = 32;  // of a row that one wgmma takes

  static PYDEFORM_DEVICE void put(unsigned char* a, const uint4& v) {
    if constexpr (SPLIT) {
      float value[4], high[4], rest[4];
      unpack<float>(value, v);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        high[i] = tf32_high(value[i]);
        rest[i] = value[i] - high[i];
      }
      *reinterpret_cast<uint4*>(a) = pack<float>(high);
      *reinterpret_cast<uint4*>(a + BM * ROW) = pack<float>(rest);
    } else {
      *reinterpret_cast<uint4*>(a) = v;
    }
  }
  static PYDEFORM_DEVICE void ready() { fence_proxy_async(); }

  struct Sums : Base::Sums {
    float step[SPLIT ? BN / 2 : 1];  // of the products under way
    PYDEFORM_DEVICE float (&products()) [BN / 2] {
      if constexpr (SPLIT)
        return step;
      else
        return reinterpret_cast<float (&)[BN / 2]>(this->of);
    }
  };

  static PYDEFORM_DEVICE void issue(Sums& sums, const unsigned char* a_tile, const unsigned char* b_tile) {
    float (&d)[BN / 2] = sums.products();
    const unsigned char* a = a_tile + threadIdx.x / 128 * 64 * ROW;
    hold(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < ROW; k += K_BYTES) {
      if constexpr (SPLIT) {
        if (k == 0)
          wgmma<T, BN, false>(d, a + BM * ROW, b_tile);
        else
          wgmma<T, BN>(d, a + BM * ROW + k, b_tile + k);
        wgmma<T, BN>(d, a + k, b_tile + BN * ROW + k);
      }
      wgmma<T, BN>(d, a + k, b_tile + k);
    }
    wgmma_commit();
  }
  static PYDEFORM_DEVICE void wait(Sums& sums) {
    wgmma_wait<0>();
    hold(sums.products());
    if constexpr (SPLIT) {
#pragma unroll
      for (int i = 0; i < BN / 2; i++) sums.of[0][i / 4][i % 4] += sums.step[i];
    }
  }
  static PYDEFORM_DEVICE void hold(float (&d)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 2; i++) wgmma_hold(d[i]);
  }
};
#endif

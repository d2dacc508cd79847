// Matrix loads, asynchronous copies, mma and wgmma: the last lane to arrive computes for its whole warp.
#include "runtime.h"

#include <immintrin.h>

#include "primitives_emulated.h"

namespace emulation {
namespace {
typedef double Doubles __attribute__((vector_size(32)));
constexpr int WIDE = 256 + 8;  // floats from row to row; with 256 the rows would compete for the same cache lines
constexpr uint32_t IN_FLIGHT = 0xffa5a5a5;  // a signalling NaN: any arithmetic changes its bits

// 32 bytes of one row of a matrix, 16 half or 8 tf32 elements, as floats.
void widen(const void* from, Type type, float* to) {
  uint32_t words[8];
  memcpy(words, from, 32);
  if (type == TF32) {
    for (int i = 0; i < 8; i++) words[i] &= 0xffffe000u;  // 19 bits count
    memcpy(to, words, 32);
    return;
  }
#ifdef __F16C__
  if (type != BF16) {
    for (int i = 0; i < 2; i++)
      _mm256_storeu_ps(to + 8 * i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words) + i)));
    return;
  }
#endif
  for (int i = 0; i < 16; i++) {
    uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i & 1) * 16);
    to[i] = type == BF16 ? bits<float>(static_cast<uint32_t>(half) << 16) : float_of_half(half);
  }
}

// Products of two floats of 11 bits are exact, their sums nearly so.
inline Doubles multiply_add(Doubles v, float a, Doubles s) {
#ifdef __FMA__
  return _mm256_fmadd_pd(v, _mm256_set1_pd(a), s);
#else
  return s + v * static_cast<double>(a);
#endif
}
#ifdef __AVX__
inline Doubles to_doubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void store_floats(float* p, Doubles v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }  // rounds as it is told
#else
inline Doubles to_doubles(const float* p) { return Doubles{p[0], p[1], p[2], p[3]}; }
inline void store_floats(float* p, Doubles v) {
  for (int i = 0; i < 4; i++) p[i] = static_cast<float>(v[i]);
}
#endif

// Switches the processor's arithmetic; what reads or writes memory stays on its side of this.
inline void set_arithmetic(unsigned csr) {
  asm volatile("" ::: "memory");
  _mm_setcsr(csr);
  asm volatile("" ::: "memory");
}

// sum[16][columns] += a[16][depth] b[depth][columns]; rows of sum and b lie STRIDE apart. As the hardware does, which
// adds the products of one instruction to the accumulator at once and drops what a float has no room for, toward zero:
// many small steps lose far more than float32's rounding to nearest, all in one direction. (Hardware also drops bits of
// the smaller terms; how many differs by generation. What becomes of denormals the manual leaves open: here they count.)
template <int STRIDE> void accumulate(float* sum, int columns, const float (*a)[16], const float* b, int depth) {
  const unsigned before = _mm_getcsr();
  set_arithmetic((before & ~FLUSH_TO_ZERO) | _MM_ROUND_TOWARD_ZERO);
  for (int first = 0; first < columns; first += 8)
    for (int i = 0; i < 16; i += 4) {
      Doubles s[4][2];
      for (int h = 0; h < 4; h++)
        for (int e = 0; e < 2; e++) s[h][e] = to_doubles(sum + (i + h) * STRIDE + first + 4 * e);
      for (int k = 0; k < depth; k++) {
        const Doubles v[2] = {to_doubles(b + k * STRIDE + first), to_doubles(b + k * STRIDE + first + 4)};
        for (int h = 0; h < 4; h++)
          for (int e = 0; e < 2; e++) s[h][e] = multiply_add(v[e], a[i + h][k], s[h][e]);
      }
      for (int h = 0; h < 4; h++)
        for (int e = 0; e < 2; e++) store_floats(sum + (i + h) * STRIDE + first + 4 * e, s[h][e]);
    }
  set_arithmetic(before);
}

// to[k * stride + i] = from[i][k] for i < 8, k < 8
void transpose8(const float (*from)[16], float* to, int stride) {
#ifdef __AVX__
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from[i]);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; h++) {
      r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  for (int k = 0; k < 4; k++) {
    _mm256_storeu_ps(to + k * stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  }
#else
  for (int k = 0; k < 8; k++)
    for (int i = 0; i < 8; i++) to[k * stride + i] = from[i][k];
#endif
}

template <bool TRANSPOSED> void ldmatrix_collective(Warp& warp, unsigned lanes) {
  if (lanes != ~0u) fail("ldmatrix without all 32 lanes");
  uint16_t rows[32][8];
  for (int l = 0; l < 32; l++) memcpy(rows[l], warp.lanes[l].row, 16);
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < 4; m++) {  // lane l gets elements 2 (l % 4) and the next of row l / 4, or of column l / 4
      int i = l / 4, j = l % 4 * 2;
      uint32_t low = TRANSPOSED ? rows[m * 8 + j][i] : rows[m * 8 + i][j];
      uint32_t high = TRANSPOSED ? rows[m * 8 + j + 1][i] : rows[m * 8 + i][j + 1];
      warp.lanes[l].fragments[m] = low | high << 16;
    }
}

template <Type TYPE> void mma_collective(Warp& warp, unsigned lanes) {
  if (lanes != ~0u) fail("mma without all 32 lanes");
  constexpr int depth = TYPE == TF32 || TYPE == F16_K8 ? 8 : 16;
  uint32_t packed_a[16][8], packed_b[8][8];  // 32 bytes of k for each row
  float a[16][16], rows[8][16], b[depth][8], sum[16][8];
  for (int l = 0; l < 32; l++) {
    const Fiber& fiber = warp.lanes[l];
    int g = l / 4, t = l % 4;
    packed_a[g][t] = fiber.a[0], packed_a[g + 8][t] = fiber.a[1];
    packed_a[g][t + 4] = fiber.a[2], packed_a[g + 8][t + 4] = fiber.a[3];
    packed_b[g][t] = fiber.b0, packed_b[g][t + 4] = fiber.b1;
    for (int h = 0; h < 2; h++)
      for (int e = 0; e < 2; e++) sum[g + 8 * h][2 * t + e] = fiber.d[2 * h + e];
  }
  for (int i = 0; i < 16; i++) widen(packed_a[i], TYPE, a[i]);
  for (int j = 0; j < 8; j++) widen(packed_b[j], TYPE, rows[j]);
  for (int k = 0; k < depth; k += 8) transpose8(reinterpret_cast<const float(*)[16]>(&rows[0][k]), b[k], 8);
  accumulate<8>(&sum[0][0], 8, a, &b[0][0], depth);
  if (profiling) count_product(16 * 8 * depth, TYPE == TF32, 0);
  for (int l = 0; l < 32; l++)
    for (int h = 0; h < 2; h++)
      for (int e = 0; e < 2; e++) warp.lanes[l].d[2 * h + e] = sum[l / 4 + 8 * h][l % 4 * 2 + e];
}

// The descriptor of a tile of wgmma. All lengths and addresses are in units of 16 bytes.
struct Descriptor {
  uint64_t address : 14, : 2, leading : 14, : 2, stride : 14, : 3, base_offset : 3, : 10, swizzle : 2;
};
constexpr uint64_t UNUSED_BITS = 0x3ff1'c000'c000'c000;

// What the twin knows is one layout, whose rows are read 128 bytes at a time: eight to a group, swizzled.
void check_descriptor(uint64_t of, const char* operand, const void* site) {
  const Descriptor tile = bits<Descriptor>(of);
  const char* wrong = of & UNUSED_BITS                        ? "has bits that mean nothing"
                      : tile.swizzle != 1                     ? "does not say 128-byte swizzle"
                      : tile.base_offset                      ? "has a base offset, for tiles off a multiple of 1024"
                      : tile.leading != 1                     ? "has a leading dimension, of no use to this swizzle"
                      : tile.stride * 16 % 1024 || !tile.stride ? "strides groups of 8 rows by no multiple of 1024"
                                                              : nullptr;
  if (wrong) fail("wgmma: the descriptor %016llx of %s %s, at {%p}", (unsigned long long)of, operand, wrong, site);
  const unsigned offset = tile.address * 16 % 1024;
  if (offset >= 128 || offset & 31)
    fail("wgmma: a tile must start on a multiple of 1024 bytes, plus 32 for each step of k, at {%p}", site);
}

// Bytes k .. k + 15 of a row of a wgmma tile: the hardware flips bits 4-6 of the address by bits 7-9.
const char* tile_chunk(uint64_t of, int row, int k) {
  const Descriptor tile = bits<Descriptor>(of);
  const uint32_t p = tile.address * 16 + row / 8 * tile.stride * 16 + row % 8 * 128 + k;
  return arena + (p ^ (p >> 7 & 7) << 4);
}

void read_tile(uint64_t base, int first, int rows, const Product& product, const void* site, float (*to)[16]) {
  for (int r = 0; r < rows; r++) {
    char bytes[32];
    for (int half = 0; half < 2; half++) {
      const char* chunk = tile_chunk(base, first + r, 16 * half);
      if (checking) product_reads(chunk, 16, product.epoch, site);
      memcpy(bytes + 16 * half, chunk, 16);
    }
    widen(bytes, static_cast<Type>(product.type), to[r]);
  }
}

// Loads or stores what all lanes keep of a 16 x columns tile.
template <bool STORE> void fragments(Warp& warp, int flight, int columns, float* sum) {
  for (int l = 0; l < 32; l++) {
    float* saved = warp.lanes[l].flight[flight].saved;
    for (int j = 0; j < columns / 8; j++)
      for (int h = 0; h < 2; h++) {
        float* at = sum + (l / 4 + 8 * h) * WIDE + 8 * j + l % 4 * 2;
        if (STORE) memcpy(saved + 4 * j + 2 * h, at, 8);
        else memcpy(at, saved + 4 * j + 2 * h, 8);
      }
  }
}

void multiply(Warp& warp, const Product& product, float* sum, const void* site) {
  static float a[16][16], rows[256][16], b[16 * WIDE];
  int depth = product.type == TF32 ? 8 : 16, columns = product.columns;
  int warp_in_group = warp.lanes[0].linear / 32 % 4;
  read_tile(product.a, 16 * warp_in_group, 16, product, site, a);
  read_tile(product.b, 0, columns, product, site, rows);
  for (int j = 0; j < columns; j += 8)
    for (int k = 0; k < depth; k += 8)
      transpose8(reinterpret_cast<const float(*)[16]>(&rows[j][k]), b + k * WIDE + j, WIDE);
  if (!product.add)
    for (int i = 0; i < 16; i++) memset(sum + i * WIDE, 0, columns * sizeof(float));
  accumulate<WIDE>(sum, columns, a, b, depth);
  // Four warps read their own rows of A and, together, those of B.
  if (profiling) count_product(16 * columns * depth, product.type == TF32, 16 * 32 + columns * 32 / 4);
}

void land(Fiber& fiber, Flight& flight) {  // the accumulators return to the kernel
  for (int i = 0; i < flight.count; i++) {
    if (bits<uint32_t>(flight.registers[i]) != IN_FLIGHT)
      fail("accumulators of a wgmma change before its wait at {%p}", fiber.site);
    flight.registers[i] = flight.saved[i];
  }
  flight.registers = nullptr;
  fiber.flights--;
}

void product_collective(Warp& warp, unsigned lanes) {
  if (lanes != ~0u) fail("wgmma_wait without all 32 lanes");
  static float sum[16 * WIDE];
  Fiber& first = warp.lanes[0];
  int done = 0;
  while (done < first.products && first.product[done].group < first.product_group - first.wait_for) done++;
  for (int l = 0; l < 32; l++) {
    const Fiber& fiber = warp.lanes[l];
    bool same = fiber.products == first.products && fiber.product_group == first.product_group;
    for (int i = 0; same && i < done; i++)
      same = fiber.product[i].a == first.product[i].a && fiber.product[i].b == first.product[i].b;
    if (!same) fail("lanes 0 and %d disagree on the operands of wgmma, awaited at {%p}", l, first.site);
  }
  for (int i = 0; i < done;) {
    const Product& product = first.product[i];
    int flight = product.flight, columns = product.columns;
    fragments<false>(warp, flight, columns, sum);
    for (; i < done && first.product[i].flight == flight; i++) {
      multiply(warp, first.product[i], sum, first.site);
      for (int l = 0; l < 32; l++) warp.lanes[l].flight[flight].pending--;
    }
    fragments<true>(warp, flight, columns, sum);
  }
  for (int l = 0; l < 32 && done; l++) {
    Fiber& fiber = warp.lanes[l];
    for (Flight& flight : fiber.flight)
      if (flight.registers && !flight.pending) land(fiber, flight);
    fiber.products -= done;
    memmove(fiber.product, fiber.product + done, fiber.products * sizeof(Product));
    fiber.product_fence = false;
  }
}

int flight_of(Fiber* fiber, float* d, int count) {
  int free = -1;
  for (int i = 0; i < MAX_FLIGHTS; i++) {
    if (fiber->flight[i].registers == d) return i;
    if (free < 0 && !fiber->flight[i].registers) free = i;
  }
  if (free < 0) fail("more than %d arrays of accumulators in use by wgmma", MAX_FLIGHTS);
  Flight& flight = fiber->flight[free];
  fiber->flights++;
  flight.registers = d, flight.count = count, flight.pending = 0;
  memcpy(flight.saved, d, count * sizeof(float));
  for (int i = 0; i < count; i++) memcpy(d + i, &IN_FLIGHT, sizeof(float));
  return free;
}
}  // namespace

// Where a shared address leads, as wide as on hardware.
uint32_t shared_address(const void* p) {
  const size_t address = static_cast<size_t>(static_cast<const char*>(p) - arena);
  if (address >= ARENA) fail("what is not shared has no shared address, at {%p}", __builtin_return_address(0));
  return static_cast<uint32_t>(address);
}

void load_matrices(uint32_t* to, uint32_t row, bool transposed) {
  const void* site = __builtin_return_address(0);
  if (row & 15) fail("ldmatrix: a row is not on a multiple of 16 bytes, at {%p}", site);
  if (checking) touch(arena + row, 16, READ, site);
  Fiber* fiber = self();
  fiber->row = arena + row, fiber->fragments = to;
  meet(~0u, transposed ? ldmatrix_collective<true> : ldmatrix_collective<false>, site);
}

void start_copy(uint32_t to, const void* from, int bytes) {
  const void* site = __builtin_return_address(0);
  Fiber* fiber = self();
  if (bytes != 0 && bytes != 16) fail("cp.async reads %d of its 16 bytes, at {%p}", bytes, site);
  if ((to | (bytes ? reinterpret_cast<uintptr_t>(from) : 0)) & 15)
    fail("cp.async: an address is not a multiple of 16 bytes, at {%p}", site);
  if (bytes && checking) touch(from, 16, PAST_L1, site);
  if (fiber->copies == MAX_COPIES) fail("more than %d cp.async of one thread are under way, at {%p}", MAX_COPIES, site);
  void* target = arena + to;
  copy_started(target, site);
  memset(target, 0xff, 16);
  fiber->copy[fiber->copies++] = {target, bytes ? from : nullptr, site, fiber->copy_group};
}
void commit_copies() { self()->copy_group++; }
void wait_for_copies(int groups_left) {
  Fiber* fiber = self();
  int done = 0;
  for (; done < fiber->copies && fiber->copy[done].group < fiber->copy_group - groups_left; done++) {
    const Copy& copy = fiber->copy[done];
    copy_landed(copy.to, __builtin_return_address(0));
    if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  fiber->copies -= done;
  memmove(fiber->copy, fiber->copy + done, fiber->copies * sizeof(Copy));
}

void multiply_tile(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Type type) {
  static constexpr Collective collectives[] = {mma_collective<F16>, mma_collective<BF16>, mma_collective<TF32>,
                                               mma_collective<F16_K8>};
  Fiber* fiber = self();
  fiber->d = d, fiber->a = a, fiber->b0 = b0, fiber->b1 = b1;
  meet(~0u, collectives[type], __builtin_return_address(0));
}

void fence_products() { self()->product_fence = true; }
void fence_async_proxy() { self()->proxy_epoch = epoch; }
void start_product(float* d, int columns, uint64_t a, uint64_t b, Type type, bool add) {
  const void* site = __builtin_return_address(0);
  Fiber* fiber = self();
  check_descriptor(a, "A", site);
  check_descriptor(b, "B", site);
  if (fiber->products == MAX_PRODUCTS) fail("more than %d wgmma are under way, at {%p}", MAX_PRODUCTS, site);
  if (!fiber->product_fence) fail("no wgmma_fence since the last wgmma_wait, at {%p}", site);
  int flight = flight_of(fiber, d, columns / 2);
  fiber->flight[flight].pending++;
  fiber->product[fiber->products++] = {a, b, site, flight, columns, type, add, fiber->product_group, epoch};
}
void commit_products() { self()->product_group++; }
void wait_for_products(int groups_left) {
  self()->wait_for = groups_left;
  meet(~0u, product_collective, __builtin_return_address(0));
}
}  // namespace emulation

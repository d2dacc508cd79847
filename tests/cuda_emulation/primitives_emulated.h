// The twins of primitives.cuh, lane by lane, after the PTX manual. Tests only; the sums are in tensor_cores.cpp.
// Copies and wgmma take effect when they are waited for: until then a kernel that does not wait sees NaN.
#pragma once
#include "emulation.h"

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }
inline float to_float(f16 v) { return static_cast<float>(emulation::bits<_Float16>(v.bits)); }
inline float to_float(bf16 v) { return emulation::bits<float>(static_cast<uint32_t>(v.bits) << 16); }

template <class T> inline T from_float(float v);
template <class T> inline T from_float(double v);
template <> inline double from_float<double>(double v) { return v; }
template <> inline double from_float<double>(float v) { return v; }
template <> inline float from_float<float>(float v) { return v; }
template <> inline f16 from_float<f16>(float v) {  // the GPU's one NaN
  return {v != v ? static_cast<uint16_t>(0x7fff) : emulation::bits<uint16_t>(static_cast<_Float16>(v))};
}
template <> inline bf16 from_float<bf16>(float v) {
  uint32_t u = emulation::bits<uint32_t>(v);
  return {static_cast<uint16_t>(v != v ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <class T> inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
inline float tf32_high(float v) {
  const uint32_t u = emulation::bits<uint32_t>(v), rounded = u + ((u & 0x7fffffffu) < 0x7f7ff000u ? 0x1000u : 0u);
  return emulation::bits<float>(rounded & 0xffffe000u);
}

namespace emulation {
enum Type { F16, BF16, TF32 };
template <class T> struct TypeOf;
template <> struct TypeOf<f16> { static constexpr Type type = F16; };
template <> struct TypeOf<bf16> { static constexpr Type type = BF16; };
template <> struct TypeOf<float> { static constexpr Type type = TF32; };

void load_matrices(uint32_t* fragments, const void* row, bool transposed);
void start_copy(void* shared, const void* global, bool valid, bool at_once);
void commit_copies();
void wait_for_copies(int groups_left);
void multiply_tile(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Type type);
void fence_products();
void fence_async_proxy();
void start_product(float* d, int columns, const void* a, const void* b, Type type, bool add);
void commit_products();
void wait_for_products(int groups_left);
}  // namespace emulation

EMULATION_REPORTS uint4 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) & 15) emulation::fail("load16: the address is not a multiple of 16");
  EMULATION_TOUCH(p, 16, emulation::READ_ONLY_PATH);
  return *static_cast<const uint4*>(p);
}
EMULATION_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* p) { emulation::load_matrices(r, p, false); }
EMULATION_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) { emulation::load_matrices(r, p, true); }

EMULATION_INLINE void cp_async16(void* to, const void* from, bool valid) {
  emulation::start_copy(to, from, valid, __CUDA_ARCH__ < 800);  // sm_75 has no cp.async: it copies at once
}
EMULATION_INLINE void cp_async_commit() { emulation::commit_copies(); }
template <int N> EMULATION_INLINE void cp_async_wait() { emulation::wait_for_copies(N); }

template <class T> EMULATION_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(__CUDA_ARCH__ >= 800 || emulation::TypeOf<T>::type == emulation::F16, "sm_75 multiplies f16 only");
  emulation::multiply_tile(d, a, b0, b1, emulation::TypeOf<T>::type);
}

template <class T>
EMULATION_INLINE void mma_from_zero(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(emulation::TypeOf<T>::type == emulation::TF32);
  for (float& v : d) v = 0;
  mma<T>(d, a, b0, b1);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
EMULATION_INLINE void wgmma_fence() { emulation::fence_products(); }
EMULATION_INLINE void fence_proxy_async() { emulation::fence_async_proxy(); }
EMULATION_INLINE void wgmma_commit() { emulation::commit_products(); }
template <int N> EMULATION_INLINE void wgmma_wait() { emulation::wait_for_products(N); }
template <class T, int N, bool ADD = true>
EMULATION_INLINE void wgmma(float (&d)[N / 2], const void* a, const void* b) {
  static_assert(N == 64 || N == 128 || N == 256);
  emulation::start_product(d, N, a, b, emulation::TypeOf<T>::type, ADD);
}
#endif
inline void wgmma_hold(float&) {}

EMULATION_REPORTS void red_add4(float* p, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(p) & 15) emulation::fail("red_add4: the address is not a multiple of 16");
  EMULATION_TOUCH(p, 16, emulation::ATOMIC);
  p[0] += a, p[1] += b, p[2] += c, p[3] += d;
}

// The twins of the instructions of core/primitives.cuh, after the PTX manual. Tests only; the sums are in tensor_cores.cpp.
// Copies and wgmma take effect when they are waited for: until then a kernel that does not wait sees NaN.
#pragma once
#include "emulation.h"

struct f16;
struct bf16;

namespace emulation {
enum Type { F16, BF16, TF32, F16_K8 };  // the last: half of a product of F16, all that Turing has
template <class T> struct TypeOf;
template <> struct TypeOf<f16> { static constexpr Type type = F16; };
template <> struct TypeOf<bf16> { static constexpr Type type = BF16; };
template <> struct TypeOf<float> { static constexpr Type type = TF32; };

uint32_t shared_address(const void* p);
void load_matrices(uint32_t* fragments, uint32_t row, bool transposed);
void start_copy(uint32_t shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int groups_left);
void multiply_tile(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Type type);
void fence_products();
void fence_async_proxy();
void start_product(float* d, int columns, uint64_t a, uint64_t b, Type type, bool add);
void commit_products();
void wait_for_products(int groups_left);

inline float float_of_half(uint16_t v) { return static_cast<float>(bits<_Float16>(v)); }
inline uint16_t half_of_float(float v) {  // the GPU's one NaN
  return v != v ? static_cast<uint16_t>(0x7fff) : bits<uint16_t>(static_cast<_Float16>(v));
}
inline uint16_t bfloat_of_float(float v) {
  const uint32_t u = bits<uint32_t>(v), below = u & 0xffff, kept = u >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fffu : kept + (below > 0x8000 || (below == 0x8000 && kept & 1)));
}
}  // namespace emulation

namespace ptx {
inline float cvt_f32_f16(uint16_t v) { return emulation::float_of_half(v); }
inline uint16_t cvt_f16_f32(float v) { return emulation::half_of_float(v); }
#if __CUDA_ARCH__ >= 800
inline uint16_t cvt_bf16_f32(float v) { return emulation::bfloat_of_float(v); }
inline uint32_t cvt_f16x2_f32(float high, float low) {
  return emulation::half_of_float(low) | static_cast<uint32_t>(emulation::half_of_float(high)) << 16;
}
inline uint32_t cvt_bf16x2_f32(float high, float low) {
  return emulation::bfloat_of_float(low) | static_cast<uint32_t>(emulation::bfloat_of_float(high)) << 16;
}
#endif

EMULATION_INLINE uint32_t shared_address(const void* p) { return emulation::shared_address(p); }
EMULATION_INLINE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emulation::load_matrices(r, row, false); }
EMULATION_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emulation::load_matrices(r, row, true); }

#if __CUDA_ARCH__ >= 800
EMULATION_INLINE void cp_async_cg(uint32_t to, const void* from, int bytes) { emulation::start_copy(to, from, bytes); }
EMULATION_INLINE void cp_async_commit_group() { emulation::commit_copies(); }
template <int N> EMULATION_INLINE void cp_async_wait_group() { emulation::wait_for_copies(N); }
#endif

#if __CUDA_ARCH__ >= 900
EMULATION_REPORTS void red_add_v4(float* p, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(p) & 15) emulation::fail("red.v4: the address is not a multiple of 16");
  EMULATION_TOUCH(p, 16, emulation::ATOMIC);
  p[0] += a, p[1] += b, p[2] += c, p[3] += d;
}
#endif

#if __CUDA_ARCH__ >= 800
template <class T> EMULATION_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_tile(d, a, b0, b1, emulation::TypeOf<T>::type);
}
EMULATION_INLINE void mma_from_zero(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (float& v : d) v = 0;
  emulation::multiply_tile(d, a, b0, b1, emulation::TF32);
}
#else
EMULATION_INLINE void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[4] = {a0, a1};
  emulation::multiply_tile(d, a, b, 0, emulation::F16_K8);
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
EMULATION_INLINE void wgmma_fence() { emulation::fence_products(); }
EMULATION_INLINE void wgmma_commit() { emulation::commit_products(); }
template <int N> EMULATION_INLINE void wgmma_wait() { emulation::wait_for_products(N); }
EMULATION_INLINE void fence_proxy_async() { emulation::fence_async_proxy(); }
inline void wgmma_hold(float&) {}
template <class T, int N> struct wgmma {
  static_assert(N == 64 || N == 128 || N == 256);
  template <int ADD> EMULATION_INLINE static void run(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emulation::start_product(d, N, a, b, emulation::TypeOf<T>::type, ADD);
  }
};
#endif
}  // namespace ptx

// What kernels need of the hardware, as device functions. No toolkit header: NVRTC finds none on most machines.
// First come single instructions, each with a twin that runs on the CPU (tests/cuda_emulation) and a test that compares
// the two lane by lane; then all that is made of them in plain C++, which is the same text on both.
#pragma once
#define PYDEFORM_DEVICE __device__ __forceinline__
#if __CUDA_ARCH__ >= 900 && !(__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ == 0)  // the PTX of CUDA 12.0 has none
#define PYDEFORM_RED_V4
#endif
#ifdef PYDEFORM_EMULATED
#include "primitives_emulated.h"
#else

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
struct f16;
struct bf16;

#define PYDEFORM_SHARED(T, name, count) __shared__ __align__(16) T name[count]
// Tiles that wgmma reads must start on a multiple of 1024 bytes.
extern __shared__ __align__(1024) unsigned char pydeform_dynamic_shared[];
#define PYDEFORM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(pydeform_dynamic_shared)

// Instructions --------------------------------------------------------------------------------------------------
namespace ptx {

// Conversions; halves as their bits.
PYDEFORM_DEVICE float cvt_f32_f16(uint16_t v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
PYDEFORM_DEVICE uint16_t cvt_f16_f32(float v) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#if __CUDA_ARCH__ >= 800
PYDEFORM_DEVICE uint16_t cvt_bf16_f32(float v) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
PYDEFORM_DEVICE uint32_t cvt_f16x2_f32(float high, float low) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PYDEFORM_DEVICE uint32_t cvt_bf16x2_f32(float high, float low) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif

PYDEFORM_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

PYDEFORM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
PYDEFORM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#if __CUDA_ARCH__ >= 800
// 16 bytes, of which the first `bytes` are read and the others are zeros.
PYDEFORM_DEVICE void cp_async_cg(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
PYDEFORM_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PYDEFORM_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

#ifdef PYDEFORM_RED_V4
PYDEFORM_DEVICE void red_add_v4(float* p, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
#endif

// D += A B for a 16 x 8 tile: k = 16 for 16-bit types, k = 8 in tf32 for float.
template <class T> PYDEFORM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#if __CUDA_ARCH__ >= 800
#define PYDEFORM_MMA(shape_and_types) \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <> PYDEFORM_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  PYDEFORM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <> PYDEFORM_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  PYDEFORM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <> PYDEFORM_DEVICE void mma<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  PYDEFORM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
// D = A B, in tf32.
PYDEFORM_DEVICE void mma_from_zero(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
#else  // Turing multiplies k = 8 at a time
PYDEFORM_DEVICE void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
PYDEFORM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PYDEFORM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> PYDEFORM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
PYDEFORM_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
PYDEFORM_DEVICE void wgmma_hold(float& v) { asm volatile("" : "+f"(v)::"memory"); }

#define PYDEFORM_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PYDEFORM_D32(i) PYDEFORM_D8(i), PYDEFORM_D8(i + 8), PYDEFORM_D8(i + 16), PYDEFORM_D8(i + 24)
#define PYDEFORM_N64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PYDEFORM_N128 \
  PYDEFORM_N64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYDEFORM_N256 \
  PYDEFORM_N128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The predicate says: add to d; or else d begins as 0.
#define PYDEFORM_WGMMA(shape_and_types, registers, a_tile, b_tile, add, tail) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned." shape_and_types " {" registers \
  "}, " a_tile ", " b_tile ", add, 1, 1" tail ";\n}"

// d += A B^T, or d = A B^T without ADD: 64 rows of A and N rows of B, 32 bytes of each, both as descriptors.
template <class T, int N> struct wgmma;
#define PYDEFORM_WGMMA_OF(T, k, types, tail) \
  template <> struct wgmma<T, 64> { \
    template <int ADD> static PYDEFORM_DEVICE void run(float (&d)[32], uint64_t a, uint64_t b) { \
      asm volatile(PYDEFORM_WGMMA("m64n64" k types, PYDEFORM_N64, "%32", "%33", "%34", tail) \
                   : PYDEFORM_D32(0) \
                   : "l"(a), "l"(b), "n"(ADD)); \
    } \
  }; \
  template <> struct wgmma<T, 128> { \
    template <int ADD> static PYDEFORM_DEVICE void run(float (&d)[64], uint64_t a, uint64_t b) { \
      asm volatile(PYDEFORM_WGMMA("m64n128" k types, PYDEFORM_N128, "%64", "%65", "%66", tail) \
                   : PYDEFORM_D32(0), PYDEFORM_D32(32) \
                   : "l"(a), "l"(b), "n"(ADD)); \
    } \
  }; \
  template <> struct wgmma<T, 256> { \
    template <int ADD> static PYDEFORM_DEVICE void run(float (&d)[128], uint64_t a, uint64_t b) { \
      asm volatile(PYDEFORM_WGMMA("m64n256" k types, PYDEFORM_N256, "%128", "%129", "%130", tail) \
                   : PYDEFORM_D32(0), PYDEFORM_D32(32), PYDEFORM_D32(64), PYDEFORM_D32(96) \
                   : "l"(a), "l"(b), "n"(ADD)); \
    } \
  }
PYDEFORM_WGMMA_OF(f16, "k16", ".f32.f16.f16", ", 0, 0");
PYDEFORM_WGMMA_OF(bf16, "k16", ".f32.bf16.bf16", ", 0, 0");
PYDEFORM_WGMMA_OF(float, "k8", ".f32.tf32.tf32", "");
#endif
}  // namespace ptx
#endif

// Conversions ---------------------------------------------------------------------------------------------------
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

PYDEFORM_DEVICE double to_float(double v) { return v; }
PYDEFORM_DEVICE float to_float(float v) { return v; }
PYDEFORM_DEVICE float to_float(f16 v) { return ptx::cvt_f32_f16(v.bits); }
PYDEFORM_DEVICE float to_float(bf16 v) { return __uint_as_float((uint32_t)v.bits << 16); }

template <class T> PYDEFORM_DEVICE T from_float(float v);
template <class T> PYDEFORM_DEVICE T from_float(double v);
template <> PYDEFORM_DEVICE double from_float<double>(double v) { return v; }
template <> PYDEFORM_DEVICE float from_float<float>(float v) { return v; }
template <> PYDEFORM_DEVICE f16 from_float<f16>(float v) { return {ptx::cvt_f16_f32(v)}; }
template <> PYDEFORM_DEVICE bf16 from_float<bf16>(float v) {
#if __CUDA_ARCH__ >= 800
  return {ptx::cvt_bf16_f32(v)};
#else
  const uint32_t u = __float_as_uint(v);
  return {(uint16_t)(v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}

// Two halves in one register, `low` in the low one.
template <class T> PYDEFORM_DEVICE uint32_t pack2(float low, float high) {
  return (uint32_t)from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}
#if __CUDA_ARCH__ >= 800
template <> PYDEFORM_DEVICE uint32_t pack2<f16>(float low, float high) { return ptx::cvt_f16x2_f32(high, low); }
template <> PYDEFORM_DEVICE uint32_t pack2<bf16>(float low, float high) { return ptx::cvt_bf16x2_f32(high, low); }
#endif

// The float that is nearest to v of those with 10 of the 23 mantissa bits, all that a tf32 product sees; v - tf32_high(v)
// has 12 at most. Toward zero where rounding up would be infinite; v - tf32_high(v) is NaN where v is.
PYDEFORM_DEVICE float tf32_high(float v) {
  const uint32_t u = __float_as_uint(v), rounded = u + ((u & 0x7fffffffu) < 0x7f7ff000u ? 0x1000u : 0u);
  return __uint_as_float(rounded & 0xffffe000u);
}

// Memory --------------------------------------------------------------------------------------------------------

PYDEFORM_DEVICE uint4 load16(const void* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8.
PYDEFORM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* p) { ptx::ldmatrix_x4(r, ptx::shared_address(p)); }
PYDEFORM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  ptx::ldmatrix_x4_trans(r, ptx::shared_address(p));
}

// 16 bytes from global to shared memory, zeros where not valid (the source is not read then).
PYDEFORM_DEVICE void cp_async16(void* target, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async_cg(ptx::shared_address(target), source, valid ? 16 : 0);
#else
  *reinterpret_cast<uint4*>(target) = valid ? load16(source) : make_uint4(0, 0, 0, 0);
#endif
}
PYDEFORM_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async_commit_group();
#endif
}
template <int N> PYDEFORM_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  ptx::cp_async_wait_group<N>();
#endif
}

// p[0..3] += a, b, c, d in no order that anybody knows; p is a multiple of 16 bytes.
PYDEFORM_DEVICE void red_add4(float* p, float a, float b, float c, float d) {
#ifdef PYDEFORM_RED_V4
  ptx::red_add_v4(p, a, b, c, d);
#else
  atomicAdd(p, a);
  atomicAdd(p + 1, b);
  atomicAdd(p + 2, c);
  atomicAdd(p + 3, d);
#endif
}

// Tensor cores: a warp -------------------------------------------------------------------------------------------

// D += A B for a 16 x 8 tile: k = 16 for 16-bit types, k = 8 in tf32 for float.
template <class T> PYDEFORM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
// D = A B, for float.
template <class T> PYDEFORM_DEVICE void mma_from_zero(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#if __CUDA_ARCH__ >= 800
template <class T> PYDEFORM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma<T>(d, a, b0, b1);
}
template <> PYDEFORM_DEVICE void mma_from_zero<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_from_zero(d, a, b0, b1);
}
#else  // Turing multiplies f16 only, k = 8 at a time
template <> PYDEFORM_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_k8(d, a[0], a[1], b0);
  ptx::mma_k8(d, a[2], a[3], b1);
}
#endif

// Tensor cores: a warpgroup of four warps (sm_90a) -----------------------------------------------------------------
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// wgmma_fence: before the first product of a batch, registers and shared memory written by this warp are ready.
// fence_proxy_async: what ordinary stores wrote to shared memory becomes visible to wgmma; then comes a barrier.
// wgmma_hold: the compiler must not move an accumulator while products that write it are in flight.
using ptx::wgmma_fence, ptx::fence_proxy_async, ptx::wgmma_commit, ptx::wgmma_wait, ptx::wgmma_hold;

// The descriptor of a tile of rows of 128 bytes under the 128-byte swizzle: 1024 bytes from eight rows to the next.
PYDEFORM_DEVICE uint64_t wgmma_tile(const void* p) {
  return (uint64_t)((ptx::shared_address(p) & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

// d += A B^T, or d = A B^T without ADD, for 64 rows of A and N rows of B, 32 bytes of each row: k = 16 for 16-bit types, 8
// in tf32 for float.
template <class T, int N, bool ADD = true> PYDEFORM_DEVICE void wgmma(float (&d)[N / 2], const void* a, const void* b) {
  ptx::wgmma<T, N>::template run<ADD>(d, wgmma_tile(a), wgmma_tile(b));
}
#endif

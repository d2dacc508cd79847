// The CUDA model as a kernel sees it when g++ compiles its .cu for the CPU. Tests only.
//
// Each CUDA thread is a fiber that runs until it meets others (barrier, warp collective); runtime.cpp switches between
// them. No C++ standard header is included here: those would take longer to compile than most kernels.
#pragma once
#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#define PYDEFORM_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))  // so that the runtime sees the kernel's line
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "shared memory is declared by PYDEFORM_SHARED or PYDEFORM_DYNAMIC_SHARED");

// Functions that touch memory on behalf of a kernel report to the checker themselves, under their caller's address.
#ifdef __SANITIZE_THREAD__
#define EMULATION_REPORTS __attribute__((no_sanitize("thread"), noinline)) static
#define EMULATION_TOUCH(pointer, bytes, kind) emulation::touch(pointer, bytes, kind, __builtin_return_address(0))
#else
#define EMULATION_REPORTS inline
#define EMULATION_TOUCH(pointer, bytes, kind)
#endif

#define EMULATION_VECTOR(type, name, alignment2, alignment4)                  \
  struct alignas(alignment2) name##2 { type x, y; };                          \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(alignment4) name##4 { type x, y, z, w; };                    \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATION_VECTOR(unsigned char, uchar, 2, 4)
EMULATION_VECTOR(short, short, 4, 8)
EMULATION_VECTOR(unsigned short, ushort, 4, 8)
EMULATION_VECTOR(int, int, 8, 16)
EMULATION_VECTOR(unsigned, uint, 8, 16)
EMULATION_VECTOR(long long, longlong, 16, 16)
EMULATION_VECTOR(float, float, 8, 16)
EMULATION_VECTOR(double, double, 16, 16)
struct dim3 { unsigned x, y, z; };

namespace emulation {
enum Access { READ, WRITE, ATOMIC, READ_ONLY_PATH, PAST_L1 };  // ld.global.nc, of memory that no one writes; cp.async.cg
struct Thread { uint3 index; int linear, lane; };
extern Thread* current;
extern uint3 block_index;
extern dim3 grid_size, block_size;

void block_barrier();
int block_barrier_count(int predicate);
void warp_barrier(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane);
unsigned ballot(unsigned mask, bool predicate);
struct SharedSite { unsigned block; void* memory; };  // where one PYDEFORM_SHARED lies in the running block
void* shared_array(SharedSite& site, size_t bytes, const char* name);
void* dynamic_shared();
void touch(const void* pointer, size_t bytes, int access, const void* site);
[[noreturn]] void fail(const char* format, ...);

// ---- kernels as Python sees them
// Kinds: 'p'ointer, 'i'nt, 'u'nsigned, 'f'loat, 's'truct.
struct Parameter { int offset, size, kind, pointee_size, pointee_kind; };
struct Entry {
  const char* name;
  void (*run)(void (*kernel)(), char* arguments);
  void (*kernel)();
  int count;
  const Parameter* parameters;
};
template <class T> constexpr int kind_of() {
  if constexpr (__is_class(T) || __is_union(T)) return 's';
  else return T(-1) < T(0) ? 'i' : 'u';
}
template <class T> struct Kind { static constexpr int kind = kind_of<T>(), size = sizeof(T); };
template <> struct Kind<float> { static constexpr int kind = 'f', size = 4; };
template <> struct Kind<double> { static constexpr int kind = 'f', size = 8; };
template <> struct Kind<void> { static constexpr int kind = 'v', size = 0; };
template <class T> struct Kind<const T> : Kind<T> {};
template <class T> struct Described { static constexpr Parameter parameter = {0, sizeof(T), Kind<T>::kind, 0, 0}; };
template <class T> struct Described<T*> {
  static constexpr Parameter parameter = {0, sizeof(T*), 'p', Kind<T>::size, Kind<T>::kind};
};
template <> struct Kind<bool> { static constexpr int kind = 'u', size = 1; };

template <int... I> struct Indices {};
constexpr int slot(int size) { return (size + 15) & ~15; }
template <class... A> struct Signature {
  Parameter parameters[sizeof...(A) + 1];
  constexpr Signature() : parameters{Described<A>::parameter...} {
    for (size_t i = 1; i < sizeof...(A); i++)
      parameters[i].offset = parameters[i - 1].offset + slot(parameters[i - 1].size);
  }
};
template <class... A> constexpr Signature<A...> signature{};
#ifdef __SANITIZE_THREAD__
#define EMULATION_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define EMULATION_UNCHECKED
#endif
template <class... A> struct Caller {
  template <int... I> EMULATION_UNCHECKED static void call(void (*kernel)(A...), char* arguments, Indices<I...>) {
    kernel(*reinterpret_cast<A*>(arguments + signature<A...>.parameters[I].offset)...);
  }
  EMULATION_UNCHECKED static void run(void (*kernel)(), char* arguments) {
    call(reinterpret_cast<void (*)(A...)>(kernel), arguments, Indices<__integer_pack(sizeof...(A))...>{});
  }
};
template <class... A> Entry entry(const char* name, void (*kernel)(A...)) {
  return {name, Caller<A...>::run, reinterpret_cast<void (*)()>(kernel), sizeof...(A), signature<A...>.parameters};
}

template <class To, class From> inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}
template <class T> inline uint64_t word(T value) {
  if constexpr (sizeof(T) == 8) return bits<uint64_t>(value);
  else return bits<uint32_t>(value);
}
template <class T> inline T unword(uint64_t value) {
  if constexpr (sizeof(T) == 8) return bits<T>(value);
  else return bits<T>(static_cast<uint32_t>(value));
}
}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
constexpr int warpSize = 32;

#define EMULATION_SITE ([]() -> emulation::SharedSite& { static emulation::SharedSite site; return site; }())
#define PYDEFORM_SHARED(T, name, count) \
  T* const name = static_cast<T*>(emulation::shared_array(EMULATION_SITE, sizeof(T) * (count), #name))
#define PYDEFORM_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared())

// Inlined everywhere, so that the runtime sees the kernel's line as its return address.
#define EMULATION_INLINE inline __attribute__((always_inline))

// ---- barriers, shuffles, votes
EMULATION_INLINE void __syncthreads() { emulation::block_barrier(); }
EMULATION_INLINE int __syncthreads_count(int p) { return emulation::block_barrier_count(p != 0); }
EMULATION_INLINE int __syncthreads_or(int p) { return emulation::block_barrier_count(p != 0) != 0; }
EMULATION_INLINE int __syncthreads_and(int p) { return emulation::block_barrier_count(p == 0) == 0; }
EMULATION_INLINE void __syncwarp(unsigned mask = ~0u) { emulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

#define EMULATION_SHUFFLE(name, offset_type, source)                                              \
  template <class T> EMULATION_INLINE T name(unsigned mask, T value, offset_type by, int width = 32) { \
    int lane = emulation::current->lane, first = lane & ~(width - 1), last = first + width - 1;   \
    int down = lane - static_cast<int>(by), up = lane + static_cast<int>(by);                     \
    (void)first, (void)last, (void)down, (void)up;                                                \
    return emulation::unword<T>(emulation::shuffle(mask, emulation::word(value), source));        \
  }
EMULATION_SHUFFLE(__shfl_sync, int, first | (by & (width - 1)))
EMULATION_SHUFFLE(__shfl_up_sync, unsigned, down >= first ? down : lane)
EMULATION_SHUFFLE(__shfl_down_sync, unsigned, up <= last ? up : lane)
EMULATION_SHUFFLE(__shfl_xor_sync, int, (lane ^ by) <= last ? lane ^ by : lane)
EMULATION_INLINE unsigned __ballot_sync(unsigned mask, int p) { return emulation::ballot(mask, p); }
EMULATION_INLINE int __any_sync(unsigned mask, int p) { return emulation::ballot(mask, p) != 0; }
EMULATION_INLINE int __all_sync(unsigned mask, int p) { return emulation::ballot(mask, !p) == 0; }
inline unsigned __activemask() { emulation::fail("__activemask is not emulated: say which lanes take part"); }

// ---- atomics: fibers switch only where threads meet, so a plain update is atomic
#define EMULATION_ATOMIC(name, T, update)                                \
  EMULATION_REPORTS T name(T* address, T value) {                        \
    EMULATION_TOUCH(address, sizeof(T), emulation::ATOMIC);              \
    T old = *address;                                                    \
    *address = update;                                                   \
    return old;                                                          \
  }
#define EMULATION_INTEGER_ATOMICS(T)                                     \
  EMULATION_ATOMIC(atomicAdd, T, old + value)                            \
  EMULATION_ATOMIC(atomicExch, T, value)                                 \
  EMULATION_ATOMIC(atomicMin, T, value < old ? value : old)              \
  EMULATION_ATOMIC(atomicMax, T, old < value ? value : old)              \
  EMULATION_ATOMIC(atomicAnd, T, old & value)                            \
  EMULATION_ATOMIC(atomicOr, T, old | value)                             \
  EMULATION_REPORTS T atomicCAS(T* address, T compare, T value) {        \
    EMULATION_TOUCH(address, sizeof(T), emulation::ATOMIC);              \
    T old = *address;                                                    \
    if (old == compare) *address = value;                                \
    return old;                                                          \
  }
EMULATION_INTEGER_ATOMICS(int)
EMULATION_INTEGER_ATOMICS(unsigned)
EMULATION_INTEGER_ATOMICS(unsigned long long)
EMULATION_ATOMIC(atomicSub, int, old - value)
EMULATION_ATOMIC(atomicSub, unsigned, old - value)
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicExch, float, value)

template <class T> EMULATION_REPORTS T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) emulation::fail("__ldg of an address that is not aligned");
  EMULATION_TOUCH(address, sizeof(T), emulation::READ_ONLY_PATH);
  return *address;
}

#ifndef EMULATION_RUNTIME  // which includes the standard headers instead
// ---- arithmetic
extern "C" {
float floorf(float), ceilf(float), truncf(float), rintf(float), roundf(float), fabsf(float), sqrtf(float);
float expf(float), exp2f(float), logf(float), log2f(float), sinf(float), cosf(float), tanhf(float), erff(float);
float fmaf(float, float, float), fminf(float, float), fmaxf(float, float), copysignf(float, float);
float powf(float, float), fmodf(float, float);
double floor(double), ceil(double), trunc(double), rint(double), round(double), fabs(double), sqrt(double);
double exp(double), log(double), sin(double), cos(double), tanh(double);
double fma(double, double, double), fmin(double, double), fmax(double, double), copysign(double, double);
double pow(double, double), fmod(double, double);
}
inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define EMULATION_MIN_MAX(T, lesser, greater)            \
  inline T min(T a, T b) { return lesser; }              \
  inline T max(T a, T b) { return greater; }
#define EMULATION_INTEGER_MIN_MAX(T) EMULATION_MIN_MAX(T, b < a ? b : a, a < b ? b : a)
EMULATION_INTEGER_MIN_MAX(int)
EMULATION_INTEGER_MIN_MAX(unsigned)
EMULATION_INTEGER_MIN_MAX(long)
EMULATION_INTEGER_MIN_MAX(unsigned long)
EMULATION_INTEGER_MIN_MAX(long long)
EMULATION_INTEGER_MIN_MAX(unsigned long long)
EMULATION_MIN_MAX(float, fminf(a, b), fmaxf(a, b))
EMULATION_MIN_MAX(double, fmin(a, b), fmax(a, b))

inline int __float_as_int(float x) { return emulation::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits<double>(x); }
inline int __double2loint(double x) { return (int)emulation::bits<long long>(x); }
inline int __double2hiint(double x) { return (int)(emulation::bits<long long>(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return emulation::bits<double>((long long)(((unsigned long long)(unsigned)high << 32) | (unsigned)low));
}
namespace emulation {
inline int saturated(double x) {  // as the GPU's conversions: NaN gives 0
  return x != x ? 0 : x >= 2147483648.0 ? INT_MAX : x < -2147483648.0 ? INT_MIN : static_cast<int>(x);
}
}  // namespace emulation
inline int __float2int_rd(float x) { return emulation::saturated(floorf(x)); }
inline int __float2int_ru(float x) { return emulation::saturated(ceilf(x)); }
inline int __float2int_rn(float x) { return emulation::saturated(rintf(x)); }
inline int __float2int_rz(float x) { return emulation::saturated(truncf(x)); }
inline int __double2int_rd(double x) { return emulation::saturated(floor(x)); }
inline int __double2int_rz(double x) { return emulation::saturated(trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline long long clock64() {  // there is no time here: the calls are counted
  static long long now;
  return ++now;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {  // of eight bytes; no signs
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
#endif

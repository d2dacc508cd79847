// Three questions to a device, on whose answers the estimates of docs/performance.md rest; cuda_measurements.py asks them.
#include "core/primitives.cuh"

// How fast do sums in device memory grow when several warps add to one place at a time?
// Owner: none. Warps in rows of `together` add 512 bytes to one of `places`, and move on alike from turn to turn.
__global__ void add_rate(float* sums, int places, int together, int turns) {
  const int lane = threadIdx.x % 32, row = (blockIdx.x * blockDim.x + threadIdx.x) / 32 / together;
  const int rows = gridDim.x * blockDim.x / 32 / together + 1;
  for (int turn = 0; turn < turns; turn++) {
    const int place = (int)((row + (long long)turn * rows) % places);
    red_add4(sums + (size_t)place * 128 + lane * 4, 1.f, 1.f, 1.f, 1.f);
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Do the operands of wgmma and loads that the first level of cache answers take the same path?
// Warpgroups 0 and 1 multiply tiles of shared memory, 2 and 3 load; each turn of either moves 49,152 bytes. `work` says
// who works: bit 0 those that multiply, bit 1 those that load. A warp's load is 512 bytes of LINES lines of 128.
// Owner: a thread writes one number, so that the compiler leaves nothing out.
template <int LINES>
__global__ void __launch_bounds__(512, 1) share(const uint4* data, float* out, int turns, int work) {
  constexpr int A = 64 * 128, B = 128 * 128;  // bytes of a tile
  constexpr int LOADS = 12, PLACES = 64;      // of a warp in a turn; in memory, where they go round
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tiles);
  for (int i = threadIdx.x; i < (2 * A + B) / 16; i += 512) reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  float result = 0.f;
  if (group < 2) {
    float d[64] = {};
    for (int turn = 0; turn < (work & 1 ? turns : 0); turn++) {
#pragma unroll
      for (int i = 0; i < 64; i++) wgmma_hold(d[i]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 128; k += 32) wgmma<f16, 128>(d, tiles + group * A + k, tiles + 2 * A + k);
      wgmma_commit();
      wgmma_wait<0>();
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
      wgmma_hold(d[i]);
      result += d[i];
    }
  } else {
    const uint4* own = data + lane / (32 / LINES) * 8 + lane % (32 / LINES);
    uint32_t seen = 0;
    for (int turn = 0; turn < (work & 2 ? turns : 0); turn++) {
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const uint4 v = load16(own + (turn * LOADS + i) % PLACES * 8 * LINES);
        seen ^= v.x ^ v.y ^ v.z ^ v.w;
      }
    }
    result = (float)seen;
  }
  out[blockIdx.x * 512 + threadIdx.x] = result;
}

// What does fence_proxy_async cost, and does it wait for loads on their way?
// Owner: lane l writes the cycles of turn t to cycles[32 * t + l]. With `loads`, each turn begins with one of a line that
// L1 does not have.
__global__ void fence_cost(const uint32_t* far, long long* cycles, int turns, int stride, int loads) {
  uint32_t seen = 0;
  for (int turn = 0; turn < turns; turn++) {
    const long long begin = clock64();
    uint32_t v = 0;
    if (loads) v = *reinterpret_cast<const volatile uint32_t*>(far + (size_t)turn * stride + threadIdx.x);
    fence_proxy_async();
    cycles[32 * turn + threadIdx.x] = clock64() - begin;
    seen |= v;
  }
  if (seen) cycles[threadIdx.x] = 0;  // never: there are zeros
}
#endif

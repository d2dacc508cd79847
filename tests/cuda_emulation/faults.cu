// Kernels with one planted fault each, on the line that says FAULT, and their correct twins (FIXED). All run with
// 128 threads a block; test_cuda_emulation.py says what each must be caught for.
#include "core/primitives.cuh"

template <bool FIXED> __global__ void missing_barrier(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = 0.0f;
  __syncthreads();
  tile[t] = x[t];
  if (FIXED) __syncthreads();
  y[t] = tile[127 - t];  // FAULT
}

template <bool FIXED> __global__ void overwrites_at_the_end_of_a_loop(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  float sum = 0.0f;
  for (int step = 0; step < 3; step++) {
    tile[t] = x[t] * step;  // FAULT
    __syncthreads();
    sum += tile[127 - t];
    if (FIXED) __syncthreads();
  }
  y[t] = sum;
}

template <bool FIXED> __global__ void overwrites_what_other_warps_read(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = x[t];
  __syncthreads();
  y[t] = tile[0];  // FAULT
  if (FIXED) __syncthreads();
  if (t == 0 || t == 127) tile[t == 0 ? 1 : 0] = 1.0f;  // FAULT
}

template <bool FIXED> __global__ void overwrites_what_its_warp_reads(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = x[t];
  __syncthreads();
  y[t] = tile[t / 32 * 32 + 1];  // FAULT
  if (FIXED) __syncwarp();
  if (t % 32 == 31) tile[t - 30] = 1.0f;  // FAULT
}

template <bool FIXED> __global__ void reads_before_the_copy_landed(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  if (t < 32) cp_async16(tile + 4 * t, x + 4 * t, true);
  cp_async_commit();
  if (FIXED) cp_async_wait<0>();
  __syncthreads();
  y[t] = tile[t];  // FAULT
  cp_async_wait<0>();
}

template <bool FIXED> __global__ void waits_for_the_copy_of_another_thread(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = 0.0f;
  __syncthreads();
  if (t < 32) cp_async16(tile + 4 * t, x + 4 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (FIXED) __syncthreads();
  y[t] = tile[t];  // FAULT
}

template <bool FIXED> __global__ void never_waits_for_the_copy(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  if (t < 32) cp_async16(tile + 4 * t, x + 4 * t, true);  // FAULT
  cp_async_commit();
  if (FIXED) cp_async_wait<0>();
  y[t] = x[t];
}

template <bool FIXED> __global__ void reads_past_the_end(const float* x, float* y) {
  int t = threadIdx.x;
  y[t] = x[FIXED ? t : t + 1];  // FAULT
}

template <bool FIXED> __global__ void writes_past_the_end(const float* x, float* y) {
  int t = threadIdx.x;
  y[FIXED ? t : t + 1] = x[t];  // FAULT
}

// `away` leads from y to an array that is not an argument.
template <bool FIXED> __global__ void writes_elsewhere(const float* x, float* y, long long away) {
  int t = threadIdx.x;
  y[FIXED ? t : t + away] = x[t];  // FAULT
}

template <bool FIXED> __global__ void writes_past_the_end_of_shared_memory(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[FIXED ? t : t + 1] = x[t];  // FAULT
  __syncthreads();
  y[t] = x[t];
}

template <bool FIXED> __global__ void reads_uninitialised_shared_memory(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  if (FIXED || t < 100) tile[t] = x[t];
  __syncthreads();
  y[t] = tile[t];  // FAULT
}

// y comes from cupy.empty.
template <bool FIXED> __global__ void reads_uninitialised_global_memory(const float* x, float* y) {
  int t = threadIdx.x;
  if (FIXED) y[t] = 0.0f;
  y[t] += x[t];  // FAULT
}

// y comes from cupy.zeros, for two blocks.
template <bool FIXED> __global__ void adds_without_atomics(const float* x, float* y) {
  int t = threadIdx.x;
  if (FIXED) atomicAdd(y + t, x[t]);
  else y[t] += x[t];  // FAULT
}

// For two blocks: each reads what the other one writes.
template <bool FIXED> __global__ void reads_the_other_block(const float* x, float* y) {
  int t = threadIdx.x, b = blockIdx.x;
  y[128 * b + t] = x[t];
  y[128 * b + t] += FIXED ? x[t] : y[128 * (1 - b) + t];  // FAULT
}

// For two blocks.
template <bool FIXED> __global__ void overwrites_what_the_other_block_reads(float* x, float* y) {
  int t = threadIdx.x, b = blockIdx.x;
  y[128 * b + t] = x[t];  // FAULT
  __syncthreads();
  if (!FIXED && b == 1) x[t] = y[128 * b + t] + x[t];  // FAULT
}

template <bool FIXED> __global__ void barrier_in_a_branch(const float* x, float* y) {
  int t = threadIdx.x;
  float v = x[t];
  if (FIXED || t % 2 == 0) __syncthreads();  // FAULT
  y[t] = __shfl_xor_sync(0xffffffffu, v, 1);
}

template <bool FIXED> __global__ void returns_before_the_barrier(const float* x, float* y) {
  int t = threadIdx.x;
  if (!FIXED && t >= 100) return;
  __syncthreads();  // FAULT
  y[t] = x[t];
}

template <bool FIXED> __global__ void shuffles_from_outside_the_mask(const float* x, float* y) {
  int t = threadIdx.x;
  float v = x[t];
  if (t % 32 < 16) v = __shfl_xor_sync(0xffffu, v, FIXED ? 8 : 16);  // FAULT
  y[t] = v;
}

template <bool FIXED> __global__ void is_not_in_its_own_mask(const float* x, float* y) {
  int t = threadIdx.x;
  y[t] = __shfl_xor_sync(FIXED ? 0xffffffffu : 0xffffu, x[t], 1);  // FAULT
}

template <bool FIXED> __global__ void misaligned_vector(const float* x, float* y) {
  int t = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(x + (FIXED ? 4 : 1));  // FAULT
  y[t] = v.x + v.y + v.z + v.w;
}

template <bool FIXED> __global__ void trusts_the_warp(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = 0.0f;
  __syncthreads();
  tile[t] = x[t];
  if (FIXED) __syncwarp();
  y[t] = tile[t ^ 1];  // FAULT
}

template <bool FIXED> __global__ void trusts_half_the_warp(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  int t = threadIdx.x;
  tile[t] = 0.0f;
  __syncthreads();
  tile[t] = x[t];
  __syncwarp(t % 32 < 16 ? 0xffffu : 0xffff0000u);
  y[t] = tile[t ^ (FIXED ? 8 : 16)];  // FAULT
}

template <bool FIXED> __global__ void writes_what_it_reads_as_constant(float* y, const float* x) {
  int t = threadIdx.x;
  float v = x[t];
  if (!FIXED) y[t] = v;
  y[t] = v + __ldg(y + t);  // FAULT
}

template <bool FIXED> __global__ void converts_without_care(const float* x, float* y) {
  int t = threadIdx.x;
  float v = (x[t] + 1.0f) * 1e30f;
  int n = FIXED ? __float2int_rd(v) : static_cast<int>(v);  // FAULT
  y[t] = static_cast<float>(n);
}

template <bool FIXED> __global__ void writes_an_input(float* x, float* y) {  // which is legal
  int t = threadIdx.x;
  y[t] = x[t];
  x[t] = 0.0f;
}

// ---- wgmma: 128 threads multiply a tile of 64 rows by itself
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
enum WgmmaFault { NONE, NO_WAIT, NO_FENCE, NO_PROXY_FENCE, NO_BARRIER, REFILL, TOUCH };
template <int FAULT> __global__ void wgmma_with(const float* x, float* y) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tile);
  int t = threadIdx.x;
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0.0f;
  for (int i = t; i < 2048; i += 128) reinterpret_cast<float*>(tile)[i] = x[i % 128];  // FAULT NO_PROXY_FENCE
  if (FAULT != NO_PROXY_FENCE) fence_proxy_async();
  if (FAULT != NO_BARRIER) __syncthreads();
  if (FAULT != NO_FENCE) wgmma_fence();
  wgmma<float, 64>(d, tile, tile);  // FAULT NO_WAIT NO_FENCE
  wgmma_commit();
  if (FAULT == REFILL) {
    __syncthreads();
    reinterpret_cast<float*>(tile)[t] = 0.0f;  // FAULT REFILL
    fence_proxy_async();
    __syncthreads();
  }
  if (FAULT == TOUCH) d[3] += 1.0f;
  if (FAULT != NO_WAIT) wgmma_wait<0>();  // FAULT NO_BARRIER TOUCH
  for (int i = 0; i < 32; i++) y[32 * t + i] = d[i];
}

// The same with a descriptor of B some of whose bits are turned over.
__global__ void wgmma_of(const float* x, float* y, unsigned long long turned) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tile);
  int t = threadIdx.x;
  float d[32] = {};
  for (int i = t; i < 4096; i += 128) reinterpret_cast<float*>(tile)[i] = x[i % 128] + i / 2048;
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  ptx::wgmma<float, 64>::run<1>(d, wgmma_tile(tile), wgmma_tile(tile) ^ turned);  // FAULT
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; i++) y[32 * t + i] = d[i];
}
#endif

// ---- for the counters: one warp
template <bool SWIZZLED> __global__ void bank_conflicts(const float* x, float* y) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tile);
  int t = threadIdx.x;
  for (int i = t; i < 1024; i += 32) reinterpret_cast<float*>(tile)[i] = x[i % 128];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, tile + t * 128 + (SWIZZLED ? (t & 7) << 4 : 0));  // COUNTED
  y[t] = __uint_as_float(r[0] ^ r[1] ^ r[2] ^ r[3]);
}

template <int STRIDE> __global__ void strided(const float* x, float* y) {
  int t = threadIdx.x;
  y[t] = x[t * STRIDE];  // COUNTED
}

__global__ void vectors(const float4* x, float4* y) {
  PYDEFORM_SHARED(float4, tile, 32);
  int t = threadIdx.x;
  float4 v = x[t];  // COUNTED
  v.x += v.y;
  tile[t] = v;  // COUNTED
  __syncwarp();
  y[t] = tile[t % 8];  // COUNTED
}

// Twice over `lines` runs of 128 bytes: through L1, or past it.
template <bool COPY> __global__ void reads_again(const float* x, float* y, int lines) {
  PYDEFORM_DYNAMIC_SHARED(float, tile);
  int t = threadIdx.x;
  float sum = 0.0f;
  for (int turn = 0; turn < 2; turn++)
    for (int i = 0; i < lines; i++) {
      if (!COPY) {
        sum += x[32 * i + t];
      } else if (t < 8) {
        cp_async16(tile + 4 * t, x + 32 * i + 4 * t, true);
        cp_async_commit();
        cp_async_wait<0>();
      }
    }
  y[t] = sum;
}

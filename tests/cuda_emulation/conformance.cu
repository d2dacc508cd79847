// One kernel for each primitive, run by one warp (wgmma: a warpgroup): each lane's registers go to `out` as they are.
// test_cuda_primitives.py compares them with what the PTX manual says, on the emulation and on a GPU.
#include "core/primitives.cuh"

// ---- conversions, one element a thread
template <class T> __global__ void widen(const T* in, float* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(in[i]);
}
__global__ void widen_double(const double* in, double* out) {
  int i = threadIdx.x;
  out[i] = from_float<double>(to_float(in[i]));
}
template <class T> __global__ void narrow(const float* in, T* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = from_float<T>(in[i]);
}
template <class T> __global__ void pack(const float* low, const float* high, uint32_t* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = pack2<T>(low[i], high[i]);
}
__global__ void tf32_part(const float* in, float* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = tf32_high(in[i]);
}

// ---- memory
__global__ void load(const uint32_t* in, uint32_t* out) {
  const uint4 v = load16(in + 4 * (31 - threadIdx.x));
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = words[i];
}

// Row r of `in`, of 8 halves, lies at place[r] in shared memory; lane l asks for row l.
template <bool TRANSPOSED> __global__ void matrices(const uint16_t* in, const int* place, uint32_t* out) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tile);
  int lane = threadIdx.x;
  unsigned char* row = tile + 16 * place[lane];
  for (int i = 0; i < 8; i++) reinterpret_cast<uint16_t*>(row)[i] = in[8 * lane + i];
  __syncwarp();
  uint32_t r[4];
  if (TRANSPOSED) ldmatrix_x4_trans(r, row);
  else ldmatrix_x4(r, row);
  for (int i = 0; i < 4; i++) out[4 * lane + i] = r[i];
}

// Three groups of copies; `seen` is taken after all but one have landed, `out` at the end.
__global__ void copies(const uint32_t* in, const int* valid, uint32_t* seen, uint32_t* out) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tile);
  int lane = threadIdx.x;
  for (int group = 0; group < 3; group++) {
    int from = 32 * group + lane;
    cp_async16(tile + 16 * (32 * group + (lane ^ 5)), in + 4 * from, valid[from] != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncwarp();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(tile);
  for (int i = lane; i < 256; i += 32) seen[i] = words[i];
  cp_async_wait<0>();
  __syncwarp();
  for (int i = lane; i < 384; i += 32) out[i] = words[i];
}

__global__ void reductions(const float* in, float* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  red_add4(out + 4 * (i % 8), in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]);
}

// ---- numbers below the smallest normal one, under -ftz=true
__global__ void denormals(const float* in, float* added, float* out) {
  int i = threadIdx.x;
  float a = in[i], b = in[(i + 1) % 32];
  out[i] = a + b;
  out[32 + i] = a * b;
  out[64 + i] = fmaf(a, 0.5f, b);
  out[96 + i] = (float)((double)a * 0.5);
  out[128 + i] = a > 0.f ? 1.f : 0.f;
  atomicAdd(added + i, a);
  if (i < 8) red_add4(added + 32 + 4 * i, in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]);
}
__global__ void double_denormals(const double* in, double* out) {
  int i = threadIdx.x;
  out[i] = in[i] * 0.5 + in[(i + 1) % 32];
}

// ---- tensor cores of a warp: in[lane] = a[4], b[2], d[4]
template <class T> __global__ void products(const uint32_t* in, float* out) {
  int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[10 * lane + i];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(in[10 * lane + 6 + i]);
  mma<T>(d, a, in[10 * lane + 4], in[10 * lane + 5]);
  for (int i = 0; i < 4; i++) out[4 * lane + i] = d[i];
}

#if __CUDA_ARCH__ >= 800
__global__ void products_from_zero(const uint32_t* in, float* out) {
  int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[10 * lane + i];
  mma_from_zero<float>(d, a, in[10 * lane + 4], in[10 * lane + 5]);
  for (int i = 0; i < 4; i++) out[4 * lane + i] = d[i];
}
#endif

// ---- tensor cores of a warpgroup: the tiles come ready, swizzled, 32 bytes of k are taken at a time
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Steps [0, steps) of four, the first of which adds to `start` or does not; the last one in a group of its own, for which
// a second wait waits.
template <class T, int N, bool ADD>
__global__ void warpgroup_products(const uint4* a, const uint4* b, const float* start, float* out, int steps) {
  PYDEFORM_DYNAMIC_SHARED(unsigned char, tiles);
  int t = threadIdx.x;
  for (int i = t; i < 64 * 8; i += 128) reinterpret_cast<uint4*>(tiles)[i] = a[i];
  for (int i = t; i < N * 8; i += 128) reinterpret_cast<uint4*>(tiles + 8192)[i] = b[i];
  fence_proxy_async();
  __syncthreads();
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = start[N / 2 * t + i];
#pragma unroll
  for (int i = 0; i < N / 2; i++) wgmma_hold(d[i]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    if (step == 0) wgmma<T, N, ADD>(d, tiles, tiles + 8192);
    else if (step < steps) wgmma<T, N>(d, tiles + 32 * step, tiles + 8192 + 32 * step);
    if (step >= 2) wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) wgmma_hold(d[i]);
#pragma unroll
  for (int i = 0; i < N / 2; i++) out[N / 2 * t + i] = d[i];
}
#endif

// ---- what CUDA itself gives
template <int WIDTH> __global__ void shuffles(const float* in, float* out) {
  int lane = threadIdx.x;
  float v = in[lane];
  double wide = (double)v + 1e-9;
  out[lane] = __shfl_sync(0xffffffffu, v, 5, WIDTH);
  out[32 + lane] = __shfl_xor_sync(0xffffffffu, v, 3, WIDTH);
  out[64 + lane] = __shfl_up_sync(0xffffffffu, v, 2, WIDTH);
  out[96 + lane] = __shfl_down_sync(0xffffffffu, v, 2, WIDTH);
  out[128 + lane] = (float)(__shfl_xor_sync(0xffffffffu, wide, 1, WIDTH) - 1e-9);
}
__global__ void votes(const int* in, uint32_t* out) {
  int lane = threadIdx.x;
  out[lane] = __ballot_sync(0xffffffffu, in[lane]);
  if (lane < 16) out[lane] ^= __ballot_sync(0x0000ffffu, in[lane] == 0) << 16;
}
__global__ void atomics(int* i, float* f, double* d) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  int old = atomicAdd(i, 1);
  atomicAdd(i + 1 + old, 100 + old);
  atomicAdd(f + t % 4, 0.5f * t);
  atomicAdd(d + t % 4, 0.25 * t);
}
__global__ void permuted_bytes(const uint32_t* a, const uint32_t* b, const uint32_t* selectors, uint32_t* out) {
  int i = threadIdx.x;
  out[i] = __byte_perm(a[i], b[i], selectors[i]);
}
__global__ void arithmetic(const float* in, float* out) {
  int i = threadIdx.x;
  float a = in[i], b = in[(i + 1) % 32], c = in[(i + 2) % 32];
  out[i] = floorf(a);
  out[32 + i] = fmaf(a, b, c);
  out[64 + i] = (float)floor((double)a * 3.0);
  out[96 + i] = (float)(fma((double)a, (double)b, (double)c));
  out[128 + i] = min(a, b);
  out[160 + i] = max(a, b);
  out[192 + i] = __uint_as_float(__float_as_uint(a) ^ 0x80000000u);
  out[224 + i] = (float)min(max((int)(a * 4.0f), -5), 7);
}

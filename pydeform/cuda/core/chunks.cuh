// Numbers that lie together in memory: the channels of a pixel in 16 bytes, a chunk; two sums that are stored at once.
#pragma once
#include "core/numbers.cuh"

template <class T> PYDEFORM_DEVICE void unpack(Compute<T> (&v)[16 / sizeof(T)], const uint4& packed);
template <> PYDEFORM_DEVICE void unpack<float>(float (&v)[4], const uint4& p) {
  v[0] = __uint_as_float(p.x);
  v[1] = __uint_as_float(p.y);
  v[2] = __uint_as_float(p.z);
  v[3] = __uint_as_float(p.w);
}
template <> PYDEFORM_DEVICE void unpack<double>(double (&v)[2], const uint4& p) {
  v[0] = __hiloint2double((int)p.y, (int)p.x);
  v[1] = __hiloint2double((int)p.w, (int)p.z);
}
template <class T> PYDEFORM_DEVICE void unpack_half(float (&v)[8], const uint4& p) {
  const uint32_t r[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[2 * i] = to_float(T{(uint16_t)r[i]});
    v[2 * i + 1] = to_float(T{(uint16_t)(r[i] >> 16)});
  }
}
template <> PYDEFORM_DEVICE void unpack<f16>(float (&v)[8], const uint4& p) { unpack_half<f16>(v, p); }
template <> PYDEFORM_DEVICE void unpack<bf16>(float (&v)[8], const uint4& p) { unpack_half<bf16>(v, p); }

template <class T> PYDEFORM_DEVICE uint4 pack(const Compute<T> (&v)[16 / sizeof(T)]) {
  return make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
}
template <> PYDEFORM_DEVICE uint4 pack<float>(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
template <> PYDEFORM_DEVICE uint4 pack<double>(const double (&v)[2]) {
  return make_uint4((uint32_t)__double2loint(v[0]), (uint32_t)__double2hiint(v[0]), (uint32_t)__double2loint(v[1]),
                    (uint32_t)__double2hiint(v[1]));
}

template <class A> struct alignas(2 * sizeof(A)) Pair {
  A v[2];
};

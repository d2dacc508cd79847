// As many neighbouring numbers as one load brings: 16 bytes, or fewer where an array's alignment or length forbids that.
#pragma once
#include "core/numbers.cuh"

template <int BYTES> struct Words {
  uint32_t w[BYTES > 4 ? BYTES / 4 : 1];
};
template <class T, int BYTES> constexpr int NUMBERS = BYTES / (int)sizeof(T);

// p is a multiple of BYTES.
template <int BYTES> PYDEFORM_DEVICE Words<BYTES> load_words(const void* p) {
  if constexpr (BYTES == 16) {
    const uint4 v = load16(p);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (BYTES == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    return {{v.x, v.y}};
  } else if constexpr (BYTES == 4) {
    return {{__ldg(reinterpret_cast<const unsigned*>(p))}};
  } else {
    return {{__ldg(reinterpret_cast<const unsigned short*>(p))}};
  }
}

// Number e of those.
template <class T, int BYTES> PYDEFORM_DEVICE Compute<T> number_in(const Words<BYTES>& words, int e) {
  if constexpr (sizeof(T) == 8) {
    return __hiloint2double((int)words.w[2 * e + 1], (int)words.w[2 * e]);
  } else if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words.w[e]);
  } else {
    return to_float(T{(uint16_t)(words.w[e / 2] >> 16 * (e % 2))});
  }
}

// Rounded, into a p that is a multiple of BYTES.
template <class T, int BYTES> PYDEFORM_DEVICE void store_numbers(T* p, const Compute<T> (&v)[NUMBERS<T, BYTES>]) {
  if constexpr (BYTES == (int)sizeof(T)) {
    *p = from_float<T>(v[0]);
  } else {
    Words<BYTES> words;
#pragma unroll
    for (int i = 0; i < BYTES / 4; i++) {
      if constexpr (sizeof(T) == 8) {
        words.w[i] = (uint32_t)(i % 2 ? __double2hiint(v[i / 2]) : __double2loint(v[i / 2]));
      } else if constexpr (sizeof(T) == 4) {
        words.w[i] = __float_as_uint(v[i]);
      } else {
        words.w[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
      }
    }
    if constexpr (BYTES == 16) {
      *reinterpret_cast<uint4*>(p) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
    } else if constexpr (BYTES == 8) {
      *reinterpret_cast<uint2*>(p) = make_uint2(words.w[0], words.w[1]);
    } else {
      *reinterpret_cast<uint32_t*>(p) = words.w[0];
    }
  }
}

// p[i] += v[i], in no order that anybody knows; p is a multiple of 16 bytes where N is one of four floats.
template <class A, int N> PYDEFORM_DEVICE void add_numbers(A* p, const A (&v)[N]) {
  if constexpr (sizeof(A) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) red_add4(p + i, v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) atomicAdd(p + i, v[i]);
  }
}

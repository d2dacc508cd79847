// A convolution with few channels in a group, where a tile of a product would be mostly zeros: each thread sums by
// itself, on the arrays as they are. DEFORMED false: positions are integers, there is no mask (conv2d).
//
// Every sum has one order, whatever the launch, but for the atomics of backward_data_direct. An image, of the input or
// the output, has fewer than 2^31 pixels; I is the type for places in whole arrays.
#pragma once
#include "channels.cuh"

constexpr int DIRECT_THREADS = 256;
constexpr int DIRECT_BLOCKS = 2;  // on a multiprocessor: left to itself, ptxas spills in order to fit in four

// The sample of one tap and its mask. Without offsets only the first corner is there, with weight 1.
template <class T, class I, bool DEFORMED, class TOffset>
PYDEFORM_DEVICE Sample<Compute<T>> direct_sample(const Offsets<T, I, TOffset>& offsets, const OutputPixel& pixel,
                                                 int og, int tap, Compute<T>& m, const Geometry& g) {
  if constexpr (DEFORMED) {
    return offsets.sample(pixel.b, og, tap, pixel.p, pixel.row, pixel.column, m, g);
  } else {
    const int y = pixel.row + tap / g.kernel[1] * g.dilation[0], x = pixel.column + tap % g.kernel[1] * g.dilation[1];
    const bool inside = y >= 0 && y < g.in_size[0] && x >= 0 && x < g.in_size[1];
    m = 1;
    return {{inside ? y * g.in_size[1] + x : -1, -1, -1, -1}, 0, 0};
  }
}

// A corner outside is never read; as 0 it still carries the NaN of a weight.
template <class T> PYDEFORM_DEVICE Compute<T> direct_pixel(const T* image, int corner) {
  return corner < 0 ? (Compute<T>)0 : to_float(image[corner]);
}

// mask * S of eq. 2 for one channel. w: corner weights times m unless that is infinite.
template <class T, bool DEFORMED>
PYDEFORM_DEVICE Compute<T> direct_value(const T* image, const Sample<Compute<T>>& s, const Compute<T> (&w)[4],
                                        Compute<T> m) {
  if constexpr (!DEFORMED) return direct_pixel(image, s.corner[0]);
  Compute<T> value = w[0] * direct_pixel(image, s.corner[0]);
#pragma unroll
  for (int j = 1; j < 4; j++) value += w[j] * direct_pixel(image, s.corner[j]);
  return is_infinite(m) ? m * value : value;
}

// Forward, eq. 1.
// Owner: one thread per (b, o, p), neighbours on neighbouring p.
// Reads the samples of o's group; bias and mask may be null. Writes its output element.
template <class T, class I, bool DEFORMED, class TOffset = T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    forward_direct(const T* __restrict__ input, const TOffset* __restrict__ offset, const T* __restrict__ weight,
                   const T* __restrict__ bias, const T* __restrict__ mask, T* __restrict__ output, Geometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x;
  const I out_pixels = (I)g.out_size[0] * g.out_size[1], in_pixels = (I)g.in_size[0] * g.in_size[1];
  if (i >= g.batch * g.out_channels * out_pixels) return;
  const I plane = i / out_pixels;
  const int b = (int)(plane / g.out_channels), o = (int)(plane - (I)b * g.out_channels);
  const OutputPixel pixel(b * out_pixels + (i - plane * out_pixels), g);
  const int taps = g.kernel[0] * g.kernel[1];
  const int per_group = g.in_channels / g.groups, per_offset = g.in_channels / g.offset_groups;
  const int first = o / (g.out_channels / g.groups) * per_group, last = first + per_group;
  const Offsets<T, I, TOffset> offsets{offset, mask};
  A sum = bias ? to_float(bias[o]) : (A)0;
  for (int c = first; c < last;) {
    const int og = c / per_offset, end = min(last, (og + 1) * per_offset);  // channels that share their samples
    for (int tap = 0; tap < taps; tap++) {
      A m, w[4];
      const Sample<A> s = direct_sample<T, I, DEFORMED>(offsets, pixel, og, tap, m, g);
      corner_weights(w, s.y, s.x, is_infinite(m) ? (A)1 : m);
      const T* image = input + ((I)b * g.in_channels + c) * in_pixels;
      const T* factor = weight + ((I)o * per_group + (c - first)) * taps + tap;
#pragma unroll 1  // registers for more threads serve these loads better
      for (int q = c; q < end; q++, image += in_pixels, factor += taps)
        sum += to_float(*factor) * direct_value<T, DEFORMED>(image, s, w, m);
    }
    c = end;
  }
  output[i] = from_float<T>(sum);
}

// Column gradients, and from them eq. 3, eq. 4 and eq. 5.
// Owner: one thread per (b, og, tap, p) of output pixels [first, first + count) and taps [tap0, tap0 + taps), those of
// neighbouring p side by side. Reads grad_output and weight of the groups of og's channels. Writes its grad_offset
// pair and grad_mask. STORE: writes its column gradients, without mask, into columns (taps, count, C) for
// conv_gather.cuh; else adds its parts to accumulator (N, C, H, W), in no order. A result that is null is not wanted.
template <class T, class I, bool STORE, class TOffset = T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    backward_data_direct(const T* __restrict__ grad_output, const T* __restrict__ input,
                         const TOffset* __restrict__ offset, const T* __restrict__ weight, const T* __restrict__ mask,
                         TOffset* __restrict__ grad_offset, T* __restrict__ grad_mask,
                         Compute<T>* __restrict__ accumulator, Compute<T>* __restrict__ columns, Geometry g, I first,
                         I count, int tap0, int taps) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x;
  if (i >= count * taps * g.offset_groups) return;
  const int part = (int)(i / count), og = part / taps, tap = tap0 + part % taps;
  const I n = i - part * count;
  const OutputPixel pixel(first + n, g);
  A m, w[4], dots[4] = {};
  const Sample<A> s = direct_sample<T, I, true>(Offsets<T, I, TOffset>{offset, mask}, pixel, og, tap, m, g);
  corner_weights(w, s.y, s.x, m);
  const I out_pixels = (I)g.out_size[0] * g.out_size[1], in_pixels = (I)g.in_size[0] * g.in_size[1];
  const int all_taps = g.kernel[0] * g.kernel[1];
  const int per_group = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int per_offset = g.in_channels / g.offset_groups;
  const bool need_dots = grad_offset || grad_mask;
  for (int c = og * per_offset; c < (og + 1) * per_offset; c++) {
    const int group = c / per_group;
    const T* factor = weight + ((I)group * outputs * per_group + (c - group * per_group)) * all_taps + tap;
    const T* grad = grad_output + ((I)pixel.b * g.out_channels + group * outputs) * out_pixels + pixel.p;
    A column = 0;
#pragma unroll 2
    for (int o = 0; o < outputs; o++, factor += per_group * all_taps, grad += out_pixels)
      column += to_float(*factor) * to_float(*grad);
    const I image = ((I)pixel.b * g.in_channels + c) * in_pixels;
    if (need_dots) {
#pragma unroll
      for (int j = 0; j < 4; j++) dots[j] += column * direct_pixel(input + image, s.corner[j]);
    }
    if constexpr (STORE) {
      if (columns) columns[((tap - tap0) * count + n) * g.in_channels + c] = column;
    } else if (accumulator) {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (s.corner[j] >= 0) atomicAdd(accumulator + image + s.corner[j], w[j] * column);
    }
  }
  if (!need_dots) return;
  A value, along_y, along_x;
  dots_of_corners(dots, s.y, s.x, value, along_y, along_x);
  const I k = ((I)pixel.b * g.offset_groups + og) * all_taps + tap;
  if (grad_offset) {
    grad_offset[2 * k * out_pixels + pixel.p] = from_float<TOffset>(m * along_y);
    grad_offset[(2 * k + 1) * out_pixels + pixel.p] = from_float<TOffset>(m * along_x);
  }
  if (grad_mask) grad_mask[k * out_pixels + pixel.p] = from_float<T>(value);
}

// Eq. 5 without offsets: no two threads give to one pixel, so no atomics.
// Owner: one thread per (b, c, y, x). Reads grad_output of c's group where a tap read this pixel.
// Writes its element of grad_input.
template <class T, class I>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    input_gradient_direct(const T* __restrict__ grad_output, const T* __restrict__ weight, T* __restrict__ grad_input,
                          Geometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x;
  const I out_pixels = (I)g.out_size[0] * g.out_size[1], in_pixels = (I)g.in_size[0] * g.in_size[1];
  if (i >= g.batch * g.in_channels * in_pixels) return;
  const I plane = i / in_pixels;
  const int b = (int)(plane / g.in_channels), c = (int)(plane - (I)b * g.in_channels);
  const int p = (int)(i - plane * in_pixels), y = p / g.in_size[1], x = p - y * g.in_size[1];
  const int taps = g.kernel[0] * g.kernel[1];
  const int per_group = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int group = c / per_group;
  const T* grads = grad_output + ((I)b * g.out_channels + group * outputs) * out_pixels;
  const T* factors = weight + ((I)group * outputs * per_group + (c - group * per_group)) * taps;
  A sum = 0;
  for (int ky = 0; ky < g.kernel[0]; ky++) {
    const int below = y + g.pad[0] - ky * g.dilation[0], oy = below / g.stride[0];
    if (below < 0 || oy >= g.out_size[0] || oy * g.stride[0] != below) continue;
    for (int kx = 0; kx < g.kernel[1]; kx++) {
      const int right = x + g.pad[1] - kx * g.dilation[1], ox = right / g.stride[1];
      if (right < 0 || ox >= g.out_size[1] || ox * g.stride[1] != right) continue;
      const T* grad = grads + (I)oy * g.out_size[1] + ox;
      const T* factor = factors + ky * g.kernel[1] + kx;
#pragma unroll 2
      for (int o = 0; o < outputs; o++, grad += out_pixels, factor += per_group * taps)
        sum += to_float(*factor) * to_float(*grad);
    }
  }
  grad_input[i] = from_float<T>(sum);
}

// The sum over the block's threads, for its first thread. Every thread calls it.
template <class A> PYDEFORM_DEVICE A direct_block_sum(A value) {
  PYDEFORM_SHARED(A, part, DIRECT_THREADS);
  const int thread = threadIdx.x;
  part[thread] = value;
#pragma unroll
  for (int half = DIRECT_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) part[thread] = value += part[thread + half];
  }
  return value;
}

// Eq. 6.
// Owner: one block per (o, channel of o's group, tap); its threads take every 256th output pixel of all images.
// Reads grad_output of o and the samples of one channel and tap.
// Writes one element of grad_weight (O, C/groups, K).
template <class T, class I, bool DEFORMED, class TOffset = T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    weight_direct(const T* __restrict__ grad_output, const T* __restrict__ input, const TOffset* __restrict__ offset,
                  const T* __restrict__ mask, T* __restrict__ grad_weight, Geometry g) {
  using A = Compute<T>;
  const int taps = g.kernel[0] * g.kernel[1], per_group = g.in_channels / g.groups;
  const int row = blockIdx.x / taps, tap = blockIdx.x % taps;  // row: (o, channel of the group)
  const int o = row / per_group;
  const int c = o / (g.out_channels / g.groups) * per_group + row % per_group;
  const int og = c / (g.in_channels / g.offset_groups);
  const I out_pixels = (I)g.out_size[0] * g.out_size[1], in_pixels = (I)g.in_size[0] * g.in_size[1];
  const Offsets<T, I, TOffset> offsets{offset, mask};
  A sum = 0;
  for (I n = threadIdx.x; n < g.batch * out_pixels; n += DIRECT_THREADS) {
    const OutputPixel pixel(n, g);
    A m, w[4];
    const Sample<A> s = direct_sample<T, I, DEFORMED>(offsets, pixel, og, tap, m, g);
    corner_weights(w, s.y, s.x, is_infinite(m) ? (A)1 : m);
    const T* image = input + ((I)pixel.b * g.in_channels + c) * in_pixels;
    const T grad = grad_output[((I)pixel.b * g.out_channels + o) * out_pixels + pixel.p];
    sum += to_float(grad) * direct_value<T, DEFORMED>(image, s, w, m);
  }
  sum = direct_block_sum(sum);
  if (threadIdx.x == 0) grad_weight[blockIdx.x] = from_float<T>(sum);
}

// Eq. 7.
// Owner: one block per o; its threads take every 256th output pixel of all images.
// Reads grad_output of o. Writes one element of grad_bias.
template <class T, class I>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    bias_gradient(const T* __restrict__ grad_output, T* __restrict__ grad_bias, Geometry g) {
  using A = Compute<T>;
  const I pixels = (I)g.out_size[0] * g.out_size[1];
  A sum = 0;
#pragma unroll 4
  for (I n = threadIdx.x; n < g.batch * pixels; n += DIRECT_THREADS) {
    const I b = n / pixels;
    sum += to_float(grad_output[(b * g.out_channels + blockIdx.x) * pixels + (n - b * pixels)]);
  }
  sum = direct_block_sum(sum);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = from_float<T>(sum);
}

// Rounds the sums of eq. 5 to the type of the result.
// Owner: one thread per element.
template <class T, class I>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    convert(const Compute<T>* __restrict__ sums, T* __restrict__ result, I count) {
  const I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x;
  if (i < count) result[i] = from_float<T>(sums[i]);
}

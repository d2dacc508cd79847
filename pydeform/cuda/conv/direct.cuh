// A convolution with few channels in a group, where a tile of a product would be mostly zeros: each thread sums by
// itself, on the arrays as they are. DEFORMED false: positions are integers, there is no mask (conv2d).
//
// Every sum has one order, whatever the launch, but for the atomics of backward_data_direct. An image, of the input or
// the output, has fewer than 2^31 pixels; I is the type for places in whole arrays.
#pragma once
#include "conv/places.cuh"
#include "core/sums.cuh"

constexpr int DIRECT_THREADS = 256;
constexpr int DIRECT_BLOCKS = 2;  // on a multiprocessor: left to itself, ptxas spills in order to fit in four

// The sample of one tap and its mask. Without offsets only the first corner is there, with weight 1.
template <class T, class I, bool DEFORMED, class TOffset>
PYDEFORM_DEVICE Sample<Compute<T>> direct_sample(const Offsets<T, I, TOffset>& offsets, const OutputPixel& pixel,
                                                 int og, int tap, Compute<T>& m, const Geometry& g) {
  if constexpr (DEFORMED) {
    return offsets.sample(pixel.b, og, tap, pixel.p, pixel.origin, m, g);
  } else {
    int at[AXES];
    take_apart(at, tap, g.kernel);
#pragma unroll
    for (int a = 0; a < AXES; a++) at[a] = pixel.origin[a] + at[a] * g.dilation[a];
    Sample<Compute<T>> s{};
    s.corner[0] = is_inside(at, g.in_size) ? place_of(at, g.in_size) : -1;
#pragma unroll
    for (int k = 1; k < CORNERS; k++) s.corner[k] = -1;
    m = 1;
    return s;
  }
}

// A corner outside is never read; as 0 it still carries the NaN of a weight.
template <class T> PYDEFORM_DEVICE Compute<T> direct_pixel(const T* image, int corner) {
  return corner < 0 ? (Compute<T>)0 : to_float(image[corner]);
}

// mask * S of eq. 2 for one channel. w: corner weights times m unless that is infinite.
template <class T, bool DEFORMED>
PYDEFORM_DEVICE Compute<T> direct_value(const T* image, const Sample<Compute<T>>& s, const Compute<T> (&w)[CORNERS],
                                        Compute<T> m) {
  if constexpr (!DEFORMED) return direct_pixel(image, s.corner[0]);
  Compute<T> value = w[0] * direct_pixel(image, s.corner[0]);
#pragma unroll
  for (int j = 1; j < CORNERS; j++) value += w[j] * direct_pixel(image, s.corner[j]);
  return is_infinite(m) ? m * value : value;
}

// The sum over the block's threads, for its first thread. Every thread calls it.
template <class A> PYDEFORM_DEVICE A direct_block_sum(A value) {
  PYDEFORM_SHARED(A, part, DIRECT_THREADS);
  const int thread = threadIdx.x;
  if (ACTIVE) __syncthreads();  // there is a sum for each axis: all have read the one before
  part[thread] = value;
#pragma unroll
  for (int half = DIRECT_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) part[thread] = value += part[thread + half];
  }
  return value;
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
  const I out_pixels = out_pixels_of<I>(g), in_pixels = in_pixels_of<I>(g);
  if (i >= g.batch * g.out_channels * out_pixels) return;
  const I plane = i / out_pixels;
  const int b = (int)(plane / g.out_channels), o = (int)(plane - (I)b * g.out_channels);
  const OutputPixel pixel(b * out_pixels + (i - plane * out_pixels), g);
  const int taps = taps_of(g);
  const int per_group = g.in_channels / g.groups, per_offset = g.in_channels / g.offset_groups;
  const int first = o / (g.out_channels / g.groups) * per_group, last = first + per_group;
  const Offsets<T, I, TOffset> offsets{offset, mask};
  A sum = bias ? to_float(bias[o]) : (A)0;
  for (int c = first; c < last;) {
    const int og = c / per_offset, end = min(last, (og + 1) * per_offset);  // channels that share their samples
    for (int tap = 0; tap < taps; tap++) {
      A m, w[CORNERS];
      const Sample<A> s = direct_sample<T, I, DEFORMED>(offsets, pixel, og, tap, m, g);
      corner_weights(w, s.within, is_infinite(m) ? (A)1 : m);
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
// neighbouring p side by side; ACTIVE: a block has pixels of one (og, tap). Reads grad_output and weight of the groups of
// og's channels. Writes its grad_offset for each axis and its grad_mask; ACTIVE: the sum over the block's pixels, to
// grad_offset[og][tap - tap0][axis][block of pixels]. STORE: writes its column gradients, without mask, into columns
// (taps, count, C) for conv/gather.cuh; else adds its parts to accumulator (N, C, P), in no order. A result that is null is
// not wanted.
template <class T, class I, bool STORE, class TOffset = T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    backward_data_direct(const T* __restrict__ grad_output, const T* __restrict__ input,
                         const TOffset* __restrict__ offset, const T* __restrict__ weight, const T* __restrict__ mask,
                         OffsetGradient<TOffset>* __restrict__ grad_offset, T* __restrict__ grad_mask,
                         Compute<T>* __restrict__ accumulator, Compute<T>* __restrict__ columns, Geometry g, I first,
                         I count, int tap0, int taps) {
  using A = Compute<T>;
  I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x, n;
  int part;
  if constexpr (ACTIVE) {
    const I blocks = (count + DIRECT_THREADS - 1) / DIRECT_THREADS;
    part = (int)(blockIdx.x / blocks);
    n = (blockIdx.x - part * blocks) * DIRECT_THREADS + threadIdx.x;
  } else {
    if (i >= count * taps * g.offset_groups) return;
    part = (int)(i / count);
    n = i - part * count;
  }
  const int og = part / taps, tap = tap0 + part % taps;
  const bool exists = !ACTIVE || n < count;  // all of a block stay for its sum
  const OutputPixel pixel(first + (exists ? n : 0), g);
  A m, w[CORNERS], dots[CORNERS] = {};
  const Sample<A> s = direct_sample<T, I, true>(Offsets<T, I, TOffset>{offset, mask}, pixel, og, tap, m, g);
  corner_weights(w, s.within, m);
  const I out_pixels = out_pixels_of<I>(g), in_pixels = in_pixels_of<I>(g);
  const int all_taps = taps_of(g);
  const int per_group = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int per_offset = g.in_channels / g.offset_groups;
  const bool need_dots = grad_offset || grad_mask;
  for (int c = og * per_offset; c < (og + 1) * per_offset && exists; c++) {
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
      for (int j = 0; j < CORNERS; j++) dots[j] += column * direct_pixel(input + image, s.corner[j]);
    }
    if constexpr (STORE) {
      if (columns) columns[((tap - tap0) * count + n) * g.in_channels + c] = column;
    } else if (accumulator) {
#pragma unroll
      for (int j = 0; j < CORNERS; j++)
        if (s.corner[j] >= 0) atomicAdd(accumulator + image + s.corner[j], w[j] * column);
    }
  }
  if (!need_dots) return;
  A value, along[AXES];
  dots_of_corners(dots, s.within, value, along);
  const I k = ((I)pixel.b * g.offset_groups + og) * all_taps + tap;
  if (grad_mask && exists) grad_mask[k * out_pixels + pixel.p] = from_float<T>(value);
  if (!grad_offset) return;
#pragma unroll
  for (int a = 0; a < AXES; a++) {
    if constexpr (ACTIVE) {
      const A sum = direct_block_sum(exists ? m * along[a] : (A)0);
      const I blocks = (count + DIRECT_THREADS - 1) / DIRECT_THREADS;
      if (threadIdx.x == 0) grad_offset[((I)part * AXES + a) * blocks + (blockIdx.x - part * blocks)] = sum;
    } else {
      grad_offset[(AXES * k + a) * out_pixels + pixel.p] = from_float<TOffset>(m * along[a]);
    }
  }
}

// Eq. 3 where all images and pixels share an offset: adds the sums of blocks, in their order, to sums [og][tap][axis].
// Owner: one block per (og, tap of [tap0, tap0 + taps), axis).
template <class A>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    add_offset_parts(const A* __restrict__ parts, A* __restrict__ sums, Geometry g, int blocks, int tap0, int taps) {
  const int axis = blockIdx.x % AXES, tap = blockIdx.x / AXES % taps, og = blockIdx.x / AXES / taps;
  A sum = 0;
  for (int i = threadIdx.x; i < blocks; i += DIRECT_THREADS) sum += parts[(long long)blockIdx.x * blocks + i];
  sum = direct_block_sum(sum);
  if (threadIdx.x == 0) sums[(og * taps_of(g) + tap0 + tap) * AXES + axis] += sum;
}

// Calls use(p, tap) for each output pixel p and the tap with which it reads the input pixel `at` where nothing moves;
// p and tap as they are made of the axes before AXIS.
template <int AXIS, class Use>
PYDEFORM_DEVICE void each_reader(const int (&at)[AXES], int p, int tap, const Geometry& g, Use use) {
  if constexpr (AXIS == AXES) {
    use(p, tap);
  } else {
    for (int k = 0; k < g.kernel[AXIS]; k++) {
      const int behind = at[AXIS] + g.pad[AXIS] - k * g.dilation[AXIS], o = behind / g.stride[AXIS];
      if (behind < 0 || o >= g.out_size[AXIS] || o * g.stride[AXIS] != behind) continue;
      each_reader<AXIS + 1>(at, p * g.out_size[AXIS] + o, tap * g.kernel[AXIS] + k, g, use);
    }
  }
}

// Eq. 5 without offsets: no two threads give to one pixel, so no atomics.
// Owner: one thread per (b, c, input pixel). Reads grad_output of c's group where a tap read this pixel.
// Writes its element of grad_input.
template <class T, class I>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    input_gradient_direct(const T* __restrict__ grad_output, const T* __restrict__ weight, T* __restrict__ grad_input,
                          Geometry g) {
  using A = Compute<T>;
  const I i = (I)blockIdx.x * DIRECT_THREADS + threadIdx.x;
  const I out_pixels = out_pixels_of<I>(g), in_pixels = in_pixels_of<I>(g);
  if (i >= g.batch * g.in_channels * in_pixels) return;
  const I plane = i / in_pixels;
  const int b = (int)(plane / g.in_channels), c = (int)(plane - (I)b * g.in_channels);
  int at[AXES];
  take_apart(at, (int)(i - plane * in_pixels), g.in_size);
  const int taps = taps_of(g);
  const int per_group = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int group = c / per_group;
  const T* grads = grad_output + ((I)b * g.out_channels + group * outputs) * out_pixels;
  const T* factors = weight + ((I)group * outputs * per_group + (c - group * per_group)) * taps;
  A sum = 0;
  each_reader<0>(at, 0, 0, g, [&](int p, int tap) {
    const T* grad = grads + p;
    const T* factor = factors + tap;
#pragma unroll 2
    for (int o = 0; o < outputs; o++, grad += out_pixels, factor += per_group * taps)
      sum += to_float(*factor) * to_float(*grad);
  });
  grad_input[i] = from_float<T>(sum);
}

// The sum over the block's threads into an element of `result`, which is blockIdx.x's; or, where the launch grid has
// rows, each with a slice of all pixels, into `parts` (element, slice), which add_parts adds up.
template <class T> PYDEFORM_DEVICE void write_sum(Compute<T> sum, T* result, Compute<T>* parts) {
  sum = direct_block_sum(sum);
  if (threadIdx.x > 0) return;
  if (parts) {
    parts[(long long)blockIdx.x * gridDim.y + blockIdx.y] = sum;
  } else {
    result[blockIdx.x] = from_float<T>(sum);
  }
}

// Where this slice of all pixels, `length` in each but the last, begins and ends.
template <class I> struct Slice {
  I begin, end;
  PYDEFORM_DEVICE Slice(I all, I length) : begin(blockIdx.y * length), end(begin + min(length, all - begin)) {}
};

// Owner: one block per element. Adds the slices of a sum, always in the same order.
template <class T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    add_parts(const Compute<T>* __restrict__ parts, T* __restrict__ result, int slices) {
  Compute<T> sum = 0;
  for (int i = threadIdx.x; i < slices; i += DIRECT_THREADS) sum += parts[(long long)blockIdx.x * slices + i];
  write_sum<T>(sum, result, nullptr);
}

// Eq. 6.
// Owner: one block per (o, channel of o's group, tap) and slice; its threads take every 256th output pixel there.
// Reads grad_output of o and the samples of one channel and tap.
// Writes one element of grad_weight (O, C/groups, K), or its part.
template <class T, class I, bool DEFORMED, class TOffset = T>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    weight_direct(const T* __restrict__ grad_output, const T* __restrict__ input, const TOffset* __restrict__ offset,
                  const T* __restrict__ mask, T* __restrict__ grad_weight, Compute<T>* __restrict__ parts, Geometry g,
                  I length) {
  using A = Compute<T>;
  const int taps = taps_of(g), per_group = g.in_channels / g.groups;
  const int row = blockIdx.x / taps, tap = blockIdx.x % taps;  // row: (o, channel of the group)
  const int o = row / per_group;
  const int c = o / (g.out_channels / g.groups) * per_group + row % per_group;
  const int og = c / (g.in_channels / g.offset_groups);
  const I out_pixels = out_pixels_of<I>(g), in_pixels = in_pixels_of<I>(g);
  const Offsets<T, I, TOffset> offsets{offset, mask};
  A sum = 0;
  const Slice<I> slice(g.batch * out_pixels, length);
  for (I n = slice.begin + threadIdx.x; n < slice.end; n += DIRECT_THREADS) {
    const OutputPixel pixel(n, g);
    A m, w[CORNERS];
    const Sample<A> s = direct_sample<T, I, DEFORMED>(offsets, pixel, og, tap, m, g);
    corner_weights(w, s.within, is_infinite(m) ? (A)1 : m);
    const T* image = input + ((I)pixel.b * g.in_channels + c) * in_pixels;
    const T grad = grad_output[((I)pixel.b * g.out_channels + o) * out_pixels + pixel.p];
    sum += to_float(grad) * direct_value<T, DEFORMED>(image, s, w, m);
  }
  write_sum<T>(sum, grad_weight, parts);
}

// Eq. 7.
// Owner: one block per o and slice; its threads take every 256th output pixel there.
// Reads grad_output of o. Writes one element of grad_bias, or its part.
template <class T, class I>
__global__ void __launch_bounds__(DIRECT_THREADS, DIRECT_BLOCKS)
    bias_gradient(const T* __restrict__ grad_output, T* __restrict__ grad_bias, Compute<T>* __restrict__ parts,
                  Geometry g, I length) {
  const I pixels = out_pixels_of<I>(g);
  const Slice<I> slice(g.batch * pixels, length);
  const I image = slice.begin / pixels;
  I place = slice.begin - image * pixels + threadIdx.x, plane = (image * g.out_channels + blockIdx.x) * pixels;
  Compute<T> sum = 0;
#pragma unroll 4
  for (I n = slice.begin + threadIdx.x; n < slice.end; n += DIRECT_THREADS, place += DIRECT_THREADS) {
    while (place >= pixels) {  // the next image; a division would take longer than the load
      place -= pixels;
      plane += g.out_channels * pixels;
    }
    sum += to_float(grad_output[plane + place]);
  }
  write_sum<T>(sum, grad_bias, parts);
}

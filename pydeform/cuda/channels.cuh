// Channels-last copies: how the channels of an image are laid out in memory and along the summed axis of a product.
#pragma once
#include "sampling.cuh"

// Channels that share both their convolution group and their offset group form a unit; units are equally long and
// follow each other. In memory a unit has `pitch` channels, a multiple of 16 bytes, zeros at its end. Along the summed
// axis it has `padded`, which divides the depth of a tile or is divided by it, so that no 16-byte chunk, and where a
// unit is long no tile, has two offset groups.
struct Channels {
  int unit, units;    // channels of a unit, units of a convolution group
  int pitch, padded;  // channels of a unit in memory, along the summed axis
  int blocks;         // tiles that the units of a group fill
};

PYDEFORM_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Place q (0 .. blocks * depth - 1) of a group's summed axis.
struct Place {
  int unit;    // of all groups
  int within;  // channel of the unit
  bool valid;  // there is such a unit, and memory for the channel
  PYDEFORM_DEVICE Place(int group, int q, const Channels& c) {
    const int u = q / c.padded;
    unit = group * c.units + u;
    within = q - u * c.padded;
    valid = u < c.units && within < c.pitch;
  }
  PYDEFORM_DEVICE int memory(const Channels& c) const { return unit * c.pitch + within; }
  PYDEFORM_DEVICE int offset_group(const Geometry& g, const Channels& c) const {
    return unit * c.unit / (g.in_channels / g.offset_groups);
  }
};

// Pixel m of all images' outputs, taken apart.
struct OutputPixel {
  int b, p;         // image, pixel in it
  int row, column;  // input pixel of tap (0, 0)
  template <class I> PYDEFORM_DEVICE OutputPixel(I m, const Geometry& g) {
    const I pixels = (I)g.out_h * g.out_w;
    b = (int)(m / pixels);
    p = (int)(m - b * pixels);
    const int oy = p / g.out_w;
    row = oy * g.stride_h - g.pad_h;
    column = (p - oy * g.out_w) * g.stride_w - g.pad_w;
  }
};

// (N, C, P) -> (N, P, units * pitch), and behind the last pixel one more, of zeros: all that is outside. Channels that
// belong to one unit follow each other, or come `cells` apart: channel (a*unit + i)*cells + cell is channel i of unit
// (cell, a).
// Owner: a block has 32 pixels x 32 memory channels, turned in shared memory; the first has the zeros too.
template <class T, class I>
__global__ void __launch_bounds__(256) to_channels_last(const T* __restrict__ input, T* __restrict__ output, int images,
                                                        int channels, I pixels, int unit, int pitch, int cells) {
  PYDEFORM_SHARED(T, tile, 32 * 33);
  const int all = channels / unit * pitch, columns = ceil_div(all, 32);
  const I rows = (pixels + 31) / 32;
  const int q0 = (int)(blockIdx.x % columns) * 32;
  const I p0 = (I)(blockIdx.x / columns) % rows * 32;
  const int b = (int)((I)(blockIdx.x / columns) / rows);
  const int low = threadIdx.x % 32, high = threadIdx.x / 32;
  for (int i = high; i < 32; i += 8) {
    const int q = q0 + i, u = pitch == unit && cells == 1 ? 0 : q / pitch, within = q - u * pitch;
    const bool valid = q < all && (pitch == unit || within < unit) && p0 + low < pixels;
    const int cell = cells == 1 ? 0 : u / (channels / unit / cells), a = u - cell * (channels / unit / cells);
    const int channel = (a * unit + within) * cells + cell;
    tile[i * 33 + low] = valid ? input[((I)b * channels + channel) * pixels + p0 + low] : T{};
  }
  __syncthreads();
  for (int i = high; i < 32; i += 8)
    if (q0 + low < all && p0 + i < pixels) output[((I)b * pixels + p0 + i) * all + q0 + low] = tile[low * 33 + i];
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < all; i += 256) output[(I)images * pixels * all + i] = T{};
}

// (N, P, units * pitch) of sums -> (N, C, P). Owner: as above.
template <class T, class I>
__global__ void __launch_bounds__(256) to_channels_first(const Compute<T>* __restrict__ input, T* __restrict__ output,
                                                         int images, int channels, I pixels, int unit, int pitch) {
  PYDEFORM_SHARED(Compute<T>, tile, 32 * 33);
  const int all = channels / unit * pitch, columns = ceil_div(all, 32);
  const I rows = (pixels + 31) / 32;
  const int q0 = (int)(blockIdx.x % columns) * 32;
  const I p0 = (I)(blockIdx.x / columns) % rows * 32;
  const int b = (int)((I)(blockIdx.x / columns) / rows);
  const int low = threadIdx.x % 32, high = threadIdx.x / 32;
  for (int i = high; i < 32; i += 8)
    if (q0 + low < all && p0 + i < pixels) tile[i * 33 + low] = input[((I)b * pixels + p0 + i) * all + q0 + low];
  __syncthreads();
  for (int i = high; i < 32; i += 8) {
    const int q = q0 + i, u = pitch == unit ? 0 : q / pitch, within = q - u * pitch;
    if (q < all && (pitch == unit || within < unit) && p0 + low < pixels)
      output[((I)b * channels + u * unit + within) * pixels + p0 + low] = from_float<T>(tile[low * 33 + i]);
  }
}

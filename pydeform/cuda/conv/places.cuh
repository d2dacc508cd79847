// How the channels of an image are laid out in a copy and along the summed axis of a product, and where a pixel reads.
#pragma once
#include "core/copies.cuh"
#include "sampling/corners.cuh"

// Channels that share both their convolution group and their offset group form a unit; units are equally long and
// follow each other. In memory a unit has `pitch` channels, a multiple of 16 bytes, zeros at its end. Along the summed
// axis it has `padded`, which divides the depth of a tile or is divided by it, so that no 16-byte chunk, and where a
// unit is long no tile, has two offset groups.
struct Channels {
  int unit, units;    // channels of a unit, units of a convolution group
  int pitch, padded;  // channels of a unit in memory, along the summed axis
  int blocks;         // tiles that the units of a group fill
};

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
  int b, p;          // image, pixel in it
  int origin[AXES];  // input pixel of the kernel's first tap
  template <class I> PYDEFORM_DEVICE OutputPixel(I m, const Geometry& g) {
    const I pixels = out_pixels_of<I>(g);
    b = (int)(m / pixels);
    p = (int)(m - b * pixels);
    take_apart(origin, p, g.out_size);
#pragma unroll
    for (int a = 0; a < AXES; a++) origin[a] = origin[a] * g.stride[a] - g.pad[a];
  }
};

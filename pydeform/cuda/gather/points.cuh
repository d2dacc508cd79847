// Where a sample reads and how much it counts (docs/math/gather.md, eq. 1 and 6). The twin of cpu/gather/places.py: the
// same operations in the same order, none fused, so that both backends put a sample on the same side of every pixel.
//
// The struct GatherGeometry stands before all headers: core/source.py. An image has fewer than 2^31 pixels, a map fewer
// than 2^27 columns; I is the type for places in whole arrays. TLocation and TReference are the types of locations and
// reference points: T, or float where T is a half type, with the same Compute.
#pragma once
#include "core/words.cuh"
#include "sampling/axes.cuh"

constexpr int BILINEAR = 0, BILINEAR_INSIDE = 1, DISCRETE = 2;  // `rule`, as in _gather_geometry.py
constexpr int GATHER_THREADS = 256;

// What a sample has in every query and group, a row of `SampleTable`; behind the samples there is a row for each map, in
// the order of their pixels, of which only `size` and what begins with `first` counts. Axes in the order y, x.
template <class A> struct __align__(8) SampleRow {
  int level, size[2], first_pixel, first_cell, number, weight, unused;
  A shift[2], scale[2], divisor[2];
};

// The table, some words at a time: a kernel's arguments reach the device in the order of the launches and need no memory
// of the host that somebody would have to keep.
struct TableWords {
  unsigned w[896];
};
__global__ void __launch_bounds__(GATHER_THREADS)
    fill_table(unsigned* __restrict__ table, TableWords words, int count) {
  for (int i = threadIdx.x; i < count; i += GATHER_THREADS) table[i] = words.w[i];
}

// The pixels that a sample reads, before any is read.
template <class A> struct Point {
  int place;    // in its image, of the corner that is near on both axes, should the map have it
  int corners;  // a bit for each one that it has, and above these the width of the map; 0: this is no point of a sum
  A within[2];  // place in the cell along each axis, from 0 to 1; all NaN where a coordinate is
  A weight;
  int cell;  // among those of its image; only where some corner is read

  PYDEFORM_DEVICE bool exists() const { return corners; }
  PYDEFORM_DEVICE bool reads() const { return corners & 15; }
  PYDEFORM_DEVICE bool reads(int corner) const { return corners >> corner & 1; }
  PYDEFORM_DEVICE int pixel(int corner) const { return place + is_far(corner, 0) * (corners >> 4) + is_far(corner, 1); }
  // That of lane k of each `lanes` lanes; all of a warp call it. The cell stays behind.
  PYDEFORM_DEVICE Point of_lane(int k, int lanes) const {
    Point p;
    p.place = __shfl_sync(0xffffffffu, place, k, lanes);
    p.corners = __shfl_sync(0xffffffffu, corners, k, lanes);
    p.within[0] = __shfl_sync(0xffffffffu, within[0], k, lanes);
    p.within[1] = __shfl_sync(0xffffffffu, within[1], k, lanes);
    p.weight = __shfl_sync(0xffffffffu, weight, k, lanes);
    p.cell = 0;
    return p;
  }
};

template <class A> PYDEFORM_DEVICE Point<A> no_point() { return {0, 0, {0, 0}, 0, 0}; }

// No index is formed from a coordinate that is not known to be in range. NaN reads nothing, and an infinite coordinate is
// outside, but to the discrete rule, which takes the last pixel on its side.
template <class A> PYDEFORM_DEVICE Point<A> point_at(const A (&at)[2], bool counts, const SampleRow<A>& row, int rule) {
  const A lowest = lowest_coordinate<A>(DCNV2);
  const bool broken = at[0] != at[0] || at[1] != at[1];
  Point<A> p;
  p.weight = 0;
  int near[2];
  if (rule == DISCRETE) {
    near[0] = clamped(at[0], row.size[0] - 1);
    near[1] = clamped(at[1], row.size[1] - 1);
    p.within[0] = p.within[1] = broken ? not_a_number<A>() : (A)0;
    p.corners = broken ? 0 : 1;
  } else {
    const bool inside = counts && in_range(at[0], lowest, row.size[0]) && in_range(at[1], lowest, row.size[1]);
    const AxisCorners<A> y = axis_corners(inside ? at[0] : lowest, row.size[0], DCNV2);
    const AxisCorners<A> x = axis_corners(inside ? at[1] : lowest, row.size[1], DCNV2);
    near[0] = y.pixel[0];
    near[1] = x.pixel[0];
    p.within[0] = broken ? not_a_number<A>() : y.place;
    p.within[1] = broken ? not_a_number<A>() : x.place;
    p.corners = 0;
#pragma unroll
    for (int k = 0; k < CORNERS; k++) p.corners |= (inside && y.exists[is_far(k, 0)] && x.exists[is_far(k, 1)]) << k;
  }
  p.corners = counts || broken ? p.corners | row.size[1] << 4 : 0;
  p.place = row.first_pixel + near[0] * row.size[1] + near[1];
  p.cell = row.first_cell + (near[0] + 1) * (row.size[1] + 1) + near[1] + 1;
  return p;
}

// A query of some image, counted through all images.
template <class A, class I> struct Query {
  I number;
  int image;
  A base[2];  // of eq. 1: all but what the sample adds
  PYDEFORM_DEVICE Query(I number, const GatherGeometry& g) : number(number), image((int)(number / g.queries)) {
    const int q = (int)(number - (I)image * g.queries), y = q / g.out_w;
    base[0] = (A)(g.start[0] + g.stride[0] * y) - (A)g.back[0];
    base[1] = (A)(g.start[1] + g.stride[1] * (q - y * g.out_w)) - (A)g.back[1];
  }
};

PYDEFORM_DEVICE float exponential(float v) { return expf(v); }
PYDEFORM_DEVICE double exponential(double v) { return exp(v); }

// Eq. 6: what makes weights of the logits of a query and group. NaN, or an infinite logit, makes all of them NaN.
template <class A> struct Softmax {
  A largest, sum;  // sum 0: weights are given
  PYDEFORM_DEVICE A operator()(A given) const { return sum == 0 ? given : exponential(given - largest) / sum; }
};

// What the caller has given, and what it means.
template <class T, class I, class TLocation, class TReference> struct Samples {
  using A = Compute<T>;
  const TLocation* __restrict__ locations;   // or raw offsets
  const T* __restrict__ weights;             // or logits
  const TReference* __restrict__ reference;  // null: locations and weights are given
  const SampleRow<A>* __restrict__ table;
  const GatherGeometry& g;

  PYDEFORM_DEVICE I number_place(I query, int group, const SampleRow<A>& row) const {
    return query * g.number_steps[1] + (I)group * g.number_steps[2] + row.number;
  }
  PYDEFORM_DEVICE I weight_place(I query, int group, const SampleRow<A>& row) const {
    return query * g.weight_steps[1] + (I)group * g.weight_steps[2] + g.first_weight + row.weight;
  }
  PYDEFORM_DEVICE A given_weight(I query, int group, const SampleRow<A>& row) const {
    return to_float(weights[weight_place(query, group, row)]);
  }
  PYDEFORM_DEVICE I reference_place(I query, int level) const {
    return (query * g.reference_levels + (g.reference_levels > 1 ? level : 0)) * g.reference_numbers;
  }
  // Eq. 6, or the location as given.
  PYDEFORM_DEVICE A location(A given, I query, int axis, const SampleRow<A>& row) const {
    if (!g.reference_numbers) return given;
    const TReference* const to = reference + reference_place(query, row.level);  // x, y, w, h
    A move = given / row.divisor[axis];
    if (g.reference_numbers == 4) move = times(times(move, to_float(to[3 - axis])), (A)g.offset_scale);
    return to_float(to[1 - axis]) + move;
  }

  // Eq. 1. A point of no weight yet.
  PYDEFORM_DEVICE Point<A> at(const Query<A, I>& query, int group, const SampleRow<A>& row) const {
    const I place = number_place(query.number, group, row);
    A at[2];
    bool counts = true;
#pragma unroll
    for (int a = 0; a < 2; a++) {
      const A number = location(to_float(locations[place + 1 - a]), query.number, a, row);
      counts = counts && (g.rule != BILINEAR_INSIDE || (number > 0 && number < 1));
      at[a] = query.base[a] + times(row.shift[a] + number, row.scale[a]);
    }
    return point_at(at, counts, row, g.rule);
  }
  PYDEFORM_DEVICE Point<A> point(const Query<A, I>& query, int group, const SampleRow<A>& row,
                                 const Softmax<A>& softmax) const {
    Point<A> p = at(query, group, row);
    if (p.exists()) p.weight = softmax(given_weight(query.number, group, row));
    return p;
  }

  // By the lanes of a team together, `team` of them.
  PYDEFORM_DEVICE Softmax<A> softmax(I query, int group, int lane, int team) const {
    Softmax<A> s{0, 0};
    if (!g.reference_numbers) return s;
    s.largest = -(A)__uint_as_float(0x7f800000u);
    for (int i = lane; i < g.samples; i += team) s.largest = max(s.largest, given_weight(query, group, table[i]));
    for (int step = team / 2; step; step /= 2)
      s.largest = max(s.largest, __shfl_xor_sync(0xffffffffu, s.largest, step));
    for (int i = lane; i < g.samples; i += team) s.sum += exponential(given_weight(query, group, table[i]) - s.largest);
    for (int step = team / 2; step; step /= 2) s.sum += __shfl_xor_sync(0xffffffffu, s.sum, step);
    return s;
  }
};

// Lanes that share one item of work: `lanes` on the channels, and as many times that as make a `team`, on other samples.
struct Team {
  int lanes, team;
  PYDEFORM_DEVICE int lane() const { return threadIdx.x % team; }
  PYDEFORM_DEVICE int chunk() const { return threadIdx.x % lanes; }
  PYDEFORM_DEVICE int in_block() const { return threadIdx.x / team; }
  // Which of `team` samples the lane locates: those that are used at once follow one another, so that neighbours that do
  // not count, as the scales of a camera, leave as many steps as they can.
  PYDEFORM_DEVICE int own() const { return chunk() * (team / lanes) + lane() / lanes; }
  // A bit for each step in which some lane of the warp has a point to use. All of a warp call it.
  PYDEFORM_DEVICE unsigned due(bool exists) const {
    unsigned live = __ballot_sync(0xffffffffu, exists);
    for (int step = lanes; step < 32; step *= 2) live |= live >> step;
    return live & 0xffffffffu >> (32 - lanes);
  }
  template <class A> PYDEFORM_DEVICE void add_up(A& sum, int from, int below) const {
    for (int step = from; step < below; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
};

// BYTES of channels at each corner, zeros where there is none. `channel`: these channels of the image's first pixel.
template <int BYTES, class T, class A, class I>
PYDEFORM_DEVICE void load_corners(Words<BYTES> (&words)[CORNERS], const T* __restrict__ channel, const Point<A>& point,
                                  I pitch) {
  const T* const upper = channel + point.place * pitch;
  const T* const rows[2] = {upper, upper + (point.corners >> 4) * pitch};
#pragma unroll
  for (int k = 0; k < CORNERS; k++)
    words[k] = point.reads(k) ? load_words<BYTES>(rows[is_far(k, 0)] + is_far(k, 1) * pitch) : Words<BYTES>{};
}

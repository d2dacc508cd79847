// Gradients of weights and locations (docs/math/gather.md, eq. 3, 4 and 6), without atomics: every number has one owner,
// which sums in one order. Dots of grad_output with the corners of a sample come from all channels of its group.
#pragma once
#include "gather/points.cuh"

// The channels of an image and of a query's row of grad_output; and of the latter what a lane has of one group, if that
// is no more than one load. `group` -1: an owner has many.
template <class T, int BYTES> struct Channels {
  const T *image, *grad;
  int kept_group;
  Words<BYTES> kept;
  PYDEFORM_DEVICE Channels(const T* image, const T* grad, int group, const Team& team, const GatherGeometry& g)
      : image(image), grad(grad), kept_group(-1), kept() {
    const int channel = team.chunk() * NUMBERS<T, BYTES>;
    if (group < 0 || team.lanes * NUMBERS<T, BYTES> < g.channels || channel >= g.channels) return;
    kept_group = group;
    kept = load_words<BYTES>(grad + group * g.channels + channel);
  }
};

// A lane's part of the dots of grad_output with the four corners of a point, which is in channels of `group`.
template <class T, class I, int BYTES>
PYDEFORM_DEVICE void dots_of_lane(Compute<T> (&dot)[CORNERS], const Point<Compute<T>>& point, int group,
                                  const Channels<T, BYTES>& from, const Team& team, const GatherGeometry& g) {
  constexpr int V = NUMBERS<T, BYTES>;
  const I pitch = (I)g.groups * g.channels, channel0 = (I)group * g.channels;
#pragma unroll
  for (int c = 0; c < CORNERS; c++) dot[c] = 0;
  if (!point.exists()) return;
  for (int channel = team.chunk() * V; channel < g.channels; channel += team.lanes * V) {
    const Words<BYTES> grad = group == from.kept_group ? from.kept : load_words<BYTES>(from.grad + channel0 + channel);
    if (!point.reads()) {  // a gradient that is not finite makes NaN of the zeros outside
#pragma unroll
      for (int e = 0; e < V; e++) dot[0] += 0 * number_in<T, BYTES>(grad, e);
      continue;
    }
    Words<BYTES> words[CORNERS];
    load_corners(words, from.image + channel0 + channel, point, pitch);
#pragma unroll
    for (int c = 0; c < CORNERS; c++)
#pragma unroll
      for (int e = 0; e < V; e++) dot[c] += number_in<T, BYTES>(grad, e) * number_in<T, BYTES>(words[c], e);
  }
}

// Of two samples a lane keeps one and gives the other to the lane `step` further, which has this one.
template <class A>
PYDEFORM_DEVICE void share_dots(A (&dot)[CORNERS], const A (&first)[CORNERS], const A (&second)[CORNERS], int step) {
  const bool keeps_second = threadIdx.x & step;
#pragma unroll
  for (int c = 0; c < CORNERS; c++)
    dot[c] =
        (keeps_second ? second[c] : first[c]) + __shfl_xor_sync(0xffffffffu, keeps_second ? first[c] : second[c], step);
}

// All of the dots of each lane's own point, into zeros. Points go around in the same way as forward; where there are lanes enough,
// four of them at a time, whose dots then need a third of the exchanges.
template <class T, class I, int BYTES>
PYDEFORM_DEVICE void dots_of_team(Compute<T> (&own_dot)[CORNERS], const Point<Compute<T>>& own, int group,
                                  const Channels<T, BYTES>& from, const Team& team, const GatherGeometry& g) {
  using A = Compute<T>;
  const bool by_four = team.lanes >= 4;
  const unsigned due = team.due(own.exists());
  for (int k = 0; k < team.lanes && due >> k; k += by_four ? 4 : 1) {
    if (!(due >> k & (by_four ? 15 : 1))) continue;
    A dot[CORNERS];
    if (by_four) {
      A part[4][CORNERS], half[2][CORNERS];
#pragma unroll
      for (int j = 0; j < 4; j++)
        dots_of_lane<T, I, BYTES>(part[j], own.of_lane(k + j, team.lanes),
                                  __shfl_sync(0xffffffffu, group, k + j, team.lanes), from, team, g);
      share_dots(half[0], part[0], part[2], 2);
      share_dots(half[1], part[1], part[3], 2);
      share_dots(dot, half[0], half[1], 1);
    } else {
      dots_of_lane<T, I, BYTES>(dot, own.of_lane(k, team.lanes), __shfl_sync(0xffffffffu, group, k, team.lanes), from,
                                team, g);
    }
    const bool mine = by_four ? team.chunk() / 4 == k / 4 : team.chunk() == k;
#pragma unroll
    for (int c = 0; c < CORNERS; c++) {
      team.add_up(dot[c], by_four ? 4 : 1, team.lanes);
      if (mine) own_dot[c] = dot[c];
    }
  }
}

// Eq. 3 and 4 where locations and weights are given. `places`: 0, or how many places a query has, each of as many
// samples, one after the other, and all groups.
// Owner: a team of lanes has one group of a query; or, with `places`, one of these, and sums their gradient.
template <class T, class I, int BYTES, class TLocation = T>
__global__ void __launch_bounds__(GATHER_THREADS, 2)
    number_gradients(const T* __restrict__ grad_output, const T* __restrict__ value,
                     const TLocation* __restrict__ locations, const T* __restrict__ weights,
                     const SampleRow<Compute<T>>* __restrict__ table, TLocation* __restrict__ grad_locations,
                     T* __restrict__ grad_weights, GatherGeometry g, Team team, int places) {
  using A = Compute<T>;
  const int owners = places ? places : g.groups, own_samples = places ? g.samples / places : g.samples;
  const int spread = places ? g.groups : 1;  // groups of an owner; they are the faster ones
  const I items = (I)g.batch * g.queries * owners;
  const I item = (I)blockIdx.x * (GATHER_THREADS / team.team) + team.in_block();
  const I some = min(item, items - 1), number = some / owners;
  const int owner = (int)(some - number * owners), count = own_samples * spread;
  const Samples<T, I, TLocation, T> samples{locations, weights, nullptr, table, g};
  const Query<A, I> query(number, g);
  const I pitch = (I)g.groups * g.channels;
  const Channels<T, BYTES> channels(value + (I)query.image * g.pixels * pitch, grad_output + number * pitch,
                                    places ? -1 : owner, team, g);
  A total[2] = {};
  for (int first = 0; first < count; first += team.team) {
    const int i = first + team.own();
    const bool exists = item < items && i < count;
    const int s = i / spread, group = places ? i - s * spread : owner;
    Point<A> point = no_point<A>();
    SampleRow<A> row;
    if (exists) {
      row = table[places ? owner * own_samples + s : s];
      point = samples.point(query, group, row, Softmax<A>{0, 0});
    }
    A dot[CORNERS] = {}, gradient, along[2];
    dots_of_team<T, I, BYTES>(dot, point, exists ? group : 0, channels, team, g);
    if (!exists) continue;
    dots_of_corners(dot, point.within, gradient, along);
    if (grad_weights) grad_weights[samples.weight_place(number, group, row)] = from_float<T>(gradient);
    const I place = samples.number_place(number, group, row);
#pragma unroll
    for (int a = 0; a < 2; a++) {
      const A move = point.weight * (row.scale[a] * along[a]);
      if (places)
        total[a] += move;
      else if (grad_locations)
        grad_locations[place + 1 - a] = from_float<TLocation>(move);
    }
  }
  if (!places || !grad_locations) return;
  team.add_up(total[0], 1, team.team);
  team.add_up(total[1], 1, team.team);
  if (item >= items || team.lane() > 0) return;
  const I place = samples.number_place(number, 0, table[owner * own_samples]);
  grad_locations[place] = from_float<TLocation>(total[1]);
  grad_locations[place + 1] = from_float<TLocation>(total[0]);
}

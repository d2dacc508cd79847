// Gradients of weights and locations (docs/math/gather.md, eq. 3, 4 and 6), without atomics: every number has one owner,
// which sums in one order. Dots of grad_output with the corners of a sample come from all channels of its group.
#pragma once
#include "gather/points.cuh"

// Pointers to a lane's channels: of the first group in the image, and in the query's row of grad_output.
template <class T> struct Channels {
  const T *image, *grad;
};

// Dots of grad_output with the four corners of each lane's own point, which is in channels of `group`. Samples go around
// in the same way as forward, so `lanes` neighbours have each its own.
template <class T, class I, int BYTES>
PYDEFORM_DEVICE void dots_of_team(Compute<T> (&own_dot)[CORNERS], const Point<Compute<T>>& own, int group, int count,
                                  const Channels<T>& from, const Team& team, const GatherGeometry& g) {
  using A = Compute<T>;
  constexpr int V = NUMBERS<T, BYTES>;
  const I pitch = (I)g.groups * g.channels;
  for (int k = 0; k < team.lanes && k < count; k++) {
    const Point<A> point = own.of_lane(k, team.lanes);
    const I channel0 = (I)__shfl_sync(0xffffffffu, group, k, team.lanes) * g.channels;
    A dot[CORNERS] = {};
    for (int channel = team.chunk() * V; channel < g.channels; channel += team.lanes * V) {
      const Words<BYTES> grad = load_words<BYTES>(from.grad + channel0 + channel);
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
#pragma unroll
    for (int c = 0; c < CORNERS; c++) {
      team.add_up(dot[c], 1, team.lanes);
      if (team.chunk() == k) own_dot[c] = dot[c];
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
  const Channels<T> channels{value + (I)query.image * g.pixels * pitch, grad_output + number * pitch};
  A total[2] = {};
  for (int first = 0; first < count; first += team.team) {
    const int i = first + team.lane();
    const bool exists = item < items && i < count;
    const int s = i / spread, group = places ? i - s * spread : owner;
    Point<A> point = no_point<A>();
    SampleRow<A> row;
    if (exists) {
      row = table[places ? owner * own_samples + s : s];
      point = samples.at(query, group, row);
      point.weight = samples.given_weight(number, group, row);
    }
    A dot[CORNERS] = {}, gradient, along[2];
    dots_of_team<T, I, BYTES>(dot, point, exists ? group : 0, count - first, channels, team, g);
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

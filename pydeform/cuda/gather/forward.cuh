// Sums of weighted samples (docs/math/gather.md, eq. 2), and the part of the value's gradient that each of them gives
// back (eq. 5), added in no order.
//
// Pixels are read as they lie, (N, S, groups, channels): the lanes of a team have BYTES of channels each, and where there
// are too few teams for the device, several runs of such lanes share the samples of one.
#pragma once
#include "gather/points.cuh"

// On a multiprocessor.
template <class T, class I> constexpr int FORWARD_BLOCKS = sizeof(T) == 8 || sizeof(I) == 8 ? 2 : 4;

// What one team works on: a run of channels of a group of a query.
template <class T, class I, int BYTES> struct Run {
  static constexpr int V = NUMBERS<T, BYTES>;
  I query;
  int group, channel;
  bool exists;  // such a run, and channels of it for this lane
  I in_query;   // place of the lane's channels among those of a query, and of a pixel

  PYDEFORM_DEVICE Run(const Team& team, const GatherGeometry& g) {
    const int runs = ceil_div(g.channels, team.lanes * V);
    const I items = (I)g.batch * g.queries * g.groups * runs;
    const I item = (I)blockIdx.x * (GATHER_THREADS / team.team) + team.in_block();
    const I some = min(item, items - 1), slot = some / runs;  // all of a warp take part in its exchanges
    query = slot / g.groups;
    group = (int)(slot - query * g.groups);
    channel = ((int)(some - slot * runs) * team.lanes + team.chunk()) * V;
    exists = item < items && channel < g.channels;
    if (channel >= g.channels) channel = 0;
    in_query = (I)group * g.channels + channel;
  }
};

// The samples of a query and group, one after the other, for the lanes that share them: use(point).
template <class A, class AllSamples, class AnyQuery, class Use>
PYDEFORM_DEVICE void for_each_sample(const AllSamples& samples, const AnyQuery& query, int group, const Team& team,
                                     Use use) {
  const GatherGeometry& g = samples.g;
  const Softmax<A> softmax = samples.softmax(query.number, group, team.lane(), team.team);
  for (int first = 0; first < g.samples; first += team.team) {
    Point<A> own = no_point<A>();
    if (first + team.own() < g.samples) {
      const SampleRow<A> row = samples.table[first + team.own()];
      own = samples.point(query, group, row, softmax);
    }
    for (unsigned due = team.due(own.exists()); due; due &= due - 1) use(own.of_lane(__ffs(due) - 1, team.lanes));
  }
}

// Eq. 2: output (N*Lq, groups*channels).
// Owner: a team of lanes has a run of channels of one group of one query.
template <class T, class I, int BYTES, class TLocation = T, class TReference = T>
__global__ void __launch_bounds__(GATHER_THREADS, FORWARD_BLOCKS<T, I>)
    gather_samples(const T* __restrict__ value, const TLocation* __restrict__ locations, const T* __restrict__ weights,
                   const TReference* __restrict__ reference, const SampleRow<Compute<T>>* __restrict__ table,
                   T* __restrict__ output, GatherGeometry g, Team team) {
  using A = Compute<T>;
  constexpr int V = NUMBERS<T, BYTES>;
  const Run<T, I, BYTES> run(team, g);
  const Query<A, I> query(run.query, g);
  const I pitch = (I)g.groups * g.channels;
  const T* const image = value + (I)query.image * g.pixels * pitch + run.in_query;
  const Samples<T, I, TLocation, TReference> samples{locations, weights, reference, table, g};
  A sum[V] = {};
  const auto add = [&](const Point<A>& point) {
    if (!point.reads()) {
      const A nothing = point.weight * (0 * point.within[0]);  // NaN for NaN, and for an infinite weight
#pragma unroll
      for (int e = 0; e < V; e++) sum[e] += nothing;
      return;
    }
    Words<BYTES> words[CORNERS];
    load_corners(words, image, point, pitch);
    A w[CORNERS];
    corner_weights(w, point.within, (A)1);
#pragma unroll
    for (int e = 0; e < V; e++) {
      A blend = w[0] * number_in<T, BYTES>(words[0], e);
#pragma unroll
      for (int k = 1; k < CORNERS; k++) blend += w[k] * number_in<T, BYTES>(words[k], e);
      sum[e] += point.weight * blend;  // not in the shares, of which an infinite weight would make NaN
    }
  };
  for_each_sample<A>(samples, query, run.group, team, add);
#pragma unroll
  for (int e = 0; e < V; e++) team.add_up(sum[e], team.lanes, team.team);
  if (run.exists && team.lane() < team.lanes) store_numbers<T, BYTES>(output + run.query * pitch + run.in_query, sum);
}

// Eq. 5: sums (N, S, groups, channels) += weight * share of the corner * grad_output, by atomics.
// Owner: a team of lanes has a run of channels of one group of one query.
template <class T, class I, int BYTES, class TLocation = T, class TReference = T>
__global__ void __launch_bounds__(GATHER_THREADS, FORWARD_BLOCKS<T, I>)
    scatter_samples(const T* __restrict__ grad_output, const TLocation* __restrict__ locations,
                    const T* __restrict__ weights, const TReference* __restrict__ reference,
                    const SampleRow<Compute<T>>* __restrict__ table, Compute<T>* __restrict__ sums, GatherGeometry g,
                    Team team) {
  using A = Compute<T>;
  constexpr int V = NUMBERS<T, BYTES>;
  const Run<T, I, BYTES> run(team, g);
  const Query<A, I> query(run.query, g);
  const I pitch = (I)g.groups * g.channels;
  A* const image = sums + (I)query.image * g.pixels * pitch + run.in_query;
  const Words<BYTES> grad = load_words<BYTES>(grad_output + run.query * pitch + run.in_query);
  const Samples<T, I, TLocation, TReference> samples{locations, weights, reference, table, g};
  const auto add = [&](const Point<A>& point) {
    if (!run.exists) return;
    A w[CORNERS];
    corner_weights(w, point.within, point.weight);
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {
      if (!point.reads(k)) continue;
      A part[V];
#pragma unroll
      for (int e = 0; e < V; e++) part[e] = w[k] * number_in<T, BYTES>(grad, e);
      add_numbers(image + point.pixel(k) * pitch, part);
    }
  };
  for_each_sample<A>(samples, query, run.group, team, add);
}

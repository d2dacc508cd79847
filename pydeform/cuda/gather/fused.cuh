// Gradients of raw offsets, logits and reference points (docs/math/gather.md, eq. 6), from those of locations and weights
// (eq. 3 and 4), which stay in shared memory.
#pragma once
#include "gather/backward.cuh"

// What a block keeps of the samples of its rows, each a query and group. Where no reference point's gradient is wanted
// there are no moves.
template <class A> struct FusedRows {
  A *of_weights, *of_locations, *totals;  // (row, sample), (row, sample, axis), (query, level, number)
  int rows;
  PYDEFORM_DEVICE FusedRows(A* shared, int rows, int samples, bool reference)
      : of_weights(shared),
        of_locations(shared + (reference ? rows * samples : 0)),
        totals(shared + (reference ? 3 : 1) * rows * samples),
        rows(rows) {}
};

// Adds the gradients of locations of the block's rows from `first_row` on to those of the reference points, in the order
// of groups and samples.
// Owner: a thread has some numbers of the block's reference points.
template <class A, class AllSamples, class I>
PYDEFORM_DEVICE void add_rows(const FusedRows<A>& kept, const AllSamples& samples, int first_row, I first_query,
                              int queries) {
  const GatherGeometry& g = samples.g;
  const int numbers = g.reference_levels * g.reference_numbers;
  for (int i = threadIdx.x; i < queries * numbers; i += blockDim.x) {
    const int q = i / numbers, level = (i - q * numbers) / g.reference_numbers, number = i % g.reference_numbers;
    const int axis = 1 - number % 2;
    const int begin = max(q * g.groups, first_row), end = min((q + 1) * g.groups, first_row + kept.rows);
    A total = kept.totals[i];
    for (int row = begin; row < end; row++) {
      for (int s = 0; s < g.samples; s++) {
        const SampleRow<A>& sample = samples.table[s];
        if (g.reference_levels > 1 && sample.level != level) continue;
        A part = kept.of_locations[((row - first_row) * g.samples + s) * 2 + axis];
        if (number >= 2 && part != 0) {  // of the box's size; an infinite offset leads outside
          const I place = samples.number_place(first_query + q, row - q * g.groups, sample) + 1 - axis;
          part *= to_float(samples.locations[place]) / sample.divisor[axis] * (A)g.offset_scale;
        }
        total += part;
      }
    }
    kept.totals[i] = total;
  }
}

// Eq. 6.
// Owner: a block has `queries` queries with all groups, a team of lanes one group of one; and the gradients of their
// reference points, which are sums over all groups.
template <class T, class I, int BYTES, class TLocation = T, class TReference = T>
__global__ void __launch_bounds__(GATHER_THREADS, sizeof(T) == 8 ? 1 : 2)
    fused_gradients(const T* __restrict__ grad_output, const T* __restrict__ value,
                    const TLocation* __restrict__ offsets, const T* __restrict__ logits,
                    const TReference* __restrict__ reference, const SampleRow<Compute<T>>* __restrict__ table,
                    TLocation* __restrict__ grad_offsets, T* __restrict__ grad_logits,
                    TReference* __restrict__ grad_reference, GatherGeometry g, Team team, int queries) {
  using A = Compute<T>;
  PYDEFORM_DYNAMIC_SHARED(A, shared);
  const int rows = blockDim.x / team.team, own_row = team.in_block();
  const FusedRows<A> kept(shared, rows, g.samples, grad_reference != nullptr);
  const Samples<T, I, TLocation, TReference> samples{offsets, logits, reference, table, g};
  const I first_query = (I)blockIdx.x * queries, pitch = (I)g.groups * g.channels;
  const int own_queries = (int)min((I)queries, (I)g.batch * g.queries - first_query);
  const int numbers = own_queries * g.reference_levels * g.reference_numbers;
  if (grad_reference)
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) kept.totals[i] = 0;
  for (int first_row = 0; first_row < own_queries * g.groups; first_row += rows) {
    const bool mine = first_row + own_row < own_queries * g.groups;
    const int row = mine ? first_row + own_row : first_row, q = row / g.groups, group = row - q * g.groups;
    const Query<A, I> query(first_query + q, g);
    const Channels<T, BYTES> channels(value + (I)query.image * g.pixels * pitch, grad_output + query.number * pitch,
                                      group, team, g);
    const Softmax<A> softmax = samples.softmax(query.number, group, team.lane(), team.team);
    A mean = 0;  // of the weights' gradients, weighted
    for (int first = 0; first < g.samples; first += team.team) {
      const int s = first + team.own();
      const bool exists = mine && s < g.samples;
      Point<A> point = no_point<A>();
      SampleRow<A> sample;
      if (exists) {
        sample = table[s];
        point = samples.point(query, group, sample, softmax);
      }
      A dot[CORNERS] = {}, gradient, along[2];
      dots_of_team<T, I, BYTES>(dot, point, group, channels, team, g);
      if (!exists) continue;
      dots_of_corners(dot, point.within, gradient, along);
      const int slot = own_row * g.samples + s;
      kept.of_weights[slot] = gradient;
      mean += point.weight * gradient;
      const I place = samples.number_place(query.number, group, sample);
      const TReference* const to = reference + samples.reference_place(query.number, sample.level);
#pragma unroll
      for (int a = 0; a < 2; a++) {
        A move = point.weight * (sample.scale[a] * along[a]);
        if (grad_reference) kept.of_locations[2 * slot + a] = move;
        move /= sample.divisor[a];
        if (g.reference_numbers == 4) move *= to_float(to[3 - a]) * (A)g.offset_scale;
        if (grad_offsets) grad_offsets[place + 1 - a] = from_float<TLocation>(move);
      }
    }
    team.add_up(mean, 1, team.team);
    if (mine && grad_logits) {
      for (int s = team.own(); s < g.samples; s += team.team) {
        const I place = samples.weight_place(query.number, group, table[s]);
        const A weight = softmax(to_float(logits[place]));
        grad_logits[place] = from_float<T>(weight * (kept.of_weights[own_row * g.samples + s] - mean));
      }
    }
    if (!grad_reference) continue;
    __syncthreads();
    add_rows<A>(kept, samples, first_row, first_query, own_queries);
    __syncthreads();
  }
  if (!grad_reference) return;
  for (int i = threadIdx.x; i < numbers; i += blockDim.x)  // each thread has its own totals
    grad_reference[first_query * (g.reference_levels * g.reference_numbers) + i] =
        from_float<TReference>(kept.totals[i]);
}

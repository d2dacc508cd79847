// From a box and an offset to what a bin reads on each axis (docs/math/roi.md, eq. 1 to 4, 10 and 11): pixels, their
// weights and derivatives. The twin of cpu/roi/bins.py. Each field of `Rules` is one line here, marked with its name.
//
// A box may be longer than any integer, so points are numbered in floating point, and only those that count are looked
// at: they follow each other. Of very many, those between the same two pixels are taken together. No integer is made
// from a number that is not known to be in range.
#pragma once
#include "core/numbers.cuh"

constexpr int EXACT = 0, AFTER_SCALE = 1, BEFORE_SCALE = 2;  // `rounding`, as in _roi_geometry.py
constexpr int FEW_POINTS = 4;      // so few are all looked at; of more, those that can matter are found by division
constexpr int MANY_POINTS = 4096;  // more are taken pixel by pixel, as a walk
// Bits of Axis::walk.
constexpr int MANY = 1;       // the points are a walk
constexpr int BEFORE = 2;     // points that do not count come before those that do, or no point counts
constexpr int AFTER = 4;      // points that do not count come after those that do
constexpr int BACKWARDS = 8;  // the last point has the lowest coordinate

PYDEFORM_DEVICE float round_up(float v) { return ceilf(v); }
PYDEFORM_DEVICE double round_up(double v) { return ceil(v); }
PYDEFORM_DEVICE float round_nearest(float v) { return roundf(v); }  // halves away from zero
PYDEFORM_DEVICE double round_nearest(double v) { return round(v); }
template <class A> PYDEFORM_DEVICE A magnitude(A v) { return v < 0 ? -v : v; }
template <class A> PYDEFORM_DEVICE bool is_finite(A v) { return v - v == 0; }
template <class A> PYDEFORM_DEVICE A epsilon() { return sizeof(A) == 8 ? (A)0x1p-52 : (A)0x1p-23; }

// As wide as a weight, so that a tap of weights is one load, without padding.
template <class A> struct PixelOf {
  using type = int;
};
template <> struct PixelOf<double> {
  using type = long long;
};

// One axis of a box, eq. 1.
template <class A> struct Extent {
  A begin, size;
  bool sound;  // begin, end and size are finite
};

template <class A> PYDEFORM_DEVICE Extent<A> extent_of(A begin, A end, const RoiGeometry& g) {
  const A scale = (A)g.spatial_scale;
  const A last_pixel = (A)g.last_pixel;                                                                 // last_pixel
  if (g.rounding == BEFORE_SCALE) begin = round_nearest(begin), end = round_nearest(end) + last_pixel;  // rounding
  begin = times(begin, scale), end = times(end, scale);
  if (g.rounding == AFTER_SCALE) begin = round_nearest(begin), end = round_nearest(end) + last_pixel;  // rounding
  if (g.half_pixel) begin -= (A)0.5, end -= (A)0.5;                                                    // half_pixel
  Extent<A> e;
  e.begin = begin;
  e.size = max(end - begin, (A)g.least_size);  // least_size
  e.sound = is_finite(begin) && is_finite(end) && is_finite(e.size);
  return e;
}

template <class A> struct RoiBox {
  Extent<A> y, x;
  int image;
  bool broken;  // a NaN, or no such image
};

template <class T>
PYDEFORM_DEVICE RoiBox<Compute<T>> read_box(const T* __restrict__ boxes, int r, const RoiGeometry& g) {
  using A = Compute<T>;
  const T* row = boxes + (long long)r * 5;
  const A image = to_float(row[0]), x1 = to_float(row[1]), y1 = to_float(row[2]), x2 = to_float(row[3]),
          y2 = to_float(row[4]);
  const bool exists = image >= 0 && image < (A)g.batch && round_down(image) == image;  // false for NaN
  RoiBox<A> box;
  box.image = exists ? (int)image : 0;
  box.broken = !exists || x1 != x1 || y1 != y1 || x2 != x2 || y2 != y2;
  box.y = extent_of(y1, y2, g);
  box.x = extent_of(x1, x2, g);
  return box;
}

// What a bin reads along one axis.
template <class A> struct Axis {
  A start, bin, n;  // of eq. 3: begin + p*bin + move, the length of the bin, its points
  A first;          // number of the first point that counts
  int points;       // that count, one after the other
  int low, high;    // it reads some of the pixels low <= k < high, or all
  int length;       // of the image
  A count;          // this axis's factor of what the mean divides by
  int walk;         // bits; with MANY, points are in ascending order: start is the first that counts, bin the step, n 1
  A late,
      pace;  // with MANY: where the first lies in the bin, 0 its begin and 1 its end, and how far each is from there

  // Eq. 3 for the j-th point that counts.
  PYDEFORM_DEVICE A at(int j, const RoiGeometry& g) const {
    return start + times(first + (A)j + (A)g.first_point, bin) / n;  // first_point
  }
  PYDEFORM_DEVICE A last_counting(const RoiGeometry& g) const { return (A)(length - 1) + (A)g.reach; }
  PYDEFORM_DEVICE bool counts(A y, const RoiGeometry& g) const {
    return y >= -(A)g.reach && y <= last_counting(g);  // reach
  }
  // Points between two coordinates have numbers from `low` to `high`; there may be no points of these numbers.
  PYDEFORM_DEVICE void numbers_between(A from, A to, A& low, A& high, A& margin, const RoiGeometry& g) const {
    const A step = bin / n, one = (from - start) / step, other = (to - start) / step;
    const A error = 4 * epsilon<A>() * (magnitude(start) + magnitude(from) + magnitude(to)) / magnitude(step);
    margin = min(error, (A)MANY_POINTS) + 1;
    low = round_down(min(one, other) - (A)g.first_point - margin);
    high = round_up(max(one, other) - (A)g.first_point + margin);
  }
  // How many points of a walk lie below y, or at y as well.
  PYDEFORM_DEVICE int up_to(A y, bool included) const {
    if (bin == 0) return start < y || (included && start == y) ? points : 0;
    const A number = (y - start) / bin;
    return clamped(included ? round_down(number) + 1 : round_up(number), points);
  }
};

// Where a point that counts reads.
template <class A> struct Reading {
  int lower, upper;
  A part;        // weight of the upper pixel
  A slope;       // 1, or 0 where the weights do not change with the coordinate
  A number = 1;  // of points
  PYDEFORM_DEVICE Reading() {}
  PYDEFORM_DEVICE Reading(A y, int length, const RoiGeometry& g) {
    const A highest = (A)(length - 1), inside = min(max(y, (A)0), highest), whole = round_down(inside);
    lower = min((int)whole, length - 1);
    part = inside - whole;
    const bool flat = g.flat_at_pixels && part == 0;  // flat_at_pixels: interpolated between floor and ceil
    upper = flat ? lower : min(lower + 1, length - 1);
    slope = flat || y <= 0 || y >= highest ? (A)0 : (A)1;
  }
};

template <class A> PYDEFORM_DEVICE void read_nothing(Axis<A>& a) { a.points = a.low = a.high = 0; }

// Eq. 4.
template <class A> PYDEFORM_DEVICE void read_pixels(Axis<A>& a, A begin, int p, const RoiGeometry& g) {
  const int end = a.length - g.unread_pixels;  // unread_pixels
  const A from = times((A)p, a.bin), to = times((A)(p + 1), a.bin);
  a.points = 0;
  a.low = clamped(g.bins_from_box ? round_down(from) + begin : round_down(begin + from), end);  // bins_from_box
  a.high = clamped(g.bins_from_box ? round_up(to) + begin : round_up(begin + to), end);         // bins_from_box
  a.high = max(a.low, a.high);
  a.count = (A)(a.high - a.low);
}

// Eq. 3 with very many points: those that count, numbered from a point near the image, since far from the image their
// coordinates are rounded to whole pixels or worse.
//
// Points count from `lowest` to `highest`.
template <class A>
PYDEFORM_DEVICE void walk_points(Axis<A>& a, A lowest, A highest, A& one, A& other, const RoiGeometry& g) {
  const A n = a.n, first_point = (A)g.first_point;  // first_point
  A step = a.bin / n, near = 0, origin;
  if (g.samples > 0) {
    if (step != 0) {
      near = (lowest - a.start) / step - first_point;
      near = min(max(step > 0 ? round_up(near) : round_down(near), (A)0), n);
    }
    const bool fits = is_finite(times(a.bin, n));  // else some point of the bin would overflow
    origin = a.start + times(near + first_point, fits ? a.bin : step) / (fits ? n : (A)1);
  } else {
    // A step is a bit less than a pixel: start + near and n - bin are exact, and near 0 and 1.
    near = min(max(round_down(-a.start), (A)0), n);
    origin = (a.start + near) - times(near, (n - a.bin) / n) + times(first_point, step);
  }
  A least = -near, most = (n - near) - 1;  // numbers of the first and the last point, from there on
  const bool backwards = step < 0;
  a.pace = 1 / n;
  if (backwards) {
    const A turned = least;
    least = -most, most = -turned, step = -step, a.pace = -a.pace;
  }
  A first = least, last = most;
  if (step > 0) {
    first = max(least, round_up((lowest - origin) / step));
    last = min(most, round_down((highest - origin) / step));
    if (first > least && origin + times(first - 1, step) >= lowest) {
      first -= 1;
    } else if (origin + times(first, step) < lowest) {
      first += 1;
    }
    if (last < most && origin + times(last + 1, step) <= highest) {
      last += 1;
    } else if (origin + times(last, step) > highest) {
      last -= 1;
    }
  } else if (!(origin >= lowest && origin <= highest)) {
    last = first - 1;
  }
  const bool some = first <= last, before = some && first > least, after = some && last < most;
  a.walk = MANY | (backwards ? BACKWARDS : 0) | (!some || (backwards ? after : before) ? BEFORE : 0) |
           ((backwards ? before : after) ? AFTER : 0);
  if (!some) return;
  a.points = clamped(last - first + 1, 0x7fffffff);
  a.late = (near + first_point) / n + times(first, a.pace);
  a.start = origin + times(first, step);
  a.bin = step;
  a.n = 1;
  a.first = -first_point;
  one = a.start;
  other = origin + times(last, step);
}

// Eq. 3 with fewer points, n: those that count, and where the first and the last of them lie.
template <class A> PYDEFORM_DEVICE void find_points(Axis<A>& a, A n, A& one, A& other, const RoiGeometry& g) {
  const A step = a.bin / a.n, last = n - 1;
  if (n <= (A)FEW_POINTS) {
    a.points = (int)n;
  } else if (step == 0) {
    a.points = a.counts(a.at(0, g), g) ? (int)n : 0;
  } else {
    const A from = -(A)g.reach, to = a.last_counting(g);
    A low, high, margin;
    a.numbers_between(from, to, low, high, margin, g);
    a.first = min(max(low, (A)0), last);
    a.points = (int)(min(max(high, (A)0), last) - a.first) + 1;
  }
  one = a.at(0, g);
  while (a.points > 0 && !a.counts(one, g)) {
    a.points--;
    a.first += 1;
    one = a.at(0, g);
  }
  while (a.points > 0 && !a.counts(other = a.at(a.points - 1, g), g)) a.points--;
  a.walk = (a.points == 0 || a.first > 0 ? BEFORE : 0) | (a.first + (A)a.points < n ? AFTER : 0);
}

// Eq. 3.
template <class A> PYDEFORM_DEVICE void read_points(Axis<A>& a, const RoiGeometry& g) {
  const A n = g.samples > 0 ? (A)g.samples : round_up(a.bin);
  a.n = n;
  a.first = 0;
  read_nothing(a);
  if (n > 0 && is_finite(a.start)) {
    A one, other;
    if (n > (A)MANY_POINTS) {
      walk_points(a, -(A)g.reach, a.last_counting(g), one, other, g);
    } else {
      if (!is_finite(times(a.bin, n))) a.bin /= n, a.n = 1;  // so that no point of the bin overflows
      find_points(a, n, one, other, g);
    }
    if (a.points > 0) {
      const Reading<A> from(one, a.length, g), to(other, a.length, g);
      a.low = min(from.lower, to.lower);
      a.high = max(from.upper, to.upper) + 1;
    }
  }
  a.count = g.count_inside ? (A)a.points : n;  // count_inside
}

// Points from <= j < to of a walk read pixel c and, if there is weight on it, the next one.
template <class A> struct Cell {
  int from, to;
  PYDEFORM_DEVICE Cell(const Axis<A>& a, int c) {
    from = c > 0 ? a.up_to((A)c, false) : 0;
    to = c < a.length - 1 ? a.up_to((A)(c + 1), false) : a.points;
  }
};

// All points of a cell as if they were one.
template <class A> PYDEFORM_DEVICE Reading<A> read_cell(const Axis<A>& a, int c, const RoiGeometry& g) {
  const Cell<A> cell(a, c);
  const bool is_last = c == a.length - 1;
  // The first point between pixel c and the next; points before it read c alone.
  const int inner = is_last ? cell.to : c == 0 ? min(a.up_to(0, true), cell.to) : cell.from;
  const A between = (A)(cell.to - inner), part = min(max(a.at(inner, g) - (A)c, (A)0), (A)1);
  const bool flat = g.flat_at_pixels && part == 0;  // flat_at_pixels
  Reading<A> all;
  all.number = (A)(cell.to - cell.from);
  // The part of the next pixel grows by a step from point to point: a sum in closed form.
  all.part = min(max(between * part + a.bin * (between * (between - 1) / 2), (A)0), between);
  all.slope = !flat ? between : a.bin == 0 ? (A)0 : max(between - 1, (A)0);
  all.lower = c;
  all.upper = is_last || (g.flat_at_pixels && all.slope == 0) ? c : c + 1;
  return all;
}

// Eq. 10: cells are counted as points are. Pixel low is in the first that the bin touches or, for that before the image,
// after it. The last cell may have nothing of the bin.
template <class A> PYDEFORM_DEVICE void read_surface(Axis<A>& a) {
  read_nothing(a);
  const A start = a.start, length = (A)a.length;
  if (!(a.bin > 0 && start < length && start + a.bin > -1)) return;
  a.low = min((int)max(start, (A)0), a.length - 1);
  const int last = clamped(round_up(start + a.bin), a.length - 1);
  a.high = min(last + 2, a.length);
  a.points = last - (start < 0 ? -1 : a.low) + 1;
}

template <class A> PYDEFORM_DEVICE int first_cell(const Axis<A>& a) { return SURFACE && a.start < 0 ? -1 : a.low; }

// What lies of a bin in the cell between pixel c and the next; beyond the image there are zeros. The twin of
// `surface_read`, which says how a small bin keeps its digits.
template <class A> struct Part {
  A left,
      right;  // from the start of the bin to the end of the cell, and from the begin of the cell to the end of the bin
  A share, low, high;  // of the bin, and what of that the two pixels get
  PYDEFORM_DEVICE Part(const Axis<A>& a, int c) {
    const A end = a.start + a.bin, added = end - a.start;
    const A lost = (a.start - (end - added)) + (a.bin - added);
    left = c > first_cell(a) ? (A)2 : a.start < 0 ? -a.start : 1 - (a.start - (A)a.low);
    right = ((end - (A)a.low) - (A)(c - a.low)) + lost;
    const bool inside = left < 1 && right < 1;
    const A width = max(inside ? a.bin : min(min(left, right), (A)1), (A)0);
    const A half = width / 2, place = inside ? 1 - left + half : left < 1 ? 1 - half : half;
    share = width / a.bin;
    low = share * (1 - place);
    high = share * place;
  }
  PYDEFORM_DEVICE A weight(bool upper) const { return upper ? high : low; }
  // Derivatives of the lower or the upper pixel's weight, eq. 11.
  PYDEFORM_DEVICE void edges(A bin, bool upper, A& by_start, A& by_end) const {
    if (bin < 1) {  // the differences below would be of close numbers
      const A half = share / 2, late = left >= 1 ? 1 - half : right < 1 ? (A)0.5 : half, whole = upper ? share : -share;
      by_end = whole * late;
      by_start = whole - by_end;
      return;
    }
    const A at_start = left <= 1 ? upper ? 1 - left : left : (A)0,
            at_end = right <= 1 ? upper ? right : 1 - right : (A)0;
    by_start = (weight(upper) - at_start) / bin;
    by_end = (at_end - weight(upper)) / bin;
  }
};

// A part as if it were one point. Of two pixels that are one each gets a half, so that none has the weight 0.
template <class A> PYDEFORM_DEVICE Reading<A> read_part(const Axis<A>& a, int c) {
  const Part<A> part(a, c);
  Reading<A> all;
  all.lower = max(c, 0);
  all.upper = min(c + 1, a.length - 1);
  all.slope = 0;
  all.number = c < 0 ? part.high : c == a.length - 1 ? part.low : part.low + part.high;
  all.part = all.lower == all.upper ? all.number / 2 : part.high;
  return all;
}

// What a sum goes through: each point or, of a walk and of a surface, each cell.
template <class A> PYDEFORM_DEVICE int readings(const Axis<A>& a) { return a.walk & MANY ? a.high - a.low : a.points; }
template <class A> PYDEFORM_DEVICE Reading<A> reading(const Axis<A>& a, int j, const RoiGeometry& g) {
  if (SURFACE) return read_part(a, first_cell(a) + j);
  return a.walk & MANY ? read_cell(a, a.low + j, g) : Reading<A>(a.at(j, g), a.length, g);
}

// What a maximum is over: all points or, of those of a walk between two pixels, the first and the last. With linear
// interpolation none of the others is larger than both.
template <class A> PYDEFORM_DEVICE unsigned candidates(const Axis<A>& a) {
  return a.walk & MANY ? 2u * (a.high - a.low) : a.points;
}
// Where candidate j lies; false: there is none of this number.
template <class A> PYDEFORM_DEVICE bool candidate(const Axis<A>& a, unsigned j, A& y, const RoiGeometry& g) {
  if (!(a.walk & MANY)) {
    y = a.at((int)j, g);
    return true;
  }
  if (a.walk & BACKWARDS) j = candidates(a) - 1 - j;
  const int c = a.low + (int)(j / 2);
  const Cell<A> cell(a, c);
  y = a.at(j % 2 ? cell.to - 1 : cell.from, g);
  if (c > 0) y = max(y, (A)c);
  return cell.to - cell.from > (int)(j % 2);
}
// Its number among the points that count.
template <class A> PYDEFORM_DEVICE int point_of_candidate(const Axis<A>& a, unsigned j) {
  if (!(a.walk & MANY)) return (int)j;
  if (a.walk & BACKWARDS) j = candidates(a) - 1 - j;
  const Cell<A> cell(a, a.low + (int)(j / 2));
  return j % 2 ? cell.to - 1 : cell.from;
}

// Those that can read pixels k ... k + N - 1: begin <= j < end.
template <int N, class A>
PYDEFORM_DEVICE void readings_near(const Axis<A>& a, int k, int& begin, int& end, const RoiGeometry& g) {
  begin = 0;
  end = a.points;
  if (SURFACE || a.walk & MANY) {
    const int first = first_cell(a);
    begin = max(k - 1 - first, 0);
    end = min(k + N - first, readings(a));
  } else if (end > FEW_POINTS && a.bin / a.n != 0) {
    const A from = k <= 0 ? -(A)g.reach : (A)(k - 1), to = k + N >= a.length ? a.last_counting(g) : (A)(k + N);
    A low, high, margin;
    a.numbers_between(from, to, low, high, margin, g);
    begin = clamped(low - a.first, a.points);
    end = clamped(high - a.first + 1, a.points);
  }
}

// A (w) and A' (slope) of the pixels k ... k + N - 1; bit i of the result says that the bin reads pixel k + i.
template <int N, class A>
PYDEFORM_DEVICE unsigned weights_of(const Axis<A>& a, int k, A (&w)[N], A (&slope)[N], const RoiGeometry& g) {
  unsigned reads = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const bool inside = !SURFACE && !g.points && k + i >= a.low && k + i < a.high;  // points
    w[i] = inside ? 1 : 0;
    slope[i] = 0;
    reads |= (unsigned)inside << i;
  }
  int begin, end;
  readings_near<N>(a, k, begin, end, g);
  for (int j = begin; j < end; j++) {
    const Reading<A> point = reading(a, j, g);
    if (point.number == 0) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (k + i == point.lower) w[i] += point.number - point.part, slope[i] -= point.slope, reads |= 1u << i;
      if (k + i == point.upper) w[i] += point.part, slope[i] += point.slope, reads |= 1u << i;
    }
  }
  return reads;
}

// What a bin reads at a pixel, and how that changes with where the bin begins and where it ends.
template <class A> struct RoiEdge {
  typename PixelOf<A>::type pixel;
  A weight, by_start, by_end;
};

// Where in its bin point j of those that count lies: 0 at the begin, 1 at the end. Only of rules whose mean is over all.
template <class A> PYDEFORM_DEVICE A late_of(const Axis<A>& a, int j, const RoiGeometry& g) {
  return a.walk & MANY ? a.late + times((A)j, a.pace) : (a.first + (A)j + (A)g.first_point) / a.count;
}

// Pixel k, whatever its weight; false: the bin does not read it.
template <class A> PYDEFORM_DEVICE bool read_edge(RoiEdge<A>& edge, const Axis<A>& a, int k, const RoiGeometry& g) {
  edge.pixel = k;
  edge.weight = edge.by_start = edge.by_end = 0;
  bool reads = false;
  int begin, end;
  readings_near<1>(a, k, begin, end, g);
  for (int j = begin; j < end; j++) {
    const Reading<A> point = reading(a, j, g);
    if (point.number == 0 || (k != point.lower && k != point.upper)) continue;
    reads = true;
    if (SURFACE) {
      const Part<A> part(a, first_cell(a) + j);
      const bool upper = k > first_cell(a) + j;
      A by_start, by_end;
      part.edges(a.bin, upper, by_start, by_end);
      edge.weight += part.weight(upper);
      edge.by_start += by_start;
      edge.by_end += by_end;
      continue;
    }
    // Of all points of a cell that move, which are the last of it, in closed form.
    const int latest = a.walk & MANY ? Cell<A>(a, a.low + j).to : j + 1, first = latest - (int)point.slope;
    const A late =
        point.slope * late_of(a, first, g) + (a.walk & MANY ? a.pace * (point.slope * (point.slope - 1) / 2) : (A)0);
    if (k == point.lower) {
      edge.weight += point.number - point.part;
      edge.by_start -= point.slope - late;
      edge.by_end -= late;
    }
    if (k == point.upper) {
      edge.weight += point.part;
      edge.by_start += point.slope - late;
      edge.by_end += late;
    }
  }
  return reads;
}

PYDEFORM_DEVICE int cell_of_bin(int p, int cells, int pooled) { return (int)((long long)p * cells / pooled); }

// The first bin of a cell: the least p with cell_of_bin(p) == cell or more.
PYDEFORM_DEVICE int first_bin(int cell, int cells, int pooled) {
  return (int)(((long long)cell * pooled + cells - 1) / cells);
}

// Place of an offset pair's x in (R, 2*classes, part_h, part_w); that of y is part_h * part_w further.
template <class I> PYDEFORM_DEVICE I offset_place(int r, int py, int px, int label, const RoiGeometry& g) {
  const int ty = cell_of_bin(py, g.part_h, g.pooled_h), tx = cell_of_bin(px, g.part_w, g.pooled_w);
  return (((I)r * g.classes + label) * 2 * g.part_h + ty) * g.part_w + tx;
}

// How the bin `place` (py * pooled_w + px) of box r lies for the channels of class `label`, before any axis is looked at.
template <class A> struct Move {
  A y, x;        // eq. 2
  bool broken;   // NaN, whatever the bin reads
  bool outside;  // infinitely far away: 0
};
// offset may be null.
template <class T, class I>
PYDEFORM_DEVICE Move<Compute<T>> read_move(const RoiBox<Compute<T>>& box, const T* __restrict__ offset, int r, int py,
                                           int px, int label, const RoiGeometry& g) {
  using A = Compute<T>;
  A offset_y = 0, offset_x = 0;
  Move<A> m;
  m.y = m.x = 0;
  if (offset) {
    const I at = offset_place<I>(r, py, px, label, g);
    offset_x = to_float(offset[at]);
    offset_y = to_float(offset[at + (I)g.part_h * g.part_w]);
    m.y = times(times(offset_y, (A)g.offset_scale), box.y.size);
    m.x = times(times(offset_x, (A)g.offset_scale), box.x.size);
  }
  m.broken = box.broken || offset_y != offset_y || offset_x != offset_x;
  m.outside = !(box.y.sound && box.x.sound && is_finite(m.y) && is_finite(m.x));
  return m;
}

// One axis of a bin, its p-th, unless `nothing` is read.
template <class A>
PYDEFORM_DEVICE Axis<A> read_axis(const Extent<A>& box, A move, int p, int pooled, int length, bool nothing,
                                  const RoiGeometry& g) {
  Axis<A> a;
  a.length = length;
  a.bin = box.size / (A)pooled;
  a.start = box.begin + times((A)p, a.bin) + move;
  a.n = a.first = 0;
  a.count = 1;
  a.walk = 0;
  a.late = a.pace = 0;
  read_nothing(a);
  if (nothing) return a;
  if (g.points) {  // points
    read_points(a, g);
  } else if (SURFACE && g.surface) {  // surface
    read_surface(a);
  } else {
    read_pixels(a, box.begin, p, g);
  }
  return a;
}

// What the mean divides by.
template <class A> PYDEFORM_DEVICE A count_of(A y, A x, const Move<A>& m, const RoiGeometry& g) {
  if (m.broken) return not_a_number<A>();
  return !g.least_count ? times(y, x) : max(times(y, x), (A)g.least_count);  // least_count
}

template <class A> struct Bin {
  Axis<A> y, x;
  A count;      // what the mean divides by, NaN for a broken one
  bool broken;  // as in Move
  bool outside;
  PYDEFORM_DEVICE bool reads() const { return y.low < y.high && x.low < x.high; }
};

template <class T, class I>
PYDEFORM_DEVICE Bin<Compute<T>> read_bin(const RoiBox<Compute<T>>& box, const T* __restrict__ offset, int r, int place,
                                         int label, const RoiGeometry& g) {
  using A = Compute<T>;
  const int py = place / g.pooled_w, px = place - py * g.pooled_w;
  const Move<A> m = read_move<T, I>(box, offset, r, py, px, label, g);
  Bin<A> b;
  b.y = read_axis(box.y, m.y, py, g.pooled_h, g.in_h, m.broken || m.outside, g);
  b.x = read_axis(box.x, m.x, px, g.pooled_w, g.in_w, m.broken || m.outside, g);
  b.count = count_of(b.y.count, b.x.count, m, g);
  b.broken = m.broken;
  b.outside = m.outside;
  return b;
}

// mask (R, 1, pooled_h, pooled_w) of a bin; null: 1.
template <class T, class I>
PYDEFORM_DEVICE Compute<T> mask_of(const T* __restrict__ mask, int r, int place, const RoiGeometry& g) {
  return mask ? to_float(mask[(I)r * (g.pooled_h * g.pooled_w) + place]) : (Compute<T>)1;
}

// The group of input channels that a bin reads.
PYDEFORM_DEVICE int group_of_bin(int place, const RoiGeometry& g) {
  const int py = place / g.pooled_w, px = place - py * g.pooled_w;
  return cell_of_bin(py, g.group_h, g.pooled_h) * g.group_w + cell_of_bin(px, g.group_w, g.pooled_w);
}

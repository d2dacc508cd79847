// Boxes that are turned (docs/math/roi.md, eq. 14 and 15): from a box to the points of a bin. The twin of
// cpu/roi/rotated.py. Points are placed along the axes of the box, as eq. 3 places those of a box that is not turned, and
// each is turned by itself; those that cannot lie in a window of the image are not looked at.
#pragma once
#include "roi/bins.cuh"

// Of a box, as turn_boxes writes them: the image, NaN for a broken box, then the first fields of TurnedBox.
constexpr int TURNED_NUMBERS = 9;

PYDEFORM_DEVICE float sine(float v) { return sinf(v); }
PYDEFORM_DEVICE double sine(double v) { return sin(v); }
PYDEFORM_DEVICE float cosine(float v) { return cosf(v); }
PYDEFORM_DEVICE double cosine(double v) { return cos(v); }

template <class A> struct TurnedBox {
  A begin_y, size_y, begin_x, size_x;  // eq. 14
  A y, x, sin, cos;
  int image;
  bool broken;   // as in RoiBox
  bool outside;  // a number is not finite
};

template <class T, class A> PYDEFORM_DEVICE void turn_box(const T* __restrict__ row, A* to, const RoiGeometry& g) {
  A number[6];
  bool broken = false;
#pragma unroll
  for (int k = 0; k < 6; k++) {
    number[k] = to_float(row[k]);
    broken |= number[k] != number[k];
  }
  const A image = number[0], scale = (A)g.spatial_scale, half = g.half_pixel ? (A)0.5 : (A)0;  // half_pixel
  const bool exists = image >= 0 && image < (A)g.batch && round_down(image) == image;
  const A width = times(number[3], scale), height = times(number[4], scale), angle = number[5] * (A)g.turn;  // turn
  // An infinite size is outside, also where the least size hides that.
  const A size_x = is_finite(width) ? max(width, (A)g.least_size) : width;     // least_size
  const A size_y = is_finite(height) ? max(height, (A)g.least_size) : height;  // least_size
  to[0] = broken || !exists ? not_a_number<A>() : image;
  to[1] = -size_y / 2, to[2] = size_y;
  to[3] = -size_x / 2, to[4] = size_x;
  to[5] = times(number[2], scale) - half, to[6] = times(number[1], scale) - half;
  to[7] = sine(angle), to[8] = cosine(angle);
}

template <class A> PYDEFORM_DEVICE TurnedBox<A> read_turned(const A* __restrict__ turned, int r) {
  const A* const row = turned + (long long)r * TURNED_NUMBERS;
  TurnedBox<A> box = {row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8]};
  box.broken = row[0] != row[0];
  box.image = box.broken ? 0 : (int)row[0];
  box.outside = false;
  for (int k = 1; k < TURNED_NUMBERS; k++) box.outside |= !is_finite(row[k]);
  return box;
}

// Pixels y0 <= y < y1, x0 <= x < x1, and from where to where the points lie that can read them, both included.
struct Window {
  int y0, y1, x0, x1;
  template <class A> PYDEFORM_DEVICE static A first(int k, const RoiGeometry& g) {
    return k <= 0 ? -(A)g.reach : (A)(k - 1);
  }
  template <class A> PYDEFORM_DEVICE static A last(int k, int length, const RoiGeometry& g) {
    return k >= length ? (A)(length - 1) + (A)g.reach : (A)k;
  }
};

// Points of an axis that lie between two coordinates have numbers begin <= j < end, among others.
template <class A>
PYDEFORM_DEVICE void points_between(const Axis<A>& a, A from, A to, int& begin, int& end, const RoiGeometry& g) {
  begin = end = 0;
  if (a.points == 0) return;
  if (a.bin / a.n == 0) {
    end = a.start >= from && a.start <= to ? a.points : 0;
    return;
  }
  A low, high, margin;
  a.numbers_between(from, to, low, high, margin, g);
  begin = clamped(low - a.first, a.points);
  end = clamped(high - a.first + 1, a.points);
}

// Eq. 3 along an axis of a box: the points of its p-th bin that can lie between two coordinates, which may be `off` by
// rounding.
template <class A>
PYDEFORM_DEVICE Axis<A> turned_axis(A begin, A size, int p, int pooled, A from, A to, A off, const RoiGeometry& g) {
  Axis<A> a;
  a.bin = size / (A)pooled;
  a.start = begin + times((A)p, a.bin);
  a.n = a.count = g.samples > 0 ? (A)g.samples : round_up(a.bin);
  a.first = 0;
  a.walk = a.length = 0;
  read_nothing(a);
  if (!(a.n > 0)) return a;
  if (a.n > (A)MANY_POINTS) {
    // They lie so close that rounding by more than a pixel cannot be made good by looking at more of them.
    A one, other;
    off = min(off, (A)1);
    walk_points(a, from - off, to + off, one, other, g);
    return a;
  }
  a.points = (int)a.n;
  if (!is_finite(times(a.bin, a.n))) a.bin /= a.n, a.n = 1;  // so that no point of the bin overflows
  if (a.points > FEW_POINTS) {
    int first, last;
    points_between(a, from - off, to + off, first, last, g);
    a.first = (A)first;
    a.points = max(last - first, 0);
  }
  return a;
}

// What the bin `place` (py * pooled_w + px) of a box reads within a window.
template <class A> struct TurnedBin {
  const TurnedBox<A>& box;  // in shared memory or in registers
  Window window;
  A off;         // what coordinates in the image are off by rounding, at most
  Axis<A> y, x;  // along the box
  A count;       // what the mean divides by, NaN for a broken box

  PYDEFORM_DEVICE TurnedBin(const TurnedBox<A>& box, int place, const Window& window, const RoiGeometry& g)
      : box(box), window(window) {
    off = 16 * epsilon<A>() * (magnitude(box.y) + magnitude(box.x) + (A)g.in_h + (A)g.in_w);
    const int py = place / g.pooled_w, px = place - py * g.pooled_w;
    A from, to;
    reach(box.cos, box.sin, from, to, g);
    y = turned_axis(box.begin_y, box.size_y, py, g.pooled_h, from, to, off, g);
    reach(-box.sin, box.cos, from, to, g);
    x = turned_axis(box.begin_x, box.size_x, px, g.pooled_w, from, to, off, g);
    if (box.broken || box.outside || x.points == 0) x.points = y.points = 0;
    Move<A> move;
    move.broken = box.broken;
    count = count_of(y.count, x.count, move, g);
  }
  // From where to where the window reaches along an axis of the box.
  PYDEFORM_DEVICE void reach(A by_y, A by_x, A& from, A& to, const RoiGeometry& g) const {
    const A top = (Window::first<A>(window.y0, g) - box.y) * by_y,
            bottom = (Window::last<A>(window.y1, g.in_h, g) - box.y) * by_y;
    const A left = (Window::first<A>(window.x0, g) - box.x) * by_x,
            right = (Window::last<A>(window.x1, g.in_w, g) - box.x) * by_x;
    from = min(top, bottom) + min(left, right);
    to = max(top, bottom) + max(left, right);
  }
  // Points begin <= j < end of the row of points at v can lie in the window, which the row crosses between its first and
  // last row of pixels, and column.
  PYDEFORM_DEVICE void crossing(A v, int& begin, int& end, const RoiGeometry& g) const {
    begin = 0, end = x.points;
    if (end <= FEW_POINTS) return;
    A from = -1 / (A)0, to = 1 / (A)0;
    if (box.sin != 0) {
      const A middle = v * box.cos + box.y;
      const A one = (middle - Window::first<A>(window.y0, g) + off) / box.sin,
              other = (middle - Window::last<A>(window.y1, g.in_h, g) - off) / box.sin;
      from = min(one, other), to = max(one, other);
    }
    if (box.cos != 0) {
      const A middle = v * box.sin + box.x;
      const A one = (Window::first<A>(window.x0, g) - off - middle) / box.cos,
              other = (Window::last<A>(window.x1, g.in_w, g) + off - middle) / box.cos;
      from = max(from, min(one, other)), to = min(to, max(one, other));
    }
    points_between(x, from, to, begin, end, g);
  }
  // Where the j-th point of that row lies in the image; false: it does not count, whatever the window.
  PYDEFORM_DEVICE bool point(A v, int j, A& at_y, A& at_x, const RoiGeometry& g) const {
    const A u = x.at(j, g);
    at_y = times(v, box.cos) - times(u, box.sin) + box.y;  // eq. 15
    at_x = times(v, box.sin) + times(u, box.cos) + box.x;
    const A reach = (A)g.reach;
    return at_y >= -reach && at_y <= (A)(g.in_h - 1) + reach && at_x >= -reach && at_x <= (A)(g.in_w - 1) + reach;
  }
};

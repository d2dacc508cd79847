"""What a bin of a box reads on one axis (docs/math/roi.md, eq. 1 to 4): pixels, their weights and the derivatives.

Every field of `Rules` is one line here and one line of cuda/roi_bins.cuh. `boxes` tells the type of coordinates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform._roi_geometry import AFTER_SCALE, BEFORE_SCALE
from pydeform.cpu._jit import inline_always

SOUND, BROKEN, OUTSIDE = 0, 1, 2  # of a box or bin: as it should be, with a NaN, infinite
MANY_POINTS = 4096  # on an axis of a bin: of more, only those that can count are looked at


@inline_always
def state_of(first: Any, second: Any, *found: Any) -> int:
    """Of two numbers that came in and of what became of them: NaN in the former is broken, else infinity is outside."""
    if (first != first) | (second != second):
        return BROKEN
    # What is NaN now was infinite before.
    finite = (abs(first) < np.inf) & (abs(second) < np.inf)
    for number in found:
        finite &= abs(number) < np.inf
    return SOUND if finite else OUTSIDE


@inline_always
def worse(first: int, second: int) -> int:
    if first == BROKEN or second == BROKEN:
        return BROKEN
    return max(first, second)


@inline_always
def _round(x: Any, boxes: Any) -> Any:
    """To the nearest integer, halves away from zero, as C does it."""
    real = boxes.dtype.type
    whole = np.trunc(x)
    return whole + np.copysign(real(1), x) if abs(x - whole) >= real(0.5) else whole


@inline_always
def rounded_down(n: int, boxes: Any) -> Any:
    """n, or the largest number below it that there is: of float32 only every second one past 2**24."""
    real = boxes.dtype.type
    nearest = real(n)
    return np.nextafter(nearest, real(0)) if np.int64(nearest) > n else nearest


@inline_always
def extent(boxes: Any, r: int, column: int, g: Any) -> tuple[Any, Any, int]:
    """Begin, size and state of box r along x (column 1) or y (2): eq. 1."""
    real = boxes.dtype.type
    first, last = boxes[r, column], boxes[r, column + 2]
    scale, last_pixel = real(g.spatial_scale), real(g.last_pixel)
    begin, end = first * scale, last * scale
    if g.rounding == AFTER_SCALE:
        begin, end = _round(begin, boxes), _round(end, boxes) + last_pixel
    if g.rounding == BEFORE_SCALE:
        begin, end = _round(first, boxes) * scale, (_round(last, boxes) + last_pixel) * scale
    half = real(0.5) * real(g.half_pixel)
    begin, end = begin - half, end - half
    size = max(end - begin, real(g.least_size))
    # An infinite end is one also where a least size hides it.
    return begin, size, state_of(first, last, begin, end, size)


@inline_always
def pixels_read(
    p: int, begin: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, weights: Any, slopes: Any
) -> tuple[int, Any]:
    """Eq. 4: entries in the list, and their number to divide by."""
    real = boxes.dtype.type
    zero, limit = real(0), rounded_down(length - g.unread_pixels, boxes)
    start, stop = real(p) * bin_size, real(p + 1) * bin_size
    if g.bins_from_box:
        first, last = np.floor(start) + begin, np.ceil(stop) + begin
    else:
        first, last = np.floor(start + begin), np.ceil(stop + begin)
    first, last = min(max(first, zero), limit), min(max(last, zero), limit)
    n = 0
    for pixel in range(np.int64(first), np.int64(last)):
        index[n], weights[n], slopes[n] = pixel, real(1), zero
        n += 1
    return n, real(n)


@inline_always
def points_of(bin_size: Any, boxes: Any, g: Any) -> Any:
    """How many a bin has on this axis, which may be negative."""
    real = boxes.dtype.type
    return real(g.samples) if g.samples > 0 else np.ceil(bin_size)


@inline_always
def _looked_at(start: Any, bin_size: Any, points: Any, length: int, boxes: Any, g: Any) -> tuple[Any, int]:
    """The first point that can count and how many follow it, with some before and after that cannot."""
    real = boxes.dtype.type
    if points <= MANY_POINTS:
        return real(0), max(np.int64(points), 0)
    step = bin_size / points
    if step == 0:
        return real(0), np.int64(points)
    reach = real(g.reach)
    one = (-reach - start) / step
    other = (real(length - 1) + reach - start) / step
    last = points - real(1)
    low = min(max(np.floor(min(one, other)) - real(2), real(0)), last)
    high = min(max(np.ceil(max(one, other)) + real(2), real(0)), last)
    # Far from zero the two are rounded: no more than really fit.
    most = (real(length + 1) + reach) / abs(step) + real(8)
    return low, np.int64(min(high - low + real(1), min(most, points)))


@inline_always
def points_read(
    start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, weights: Any, slopes: Any
) -> tuple[int, Any]:
    """Eq. 3, as a list of pixels: entries in it, and the number of points to divide by.

    Points are taken in ascending order. Where they are at most a pixel apart they leave none out, so the list is a run
    of pixels, without asking what the point before has read; it may take some entries more than it gives.
    """
    real = boxes.dtype.type
    zero, one, highest = real(0), real(1), rounded_down(length - 1, boxes)
    first_point, lowest_counted, highest_counted = real(g.first_point), -real(g.reach), highest + real(g.reach)
    points = points_of(bin_size, boxes, g)
    first, looked_at = _looked_at(start, bin_size, points, length, boxes, g)
    run = (zero <= bin_size) & (bin_size <= points)
    base, latest, n, inside = -1, -1, 0, 0
    above = False  # whether the pixel after the latest is read as well
    for i in range(looked_at):
        j = i if bin_size >= zero else looked_at - 1 - i
        y = start + (first + real(j) + first_point) * bin_size / points
        if not ((y >= lowest_counted) & (y <= highest_counted)):
            continue
        inside += 1
        at_pixel = min(max(y, zero), highest)
        lower = np.int64(at_pixel)
        part = at_pixel - real(lower)
        flat = (g.flat_at_pixels != 0) & (part == zero)
        slope = zero if (y <= zero) | (y >= highest) | flat else one
        if base < 0:
            base = lower
            for k in range(min(np.int64(min(bin_size, highest)) + 4, length + 1) if run else 2):
                weights[k], slopes[k] = zero, zero
        elif not run and lower != latest:
            # After a gap the next two entries begin anew; in the next cell only the second does.
            n += 1 if lower == latest + 1 or not above else 2
            if lower != latest + 1:
                weights[n], slopes[n] = zero, zero
            weights[n + 1], slopes[n + 1] = zero, zero
        if run:
            n = lower - base
        index[n], index[n + 1] = lower, lower + 1
        weights[n] += one - part
        slopes[n] -= slope
        weights[n + 1] += part
        slopes[n + 1] += slope
        latest, above = lower, (not flat) & (lower < length - 1)
    if base >= 0:
        n += 2 if above else 1
    return n, real(inside) if g.count_inside else points


@inline_always
def points_listed(start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, parts: Any) -> int:
    """Eq. 3, point by point: the lower pixel, -1 for a point that does not count, and the part of the next one.

    Of points that do not count one stands for all before the first that does, and one for all after the last.
    """
    real = boxes.dtype.type
    zero, highest, reach = real(0), rounded_down(length - 1, boxes), real(g.reach)
    points = points_of(bin_size, boxes, g)
    first, looked_at = _looked_at(start, bin_size, points, length, boxes, g)
    n = 0
    if first > zero:
        index[0], parts[0], n = -1, zero, 1
    for i in range(looked_at):
        y = start + (first + real(i) + real(g.first_point)) * bin_size / points
        if (y >= -reach) & (y <= highest + reach):
            at_pixel = min(max(y, zero), highest)
            floor = np.floor(at_pixel)
            index[n], parts[n] = np.int64(floor), at_pixel - floor
            n += 1
        elif n == 0 or index[n - 1] != -1:
            index[n], parts[n] = -1, zero
            n += 1
    if first + real(looked_at) < points and n > 0 and index[n - 1] != -1:
        index[n], parts[n] = -1, zero
        n += 1
    return n

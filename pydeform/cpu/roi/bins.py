"""What a bin of a box reads on one axis (docs/math/roi.md, eq. 1 to 4): pixels, their weights and the derivatives.

Every field of `Rules` is one line here and one line of cuda/roi/bins.cuh. `boxes` tells the type of coordinates.

Where there is room for `ends`, which is None elsewhere, derivatives come in two parts: `slopes` by where the bin
begins, its end being held, and `ends` by where it ends. Otherwise `slopes` are those by the bin's place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform._roi_geometry import AFTER_SCALE, BEFORE_SCALE
from pydeform.cpu.core.jit import inline, inline_always

SOUND, BROKEN, OUTSIDE = 0, 1, 2  # state of a box or bin: finite, with a NaN, infinitely large or far away
MANY_POINTS = 4096  # on an axis of a bin: more are not looked at one by one


@inline_always
def state_of(first: Any, second: Any, *found: Any) -> int:
    """Of two numbers that came in, and of what was computed of them: BROKEN if one that came in is NaN, else OUTSIDE if
    any is not finite."""
    if (first != first) | (second != second):
        return BROKEN
    # A NaN in `found` was computed of infinite numbers.
    finite = (abs(first) < np.inf) & (abs(second) < np.inf)
    for number in found:
        finite &= abs(number) < np.inf
    return SOUND if finite else OUTSIDE


@inline_always
def worse(first: int, second: int) -> int:
    """Of two states: BROKEN if one is, else OUTSIDE if one is."""
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
    """n or, if the type of coordinates lacks it, the largest below: float32 has every second integer past 2**24."""
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
    # With an infinite end the box is OUTSIDE, also where the least size hides that.
    return begin, size, state_of(first, last, begin, end, size)


@inline_always
def is_least(boxes: Any, r: int, column: int, g: Any) -> bool:
    """Whether box r would be smaller along x (column 1) or y (2) than `least_size` lets it be."""
    real = boxes.dtype.type
    scale = real(g.spatial_scale)
    return boxes[r, column + 2] * scale - boxes[r, column] * scale < real(g.least_size)


@inline_always
def pixels_read(
    p: int, begin: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, weights: Any, slopes: Any
) -> tuple[int, Any]:
    """Eq. 4, as a list of pixels: entries in it, and the number to divide by."""
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
    """How many points a bin has on this axis; the number may be negative."""
    real = boxes.dtype.type
    return real(g.samples) if g.samples > 0 else np.ceil(bin_size)


@inline_always
def spread_of(bin_size: Any, points: Any, boxes: Any) -> tuple[Any, Any]:
    """a and b with a / b the distance of two points, where (i + first_point) * a overflows for no point of the bin."""
    if abs(bin_size * points) < np.inf:
        return bin_size, points
    return bin_size / points, boxes.dtype.type(1)


@inline_always
def points_read(
    start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, weights: Any, slopes: Any, ends: Any
) -> tuple[int, Any]:
    """Eq. 3, as a list of pixels: entries in it, and the number of points to divide by.

    Points are taken in ascending order. Points that are at most a pixel apart leave no pixel out: then the list is a
    run of pixels, and a pixel's entry follows from its number. Some entries behind the last may be written to as well.
    """
    real = boxes.dtype.type
    zero, one, highest = real(0), real(1), rounded_down(length - 1, boxes)
    first_point, lowest_counted, highest_counted = real(g.first_point), -real(g.reach), highest + real(g.reach)
    points = points_of(bin_size, boxes, g)
    if points > MANY_POINTS:
        return many_points_read(start, bin_size, length, boxes, g, index, weights, slopes, ends)
    spread, divisor = spread_of(bin_size, points, boxes)
    number = np.int64(max(points, zero))
    # In an image so large that its last coordinates are whole numbers or worse, rounded points leave pixels out.
    run = (zero <= bin_size) & (bin_size <= points) & (highest + real(0.25) > highest)
    base, latest, n, inside = -1, -1, 0, 0
    above = False  # whether the pixel after the latest is read as well
    for i in range(number):
        j = i if bin_size >= zero else number - 1 - i
        y = start + (real(j) + first_point) * spread / divisor
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
                _clear(k, zero, weights, slopes, ends)
        elif not run and lower != latest:
            # After a gap both entries of this point are new; in the cell next to the latest, only its second is.
            n += 1 if lower == latest + 1 or not above else 2
            if lower != latest + 1:
                _clear(n, zero, weights, slopes, ends)
            _clear(n + 1, zero, weights, slopes, ends)
        if run:
            n = lower - base
        index[n], index[n + 1] = lower, lower + 1
        weights[n] += one - part
        weights[n + 1] += part
        _add_slopes(n, slope, slope * ((real(j) + first_point) / points), slopes, ends)
        latest, above = lower, (not flat) & (lower < length - 1)
    if base >= 0:
        n += 2 if above else 1
    return n, real(inside) if g.count_inside else points


@inline_always
def _clear(n: int, zero: Any, weights: Any, slopes: Any, ends: Any) -> None:
    weights[n], slopes[n] = zero, zero
    if ends is not None:
        ends[n] = zero


@inline_always
def _add_slopes(n: int, slope: Any, late: Any, slopes: Any, ends: Any) -> None:
    """What entry n loses and the one after it gains, `late` of it by the end of the bin."""
    if ends is not None:
        ends[n] -= late
        ends[n + 1] += late
        slope -= late
    slopes[n] -= slope
    slopes[n + 1] += slope


@inline_always
def points_listed(
    start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, parts: Any, slopes: Any, ends: Any
) -> int:
    """Eq. 3, point by point; gives how many are listed. index: the lower pixel that a point reads, -1 for a point that
    does not count; parts: the weight of the pixel after it. slopes, ends: the derivatives of that, or None.

    Of points that do not count, one is listed for all before the first that counts, and one for all after the last.
    """
    real = boxes.dtype.type
    zero, highest, reach = real(0), rounded_down(length - 1, boxes), real(g.reach)
    points = points_of(bin_size, boxes, g)
    if points > MANY_POINTS:
        return many_points_listed(start, bin_size, length, boxes, g, index, parts, slopes, ends)
    spread, divisor = spread_of(bin_size, points, boxes)
    n = 0
    for i in range(np.int64(max(points, zero))):
        y = start + (real(i) + real(g.first_point)) * spread / divisor
        if (y >= -reach) & (y <= highest + reach):
            at_pixel = min(max(y, zero), highest)
            floor = np.floor(at_pixel)
            index[n], parts[n] = np.int64(floor), at_pixel - floor
            if ends is not None:
                slope = zero if (y <= zero) | (y >= highest) else real(1)
                ends[n] = slope * ((real(i) + real(g.first_point)) / points)
                slopes[n] = slope - ends[n]
            n += 1
        elif n == 0 or index[n - 1] != -1:
            index[n], parts[n] = -1, zero
            n += 1
    return n


# Many points ----------------------------------------------------------------------------------------------------------
# A bin may have more points than an integer counts, or than anyone can wait for; and far from zero their coordinates
# are rounded to whole numbers or worse. So the points that count are found by division, numbered from a point that lies
# near the image, and taken together where they read the same pixels.


class Walk(NamedTuple):
    """The points of a bin that count, in ascending order: number k, 0 <= k < number, lies at origin + k * step."""

    origin: Any
    step: Any  # never negative
    number: int
    before: bool  # whether points that do not count come before these
    after: bool  # and after these
    late: Any  # where number 0 lies in the bin, 0 its begin and 1 its end,
    pace: Any  # and how much further each is


@inline_always
def walk_between(lowest: Any, highest: Any, start: Any, bin_size: Any, boxes: Any, g: Any) -> Walk:
    """Of the points of a bin, those from lowest to highest."""
    real = boxes.dtype.type
    zero, one = real(0), real(1)
    points = points_of(bin_size, boxes, g)
    step = bin_size / points
    # The number of a point near the image, and where it lies.
    near, first_point = zero, real(g.first_point)
    if g.samples > 0:
        if step != zero:
            near = (lowest - start) / step - first_point
            near = min(max(np.ceil(near) if step > zero else np.floor(near), zero), points)
        spread, divisor = spread_of(bin_size, points, boxes)
        origin = start + (near + first_point) * spread / divisor
    else:
        # A step is a bit less than a pixel: start + near and points - bin_size are exact, and near 0 and 1.
        near = min(max(np.floor(-start), zero), points)
        origin = (start + near) - near * ((points - bin_size) / points) + first_point * step
    least, most = -near, (points - near) - one  # numbers of the first and the last point, from there on
    pace = one / points
    if step < zero:
        least, most, step, pace = -most, -least, -step, -pace
    first, last = least, most
    if step > zero:
        first, last = max(least, np.ceil((lowest - origin) / step)), min(most, np.floor((highest - origin) / step))
        if first > least and origin + (first - one) * step >= lowest:
            first -= one
        elif origin + first * step < lowest:
            first += one
        if last < most and origin + (last + one) * step <= highest:
            last += one
        elif origin + last * step > highest:
            last -= one
    else:
        last = last if (origin >= lowest) & (origin <= highest) else first - one
    if not (first <= last):  # NaN: infinitely far away
        return Walk(zero, zero, 0, True, False, zero, zero)
    # The number fits: it is at most twice that of the pixels between, or `samples`.
    number, late = np.int64(last - first + one), (near + first_point) / points + first * pace
    return Walk(origin + first * step, step, number, first > least, last < most, late, pace)


@inline_always
def _walk(start: Any, bin_size: Any, length: int, boxes: Any, g: Any) -> Walk:
    reach = boxes.dtype.type(g.reach)
    return walk_between(-reach, rounded_down(length - 1, boxes) + reach, start, bin_size, boxes, g)


@inline_always
def _up_to(y: Any, included: bool, walk: Walk, boxes: Any) -> int:
    """How many points of a walk lie below y, or at y as well."""
    real = boxes.dtype.type
    if walk.step == real(0):
        return walk.number if walk.origin < y or (included and walk.origin == y) else 0
    number = (y - walk.origin) / walk.step
    number = np.floor(number) + real(1) if included else np.ceil(number)
    return min(np.int64(min(max(number, real(0)), real(walk.number))), walk.number)


@inline_always
def _cell(k: int, least: int, walk: Walk, length: int, boxes: Any) -> tuple[int, int, int, Any]:
    """Points k <= i < end of a walk read pixel `lower`, which is `least` or more. Those from `inner` on lie between it
    and the next pixel, of which the first of them reads `part`. Gives lower, end, inner, part."""
    real = boxes.dtype.type
    highest = np.int64(rounded_down(length - 1, boxes))
    y = walk.origin + real(k) * walk.step
    # From `least` on, so that each pixel comes once, also in an image so large that two pixels have one coordinate.
    lower = min(max(np.int64(max(np.floor(y), real(0))), least), highest)
    end = inner = walk.number
    if lower < highest:
        end = max(_up_to(real(lower + 1), False, walk, boxes), k + 1)
        inner = min(max(_up_to(real(0), True, walk, boxes), k), end) if lower == 0 else k
    part = min(max(walk.origin + real(inner) * walk.step - real(lower), real(0)), real(1))
    return lower, end, inner, part


@inline
def many_points_read(
    start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, weights: Any, slopes: Any, ends: Any
) -> tuple[int, Any]:
    """`points_read`, pixel by pixel."""
    real = boxes.dtype.type
    zero, one = real(0), real(1)
    walk = _walk(start, bin_size, length, boxes, g)
    n, latest, k, above = 0, -1, 0, False
    while k < walk.number:
        lower, end, inner, part = _cell(k, latest + 1, walk, length, boxes)
        number, between = real(end - k), real(end - inner)
        # The part of the next pixel grows by a step from point to point: a sum in closed form.
        parts = min(max(between * part + walk.step * (between * (between - one) / real(2)), zero), between)
        moved = between
        if g.flat_at_pixels != 0 and part == zero:
            moved = zero if walk.step == zero else max(between - one, zero)
        if latest < 0 or lower != latest + 1 or not above:
            n += 0 if latest < 0 else 2 if above else 1
            _clear(n, zero, weights, slopes, ends)
        else:
            n += 1
        _clear(n + 1, zero, weights, slopes, ends)
        index[n], index[n + 1] = lower, lower + 1
        weights[n] += number - parts
        weights[n + 1] += parts
        late = walk.late + real(inner) * walk.pace
        late = moved * late + walk.pace * (moved * (moved - one) / real(2))
        _add_slopes(n, moved, late, slopes, ends)
        latest, above, k = lower, (g.flat_at_pixels == 0 or moved > zero) and lower < length - 1, end
    if latest >= 0:
        n += 2 if above else 1
    return n, real(walk.number) if g.count_inside else points_of(bin_size, boxes, g)


@inline
def many_points_listed(
    start: Any, bin_size: Any, length: int, boxes: Any, g: Any, index: Any, parts: Any, slopes: Any, ends: Any
) -> int:
    """`points_listed`, but of the points between the same pixels only the first and the last: with linear
    interpolation none of the others is larger than both."""
    real = boxes.dtype.type
    walk = _walk(start, bin_size, length, boxes, g)
    n, latest, k = 0, -1, 0
    if walk.before:
        index[0], parts[0], n = -1, real(0), 1
    while k < walk.number:
        lower, end, inner, part = _cell(k, latest + 1, walk, length, boxes)
        last = min(max(walk.origin + real(end - 1) * walk.step - real(lower), real(0)), real(1))
        index[n], parts[n] = lower, part if inner == k else real(0)
        _list_slope(n, inner == k and inner < end, k, walk, slopes, ends)
        n += 1
        if end - k > 1:
            index[n], parts[n] = lower, last if inner < end else real(0)
            _list_slope(n, inner < end, end - 1, walk, slopes, ends)
            n += 1
        latest, k = lower, end
    if walk.after:
        index[n], parts[n] = -1, real(0)
        n += 1
    if bin_size < real(0):  # the bin's first point has the highest coordinate: reverse the list
        for i in range(n // 2):
            j = n - 1 - i
            index[i], index[j] = index[j], index[i]
            parts[i], parts[j] = parts[j], parts[i]
            if ends is not None:
                slopes[i], slopes[j] = slopes[j], slopes[i]
                ends[i], ends[j] = ends[j], ends[i]
    return n


@inline_always
def _list_slope(n: int, moves: bool, k: int, walk: Walk, slopes: Any, ends: Any) -> None:
    """Of candidate n, which is point k of a walk."""
    if ends is not None:
        late = walk.late + k * walk.pace
        slopes[n] = 1 - late if moves else 0
        ends[n] = late if moves else 0

"""RoI pooling where each channel is read for itself: what bins read, and sums over their rows.

A band is up to eight neighbouring pixels of a row, or eight bins, in eight lanes on every machine, so that sums have
one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import inline_always
from pydeform.cpu.core.simd import advance
from pydeform.cpu.core.squares import row_numbers, rows_of, store_columns
from pydeform.cpu.core.vector import (
    ceil,
    convert,
    fabs,
    first_lanes,
    floor,
    fma,
    from_lane,
    is_any,
    lane_numbers,
    largest_of,
    load_lanes,
    load_where,
    room_for,
    select,
    splat,
    store,
    store_where,
    sum_of,
)

BAND = 8
FAR = 1e30  # from every pixel
load_band = load_lanes(BAND)


class Slots(NamedTuple):
    """Pointers to eight bins of an axis, and to room for what each reads."""

    starts: Any  # of the bins,
    sizes: Any  # and how long they are
    index: Any  # (bin, entry): pixels
    weights: Any  # (bin, 0: weights and 1: their derivatives, entry)
    entries: Any  # how many
    counts: Any  # the number to divide by
    row: int  # entries that there is room for, eight or more


class Points(NamedTuple):
    """What all bins of an axis have in common."""

    samples: Any
    first: Any
    reach: Any
    highest: Any
    count_inside: bool
    flat: bool
    sloped: bool


@inline_always
def band_lists(slots: Any, bins: int, points: Any) -> bool:
    """What up to eight bins of an axis read by linear interpolation, a lane for each (docs/math/roi.md, eq. 3).

    Points of a bin are y_i = start + (i + first) * size / number, where the number is `samples` or, if that is 0,
    ceil(size). Those from -reach to highest + reach count, clamped to [0, highest]. The bin reads a run of pixels. Its
    count is how many points count, or all of them without `count_inside`. With `flat` a point at a pixel moves nothing,
    and the pixel above it is not read. Eight entries are written for each of eight bins, also of fewer.

    Entries of -1 say that none of this is so: more than eight points or pixels, points that are further than a pixel
    apart, or in descending order. Gives whether none of the bins is like that.
    """
    size = load_band(slots.sizes)
    number = select(points.samples > 0, splat(points.samples, size), ceil(size))
    sound = (size >= 0) & (size <= number) & (number <= BAND)
    most = np.int64(largest_of(select(sound, number, 0)))
    places, steep = room_for(size), room_for(size)
    low, high, inside = _find_points(slots, number, most, places, steep, points)
    some, one = inside > 0, splat(1, size)
    low, high = select(some, low, 0), select(some, high, 0)
    base, latest = floor(low), floor(high)
    at_last = (latest >= points.highest) | (points.flat & (high == latest))
    pixels = select(some, latest - base + select(at_last, one, 2), 0)
    sound = sound & (pixels <= BAND)
    base = select(sound, base, 0)
    store(convert(select(sound, pixels, -1), slots.entries), slots.entries)
    store(select(points.count_inside, inside, number), slots.counts)
    first = convert(base, slots.index)
    for bin_ in range(BAND):
        store(from_lane(first, bin_) + lane_numbers(first), advance(slots.index, bin_ * slots.row))
    _weigh_pixels(slots, base, most, places)
    if points.sloped:
        _slope_pixels(slots, base, most, places, steep)
    return not is_any(first_lanes(bins, size) & ~sound)


@inline_always
def _find_points(slots: Any, number: Any, most: int, places: Any, steep: Any, points: Any) -> tuple[Any, Any, Any]:
    """Where the points lie, -FAR if they do not count, and whether they move; the lowest and highest that count, and
    how many do."""
    start, size = load_band(slots.starts), load_band(slots.sizes)
    low, high, inside, one = splat(FAR, size), splat(-FAR, size), splat(0, size), splat(1, size)
    for i in range(most):
        ordinal = splat(i, size)
        y = start + (ordinal + points.first) * size / number
        counted = (y >= -points.reach) & (y <= points.highest + points.reach) & (ordinal < number)
        at_start, at_end = y <= 0, y >= points.highest
        place = select(at_end, points.highest, select(at_start, 0, y))
        at_place = select(counted, place, -FAR)
        store(at_place, advance(places, BAND * i))
        if points.sloped:
            still = at_start | at_end | (points.flat & (place == floor(place)))
            store(select(still, 0, one), advance(steep, BAND * i))
        lowest = select(counted, place, FAR)
        low, high = select(low < lowest, low, lowest), select(high > at_place, high, at_place)
        inside = inside + select(counted, one, 0)
    return low, high, inside


@inline_always
def _weigh_pixels(slots: Any, base: Any, most: int, places: Any) -> None:
    pixel = row_numbers(base)
    weights = splat(0, pixel)
    for i in range(most):
        # Exact, also where `base` is so large that the numbers after it are rounded.
        near = 1 - fabs(rows_of(load_band(advance(places, BAND * i)) - base) - pixel)
        weights = weights + select(near > 0, near, 0)
    store_columns(weights, slots.weights, 2 * slots.row)


@inline_always
def _slope_pixels(slots: Any, base: Any, most: int, places: Any, steep: Any) -> None:
    """What the lower pixel of a point loses the upper one gains. Which they are is not to be seen from a distance: that
    of a point close to a pixel is rounded to a whole one."""
    pixel = row_numbers(base)
    slopes = splat(0, pixel)
    for i in range(most):
        gain = rows_of(load_band(advance(steep, BAND * i)))
        lower = rows_of(floor(load_band(advance(places, BAND * i))) - base)
        slopes = slopes + (0 - select(lower == pixel, gain, 0) + select(lower == pixel - 1, gain, 0))
    store_columns(slopes, advance(slots.weights, slots.row), 2 * slots.row)


class Band(NamedTuple):
    """Up to eight columns of some rows of a plane, of one row at least, in ascending order.

    Masked loads are slow and masked stores slower, so whole vectors are read, whose lanes behind the last column are
    left aside and are written back as they were, unless they reach past the end of the plane.
    """

    pixels: Any  # from the first column on
    rows: Any
    number: int  # of the rows
    width: int  # of the plane
    room: int  # pixels of the plane from the first column on
    columns: int


@inline_always
def _is_inside(band: Any) -> bool:
    return band.rows[band.number - 1] * band.width + BAND <= band.room


@inline_always
def _row(band: Any, i: int) -> Any:
    return advance(band.pixels, band.rows[i] * band.width)


@inline_always
def band_sum(band: Any, y_weights: Any, x_weights: Any) -> Any:
    """The pixels times both weights; eight can be read for x."""
    along = load_band(x_weights)
    inside, total = first_lanes(band.columns, along), splat(0, along)
    if _is_inside(band):
        for i in range(band.number):
            total = fma(y_weights[i], load_band(_row(band, i)), total)
    else:
        for i in range(band.number):
            total = fma(y_weights[i], load_where(inside, _row(band, i)), total)
    return sum_of(select(inside, total * along, 0))


@inline_always
def band_dots(band: Any, y_weights: Any, y_slopes: Any, x_weights: Any, x_slopes: Any) -> tuple[Any, Any, Any]:
    """The pixels times both weights, with y's slopes, and with x's."""
    along = load_band(x_weights)
    inside, summed, sloped = first_lanes(band.columns, along), splat(0, along), splat(0, along)
    if _is_inside(band):
        for i in range(band.number):
            row = load_band(_row(band, i))
            summed, sloped = fma(y_weights[i], row, summed), fma(y_slopes[i], row, sloped)
    else:
        for i in range(band.number):
            row = load_where(inside, _row(band, i))
            summed, sloped = fma(y_weights[i], row, summed), fma(y_slopes[i], row, sloped)
    across = summed * load_band(x_slopes)
    return (
        sum_of(select(inside, summed * along, 0)),
        sum_of(select(inside, sloped * along, 0)),
        sum_of(select(inside, across, 0)),
    )


@inline_always
def band_scatter(band: Any, y_weights: Any, x_weights: Any, grad: Any) -> None:
    """pixel += y_weights[row] * (x_weights[column] * grad), in a plane that nobody else writes to."""
    along = load_band(x_weights) * grad
    inside = first_lanes(band.columns, along)
    if _is_inside(band):
        for i in range(band.number):
            row = load_band(_row(band, i))
            store(select(inside, fma(y_weights[i], along, row), row), _row(band, i))
    else:
        for i in range(band.number):
            added = fma(y_weights[i], along, load_where(inside, _row(band, i)))
            store_where(inside, added, _row(band, i))

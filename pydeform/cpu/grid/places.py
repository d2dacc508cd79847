"""Where queries read: from a caller's numbers to pixels along each axis (docs/math/grid.md, eq. 1 to 4), and to the
corners of their product and their shares (eq. 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform._grid_geometry import BORDER, REFLECTION
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.vector import (
    convert,
    evens,
    fabs,
    floor,
    gather_pairs,
    gather_where,
    is_any,
    lanes_of,
    load,
    load_beside,
    load_first,
    odds,
    rint,
    select,
    splat,
    store,
)
from pydeform.cpu.sampling.axes import axis_corners, in_range

A = -0.75  # of cubic convolution, as PyTorch has it


class Tile(NamedTuple):
    """Some queries of an image, and the thread that has them in its tables."""

    thread: int
    image: int
    query: int
    queries: int


@inline
def locate(tile: Any, grid: Any, scratch: Any, g: Any, p: Any) -> None:
    """Fills the tables of the tile's queries. No pixel is named by a number that is not known to be in range."""
    _bring_together(tile, grid, scratch, g)
    last = len(g.in_size) - 1
    for number in range(last):
        _name_axis(tile.queries, axis_of(tile, number, 1 << p.bits, scratch, g), None, p)
    _name_axis(tile.queries, axis_of(tile, last, 1 << p.bits, scratch, g), p.pairs, p)
    _name_corners(tile, scratch, g, p)


@inline_always
def _name_axis(queries: int, axis: Any, pairs: Any, p: Any) -> None:
    if p.nearest is not None:
        _name_nearest(queries, axis)
    elif p.cubic is not None:
        _name_four(queries, axis, pairs)
    else:
        _name_two(queries, axis, pairs)


@inline
def _bring_together(tile: Any, grid: Any, scratch: Any, g: Any) -> None:
    """numbers[axis][query], of queries that move with their own place added."""
    first = at(grid, (tile.image, tile.query * g.number_step))
    if g.number_step == 2:
        _bring_pairs(tile.queries, first, tile, scratch)
        return
    for axis in range(len(g.in_size)):
        numbers, source = at(scratch.numbers, (tile.thread, axis, 0)), advance(first, g.number_first[axis])
        for i in range(tile.queries):
            numbers[i] = source[i * g.number_step]
        if g.moves:
            step, size = step_of(axis, g), g.in_size[axis]
            for i in range(tile.queries):
                numbers[i] += type(numbers[0])((tile.query + i) // step % size)


@inline
def _bring_pairs(queries: int, pairs: Any, tile: Any, scratch: Any) -> None:
    """Of (x, y) side by side."""
    y, x, lanes = at(scratch.numbers, (tile.thread, 0, 0)), at(scratch.numbers, (tile.thread, 1, 0)), lanes_of(pairs)
    for i in range(0, queries, lanes):
        one = load_first(advance(pairs, 2 * i), 2 * (queries - i))
        two = load_first(advance(pairs, 2 * i + lanes), 2 * (queries - i) - lanes)
        store(evens(one, two), advance(x, i))
        store(odds(one, two), advance(y, i))


@inline_always
def step_of(axis: int, g: Any) -> int:
    """Pixels from one to the next along an axis."""
    step = 1
    for later in range(axis + 1, len(g.in_size)):
        step *= g.in_size[later]
    return step


class Axis(NamedTuple):
    """Numbers of the geometry, of one axis, and its pixels of the queries of a tile."""

    padding: int
    shift: float
    half: float
    back: float
    span: float
    size: int
    step: int  # pixels from one to the next
    row: int  # queries from one of its pixels to the next in the tables
    numbers: Any
    pixels: Any
    parts: Any
    slopes: Any
    has_slopes: int


@inline_always
def axis_of(tile: Any, axis: int, taps: int, scratch: Any, g: Any) -> Axis:
    place = (tile.thread, axis * taps, 0)
    return Axis(
        g.padding,
        g.shift,
        g.half[axis],
        g.back,
        g.span[axis],
        g.in_size[axis],
        step_of(axis, g),
        scratch.parts.shape[2],
        at(scratch.numbers, (tile.thread, axis, 0)),
        at(scratch.pixels, place),
        at(scratch.parts, place),
        at(scratch.slopes, place),
        scratch.slopes.shape[1],
    )


@inline_always
def position_of(numbers: Any, axis: Any) -> Any:
    """Eq. 1. What is infinite stays so, on an axis of one pixel too, where `half` may be 0."""
    number = load(numbers)
    return select(fabs(number) < np.inf, (number + axis.shift) * axis.half - axis.back, number)


@inline_always
def remainder(y: Any, period: Any, room: Any) -> Any:
    """y modulo a period, exactly, as fmod has it, for y >= 0. `room` is overwritten."""
    rest = y - floor(y / period) * period
    rest = select(rest < 0, rest + period, rest)
    rest = select(rest >= period, rest - period, rest)
    far = y >= 2.0**23  # beyond, multiples of the period are rounded
    if is_any(far & (y < np.inf)):
        store(y, room)
        for i in range(lanes_of(room)):
            room[i] = room[i] % type(room[i])(period)
        rest = select(far, load(room), rest)
    return rest


@inline_always
def mirrored(p: Any, axis: Any, room: Any) -> tuple[Any, Any]:
    """Eq. 3: which position of the image a position shows, and the sign of their derivative; of what is infinitely far
    away, anything."""
    period, beyond = 2 * axis.span, p + axis.back
    rest = remainder(fabs(beyond), period, room)
    turned = rest >= axis.span
    sign = select(beyond < 0, splat(-1, p), 1) * select(turned, splat(-1, p), 1)
    return select(turned, period - rest, rest) - axis.back, sign


@inline_always
def held(p: Any, axis: Any) -> tuple[Any, Any]:
    """The position at the first or last pixel instead of one beyond, and where that is so."""
    last = float(axis.size - 1)
    return select(p >= last, splat(last, p), select(p <= 0, splat(0, p), p)), (p <= 0) | (p >= last)


@inline_always
def source_of(p: Any, axis: Any, room: Any) -> tuple[Any, Any, Any]:
    """Eq. 2 and 3: the position that is read, its derivative by the number, and whether there is any; NaN of NaN."""
    slope, is_there = splat(axis.half, p), p == p
    if axis.padding == BORDER:
        p, is_held = held(p, axis)
        slope = select(is_held, splat(0, p), slope)
    elif axis.padding == REFLECTION:
        is_there = fabs(p) < np.inf
        shown, sign = mirrored(p, axis, room)
        if axis.span == 0:
            shown = splat(0, p)
        shown, is_held = held(select(is_there, shown, splat(0, p)), axis)
        slope = select(is_held, splat(0, p), slope * sign)
        p = select(p == p, shown, np.nan)
    return p, select(p == p, slope, np.nan), is_there


@inline_always
def _put(entry: int, tap: int, pixel: Any, exists: Any, part: Any, slope: Any, axis: Any) -> None:
    """One of an axis' pixels for a vector of queries."""
    place = tap * axis.row + entry
    store(select(exists, pixel * axis.step, -1), advance(axis.pixels, place))
    store(part, advance(axis.parts, place))
    if axis.has_slopes:
        store(slope, advance(axis.slopes, place))


class Tap(NamedTuple):
    """For a vector of queries one of the pixels along an axis, and its part of the sample."""

    pixel: Any
    exists: Any
    part: Any
    slope: Any


@inline_always
def _put_two(entry: int, tap: int, one: Tap, other: Tap, axis: Any, pairs: Any) -> None:
    """Two neighbours; with `pairs` in the order of the image, so that they are read at once: a pixel and the one behind
    it, with no part for either that is not meant."""
    if pairs is None:
        _put(entry, tap, one.pixel, one.exists, one.part, one.slope, axis)
        _put(entry, tap + 1, other.pixel, other.exists, other.part, other.slope, axis)
    else:
        only_one = one.exists & ~(other.exists & (other.pixel < one.pixel))
        first = select(only_one, one.pixel, other.pixel)
        first = select(first < 0, splat(0, first), select(first > axis.size - 2, splat(axis.size - 2, first), first))
        none, broken = splat(0, one.part), one.part - one.part  # 0, or NaN, which stays
        for k in range(2):
            is_one, is_other = one.exists & (one.pixel == first + k), other.exists & (other.pixel == first + k)
            part = select(is_one, one.part, none) + select(is_other, other.part, none) + broken
            slope = select(is_one, one.slope, none) + select(is_other, other.slope, none) + broken
            _put(entry, tap + k, first + k, is_one | is_other, part, slope, axis)


@inline
def _name_nearest(queries: int, axis: Any) -> None:
    for i in range(0, queries, lanes_of(axis.numbers)):
        room = advance(axis.numbers, i)
        p, _, is_there = source_of(position_of(room, axis), axis, room)
        near = rint(p)
        exists = is_there & in_range(near, 0, float(axis.size))
        pixel = convert(select(exists, near, splat(0, p)), axis.pixels)
        _put(i, 0, pixel, exists, select(p == p, splat(1, p), np.nan), splat(0, p), axis)


@inline
def _name_two(queries: int, axis: Any, pairs: Any) -> None:
    """Eq. 4, linear."""
    end = float(axis.size)
    for i in range(0, queries, lanes_of(axis.numbers)):
        room = advance(axis.numbers, i)
        p, slope, is_there = source_of(position_of(room, axis), axis, room)
        first, second, has_first, has_second, part = axis_corners(p, -1.0, end, axis.size, axis.size, axis.pixels)
        one, other = (
            Tap(first, has_first & is_there, 1 - part, 0 - slope),
            Tap(second, has_second & is_there, part, slope),
        )
        _put_two(i, 0, one, other, axis, pairs)


@inline
def _name_four(queries: int, axis: Any, pairs: Any) -> None:
    """Eq. 4, cubic: each pixel, not the position, is held or mirrored."""
    for i in range(0, queries, lanes_of(axis.numbers)):
        room = advance(axis.numbers, i)
        p = position_of(room, axis)
        before = floor(p)
        t = select(p == p, select(fabs(p) < np.inf, p - before, splat(0, p)), np.nan)
        for tap in range(0, 4, 2):
            one, other = _cubic_tap(tap, before, t, room, axis), _cubic_tap(tap + 1, before, t, room, axis)
            _put_two(i, tap, one, other, axis, pairs)


@inline_always
def _cubic_tap(tap: int, before: Any, t: Any, room: Any, axis: Any) -> Tap:
    q, _, exists = source_of(before + float(tap - 1), axis, room)
    exists = exists & in_range(q, 0, float(axis.size))
    pixel = convert(select(exists, q, splat(0, q)), axis.pixels)
    return Tap(pixel, exists, cubic_weight(tap, t), cubic_slope(tap, t) * axis.half)


@inline_always
def cubic_weight(tap: int, t: Any) -> Any:
    """Cubic convolution: the part of pixel floor(p) - 1 + tap, where t = p - floor(p)."""
    if tap == 0:
        return ((A * (t + 1) - 5 * A) * (t + 1) + 8 * A) * (t + 1) - 4 * A
    if tap == 1:
        return ((A + 2) * t - (A + 3)) * t * t + 1
    if tap == 2:
        return ((A + 2) * (1 - t) - (A + 3)) * (1 - t) * (1 - t) + 1
    return ((A * (2 - t) - 5 * A) * (2 - t) + 8 * A) * (2 - t) - 4 * A


@inline_always
def cubic_slope(tap: int, t: Any) -> Any:
    """The derivative of `cubic_weight`."""
    if tap == 0:
        return (3 * A * (t + 1) - 10 * A) * (t + 1) + 8 * A
    if tap == 1:
        return (3 * (A + 2) * t - 2 * (A + 3)) * t
    if tap == 2:
        return 0 - (3 * (A + 2) * (1 - t) - 2 * (A + 3)) * (1 - t)
    return 0 - ((3 * A * (2 - t) - 10 * A) * (2 - t) + 8 * A)


@inline_always
def tap_of(corner: int, axis: int, g: Any, p: Any) -> int:
    """Which of all axes' pixels a corner has along one: the last axis is the fastest."""
    last = len(g.in_size) - 1
    return (axis << p.bits) + (corner >> (last - axis) * p.bits & (1 << p.bits) - 1)


@inline
def _name_corners(tile: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 5."""
    thread, last = tile.thread, len(g.in_size) - 1
    for corner in range(p.corners):
        of_last = tap_of(corner, last, g, p)
        for i in range(0, tile.queries, lanes_of(at(scratch.shares, (0, 0, 0)))):
            share = load(at(scratch.parts, (thread, of_last, i)))
            pixel = load_beside(at(scratch.pixels, (thread, of_last, i)), share)
            exists = pixel >= 0
            for axis in range(last):
                tap = tap_of(corner, axis, g, p)
                along = load_beside(at(scratch.pixels, (thread, tap, i)), share)
                exists, pixel = exists & (along >= 0), pixel + along
                share = load(at(scratch.parts, (thread, tap, i))) * share
            store(select(exists, pixel, -1), at(scratch.corners, (thread, corner, i)))
            store(share, at(scratch.shares, (thread, corner, i)))


@inline_always
def corner_values(corner: int, i: int, plane: Any, thread: int, scratch: Any, like: Any) -> Any:
    """What a plane, one channel of an image, has at a corner of some queries; zeros where there is none."""
    pixel = load_beside(at(scratch.corners, (thread, corner, i)), like)
    return gather_where(pixel >= 0, plane, pixel)


@inline_always
def pair_values(corner: int, i: int, plane: Any, thread: int, scratch: Any, like: Any) -> tuple[Any, Any]:
    """The same of a corner and the next one, which lies behind it."""
    one = load_beside(at(scratch.corners, (thread, corner, i)), like)
    other = load_beside(at(scratch.corners, (thread, corner + 1, i)), like)
    has_one, has_other = one >= 0, other >= 0
    first, second = gather_pairs(has_one | has_other, plane, select(has_one, one, other - 1))
    return select(has_one, first, splat(0, like)), select(has_other, second, splat(0, like))

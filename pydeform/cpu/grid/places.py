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
    gather_numbered,
    gather_pairs,
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
NOTHING = -(1 << 31)  # in the place of a pixel's number: without its sign pixel 0, which may be read


class Tile(NamedTuple):
    """Some queries of an image, and the thread that has them in its tables."""

    thread: int
    image: int
    query: int
    queries: int


@inline
def locate(tile: Any, grid: Any, slopes: Any, scratch: Any, g: Any, p: Any) -> None:
    """Fills the tables of the tile's queries; `slopes`: None, or that table, which may be empty. No pixel is named by a
    number that is not known to be in range."""
    _bring_together(tile, grid, scratch, g)
    last = len(g.in_size) - 1
    along_x, along_y = axis_of(tile, last, p.pairs, scratch, g), axis_of(tile, last - 1, None, scratch, g)
    for i in range(0, tile.queries, lanes_of(along_x.numbers)):
        from_x, from_y = _sources(i, along_x, p), _sources(i, along_y, p)
        if p.volume is None:
            x, y = _taps(from_x, along_x, p), _taps(from_y, along_y, p)
            _put_corners(i, (_whole(x[0]),), y, x, tile, scratch)
        else:
            along_z = axis_of(tile, 0, None, scratch, g)
            from_z = _sources(i, along_z, p)
            x, y, z = _taps(from_x, along_x, p), _taps(from_y, along_y, p), _taps(from_z, along_z, p)
            _put_corners(i, z, y, x, tile, scratch)
            if slopes is not None:
                _keep(i, 0, z, tile, slopes, scratch, p)
        if slopes is not None:
            _keep(i, last, x, tile, slopes, scratch, p)
            _keep(i, last - 1, y, tile, slopes, scratch, p)


@inline_always
def _sources(i: int, axis: Any, p: Any) -> Any:
    """What the queries from number i on read along an axis: one place, or four and where between them they are."""
    room = advance(axis.numbers, i)
    position = position_of(room, axis)
    if p.cubic is None:
        return (source_of(position, axis, room),)
    before = floor(position)  # each pixel, not the position, is held or mirrored
    within = select(fabs(position) < np.inf, position - before, splat(0, position))
    four = (
        source_of(before - 1, axis, room),
        source_of(before, axis, room),
        source_of(before + 1, axis, room),
        source_of(before + 2, axis, room),
    )
    return four, select(position == position, within, np.nan)


@inline_always
def _taps(sources: Any, axis: Any, p: Any) -> Any:
    """Pixels along an axis."""
    if p.nearest is not None:
        return (_nearest(sources[0], axis),)
    if p.cubic is not None:
        return _four(sources[0], sources[1], axis)
    return _two(sources[0], axis)


@inline_always
def _whole(like: Any) -> Any:
    """Of the axis that an image does not have."""
    return Tap(splat(0, like.pixel), like.pixel == like.pixel, splat(1, like.part), like.slope)


@inline_always
def _put_corners(i: int, zs: Any, ys: Any, xs: Any, tile: Any, scratch: Any) -> None:
    """Eq. 5: the last axis is the fastest."""
    row = scratch.shares.shape[2]
    corners, shares = at(scratch.corners, (tile.thread, 0, i)), at(scratch.shares, (tile.thread, 0, i))
    place = 0
    for z in zs:
        for y in ys:
            first, exists = z.pixel + y.pixel, z.exists & y.exists
            for x in xs:
                store(select(exists & x.exists, first + x.pixel, NOTHING), advance(corners, place))
                store(y.part * (z.part * x.part), advance(shares, place))
                place += row


@inline_always
def _keep(i: int, axis: int, taps: Any, tile: Any, slopes: Any, scratch: Any, p: Any) -> None:
    """What the gradient along an axis needs."""
    if slopes.shape[1]:
        place = axis << p.bits
        for tap in taps:
            store(tap.part, at(scratch.parts, (tile.thread, place, i)))
            store(tap.slope, at(slopes, (tile.thread, place, i)))
            place += 1


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
    """Numbers of the geometry, of one axis, and those of the queries of a tile."""

    padding: int
    shift: float
    half: float
    back: float
    span: float
    farthest: float  # the largest number that is a place
    size: int
    step: int  # pixels from one to the next
    numbers: Any
    integer: Any  # points to the type of a pixel's number
    pairs: Any


@inline_always
def axis_of(tile: Any, axis: int, pairs: Any, scratch: Any, g: Any) -> Axis:
    numbers, integer = at(scratch.numbers, (tile.thread, axis, 0)), at(scratch.corners, (0, 0, 0))
    farthest = type(numbers[0])(np.inf)
    if g.padding == REFLECTION:
        farthest = np.nextafter(farthest, type(farthest)(0))
    step, size = step_of(axis, g), g.in_size[axis]
    return Axis(g.padding, g.shift, g.half[axis], g.back, g.span[axis], farthest, size, step, numbers, integer, pairs)


@inline_always
def position_of(numbers: Any, axis: Any) -> Any:
    """Eq. 1. What is infinite stays so, on an axis of one pixel too, where `half` may be 0."""
    number = load(numbers)
    position = (number + axis.shift) * axis.half - axis.back
    if axis.half == 0:
        position = select(fabs(number) < np.inf, position, number)
    return position


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


class Source(NamedTuple):
    """Where a vector of queries reads along an axis. Only once the branches of all axes lie behind are pixels compared
    with it: AVX2 has no registers for masks, and one that outlives a branch is packed, and unpacked for each use."""

    given: Any
    position: Any  # that of the image which is shown there; NaN of NaN
    slope: Any  # its derivative by the number


@inline_always
def source_of(p: Any, axis: Any, room: Any) -> Source:
    """Eq. 2 and 3."""
    given, slope = p, splat(axis.half, p)
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
    return Source(given, p, select(p == p, slope, np.nan))


@inline_always
def _is_there(source: Source, axis: Any) -> Any:
    """What is infinitely far away has no mirrored pixel."""
    return fabs(source.given) <= axis.farthest


class Tap(NamedTuple):
    """For a vector of queries one of the pixels along an axis, and its part of the sample."""

    pixel: Any  # its number, then times the pixels that a step takes
    exists: Any
    part: Any
    slope: Any  # how the part grows with the number


@inline_always
def _two_of(one: Tap, other: Tap, axis: Any) -> Any:
    """Two neighbours; with `pairs` in the order of the image, so that they are read at once: a pixel and the one behind
    it, with no part for either that is not meant."""
    if axis.pairs is None:
        return _stepped(one, axis), _stepped(other, axis)
    only_one = one.exists & ~(other.exists & (other.pixel < one.pixel))
    first = select(only_one, one.pixel, other.pixel)
    first = select(first < 0, splat(0, first), select(first > axis.size - 2, splat(axis.size - 2, first), first))
    return _stepped(_behind(0, first, one, other), axis), _stepped(_behind(1, first, one, other), axis)


@inline_always
def _behind(k: int, first: Any, one: Tap, other: Tap) -> Any:
    """The pixel k behind `first`, with the parts of those that it is."""
    none, broken = splat(0, one.part), one.part - one.part  # 0, or NaN, which stays
    is_one, is_other = one.exists & (one.pixel == first + k), other.exists & (other.pixel == first + k)
    part = select(is_one, one.part, none) + select(is_other, other.part, none) + broken
    slope = select(is_one, one.slope, none) + select(is_other, other.slope, none) + broken
    return Tap(first + k, is_one | is_other, part, slope)


@inline_always
def _stepped(tap: Tap, axis: Any) -> Any:
    return Tap(tap.pixel * axis.step, tap.exists, tap.part, tap.slope)


@inline_always
def _nearest(source: Source, axis: Any) -> Any:
    p = source.position
    near = rint(p)
    exists = _is_there(source, axis) & in_range(near, 0, float(axis.size))
    pixel = convert(select(exists, near, splat(0, p)), axis.integer)
    return _stepped(Tap(pixel, exists, select(p == p, splat(1, p), np.nan), splat(0, p)), axis)


@inline_always
def _two(source: Source, axis: Any) -> Any:
    """Eq. 4, linear."""
    first, second, has_first, has_second, part = axis_corners(
        source.position, -1.0, float(axis.size), axis.size, axis.size, axis.integer
    )
    is_there, slope = _is_there(source, axis), source.slope
    one, other = Tap(first, has_first & is_there, 1 - part, 0 - slope), Tap(second, has_second & is_there, part, slope)
    return _two_of(one, other, axis)


@inline_always
def _four(sources: Any, t: Any, axis: Any) -> Any:
    """Eq. 4, cubic."""
    first, second = _two_of(_cubic_tap(0, sources[0], t, axis), _cubic_tap(1, sources[1], t, axis), axis)
    third, fourth = _two_of(_cubic_tap(2, sources[2], t, axis), _cubic_tap(3, sources[3], t, axis), axis)
    return first, second, third, fourth


@inline_always
def _cubic_tap(tap: int, source: Source, t: Any, axis: Any) -> Any:
    q = source.position
    exists = _is_there(source, axis) & in_range(q, 0, float(axis.size))
    pixel = convert(select(exists, q, splat(0, q)), axis.integer)
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


@inline_always
def corner_values(corner: int, i: int, plane: Any, thread: int, scratch: Any, like: Any) -> Any:
    """What a plane, one channel of an image, has at a corner of some queries; zeros where there is none."""
    return gather_numbered(plane, at(scratch.corners, (thread, corner, i)), like)


@inline_always
def pair_values(corner: int, i: int, plane: Any, thread: int, scratch: Any, like: Any) -> tuple[Any, Any]:
    """The same of a corner and the next one, which lies behind it."""
    one = load_beside(at(scratch.corners, (thread, corner, i)), like)
    other = load_beside(at(scratch.corners, (thread, corner + 1, i)), like)
    has_one, has_other = one >= 0, other >= 0
    first, second = gather_pairs(has_one | has_other, plane, select(has_one, one, other - 1))
    return select(has_one, first, splat(0, like)), select(has_other, second, splat(0, like))

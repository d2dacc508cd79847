"""Boxes that are turned (docs/math/roi.md, eq. 14 and 15): points are placed in the box, as on the axes of one that is
not, and each is turned by itself. What a bin reads is no product of rows and columns, so its points' pixels are listed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.simd import advance
from pydeform.cpu.roi.bins import MANY_POINTS, points_of, rounded_down, spread_of, state_of, walk_between, worse

FEW_POINTS = 8  # so many on an axis are looked at one by one; of more, those that can count are found by division
ROUNDING = 2.0**-20  # of a point's coordinate, relative to the numbers that it is computed of: more than in float32


class Turn(NamedTuple):
    """Where the centre of a box is, and by what angle the box is turned."""

    y: Any
    x: Any
    sin: Any
    cos: Any


class Line(NamedTuple):
    """Points of a bin along one axis of its box: number i lies at origin + (i + phase) * spread / divisor."""

    origin: Any
    spread: Any
    divisor: Any
    phase: Any
    number: int


@inline_always
def turn_box(boxes: Any, r: int, extents: Any, turns: Any, g: Any) -> int:
    """Eq. 14: begin and size of box r along its own axes, from its centre, and its turn; gives its state."""
    real = boxes.dtype.type
    x, y, w, h, angle = boxes[r, 1], boxes[r, 2], boxes[r, 3], boxes[r, 4], boxes[r, 5]
    scale, half, least = real(g.spatial_scale), real(0.5) * real(g.half_pixel), real(g.least_size)
    centre_y, centre_x, height, width = y * scale - half, x * scale - half, h * scale, w * scale
    size_y, size_x = max(height, least), max(width, least)
    extents[r, 0], extents[r, 1] = -size_y / real(2), size_y
    extents[r, 2], extents[r, 3] = -size_x / real(2), size_x
    turned = angle * real(g.turn)
    turns[r, 0], turns[r, 1] = centre_y, centre_x
    turns[r, 2], turns[r, 3] = math.sin(turned), math.cos(turned)
    # An infinite size is OUTSIDE, also where the least size hides that.
    state = worse(state_of(y, x, centre_y, centre_x), state_of(h, w, height, width))
    return worse(state, state_of(angle, angle, turned))


@inline_always
def turn_of(turns: Any, r: int) -> Turn:
    return Turn(turns[r, 0], turns[r, 1], turns[r, 2], turns[r, 3])


@inline_always
def _rounding(turn: Turn, boxes: Any, g: Any) -> Any:
    """What the coordinates of a point in the image are off by, at most."""
    real = boxes.dtype.type
    return real(ROUNDING) * (abs(turn.y) + abs(turn.x) + real(g.in_h) + real(g.in_w))


@inline_always
def _between(lowest: Any, highest: Any, line: Line, boxes: Any) -> tuple[int, int]:
    """Points of a line that lie from lowest to highest have numbers first <= number < last, among others."""
    real = boxes.dtype.type
    step, zero, number = line.spread / line.divisor, real(0), real(line.number)
    if step == zero:
        return 0, line.number if lowest <= line.origin <= highest else 0
    one, other = (lowest - line.origin) / step - line.phase, (highest - line.origin) / step - line.phase
    rounding = real(ROUNDING) * (abs(line.origin) + abs(lowest) + abs(highest)) / abs(step)
    margin = min(rounding, real(MANY_POINTS)) + real(1)
    first, last = np.floor(min(one, other) - margin), np.ceil(max(one, other) + margin) + real(1)
    if not (first < last):  # NaN: infinitely far away
        return 0, 0
    return np.int64(min(max(first, zero), number)), min(np.int64(min(max(last, zero), number)), line.number)


@inline_always
def _line(lowest: Any, highest: Any, start: Any, bin_size: Any, boxes: Any, g: Any) -> Line:
    """The points of a bin that can lie from lowest to highest, along an axis of its box."""
    real = boxes.dtype.type
    points, phase = points_of(bin_size, boxes, g), real(g.first_point)
    if points > MANY_POINTS:
        walk = walk_between(lowest, highest, start, bin_size, boxes, g)
        return Line(walk.origin, walk.step, real(1), real(0), walk.number)
    spread, divisor = spread_of(bin_size, points, boxes)
    line = Line(start, spread, divisor, phase, np.int64(max(points, real(0))))
    if line.number <= FEW_POINTS:
        return line
    first, last = _between(lowest, highest, line, boxes)
    return Line(start, spread, divisor, phase + real(first), max(last - first, 0))


@inline_always
def place_lines(r: int, first: Any, last: Any, lists: Any, g: Any) -> None:
    """The lines of bins first <= bin < last on each axis (y, x) of box r, from the starts and sizes in their slots,
    into their slots. The image is seen from the box: along each of its axes, from where to where the image reaches."""
    boxes = lists.turns  # tells the type
    real, turn = boxes.dtype.type, turn_of(boxes, r)
    reach, off = real(g.reach), _rounding(turn, boxes, g)
    top, bottom = -reach - turn.y, rounded_down(g.in_h - 1, boxes) + reach - turn.y
    left, right = -reach - turn.x, rounded_down(g.in_w - 1, boxes) + reach - turn.x
    for axis in range(2):
        by_y, by_x = (-turn.sin, turn.cos) if axis else (turn.cos, turn.sin)
        lowest = min(top * by_y, bottom * by_y) + min(left * by_x, right * by_x)
        highest = max(top * by_y, bottom * by_y) + max(left * by_x, right * by_x)
        for slot in range(axis * lists.of_axis + first[axis], axis * lists.of_axis + last[axis]):
            points = points_of(lists.sizes[slot], boxes, g)
            # Very many points lie so close that rounding by more than a pixel cannot be made good by looking at more.
            margin = min(off, real(1)) if points > MANY_POINTS else off
            line = _line(lowest - margin, highest + margin, lists.starts[slot], lists.sizes[slot], boxes, g)
            more = advance(lists.weights, 2 * slot * lists.row)
            lists.starts[slot], lists.sizes[slot], more[0], more[1] = line.origin, line.spread, line.divisor, line.phase
            lists.entries[slot], lists.counts[slot] = line.number, points


@inline_always
def _line_of(slot: int, here: Any) -> Line:
    more = advance(here.weights, 2 * slot * here.row)
    return Line(here.starts[slot], here.sizes[slot], more[0], more[1], here.entries[slot])


@inline_always
def _point_of(i: int, line: Line, boxes: Any) -> Any:
    return line.origin + (boxes.dtype.type(i) + line.phase) * line.spread / line.divisor


@inline
def _in_image(along_y: Any, turn: Turn, line: Line, boxes: Any, g: Any) -> tuple[int, int]:
    """Points of a row of points that can count, first <= number < last: the row crosses the image between two rows of
    pixels and between two columns."""
    real = boxes.dtype.type
    edge = real(g.reach) + _rounding(turn, boxes, g)
    low, high = -real(np.inf), real(np.inf)
    if turn.sin != real(0):
        y = along_y * turn.cos + turn.y
        one, other = (y + edge) / turn.sin, (y - (real(g.in_h - 1) + edge)) / turn.sin
        low, high = min(one, other), max(one, other)
    if turn.cos != real(0):
        x = along_y * turn.sin + turn.x
        one, other = (-edge - x) / turn.cos, (real(g.in_w - 1) + edge - x) / turn.cos
        low, high = max(low, min(one, other)), min(high, max(one, other))
    return _between(low, high, line, boxes)


@inline
def list_points(bin_: Any, first: int, room: int, here: Any, g: Any) -> tuple[int, int]:
    """Pixels that a bin's points read, from number `first` on, into places and their weights into products, at most
    `room`. Gives how many, and the number of the point to go on with: `bin_.listed` after the last.

    Points that follow each other between the same pixels share entries: so sums over very many points are sums of sums,
    which lose far less.
    """
    if bin_.listed == 0:
        return 0, 0
    boxes = here.turns  # tells the type
    real, turn = boxes.dtype.type, turn_of(boxes, bin_.r)
    rows, columns = _line_of(bin_.sy, here), _line_of(bin_.sx, here)
    reach, bottom, right = real(g.reach), rounded_down(g.in_h - 1, boxes), rounded_down(g.in_w - 1, boxes)
    row = first // columns.number if first else 0
    column, n, latest, cell = first - row * columns.number, 0, -1, 0  # `latest`: pixel whose entries begin at `cell`
    while row < rows.number and n + 4 <= room:
        along_y = _point_of(row, rows, boxes)
        start, stop = 0, columns.number
        if stop > FEW_POINTS:
            start, stop = _in_image(along_y, turn, columns, boxes, g)
        column = max(column, start)
        while column < stop and n + 4 <= room:
            along_x = _point_of(column, columns, boxes)
            y = along_y * turn.cos - along_x * turn.sin + turn.y  # eq. 15
            x = along_y * turn.sin + along_x * turn.cos + turn.x
            if (y >= -reach) & (y <= bottom + reach) & (x >= -reach) & (x <= right + reach):
                y, x = min(max(y, real(0)), bottom), min(max(x, real(0)), right)
                pixel = np.int64(y) * g.in_w + np.int64(x)
                if pixel != latest:
                    latest, cell = pixel, n
                    n = _list_corners(n, np.int64(y), np.int64(x), here, g)
                _add_weights(cell, y, x, real(1), here, g)
            column += 1
        if column >= stop:
            row, column = row + 1, 0
    return n, row * columns.number + column


@inline_always
def _list_corners(n: int, top: int, left: int, here: Any, g: Any) -> int:
    """Entries from n on for a pixel and its neighbours below and to the right, those that the image has, without
    weights yet; gives the number of entries then."""
    for i in range(min(2, g.in_h - top)):
        for j in range(min(2, g.in_w - left)):
            here.places[n], here.products[n] = (top + i) * g.in_w + left + j, 0
            n += 1
    return n


@inline_always
def _add_weights(n: int, y: Any, x: Any, one: Any, here: Any, g: Any) -> None:
    """Those of a point, to the entries that `_list_corners` made from n on."""
    part_y, part_x = y - np.floor(y), x - np.floor(x)
    for i in range(min(2, g.in_h - np.int64(y))):
        for j in range(min(2, g.in_w - np.int64(x))):
            here.products[n] += (part_y if i else one - part_y) * (part_x if j else one - part_x)
            n += 1

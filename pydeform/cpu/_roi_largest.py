"""Maxima over a bin: of its pixels, or of its points in the order y, x."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu._jit import inline
from pydeform.cpu._roi_bins import BROKEN, SOUND, pixels_read, points_listed
from pydeform.cpu._roi_common import LISTED, entries_of, lay_bins
from pydeform.cpu._simd import VECTOR_BYTES, advance, at
from pydeform.cpu._simd_roi import largest_pixel, largest_point


@inline
def list_candidates(box: Any, boxes: Any, lists: Any, g: Any) -> None:
    """All bins of a box: on each axis the pixels, or the points as `points_listed` has them."""
    if box[4] != SOUND:
        return
    last = g.pooled_h, g.pooled_w
    lay_bins(box, (0, 0), last, boxes, lists, g)
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        for bin_ in range(last[axis]):
            slot = axis * lists.of_axis + bin_
            row, part = advance(lists.index, slot * lists.row), advance(lists.weights, 2 * slot * lists.row)
            start, size = lists.starts[slot], lists.starts[2 * lists.of_axis + slot]
            if g.points:
                n = points_listed(start, size, length, boxes, g, row, part)
            else:
                n, _ = pixels_read(bin_, start, size, length, boxes, g, row, part, advance(part, lists.row))
            lists.entries[slot] = n


@inline
def _corners(
    sy: int, sx: int, i: int, j: int, boxes: Any, g: Any, lists: Any, places: Any, products: Any, to: int
) -> None:
    """Four pixels and weights of row i, column j of a bin's candidates, into to ... to + 3; -1 where it has none."""
    low_y, low_x = np.int64(lists.index[sy * lists.row + i]), np.int64(lists.index[sx * lists.row + j])
    if low_y < 0 or low_x < 0:
        for k in range(4):
            places[to + k], products[0, to + k] = -1, 0
        return
    part_y, part_x = lists.weights[2 * sy * lists.row + i], lists.weights[2 * sx * lists.row + j]
    one = boxes.dtype.type(1)
    high_y, high_x = min(low_y + 1, g.in_h - 1), min(low_x + 1, g.in_w - 1)
    places[to], products[0, to] = low_y * g.in_w + low_x, (one - part_y) * (one - part_x)
    places[to + 1], products[0, to + 1] = low_y * g.in_w + high_x, (one - part_y) * part_x
    places[to + 2], products[0, to + 2] = high_y * g.in_w + low_x, part_y * (one - part_x)
    places[to + 3], products[0, to + 3] = high_y * g.in_w + high_x, part_y * part_x


@inline
def list_part(
    sy: int, sx: int, first: int, last: int, boxes: Any, g: Any, lists: Any, places: Any, products: Any
) -> None:
    """Candidates [first, last) of a bin: a pixel each or, of points, four and their weights."""
    columns = lists.entries[sx]
    i = first // columns
    j = first - i * columns
    for n in range(last - first):
        if g.points:
            _corners(sy, sx, i, j, boxes, g, lists, places, products, 4 * n)
        else:
            places[n] = np.int64(lists.index[sy * lists.row + i]) * g.in_w + lists.index[sx * lists.row + j]
        j += 1
        if j == columns:
            i, j = i + 1, 0


@inline
def largest_of_bin(
    state: int,
    sy: int,
    sx: int,
    out: Any,
    winners: Any,
    image: Any,
    width: int,
    boxes: Any,
    lists: Any,
    g: Any,
    places: Any,
    products: Any,
) -> None:
    """out[c] for a block of channels, and which candidate it is in winners[c]; -1: none."""
    real = boxes.dtype.type
    listed = entries_of(state, sy, sx, lists)
    if listed == 0:
        for c in range(width):
            out[c] = real(np.nan) if state == BROKEN else real(0)
            winners[c] = -1
        return
    vectors = width * boxes.itemsize // VECTOR_BYTES
    for first in range(0, listed, LISTED):
        last = min(first + LISTED, listed)
        list_part(sy, sx, first, last, boxes, g, lists, places, products)
        if g.points:
            largest_point(
                out,
                at(winners, (0,)),
                image,
                at(places, (0,)),
                at(products, (0, 0)),
                last - first,
                width,
                vectors,
                first,
                first > 0,
            )
        else:
            largest_pixel(
                out,
                at(winners, (0,)),
                image,
                at(places, (0,)),
                at(products, (0, 0)),
                last - first,
                width,
                vectors,
                first,
                first > 0,
            )

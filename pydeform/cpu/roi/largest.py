"""Maxima over a bin: of its pixels, or of its points in the order y, x."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.planes import gather
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at
from pydeform.cpu.core.weighted import largest_pixel, largest_point
from pydeform.cpu.roi.bins import BROKEN, SOUND, pixels_read, points_listed
from pydeform.cpu.roi.common import LISTED, bins_from, entries_of, lay_bins, lists_from


@inline
def list_candidates(box: Any, chunk: int, boxes: Any, lists: Any, g: Any) -> tuple[Any, int]:
    """All bins of a box from number `chunk` on that there are slots for: on each axis the pixels, or the points as
    `points_listed` has them. The lists in which their slots are, and how many bins they are."""
    y = chunk // g.pooled_w
    x = chunk - y * g.pooled_w
    first, last, count = bins_from(y, x, (0, 0), (g.pooled_h, g.pooled_w), lists)
    here = lists_from(lists, first[0], first[1])
    if box[4] != SOUND:
        return here, count
    lay_bins(box, first, last, boxes, here, g)
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        for bin_ in range(first[axis], last[axis]):
            slot = axis * here.of_axis + bin_
            row, part = advance(here.index, slot * here.row), advance(here.weights, 2 * slot * here.row)
            start, size = here.starts[slot], here.starts[here.beyond + slot]
            if g.points:
                n = points_listed(start, size, length, boxes, g, row, part)
            else:
                n, _ = pixels_read(bin_, start, size, length, boxes, g, row, part, advance(part, here.row))
            here.entries[slot] = n
    return here, count


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


@inline_always
def largest_of_bin(
    state: int,
    sy: int,
    sx: int,
    out: Any,
    winners: Any,
    image: Any,
    row: Any,
    boxes: Any,
    lists: Any,
    g: Any,
    places: Any,
    products: Any,
    b: int,
    reader: Any,
    p: Any,
) -> None:
    """out[c] for a block of channels, and which candidate it is in winners[c]; -1: none.

    Pixels are those of `image`, whose block it is, or are gathered.
    """
    width = row.width
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
        index, pixels = at(places, (0,)), image
        if p.planes:
            count = (last - first) * (4 if g.points else 1)
            gather(reader, b, row.first, 1, row.channels, width, places, count, g.in_w)
            index, pixels = reader.own, reader.pixels
        if g.points:
            largest_point(
                out,
                at(winners, (0,)),
                pixels,
                index,
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
                pixels,
                index,
                at(products, (0, 0)),
                last - first,
                width,
                vectors,
                first,
                first > 0,
            )

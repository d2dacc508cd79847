"""Maxima over a bin: of its pixels, or of its points in the order y, x."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu._jit import inline
from pydeform.cpu._roi_bins import BROKEN, SOUND, pixels_read, points_listed
from pydeform.cpu._roi_common import LISTED
from pydeform.cpu._simd import VECTOR_BYTES, at
from pydeform.cpu._simd_roi import largest_pixel, largest_point


@inline
def list_candidates(box: Any, boxes: Any, g: Any, index: Any, weights: Any, entries: Any) -> None:
    """All bins of a box: on each axis the pixels, or the points as `points_listed` has them."""
    begin_y, size_y, begin_x, size_x, state = box
    if state != SOUND:
        return
    real = boxes.dtype.type
    for axis in range(2):
        begin, size = (begin_x, size_x) if axis else (begin_y, size_y)
        length, pooled = (g.in_w, g.pooled_w) if axis else (g.in_h, g.pooled_h)
        bin_size = size / real(pooled)
        for bin_ in range(pooled):
            row, part, none = (
                at(index, (axis, bin_, 0)),
                at(weights, (axis, bin_, 0, 0)),
                at(weights, (axis, bin_, 1, 0)),
            )
            if g.points:
                n = points_listed(bin_, begin, bin_size, length, boxes, g, row, part)
            else:
                n, _ = pixels_read(bin_, begin, bin_size, length, boxes, g, row, part, none)
            entries[axis, bin_] = n


@inline
def _corners(
    i: int, j: int, py: int, px: int, g: Any, index: Any, weights: Any, places: Any, products: Any, to: int
) -> None:
    """Four pixels and weights of row i, column j of a bin's candidates, into to ... to + 3; -1 where it has none."""
    low_y, low_x = np.int64(index[0, py, i]), np.int64(index[1, px, j])
    if low_y < 0 or low_x < 0:
        for k in range(4):
            places[to + k], products[0, to + k] = -1, 0
        return
    part_y, part_x = weights[0, py, 0, i], weights[1, px, 0, j]
    one = weights.dtype.type(1)
    high_y, high_x = min(low_y + 1, g.in_h - 1), min(low_x + 1, g.in_w - 1)
    places[to], products[0, to] = low_y * g.in_w + low_x, (one - part_y) * (one - part_x)
    places[to + 1], products[0, to + 1] = low_y * g.in_w + high_x, (one - part_y) * part_x
    places[to + 2], products[0, to + 2] = high_y * g.in_w + low_x, part_y * (one - part_x)
    places[to + 3], products[0, to + 3] = high_y * g.in_w + high_x, part_y * part_x


@inline
def list_part(
    py: int,
    px: int,
    first: int,
    last: int,
    g: Any,
    index: Any,
    weights: Any,
    entries: Any,
    places: Any,
    products: Any,
) -> None:
    """Candidates [first, last) of a bin: a pixel each or, of points, four and their weights."""
    columns = entries[1, px]
    i = first // columns
    j = first - i * columns
    for n in range(last - first):
        if g.points:
            _corners(i, j, py, px, g, index, weights, places, products, 4 * n)
        else:
            places[n] = np.int64(index[0, py, i]) * g.in_w + index[1, px, j]
        j += 1
        if j == columns:
            i, j = i + 1, 0


@inline
def largest_of_bin(
    state: int,
    py: int,
    px: int,
    out: Any,
    winners: Any,
    image: Any,
    width: int,
    boxes: Any,
    g: Any,
    index: Any,
    weights: Any,
    entries: Any,
    places: Any,
    products: Any,
) -> None:
    """out[c] for a block of channels, and which candidate it is in winners[c]; -1: none."""
    real = boxes.dtype.type
    listed = entries[0, py] * entries[1, px] if state == SOUND else 0
    if listed == 0:
        for c in range(width):
            out[c] = real(np.nan) if state == BROKEN else real(0)
            winners[c] = -1
        return
    vectors = width * boxes.itemsize // VECTOR_BYTES
    for first in range(0, listed, LISTED):
        last = min(first + LISTED, listed)
        list_part(py, px, first, last, g, index, weights, entries, places, products)
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

"""RoI pooling where a class has few channels, in planes as they lie, forward and backward (eq. 5 to 9).

A unit of work goes plane by plane, in each through all boxes of its image: so its pixels stay in the nearest cache.
Columns that are neighbours are read and written as one vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.bands import BAND, band_dots, band_scatter, band_sum
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.memory import workspace
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.planes import NO_PLANES, Planes, gather, gather_band, reader_of, reader_parts
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.sizes import pixel_dtype
from pydeform.cpu.core.weighted import plane_scatter, plane_weighted_dots, plane_weighted_sum
from pydeform.cpu.roi import common as roi_common
from pydeform.cpu.roi.common import (
    LISTED,
    bins_of,
    bins_of_cell,
    entries_of,
    find_boxes,
    is_run,
    list_of_cell,
    list_pixels,
    list_slopes,
    lists_of,
    next_bin,
    scale_of,
    slots_of,
    write_moves,
)

# Neighbouring bins of a box are neighbours in memory: threads that wrote them at the same time would wait for each
# other's cache lines. So a unit is several planes in a row, and there are not many more of them than keep all at work.
UNITS_OF_THREAD = 16


class FewPlan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result."""

    planes: int  # 1: pixels are gathered from the input, since kernels cannot read it as it is; 0: they can
    per_class: int  # channels of a class
    parts: int  # of an image's boxes, each for itself, where they write to different places and there are few planes
    units: int  # into which the planes, or their parts, are divided; some may be empty
    has_offset: int
    has_mask: int
    need_input: int
    need_dots: int  # for offset and mask


def _plan(
    g: Any,
    threads: int,
    planes: bool,
    has_offset: bool,
    has_mask: bool,
    need_input: bool = False,
    need_dots: bool = False,
) -> FewPlan:
    number = g.batch * roi_common.cells_of(g) * g.classes
    return FewPlan(
        planes=int(planes),
        per_class=g.out_channels // g.classes,
        parts=-(-UNITS_OF_THREAD * threads // (4 * number)) if threads > 1 else 1,
        units=UNITS_OF_THREAD * threads,
        has_offset=int(has_offset),
        has_mask=int(has_mask),
        need_input=int(need_input),
        need_dots=int(need_dots),
    )


def _workspace(threads: int, g: Any, boxes: Any, gathered: bool) -> Any:
    dtype = boxes.dtype
    lists = roi_common.lists_of_threads(threads, g, boxes)
    longest = max(LISTED, lists[1][0][-1]) if gathered else 0
    return workspace(
        ((g.boxes, 4), dtype),
        ((g.boxes,), np.dtype(np.int64)),
        *lists,
        ((threads, LISTED), pixel_dtype(g.in_h * g.in_w)),
        ((threads, 3, LISTED), dtype),
        *reader_parts(threads, longest, BAND, pixel_dtype(g.in_h * g.in_w), dtype),
    )


def forward(
    arguments: tuple[Any, ...], planes: Planes | None, output: Any, has_offset: bool, has_mask: bool, g: Any
) -> None:
    """`planes`: where the input lies, if `arguments` have none of it."""
    threads = roi_common.threads_for(g, 1, True, g.boxes * roi_common.cells_of(g) * g.classes)
    parallel.run(
        _mean_of_few,
        output.dtype.char + pixel_dtype(g.in_h * g.in_w).char,
        threads,
        parallel.new_counters(2),
        *arguments,
        planes or NO_PLANES,
        *roi_common.by_image(arguments[1], g.batch),
        output,
        *_workspace(threads, g, arguments[1], planes is not None),
        bins_of(g),
        g,
        _plan(g, threads, planes is not None, has_offset, has_mask),
    )


def backward(
    grad_output: Any,
    arguments: tuple[Any, ...],
    planes: Planes | None,
    grad_input: Any,
    grad_moves: Any,
    grad_mask: Any,
    has_offset: bool,
    has_mask: bool,
    g: Any,
) -> None:
    """Adds to grad_input, and writes grad_moves (box, class, axis, bin) and grad_mask; an empty one is not wanted."""
    units = (g.batch * bool(len(grad_input)) + g.boxes * bool(len(grad_mask))) * roi_common.cells_of(g) * g.classes
    threads = roi_common.threads_for(g, 1 + 2 * bool(len(grad_mask)), True, units)
    parallel.run(
        _few_backward,
        grad_output.dtype.char + pixel_dtype(g.in_h * g.in_w).char,
        threads,
        parallel.new_counters(2),
        grad_output,
        *arguments,
        planes or NO_PLANES,
        *roi_common.by_image(arguments[1], g.batch),
        grad_input,
        grad_moves,
        grad_mask,
        *_workspace(threads, g, arguments[1], planes is not None and len(grad_mask) > 0),
        bins_of(g),
        g,
        _plan(g, threads, planes is not None, has_offset, has_mask, len(grad_input) > 0, len(grad_mask) > 0),
    )


@inline
def _planes_of(unit: int, units: int, parts: int, g: Any) -> tuple[int, int]:
    """first <= plane * parts + part < last of a unit."""
    pieces = g.batch * g.classes * g.group_h * g.group_w * parts
    return pieces * unit // units, pieces * (unit + 1) // units


@inline
def _place(piece: int, parts: int, starts: Any, g: Any) -> tuple[int, int, int, int, int]:
    """Image, class and cell, and the places in `order` of the boxes: first and after the last."""
    cells = g.group_h * g.group_w
    plane = piece // parts
    image = plane // cells
    part, cell, cls, b = piece - plane * parts, plane - image * cells, image % g.classes, image // g.classes
    n = starts[b + 1] - starts[b]
    return b, cls, cell, starts[b] + n * part // parts, starts[b] + n * (part + 1) // parts


@inline_always
def _rows_of(
    b: int, channel: int, sy: int, x: Any, k: int, columns: int, input: Any, lists: Any, reader: Any, g: Any, p: Any
) -> Any:
    """For `band_sum`: a bin's columns from x[k] on, the list of its rows there, the width and the rest of the plane."""
    rows, count = advance(lists.index, sy * lists.row), lists.entries[sy]
    if p.planes:
        gather_band(reader, b, channel, rows, count, np.int64(x[k]), min(BAND, columns - k), BAND)
        return reader.pixels, reader.own, BAND, count * BAND
    return at(input, (b, channel, np.int64(x[k]))), rows, g.in_w, g.in_h * g.in_w - x[k]


@inline_always
def _listed_of(b: int, channel: int, places: Any, count: int, input: Any, reader: Any, g: Any, p: Any) -> Any:
    """A plane, and where in it the listed pixels are."""
    if p.planes:
        gather(reader, b, channel, 1, 1, 1, places, count, g.in_w)
        return reader.pixels, reader.own
    return at(input, (b, channel, 0)), at(places, (0,))


@Kernel
def _mean_of_few(
    thread: int,
    counters: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    planes: Any,
    order: Any,
    starts: Any,
    output: Any,
    extents: Any,
    states: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    bins: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, boxes, extents, states, g)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products = all_places[thread], all_products[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    unit = claim(counters, 1)
    while unit < p.units:
        first, last = _planes_of(unit, p.units, p.parts, g)
        for piece in range(first, last):
            place = _place(piece, p.parts, starts, g)
            _mean_of_plane(
                place,
                input,
                offset,
                mask,
                order,
                output,
                extents,
                states,
                lists,
                places,
                products,
                reader,
                bins,
                g,
                p,
            )
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, p.units)
    let_helpers_go(thread, counters)


@inline
def _mean_of_plane(
    place: Any,
    input: Any,
    offset: Any,
    mask: Any,
    order: Any,
    output: Any,
    extents: Any,
    states: Any,
    lists: Any,
    places: Any,
    products: Any,
    reader: Any,
    bins: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 5 for all bins of some boxes that read a cell of a class."""
    b, cls, cell, box, last_box = place
    one, cells = output.dtype.type(1), g.group_h * g.group_w
    first, last = bins_of_cell(cell, g)
    current = box, first[0], first[1]
    left = (last_box - box) * (last[0] - first[0]) * (last[1] - first[1])
    while left > 0:
        here, count = list_of_cell(
            current, left, first, last, cls, extents, states, order, offset, bins, lists, g, p, False
        )
        for slot in range(count):
            box, py, px = current
            r, i = order[box], py * g.pooled_w + px
            current = next_bin(current, first, last)
            sy, sx, state = slots_of(py, px, slot, states[r], here, p)
            listed = entries_of(state, sy, sx, here)
            scale = scale_of(state, sy, sx, extents, here, g)
            if p.has_mask:
                scale *= mask[r, i]
            is_band = listed > 0 and is_run(sx, here)
            columns, x = here.entries[sx], advance(here.index, sx * here.row)
            for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                total = output.dtype.type(0)
                for k in range(0, columns if is_band else 0, BAND):
                    source, rows, width, room = _rows_of(
                        b, c * cells + cell, sy, x, k, columns, input, here, reader, g, p
                    )
                    total += band_sum(
                        source,
                        rows,
                        advance(here.weights, 2 * sy * here.row),
                        here.entries[sy],
                        width,
                        room,
                        advance(here.weights, 2 * sx * here.row + k),
                        min(BAND, columns - k),
                    )
                output[r, c, i] = total * scale
            for done in range(0, 0 if is_band else listed, LISTED):
                stop = min(done + LISTED, listed)
                list_pixels(sy, sx, done, stop, g, here, places, products)
                for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                    pixels, index = _listed_of(b, c * cells + cell, places, stop - done, input, reader, g, p)
                    plane_weighted_sum(
                        at(output, (r, c, i)),
                        pixels,
                        index,
                        at(products, (0, 0)),
                        stop - done,
                        1,
                        1,
                        scale if stop == listed else one,
                        done > 0,
                    )
        left -= count


@Kernel
def _few_backward(
    thread: int,
    counters: Any,
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    planes: Any,
    order: Any,
    starts: Any,
    grad_input: Any,
    grad_moves: Any,
    grad_mask: Any,
    extents: Any,
    states: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    bins: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, boxes, extents, states, g)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products = all_places[thread], all_products[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    scattering = p.units * p.need_input
    units = scattering + p.units * p.need_dots
    unit = claim(counters, 1)
    while unit < units:
        if unit < scattering:  # all boxes of an image add to the same planes
            first, last = _planes_of(unit, p.units, 1, g)
            for piece in range(first, last):
                place = _place(piece, 1, starts, g)
                _add_to_plane(
                    place,
                    grad_output,
                    offset,
                    mask,
                    order,
                    grad_input,
                    extents,
                    states,
                    lists,
                    places,
                    products,
                    bins,
                    g,
                    p,
                )
        else:
            first, last = _planes_of(unit - scattering, p.units, p.parts, g)
            for piece in range(first, last):
                place = _place(piece, p.parts, starts, g)
                _dots_of_plane(
                    place,
                    grad_output,
                    input,
                    offset,
                    mask,
                    order,
                    grad_moves,
                    grad_mask,
                    extents,
                    states,
                    lists,
                    places,
                    products,
                    reader,
                    bins,
                    g,
                    p,
                )
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, units)
    let_helpers_go(thread, counters)


@inline
def _add_to_plane(
    place: Any,
    grad_output: Any,
    offset: Any,
    mask: Any,
    order: Any,
    grad_input: Any,
    extents: Any,
    states: Any,
    lists: Any,
    places: Any,
    products: Any,
    bins: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 7 for a cell of a class."""
    b, cls, cell, box, last_box = place
    cells = g.group_h * g.group_w
    first, last = bins_of_cell(cell, g)
    current = box, first[0], first[1]
    left = (last_box - box) * (last[0] - first[0]) * (last[1] - first[1])
    while left > 0:
        here, count = list_of_cell(
            current, left, first, last, cls, extents, states, order, offset, bins, lists, g, p, False
        )
        for slot in range(count):
            box, py, px = current
            r, i = order[box], py * g.pooled_w + px
            current = next_bin(current, first, last)
            sy, sx, state = slots_of(py, px, slot, states[r], here, p)
            listed = entries_of(state, sy, sx, here)
            if listed == 0:
                continue
            scale = scale_of(state, sy, sx, extents, here, g)
            if p.has_mask:
                scale *= mask[r, i]
            is_band = is_run(sx, here)
            columns, x = here.entries[sx], advance(here.index, sx * here.row)
            for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                for k in range(0, columns if is_band else 0, BAND):
                    band_scatter(
                        at(grad_input, (b, c * cells + cell, np.int64(x[k]))),
                        advance(here.index, sy * here.row),
                        advance(here.weights, 2 * sy * here.row),
                        here.entries[sy],
                        g.in_w,
                        g.in_h * g.in_w - x[k],
                        advance(here.weights, 2 * sx * here.row + k),
                        min(BAND, columns - k),
                        grad_output[r, c, i] * scale,
                    )
            for done in range(0, 0 if is_band else listed, LISTED):
                stop = min(done + LISTED, listed)
                list_pixels(sy, sx, done, stop, g, here, places, products)
                for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                    plane_scatter(
                        at(grad_output, (r, c, i)),
                        at(grad_input, (b, c * cells + cell, 0)),
                        at(places, (0,)),
                        at(products, (0, 0)),
                        stop - done,
                        1,
                        1,
                        scale,
                    )
        left -= count


@inline
def _dots_of_plane(
    place: Any,
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any,
    order: Any,
    grad_moves: Any,
    grad_mask: Any,
    extents: Any,
    states: Any,
    lists: Any,
    places: Any,
    products: Any,
    reader: Any,
    bins: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 8 and 9 for all bins of some boxes that read a cell of a class."""
    b, cls, cell, box, last_box = place
    cells = g.group_h * g.group_w
    first, last = bins_of_cell(cell, g)
    current = box, first[0], first[1]
    left = (last_box - box) * (last[0] - first[0]) * (last[1] - first[1])
    while left > 0:
        here, count = list_of_cell(
            current, left, first, last, cls, extents, states, order, offset, bins, lists, g, p, True
        )
        for slot in range(count):
            box, py, px = current
            r, i = order[box], py * g.pooled_w + px
            current = next_bin(current, first, last)
            sy, sx, state = slots_of(py, px, slot, states[r], here, p)
            listed = entries_of(state, sy, sx, here)
            scale = scale_of(state, sy, sx, extents, here, g)
            value = along_y = along_x = grad_output.dtype.type(0)
            is_band = listed > 0 and is_run(sx, here)
            columns, x = here.entries[sx], advance(here.index, sx * here.row)
            y_weights = advance(here.weights, 2 * sy * here.row)
            for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                grad = grad_output[r, c, i]
                for k in range(0, columns if is_band else 0, BAND):
                    x_weights = advance(here.weights, 2 * sx * here.row + k)
                    source, rows, width, room = _rows_of(
                        b, c * cells + cell, sy, x, k, columns, input, here, reader, g, p
                    )
                    dots = band_dots(
                        source,
                        rows,
                        y_weights,
                        advance(y_weights, here.row),
                        here.entries[sy],
                        width,
                        room,
                        x_weights,
                        advance(x_weights, here.row),
                        min(BAND, columns - k),
                    )
                    value, along_y, along_x = value + dots[0] * grad, along_y + dots[1] * grad, along_x + dots[2] * grad
            for done in range(0, 0 if is_band else listed, LISTED):
                stop = min(done + LISTED, listed)
                list_pixels(sy, sx, done, stop, g, here, places, products)
                list_slopes(sy, sx, done, stop, here, products)
                for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                    pixels, index = _listed_of(b, c * cells + cell, places, stop - done, input, reader, g, p)
                    dots = plane_weighted_dots(
                        at(grad_output, (r, c, i)),
                        pixels,
                        index,
                        at(products, (0, 0)),
                        at(products, (1, 0)),
                        at(products, (2, 0)),
                        stop - done,
                        1,
                        1,
                    )
                    value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
            write_moves(
                r, cls, i, state, listed, scale, value, along_y, along_x, extents, mask, grad_moves, grad_mask, g, p
            )
        left -= count

"""The gradient of boxes, of means and of maxima of points (docs/math/roi.md, eq. 11 to 13).

A unit of work is one box, which owns its row of the gradient. It goes through its bins in their order. What a bin reads
on an axis is listed with two derivatives, by where the bin begins and by where it ends: `slopes` and `ends`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import advance, at, vectors_of
from pydeform.cpu.core.weighted import Pixels, weighted_dots
from pydeform.cpu.roi.bins import BROKEN, SOUND, is_least, points_listed, points_read
from pydeform.cpu.roi.boxes import find_boxes, found_box
from pydeform.cpu.roi.copies import Channels, block_pixels, convert_grads, convert_image, grad_place
from pydeform.cpu.roi.largest import largest_of_bin, list_part
from pydeform.cpu.roi.lists import (
    Cursor,
    Span,
    after,
    bin_of,
    bins_in,
    lay_bins,
    list_pixels,
    lists_from,
    lists_of,
    scale_of,
    with_slots,
)
from pydeform.cpu.roi.plan import LISTED, edges_plan, run, threads_for
from pydeform.cpu.roi.records import Kind
from pydeform.cpu.roi.surface import surface_read

PRODUCTS = 4  # of the two derivatives along each axis


class BoxGradients(NamedTuple):
    """The output's gradient, which is given, and that of the boxes."""

    output: Any
    boxes: Any


class Listed(NamedTuple):
    """Bins that are listed."""

    here: Any
    ends: Any  # (slot, entry), as the weights in `here`


class Edges(NamedTuple):
    """Derivatives by where a bin begins and where it ends, along y and along x."""

    top: Any
    bottom: Any
    left: Any
    right: Any


def backward(given: Any, grads: Any, kind: Kind) -> None:
    kernel = _edges_of_largest if kind.g.is_max else _edges_of_means
    run(kernel, edges_plan, kind, threads_for(kind.g, PRODUCTS, kind.gathers, kind.g.boxes), given, grads)


@Kernel
def _edges_of_means(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    if not p.gathers:
        convert_image(counters, 1, given, scratch.image, tables.blocks, g, p)
    convert_grads(counters, 2, grads.output, scratch.grads, tables.blocks, g, p)
    unit = claim(counters, 3)
    while unit < g.boxes:
        _means_of_box(thread, unit, given, grads.boxes, scratch, tables, g, p)
        finish(counters, 3)
        unit = claim(counters, 3)
    wait_for(counters, 3, g.boxes)
    let_helpers_go(thread, counters)


@inline
def _means_of_box(
    thread: int, place: int, given: Any, grad_boxes: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    lists, cursor = lists_of(thread, given, scratch), Cursor(place, 0, 0)
    channels, total, left = _begin_box(lists, cursor, given, grad_boxes, g)
    while left > 0:
        listed, count = _list_bins(cursor, lists, at(scratch.ends, (thread, 0, 0)), given.boxes, g)
        for _ in range(count):
            bin_ = bin_of(cursor, 0, listed.here, g, p)
            sums = _means_of_bin(bin_, channels, tables.blocks, listed, scratch, g, p)
            total = _add_bin(total, sums, scale_of(bin_, listed.here, given.mask, g), cursor, given.boxes, g)
            cursor = after(cursor, _span(g))
        left -= count
    _end_box(total, lists.order[place], given.boxes, grad_boxes, g)


@inline_always
def _span(g: Any) -> Span:
    return Span((0, 0), (g.pooled_h, g.pooled_w), 0, True)


@inline_always
def _begin_box(lists: Any, cursor: Any, given: Any, grad_boxes: Any, g: Any) -> tuple[Channels, Edges, int]:
    """A box's channels, sums that have nothing in them, and how many bins are to be added."""
    r = lists.order[cursor.place]
    zero = grad_boxes.dtype.type(0)
    state = lists.states[r]
    nothing = grad_boxes.dtype.type(np.nan) if state == BROKEN else zero
    total = Edges(nothing, nothing, nothing, nothing)
    return Channels(np.int64(given.boxes[r, 0]), 0, 0), total, bins_in(_span(g)) if state == SOUND else 0


@inline_always
def _end_box(total: Any, r: int, boxes: Any, grad_boxes: Any, g: Any) -> None:
    """Eq. 13."""
    scale, zero = grad_boxes.dtype.type(g.spatial_scale), grad_boxes.dtype.type(0)
    top, bottom, left, right = total
    if is_least(boxes, r, 2, g):
        top, bottom = top + bottom, bottom * zero
    if is_least(boxes, r, 1, g):
        left, right = left + right, right * zero
    grad_boxes[r, 1], grad_boxes[r, 2] = left * scale, top * scale
    grad_boxes[r, 3], grad_boxes[r, 4] = right * scale, bottom * scale


@inline_always
def _add_bin(total: Any, sums: Any, scale: Any, cursor: Any, boxes: Any, g: Any) -> Edges:
    """Eq. 12: what a bin's edges, of which `sums` are not yet multiplied by `scale`, give to those of its box."""
    real = boxes.dtype.type
    rows, columns = real(g.pooled_h), real(g.pooled_w)
    y, next_y, x, next_x = real(cursor.y), real(cursor.y + 1), real(cursor.x), real(cursor.x + 1)
    return Edges(
        total.top + scale * (sums.top * ((rows - y) / rows) + sums.bottom * ((rows - next_y) / rows)),
        total.bottom + scale * (sums.top * (y / rows) + sums.bottom * (next_y / rows)),
        total.left + scale * (sums.left * ((columns - x) / columns) + sums.right * ((columns - next_x) / columns)),
        total.right + scale * (sums.left * (x / columns) + sums.right * (next_x / columns)),
    )


@inline
def _list_bins(cursor: Any, lists: Any, ends: Any, boxes: Any, g: Any) -> tuple[Listed, int]:
    """Lists what a box's next bins read, as many as there are slots for, and how many they are: of means pixels, of
    maxima candidates as `points_listed` has them."""
    first, last, count = with_slots(cursor, _span(g), lists)
    here = lists_from(lists, first[0], first[1])
    own = advance(ends, -first[0] * lists.row)
    lay_bins(found_box(lists.extents, lists.states, lists.order[cursor.place]), first, last, boxes, here, g)
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        for slot in range(axis * here.of_axis + first[axis], axis * here.of_axis + last[axis]):
            index, weights = advance(here.index, slot * here.row), advance(here.weights, 2 * slot * here.row)
            slopes, late = advance(weights, here.row), advance(own, slot * here.row)
            start, size, count_ = here.starts[slot], here.sizes[slot], boxes.dtype.type(1)
            if g.surface:
                n, count_ = surface_read(start, size, length, boxes, index, weights, slopes, late)
            elif g.is_max:
                n = points_listed(start, size, length, boxes, g, index, weights, slopes, late)
            else:
                n, count_ = points_read(start, size, length, boxes, g, index, weights, slopes, late)
            here.entries[slot], here.counts[slot] = n, count_
    return Listed(here, own), count


@inline_always
def _means_of_bin(bin_: Any, channels: Any, blocks: Any, lists: Any, scratch: Any, g: Any, p: Any) -> Edges:
    """Sums of derivatives times the output's gradient."""
    here = lists.here
    top = bottom = left = right = scratch.image.dtype.type(0)
    for done in range(0, bin_.listed, LISTED):
        until = min(done + LISTED, bin_.listed)
        list_pixels(bin_, done, here, g)
        _list_products(bin_, done, until, lists)
        for block in range(len(blocks)):
            row = blocks[block]
            pixels, index = block_pixels(channels, row, until - done, here, scratch.image, g, p)
            grad = at(scratch.grads, (grad_place(bin_, 0, row, g, p),))
            listed = Pixels(pixels, index, _products_of(here), until - done, row.width)
            dots = weighted_dots(grad, listed, vectors_of(pixels, row.width))
            top, bottom, left, right = top + dots[0], bottom + dots[1], left + dots[2], right + dots[3]
    return Edges(top, bottom, left, right)


@inline_always
def _list_products(bin_: Any, first: int, last: int, lists: Any) -> None:
    """What the pixels that `list_pixels` lists are weighted by for each of the four derivatives."""
    here, ends = lists
    columns = here.entries[bin_.sx]
    row = first // columns if first else 0
    column = first - row * columns
    y, x = advance(here.weights, 2 * bin_.sy * here.row), advance(here.weights, 2 * bin_.sx * here.row)
    y_ends, x_ends = advance(ends, bin_.sy * here.row), advance(ends, bin_.sx * here.row)
    top, bottom, left, right = _products_of(here)
    for n in range(last - first):
        top[n], bottom[n] = y[here.row + row] * x[column], y_ends[row] * x[column]
        left[n], right[n] = y[row] * x[here.row + column], y[row] * x_ends[column]
        column += 1
        if column == columns:
            row, column = row + 1, 0


@inline_always
def _products_of(here: Any) -> tuple[Any, Any, Any, Any]:
    return (
        here.products,
        advance(here.products, LISTED),
        advance(here.products, 2 * LISTED),
        advance(here.products, 3 * LISTED),
    )


# Maxima ---------------------------------------------------------------------------------------------------------------


@Kernel
def _edges_of_largest(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    if not p.gathers:
        convert_image(counters, 1, given, scratch.image, tables.blocks, g, p)
    unit = claim(counters, 2)
    while unit < g.boxes:
        _largest_of_box(thread, unit, given, grads, scratch, tables, g, p)
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, g.boxes)
    let_helpers_go(thread, counters)


@inline
def _largest_of_box(thread: int, place: int, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    lists, cursor = lists_of(thread, given, scratch), Cursor(place, 0, 0)
    channels, total, left = _begin_box(lists, cursor, given, grads.boxes, g)
    one = given.boxes.dtype.type(1)
    while left > 0:
        listed, count = _list_bins(cursor, lists, at(scratch.ends, (thread, 0, 0)), given.boxes, g)
        for _ in range(count):
            bin_ = bin_of(cursor, 0, listed.here, g, p)
            for block in range(len(tables.blocks)):
                row = tables.blocks[block]
                largest_of_bin(bin_, channels, row, (thread, 0), listed.here, given.boxes, scratch, g, p)
                sums = _winners_of_bin(bin_, thread, channels, row, listed, grads.output, scratch, g, p)
                total = _add_bin(total, sums, one, cursor, given.boxes, g)
            cursor = after(cursor, _span(g))
        left -= count
    _end_box(total, lists.order[place], given.boxes, grads.boxes, g)


@inline
def _winners_of_bin(
    bin_: Any, thread: int, channels: Any, row: Any, lists: Any, grad_output: Any, scratch: Any, g: Any, p: Any
) -> Edges:
    """As `_means_of_bin`, for a block of channels, of each the point that has won."""
    here, ends = lists
    top = bottom = left = right = grad_output.dtype.type(0)
    one, columns = grad_output.dtype.type(1), here.entries[bin_.sx]
    for c in range(row.channels):
        winner = np.int64(scratch.winners[thread, c])
        if winner < 0:
            continue
        list_part(bin_, winner, winner + 1, one, here, g)
        if here.places[0] < 0:
            continue
        pixels, index = block_pixels(channels, row, 4, here, scratch.image, g, p)
        upper_left, upper_right = pixels[index[0] * row.width + c], pixels[index[1] * row.width + c]
        lower_left, lower_right = pixels[index[2] * row.width + c], pixels[index[3] * row.width + c]
        i = bin_.sy * here.row + winner // columns
        j = bin_.sx * here.row + winner % columns
        y, x = i + bin_.sy * here.row, j + bin_.sx * here.row  # of the parts; of the slopes a row further
        part_y, part_x = here.weights[y], here.weights[x]
        grad = grad_output[bin_.r, row.first + c, bin_.i]
        along_y = grad * ((one - part_x) * (lower_left - upper_left) + part_x * (lower_right - upper_right))
        along_x = grad * ((one - part_y) * (upper_right - upper_left) + part_y * (lower_right - lower_left))
        top, bottom = top + here.weights[y + here.row] * along_y, bottom + ends[i] * along_y
        left, right = left + here.weights[x + here.row] * along_x, right + ends[j] * along_x
    return Edges(top, bottom, left, right)

"""Maxima over bins, of pixels or of points in the order y, x, forward and backward (docs/math/roi.md).

These pixels or points are called candidates, and the largest of them the winner. Forward: a unit of work is one box,
and owns its outputs. Backward: a unit is one block of channels of one image, which owns their part of the input's
gradient and finds the winners once more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.layout import to_channels_first
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import advance, at, vectors_of
from pydeform.cpu.core.weighted import Pixels, largest_pixel, largest_point
from pydeform.cpu.roi.bins import BROKEN, SOUND, pixels_read, points_listed
from pydeform.cpu.roi.boxes import find_boxes, found_box
from pydeform.cpu.roi.copies import (
    Channels,
    block_pixels,
    clear_blocks,
    convert_grads,
    convert_image,
    copy_origin,
    grad_place,
    write_blocks,
)
from pydeform.cpu.roi.lists import Cursor, Span, after, bin_of, bins_in, lay_bins, lists_from, lists_of, with_slots
from pydeform.cpu.roi.plan import LISTED, blocks_plan, blocks_threads, run, slices_plan, threads_for
from pydeform.cpu.roi.records import Kind


def forward(given: Any, output: Any, kind: Kind) -> None:
    run(_largest, slices_plan, kind, threads_for(kind.g, 1, kind.gathers, kind.g.boxes), given, output)


def backward(given: Any, grads: Any, kind: Kind) -> None:
    run(_largest_backward, blocks_plan, kind, blocks_threads(kind), given, grads)


@Kernel
def _largest(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    for s in range(len(tables.blocks)):
        if not p.gathers:
            convert_image(counters, 2 * s + 1, given, scratch.image, tables.blocks[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 2)
        while unit < g.boxes:
            _largest_of_box(thread, unit, tables.blocks[s], given, output, scratch, tables.no_shift, g, p)
            finish(counters, 2 * s + 2)
            unit = claim(counters, 2 * s + 2)
        wait_for(counters, 2 * s + 2, g.boxes)
    let_helpers_go(thread, counters)


@inline
def _largest_of_box(
    thread: int, place: int, row: Any, given: Any, output: Any, scratch: Any, no_shift: Any, g: Any, p: Any
) -> None:
    r = given.order[place]
    channels = Channels(np.int64(given.boxes[r, 0]), 0, 0)
    lists, cursor = lists_of(thread, given, scratch), Cursor(place, 0, 0)
    span = Span((0, 0), (g.pooled_h, g.pooled_w), 0, False)
    here, known = lists, 0  # `known` bins have been listed so far, the latest of them in `here`
    for bin0 in range(0, bins_in(span), p.tile_bins):
        bin1 = min(bin0 + p.tile_bins, bins_in(span))
        for i in range(bin0, bin1):
            if i == known:
                here, count = _list_candidates(cursor, span, lists, given.boxes, g)
                known += count
            bin_ = bin_of(cursor, i, here, g, p)
            cursor = after(cursor, span)
            largest_of_bin(bin_, channels, row, (thread, i - bin0), here, given.boxes, scratch, g, p)
        to_channels_first(scratch.tiles[thread], output, r, row.first, row.channels, bin0, bin1 - bin0, no_shift)


@inline
def _list_candidates(cursor: Any, span: Any, lists: Any, boxes: Any, g: Any) -> tuple[Any, int]:
    """Lists the candidates of a box's next bins, as many bins as there are slots for: on each axis the pixels, or the
    points as `points_listed` has them. Gives the lists for `bin_of`, and how many bins there are in them."""
    first, last, count = with_slots(cursor, span, lists)
    here = lists_from(lists, first[0], first[1])
    r = lists.order[cursor.place]
    if lists.states[r] != SOUND:
        return here, count
    lay_bins(found_box(lists.extents, lists.states, r), first, last, boxes, here, g)
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        for bin_ in range(first[axis], last[axis]):
            slot = axis * here.of_axis + bin_
            index, parts = advance(here.index, slot * here.row), advance(here.weights, 2 * slot * here.row)
            start, size = here.starts[slot], here.sizes[slot]
            if g.points:
                n = points_listed(start, size, length, boxes, g, index, parts, None, None)
            else:
                n, _ = pixels_read(bin_, start, size, length, boxes, g, index, parts, advance(parts, here.row))
            here.entries[slot] = n
    return here, count


@inline
def _corners(bin_: Any, i: int, j: int, to: int, one: Any, here: Any, g: Any) -> None:
    """The four pixels that candidate (i, j) of a bin reads, and weights, into entries `to` to `to` + 3; -1: none."""
    places, products = advance(here.places, to), advance(here.products, to)
    low_y, low_x = np.int64(here.index[bin_.sy * here.row + i]), np.int64(here.index[bin_.sx * here.row + j])
    if low_y < 0 or low_x < 0:
        for k in range(4):
            places[k], products[k] = -1, 0
        return
    part_y, part_x = here.weights[2 * bin_.sy * here.row + i], here.weights[2 * bin_.sx * here.row + j]
    high_y, high_x = min(low_y + 1, g.in_h - 1), min(low_x + 1, g.in_w - 1)
    places[0], products[0] = low_y * g.in_w + low_x, (one - part_y) * (one - part_x)
    places[1], products[1] = low_y * g.in_w + high_x, (one - part_y) * part_x
    places[2], products[2] = high_y * g.in_w + low_x, part_y * (one - part_x)
    places[3], products[3] = high_y * g.in_w + high_x, part_y * part_x


@inline
def list_part(bin_: Any, first: int, last: int, one: Any, here: Any, g: Any) -> None:
    """Candidates [first, last) of a bin into places: a pixel each or, of points, four with their weights."""
    columns = here.entries[bin_.sx]
    i = first // columns
    j = first - i * columns
    for n in range(last - first):
        if g.points:
            _corners(bin_, i, j, 4 * n, one, here, g)
        else:
            y, x = np.int64(here.index[bin_.sy * here.row + i]), here.index[bin_.sx * here.row + j]
            here.places[n] = y * g.in_w + x
        j += 1
        if j == columns:
            i, j = i + 1, 0


@inline_always
def largest_of_bin(
    bin_: Any, channels: Any, row: Any, tile: Any, here: Any, boxes: Any, scratch: Any, g: Any, p: Any
) -> None:
    """The largest value of each channel of a block, into a row of a thread's tile; the number of the candidate that has
    it, into winners; -1: none."""
    real = boxes.dtype.type
    out, winners = at(scratch.tiles, (tile[0], tile[1], 0)), at(scratch.winners, (tile[0], 0))
    if bin_.listed == 0:
        for c in range(row.width):
            out[c] = real(np.nan) if bin_.state == BROKEN else real(0)
            winners[c] = -1
        return
    vectors = vectors_of(out, row.width)
    for first in range(0, bin_.listed, LISTED):
        n = min(first + LISTED, bin_.listed) - first
        list_part(bin_, first, first + n, real(1), here, g)
        pixels, index = block_pixels(channels, row, n * (4 if g.points else 1), here, scratch.image, g, p)
        listed = Pixels(pixels, index, here.products, n, row.width)
        if g.points:
            largest_point(out, winners, listed, vectors, first, first > 0)
        else:
            largest_pixel(out, winners, listed, vectors, first, first > 0)


@Kernel
def _largest_backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    if not p.gathers:
        convert_image(counters, 1, given, scratch.image, tables.blocks, g, p)
        convert_grads(counters, 2, grads.output, scratch.grads, tables.blocks, g, p)
    units = g.batch * len(tables.blocks)
    unit = claim(counters, 3)
    while unit < units:
        b = unit // len(tables.blocks)
        block = unit - b * len(tables.blocks)
        blocks = tables.blocks[block : block + 1]
        if not p.gathers:
            clear_blocks(Channels(b, 0, 0), blocks, scratch.grad_image, g, p)
        for place in range(given.starts[b], given.starts[b + 1]):
            if scratch.states[given.order[place]] == SOUND:
                _add_to_winners_of_box(thread, place, Channels(b, 0, 0), blocks[0], given, grads, scratch, g, p)
        if not p.gathers:
            write_blocks(Channels(b, 0, 0), blocks, scratch.grad_image, grads.input, g, p)
        finish(counters, 3)
        unit = claim(counters, 3)
    wait_for(counters, 3, units)
    let_helpers_go(thread, counters)


@inline
def _add_to_winners_of_box(
    thread: int, place: int, channels: Any, row: Any, given: Any, grads: Any, scratch: Any, g: Any, p: Any
) -> None:
    """Eq. 7 for one box and block of channels: each bin adds its gradient to the pixels of its winners."""
    lists, cursor = lists_of(thread, given, scratch), Cursor(place, 0, 0)
    span = Span((0, 0), (g.pooled_h, g.pooled_w), 0, False)
    here, known = lists, 0  # as in the forward
    winners, one = at(scratch.winners, (thread, 0)), given.boxes.dtype.type(1)
    for i in range(bins_in(span)):
        if i == known:
            here, count = _list_candidates(cursor, span, lists, given.boxes, g)
            known += count
        bin_ = bin_of(cursor, i, here, g, p)
        cursor = after(cursor, span)
        largest_of_bin(bin_, channels, row, (thread, 0), here, given.boxes, scratch, g, p)
        # Pointers to the block's first channel, and how far the next channel, and the next pixel, is from there.
        grad, next_grad = at(grads.output, (bin_.r, row.first, bin_.i)), bins_in(span)
        target, next_channel, next_pixel = at(grads.input, (channels.b, row.first, 0)), g.in_h * g.in_w, 1
        if not p.gathers:
            grad, next_grad = at(scratch.grads, (grad_place(bin_, 0, row, g, p),)), 1
            target = at(scratch.grad_image, (copy_origin(channels, row.before, g, p),))
            next_channel, next_pixel = 1, row.width
        for c in range(row.channels):
            winner, channel = np.int64(winners[c]), advance(target, c * next_channel)
            if winner < 0:
                continue
            if bin_.listed > LISTED:  # else all candidates are still in `places`
                list_part(bin_, winner, winner + 1, one, here, g)
                winner = 0
            if not g.points:
                channel[np.int64(here.places[winner]) * next_pixel] += grad[c * next_grad]
            elif here.places[4 * winner] >= 0:
                for k in range(4 * winner, 4 * winner + 4):
                    channel[np.int64(here.places[k]) * next_pixel] += grad[c * next_grad] * here.products[k]

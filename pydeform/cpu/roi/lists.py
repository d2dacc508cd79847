"""What bins read, as a thread lists it: on each axis some pixels with weights, then their products (eq. 3 to 5).

Bins are gone through box by box. As many as there is room for are listed at once, on each axis for itself: so a row of
bins lists its rows once. Bins that an offset moves share nothing and are listed eight at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.bands import BAND, Points, Slots, band_lists
from pydeform.cpu.core.jit import inline_always
from pydeform.cpu.core.planes import Reader, reader_of
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.roi.bins import BROKEN, SOUND, pixels_read, points_read, rounded_down
from pydeform.cpu.roi.boxes import found_box
from pydeform.cpu.roi.offsets import move_bin
from pydeform.cpu.roi.plan import LISTED
from pydeform.cpu.roi.rotated import list_points, place_lines
from pydeform.cpu.roi.surface import surface_read


class Lists(NamedTuple):
    """A thread's own memory: for each bin, the pixels that it reads along y and along x, with weights.

    A bin has two slots: one of y, and one of x, whose number is `of_axis` or more. Arrays are here as pointers, since
    an index of an array could be negative, which takes time to find out.
    """

    starts: Any  # by slot: where the bin begins along the axis,
    sizes: Any  # and how long it is there
    index: Any  # (slot, entry): rows, or columns, that the bin reads
    weights: Any  # (slot, 0: weights and 1: their derivatives, entry)
    counts: Any  # by slot: this axis's factor of the number to divide by
    entries: Any  # by slot: how many entries it has
    moved: Any  # by slot of y: the state of a bin that an offset moves
    places: Any  # pixels of one bin, LISTED of them at a time,
    products: Any  # and their weights; LISTED further on the derivatives along y, then as far again those along x
    reader: Reader
    order: Any  # of the boxes, their extents and states, for all threads
    extents: Any
    states: Any
    of_axis: int  # the first slot of x
    row: int  # entries that a slot has room for
    turns: Any  # of boxes, an array; if there are, a slot has a `rotated.Line`, with `entries` its points


class Cursor(NamedTuple):
    """Which bin comes next."""

    place: int  # of its box in `order`
    y: int
    x: int


class Span(NamedTuple):
    """Bins that are gone through in each box, first <= (row, column) < last, for the channels of a class."""

    first: tuple[int, int]
    last: tuple[int, int]
    cls: int
    sloped: bool  # whether the derivatives of weights are listed, too


class Bin(NamedTuple):
    """A bin that is listed."""

    r: int  # its box
    i: int  # its number in the box
    sy: int  # its slots
    sx: int
    state: int
    listed: int  # pixels that it reads or, if boxes are turned, points that it may have in the image


@inline_always
def lists_of(thread: int, given: Any, scratch: Any) -> Lists:
    starts, entries = at(scratch.starts, (thread, 0, 0)), at(scratch.entries, (thread, 0))
    slots = scratch.starts.shape[2]
    return Lists(
        starts,
        advance(starts, slots),
        at(scratch.index, (thread, 0, 0)),
        at(scratch.weights, (thread, 0, 0, 0)),
        at(scratch.counts, (thread, 0)),
        entries,
        advance(entries, slots),
        at(scratch.places, (thread, 0)),
        at(scratch.products, (thread, 0)),
        reader_of(thread, given.planes, scratch.own, scratch.offsets, scratch.pixels),
        at(given.order, (0,)),
        at(scratch.extents, (0, 0)),
        at(scratch.states, (0,)),
        slots // 2,
        scratch.index.shape[2],
        scratch.turns,
    )


@inline_always
def lists_from(lists: Any, y: int, x: int) -> Lists:
    """The same memory with slots numbered by rows and columns of bins: row y and column x have the first slots."""
    return Lists(
        advance(lists.starts, -y),
        advance(lists.sizes, -y),
        advance(lists.index, -y * lists.row),
        advance(lists.weights, -2 * y * lists.row),
        advance(lists.counts, -y),
        advance(lists.entries, -y),
        lists.moved,
        lists.places,
        lists.products,
        lists.reader,
        lists.order,
        lists.extents,
        lists.states,
        lists.of_axis + y - x,
        lists.row,
        lists.turns,
    )


@inline_always
def span_of_cell(cell: int, cls: int, sloped: bool, g: Any) -> Span:
    """The bins that read a cell's channels."""
    gy = cell // g.group_w
    gx = cell - gy * g.group_w
    first = -(-gy * g.pooled_h // g.group_h), -(-gx * g.pooled_w // g.group_w)
    last = -(-(gy + 1) * g.pooled_h // g.group_h), -(-(gx + 1) * g.pooled_w // g.group_w)
    return Span(first, last, cls, sloped)


@inline_always
def bins_in(span: Any) -> int:
    """How many there are of each box."""
    return (span.last[0] - span.first[0]) * (span.last[1] - span.first[1])


@inline_always
def after(cursor: Any, span: Any) -> Cursor:
    place, y, x = cursor
    x += 1
    if x == span.last[1]:
        y, x = y + 1, span.first[1]
    if y == span.last[0]:
        place, y = place + 1, span.first[0]
    return Cursor(place, y, x)


@inline_always
def with_slots(cursor: Any, span: Any, lists: Any) -> tuple[Any, Any, int]:
    """The next bins of a box, as many as there are slots for: the first row and column to be listed for them, those
    after the last, and how many bins they are."""
    slots, columns = lists.of_axis, span.last[1] - span.first[1]
    if columns <= slots:
        until = min(cursor.y + slots, span.last[0])
        return (cursor.y, span.first[1]), (until, span.last[1]), (until - cursor.y) * columns - cursor.x + span.first[1]
    end = min(cursor.x + slots, span.last[1])
    return (cursor.y, cursor.x), (cursor.y + 1, end), end - cursor.x


@inline_always
def list_bins(
    cursor: Any, left: int, span: Any, lists: Any, offset: Any, bins: Any, g: Any, p: Any
) -> tuple[Lists, int]:
    """Lists what the next bins read, at most `left` of them: bins of one box or, if offsets move bins, of several.
    Gives the lists for `bin_of`, and how many bins there are in them."""
    first, last, count = with_slots(cursor, span, lists)
    here, is_there = lists, True
    if p.has_offset:
        count = BAND
        first, last = (0, 0), (min(left, BAND), min(left, BAND))
        for slot in range(last[0]):
            r = lists.order[cursor.place]
            move_bin(slot, found_box(lists.extents, lists.states, r), r, span.cls, cursor, offset, bins, lists, g)
            cursor = after(cursor, span)
    else:
        r = lists.order[cursor.place]
        here, is_there = lists_from(lists, first[0], first[1]), lists.states[r] == SOUND
        if is_there:
            lay_bins(found_box(lists.extents, lists.states, r), first, last, offset, here, g)
    if is_there and lists.turns is not None:
        place_lines(r, first, last, here, g)
    elif is_there:
        _list_axes(first, last, offset, here, g, span.sloped)
    return here, min(count, left)


@inline_always
def lay_bins(box: Any, first: Any, last: Any, boxes: Any, lists: Any, g: Any) -> None:
    """Where the bins of a box lie that no offset moves: on each axis (y, x) bins first <= bin < last, whose numbers are
    those of their slots."""
    real = boxes.dtype.type
    for axis in range(2):
        begin, size = (box.begin_x, box.size_x) if axis else (box.begin_y, box.size_y)
        bin_size = size / real(g.pooled_w if axis else g.pooled_h)
        for bin_ in range(first[axis], last[axis]):
            slot = axis * lists.of_axis + bin_
            lists.starts[slot] = begin + real(bin_) * bin_size if g.points or g.surface else begin
            lists.sizes[slot] = bin_size


@inline_always
def slots_from(lists: Any, slot: int) -> Slots:
    return Slots(
        advance(lists.starts, slot),
        advance(lists.sizes, slot),
        advance(lists.index, slot * lists.row),
        advance(lists.weights, 2 * slot * lists.row),
        advance(lists.entries, slot),
        advance(lists.counts, slot),
        lists.row,
    )


@inline_always
def _list_axes(first: Any, last: Any, boxes: Any, lists: Any, g: Any, sloped: bool) -> None:
    """What bins first <= bin < last read on each axis (y, x), from the starts and sizes in their slots."""
    real = boxes.dtype.type
    in_lanes = g.points != 0 and g.samples <= BAND
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        points = Points(
            real(g.samples),
            real(g.first_point),
            real(g.reach),
            rounded_down(length - 1, boxes),
            g.count_inside != 0,
            g.flat_at_pixels != 0,
            sloped,
        )
        for bin0 in range(first[axis], last[axis], BAND):
            bins = min(BAND, last[axis] - bin0)
            slot0 = axis * lists.of_axis + bin0
            if in_lanes and band_lists(slots_from(lists, slot0), bins, points):
                continue
            for slot in range(slot0, slot0 + bins):
                if in_lanes and lists.entries[slot] >= 0:
                    continue
                index, weights = advance(lists.index, slot * lists.row), advance(lists.weights, 2 * slot * lists.row)
                slopes = advance(weights, lists.row)
                start, size = lists.starts[slot], lists.sizes[slot]
                if g.points:
                    n, count = points_read(start, size, length, boxes, g, index, weights, slopes, None)
                elif g.surface:
                    n, count = surface_read(start, size, length, boxes, index, weights, slopes, None)
                else:
                    bin_ = slot - axis * lists.of_axis
                    n, count = pixels_read(bin_, start, size, length, boxes, g, index, weights, slopes)
                lists.entries[slot], lists.counts[slot] = n, count


@inline_always
def bin_of(cursor: Any, slot: int, here: Any, g: Any, p: Any) -> Bin:
    """The bin at the cursor, number `slot` of those listed together."""
    r = here.order[cursor.place]
    sy, sx, state = cursor.y, here.of_axis + cursor.x, here.states[r]
    if p.has_offset:
        sy, sx, state = slot, here.of_axis + slot, here.moved[slot]
    listed = here.entries[sy] * here.entries[sx] if state == SOUND else 0
    return Bin(r, cursor.y * g.pooled_w + cursor.x, sy, sx, state, listed)


@inline_always
def cell_at(cursor: Any, bins: Any, g: Any) -> int:
    return bins[cursor.y].cell + bins[g.pooled_h + cursor.x].cell


@inline_always
def scale_of(bin_: Any, here: Any, mask: Any, g: Any) -> Any:
    """What the sum over a bin is multiplied by: 1/count; NaN for a broken bin. `mask` tells the type."""
    real = mask.dtype.type
    if bin_.state == BROKEN:
        return real(np.nan)
    if bin_.state != SOUND:
        return real(0)
    count = here.counts[bin_.sy] * here.counts[bin_.sx]
    if g.points == 0 or g.least_count != 0:
        count = max(count, real(1))
    return real(1) / count


@inline_always
def masked_scale(bin_: Any, here: Any, mask: Any, g: Any, p: Any) -> Any:
    scale = scale_of(bin_, here, mask, g)
    if p.has_mask:
        scale *= mask[bin_.r, bin_.i]
    return scale


@inline_always
def list_pixels(bin_: Any, first: int, here: Any, g: Any) -> tuple[int, int]:
    """What a bin reads, from number `first` of `bin_.listed` on: at most LISTED pixels into places, and their weights
    into products. Gives how many these are, and the number to go on with."""
    if here.turns is not None:
        return list_points(bin_, first, LISTED, here, g)
    last = min(first + LISTED, bin_.listed)
    _list_products(bin_, first, last, here, g)
    return last - first, last


@inline_always
def _list_products(bin_: Any, first: int, last: int, here: Any, g: Any) -> None:
    """Entries [first, last) of a bin's rows x columns: A(row) * B(column) is the weight of a pixel."""
    columns = here.entries[bin_.sx]
    row = first // columns if first else 0
    column = first - row * columns
    rows, row_weights = advance(here.index, bin_.sy * here.row), advance(here.weights, 2 * bin_.sy * here.row)
    x, x_weights = advance(here.index, bin_.sx * here.row), advance(here.weights, 2 * bin_.sx * here.row)
    n = 0
    while n < last - first:
        base = rows[row] * g.in_w
        weight = row_weights[row]
        until = min(columns, column + (last - first) - n)
        for i in range(until - column):
            here.places[n + i] = base + x[column + i]
            here.products[n + i] = weight * x_weights[column + i]
        n += until - column
        row += 1
        column = 0


@inline_always
def list_slopes(bin_: Any, first: int, last: int, here: Any) -> None:
    """A'(row) * B(column) and A(row) * B'(column) beside what `list_pixels` lists."""
    columns = here.entries[bin_.sx]
    row = first // columns if first else 0
    column = first - row * columns
    y_weights, x_weights = advance(here.weights, 2 * bin_.sy * here.row), advance(here.weights, 2 * bin_.sx * here.row)
    y_slopes, x_slopes = advance(y_weights, here.row), advance(x_weights, here.row)
    _, along_y, along_x = products_of(here)
    for n in range(last - first):
        along_y[n] = y_slopes[row] * x_weights[column]
        along_x[n] = y_weights[row] * x_slopes[column]
        column += 1
        if column == columns:
            row, column = row + 1, 0


@inline_always
def products_of(here: Any) -> tuple[Any, Any, Any]:
    """What the listed pixels are weighted by: for the mean, and for its derivatives along y and x."""
    return here.products, advance(here.products, LISTED), advance(here.products, 2 * LISTED)

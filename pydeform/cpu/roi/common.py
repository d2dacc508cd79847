"""How one RoI problem is cut up and where its arrays lie, for forward and backward (docs/math/roi.md)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.bands import BAND, band_lists
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.layout import pixel_parts, to_channels_last
from pydeform.cpu.core.memory import contiguous
from pydeform.cpu.core.parallel import claim, finish, wait_for
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at
from pydeform.cpu.core.sizes import SERIAL_FLOPS, pixel_dtype, round_up, table
from pydeform.cpu.roi.bins import (
    BROKEN,
    MANY_POINTS,
    SOUND,
    extent,
    pixels_read,
    points_read,
    rounded_down,
    state_of,
    worse,
)

CHANNELS = 64  # of a block whose gradients one thread adds up
SLICE_CHANNELS = 128  # at least, of those that the forward puts last at a time: each slice lists the bins anew
SLICE_BYTES = 1 << 23  # at most, of an image, if there are more channels: what the caches keep while boxes read it
FEW_CHANNELS = 4  # of a class: below, a copy that puts channels last brings nothing
LISTED = 512  # pixels of a bin in a list at a time
BOXES_AT_ONCE = 256  # whose places a thread finds
TILE = 1 << 14  # numbers in a thread's tile of results
LIST_BYTES = 4 << 20  # of a thread's lists, if eight bins fit: where there are more bins, some rows of them at a time
KEPT_BINS = 1 << 12  # of an axis: longer tables are made for each call
# For estimates of the work:
TYPICAL_PIXELS = 16  # that a bin reads
LISTING = 300  # operations that it takes to list them


class RoiPlan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result."""

    planes: int  # 1: pixels are gathered from the input as it lies; 0: copies with channels last are made
    per_class: int  # channels of a class
    width: int  # of a class in a copy, blocks rounded up to vectors
    tile_bins: int  # bins whose results are turned to channels first at once
    has_offset: int
    has_mask: int


class Bin(NamedTuple):
    """Which bin of a box it is."""

    y: int
    x: int
    cell: int  # the group of channels that it reads
    part: int  # the cell of `offset` that moves it


class Lists(NamedTuple):
    """What a thread knows of the bins that it is at. Each has a slot for what it reads on one axis: those of y have the
    first half of the numbers, those of x the other.

    These are pointers, since indices of an array could be negative, which takes time to find out.
    """

    starts: Any  # of the bin along its axis; its size: `beyond` after it
    index: Any  # (slot, entry): pixels that the bin reads
    weights: Any  # (slot, 0: weights and 1: their derivatives, entry)
    counts: Any  # the number to divide by
    entries: Any  # how many there are in index; `beyond` after a slot of y: state of a bin that its offset moved
    of_axis: int  # from a slot of y to that of x with the same number
    row: int  # entries that a slot has room for
    beyond: int  # slots of both axes


def _blocks(channels: int, largest: int, lanes: int) -> list[tuple[int, int, int]]:
    """(first, channels, width) of blocks as equal as can be; the width is whole vectors."""
    size = -(-channels // -(-channels // largest))
    starts = range(0, channels, size)
    return [(first, n := min(size, channels - first), round_up(n, lanes)) for first in starts]


@functools.lru_cache(maxsize=64)
def blocks_of_class(per_class: int, lanes: int) -> tuple[Any, int]:
    """The blocks of channels of one class, and the width of all. `before`: that of earlier ones.

    Two at least where channels allow it, as threads share them. Sums over channels go block by block, so what they are
    depends on the class alone.
    """
    half = max(2 * lanes, round_up(-(-per_class // 2), lanes))
    rows, before = [], 0
    for row in _blocks(per_class, min(half, CHANNELS), lanes):
        rows.append((*row, before))
        before += row[-1]
    return table("first channels width before", rows), before


@functools.lru_cache(maxsize=64)
def slices_of_class(per_class: int, lanes: int, channel_bytes: int) -> tuple[Any, int]:
    """The channels of a class that the forward puts last at a time, in the same place, and the largest width."""
    blocks = _blocks(per_class, max(SLICE_CHANNELS, SLICE_BYTES // channel_bytes), lanes)
    return table("first channels width before", [(*row, 0) for row in blocks]), blocks[0][-1]


@functools.lru_cache(maxsize=64)
def bins_table(pooled: tuple[int, int], group: tuple[int, int], part: tuple[int, int]) -> Any:
    """Of each row of bins, then of each column, what they add to the numbers of `Bin.cell` and `Bin.part`.

    Kernels look these up: the divisions would take as long as the rest of a bin of one channel.
    """
    bins = np.empty(sum(pooled), [("cell", np.int64), ("part", np.int64)])
    for axis, of_axis in enumerate((bins[: pooled[0]], bins[pooled[0] :])):
        numbers = np.arange(pooled[axis])
        for name, cells in ("cell", group), ("part", part):
            of_axis[name] = numbers * cells[axis] // pooled[axis] * (1 if axis else cells[1])
    return bins


def bins_of(g: Any) -> Any:
    make = bins_table if g.pooled_h + g.pooled_w <= KEPT_BINS else bins_table.__wrapped__
    return make((g.pooled_h, g.pooled_w), (g.group_h, g.group_w), (g.part_h, g.part_w))


@inline_always
def bin_at(y: int, x: int, bins: Any, g: Any) -> Bin:
    row, column = bins[y], bins[g.pooled_h + x]
    return Bin(y, x, row.cell + column.cell, row.part + column.part)


@inline_always
def bin_after(y: int, x: int, g: Any) -> tuple[int, int]:
    """Row and column of the next bin of a box."""
    return (y + 1, 0) if x + 1 == g.pooled_w else (y, x + 1)


def cells_of(g: Any) -> int:
    """Groups of channels of the input, of which each bin reads one."""
    return int(g.group_h * g.group_w)


def copy_size(g: Any, width: int) -> int:
    return int(g.batch * cells_of(g) * g.classes * width * (g.in_h * g.in_w + 1))


def most_listed(g: Any) -> int:
    """Entries that an axis of a bin may have, whichever way it lists them, and then some: eight are read at once."""
    longest = max(g.in_h, g.in_w)
    if g.points and g.is_max:
        return int(g.samples + 2 if 0 < g.samples <= MANY_POINTS else 2 * longest + 16)
    return int((min(2 * g.samples, longest) if g.samples and g.points else longest) + BAND)


def _longest_bin(boxes: Any, g: Any) -> float:
    """No bin is longer in pixels: rounding, a last pixel and a least size each add one at most, and then there is what
    the kernels' arithmetic may round off."""
    corners = boxes[:, 1:].astype(np.float64)
    corners = corners[np.isfinite(corners).all(axis=1)]
    if not len(corners):
        return 0.0
    lengths = (np.abs(corners[:, 2:] - corners[:, :2]).max(axis=0) + 2) * g.spatial_scale + 2
    rounding = np.abs(corners).max() * max(g.spatial_scale, 1) * 2.0**-20
    return float(np.ceil(max(lengths[0] / g.pooled_w, lengths[1] / g.pooled_h) + rounding))


def by_image(boxes: Any, batch: int) -> tuple[Any, Any]:
    """The boxes' numbers, image by image and in order, and where each image begins among them."""
    index = boxes[:, 0].astype(np.int64)
    order = np.argsort(index, kind="stable")
    return order, np.searchsorted(index[order], np.arange(batch + 1))


def threads_for(g: Any, products: int, planes: bool, units: int) -> int:
    per_bin = products * (2 * TYPICAL_PIXELS * g.out_channels + LISTING * g.classes)
    flops = g.boxes * g.pooled_h * g.pooled_w * per_bin
    if not planes:
        flops += products * g.batch * g.in_channels * g.in_h * g.in_w
    return 1 if flops < SERIAL_FLOPS else parallel.threads_for(units)


def has_few_channels(g: Any) -> bool:
    """A class, where bins are averaged: each channel is read in its plane, for itself."""
    return bool(g.out_channels // g.classes < FEW_CHANNELS and not g.is_max)


def prefers_planes(g: Any, dtype: Any) -> bool:
    """For few boxes a copy would be most of the work. So it never has more numbers than bins read, about."""
    per_class = g.out_channels // g.classes
    width = per_class if has_few_channels(g) else blocks_of_class(per_class, lanes_of(dtype))[1]
    return TYPICAL_PIXELS * g.boxes * g.pooled_h * g.pooled_w * int(g.out_channels) < copy_size(g, width)


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(dtype.itemsize)


def lists_of_threads(threads: int, g: Any, boxes: Any) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shapes and dtypes of `Lists`, for each thread. `boxes` as kernels get them."""
    dtype = boxes.dtype
    listed, of_axis = most_listed(g), round_up(max(g.pooled_h, g.pooled_w), BAND)  # eight are listed at once
    entry = 2 * (pixel_dtype(g.in_h * g.in_w).itemsize + 2 * dtype.itemsize)
    if of_axis * listed * entry > LIST_BYTES:
        if not (g.points and g.is_max and g.samples):
            # Lists as long as bins, not as the image: every pixel, or point between, is one entry, or two.
            listed = int(min(listed, 2 * _longest_bin(boxes, g) + 16))
        of_axis = max(BAND, min(of_axis, LIST_BYTES // (listed * entry) // BAND * BAND))
    return (
        ((threads, 2, 2 * of_axis), dtype),
        ((threads, 2 * of_axis, listed), pixel_dtype(g.in_h * g.in_w)),
        ((threads, 2 * of_axis, 2, listed), dtype),
        ((threads, 2 * of_axis), dtype),
        ((threads, 3 * of_axis), np.dtype(np.int64)),
    )


@inline_always
def lists_of(thread: int, starts: Any, index: Any, weights: Any, counts: Any, entries: Any) -> Lists:
    return Lists(
        at(starts, (thread, 0, 0)),
        at(index, (thread, 0, 0)),
        at(weights, (thread, 0, 0, 0)),
        at(counts, (thread, 0)),
        at(entries, (thread, 0)),
        index.shape[1] // 2,
        index.shape[2],
        index.shape[1],
    )


@inline_always
def lists_from(lists: Any, y: int, x: int) -> Lists:
    """The same memory for bins from row y and column x on: theirs are the first slots of their axis."""
    return Lists(
        advance(lists.starts, -y),
        advance(lists.index, -y * lists.row),
        advance(lists.weights, -2 * y * lists.row),
        advance(lists.counts, -y),
        advance(lists.entries, -y),
        lists.of_axis + y - x,
        lists.row,
        lists.beyond,
    )


@inline_always
def bins_from(y: int, x: int, first: Any, last: Any, lists: Any) -> tuple[Any, Any, int]:
    """As many of the bins first <= bin < last, from row y, column x on in their order, as there are slots for.

    Which bins have to be listed for them, from where to where, and how many they are.
    """
    slots, columns = lists.of_axis, last[1] - first[1]
    if columns <= slots:
        until = min(y + slots, last[0])
        return (y, first[1]), (until, last[1]), (until - y) * columns - (x - first[1])
    end = min(x + slots, last[1])
    return (y, x), (y + 1, end), end - x


def flat_arguments(input: Any, boxes: Any, offset: Any, mask: Any, g: Any, dtype: Any) -> tuple[Any, ...]:
    """input, boxes, offset, mask in the kernels' shapes; an absent one is empty."""
    return (
        np.empty((0, 1, 1), dtype)
        if input is None
        else contiguous(input, dtype, (g.batch, g.in_channels, g.in_h * g.in_w)),
        contiguous(boxes, dtype, (g.boxes, 5)),
        np.empty((0, 1, 2, 1), dtype)
        if offset is None
        else contiguous(offset, dtype, (g.boxes, g.classes, 2, g.part_h * g.part_w)),
        np.empty((0, 1), dtype) if mask is None else contiguous(mask, dtype, (g.boxes, g.pooled_h * g.pooled_w)),
    )


@inline_always
def copy_origin(b: int, cell: int, cls: int, before: int, g: Any, p: Any) -> int:
    """Place in the copy of an image's block, which is (in_h*in_w + 1, width of the block)."""
    return (((b * g.group_h * g.group_w + cell) * g.classes + cls) * p.width + before) * (g.in_h * g.in_w + 1)


@inline
def box_of(boxes: Any, r: int, g: Any) -> tuple[Any, Any, Any, Any, int]:
    """begin and size along y, then along x, and the state."""
    begin_y, size_y, state_y = extent(boxes, r, 2, g)
    begin_x, size_x, state_x = extent(boxes, r, 1, g)
    return begin_y, size_y, begin_x, size_x, worse(state_y, state_x)


@inline
def find_boxes(counters: Any, phase: int, boxes: Any, extents: Any, states: Any, g: Any) -> None:
    """A phase: `box_of` every box."""
    units = -(-g.boxes // BOXES_AT_ONCE)
    unit = claim(counters, phase)
    while unit < units:
        for r in range(unit * BOXES_AT_ONCE, min((unit + 1) * BOXES_AT_ONCE, g.boxes)):
            box = box_of(boxes, r, g)
            extents[r, 0], extents[r, 1], extents[r, 2], extents[r, 3], states[r] = box
        finish(counters, phase)
        unit = claim(counters, phase)
    wait_for(counters, phase, units)


@inline_always
def found_box(extents: Any, states: Any, r: int) -> tuple[Any, Any, Any, Any, int]:
    return extents[r, 0], extents[r, 1], extents[r, 2], extents[r, 3], states[r]


@inline_always
def bins_of_cell(cell: int, g: Any) -> Any:
    """first and last, each (row, column), of the bins first <= bin < last that read a cell's channels."""
    gy = cell // g.group_w
    gx = cell - gy * g.group_w
    first = -(-gy * g.pooled_h // g.group_h), -(-gx * g.pooled_w // g.group_w)
    last = -(-(gy + 1) * g.pooled_h // g.group_h), -(-(gx + 1) * g.pooled_w // g.group_w)
    return first, last


@inline_always
def next_bin(current: Any, first: Any, last: Any) -> Any:
    """(place of the box, row, column) of the bin after that, where each box has those first <= (row, column) < last."""
    place, py, px = current
    px += 1
    if px == last[1]:
        py, px = py + 1, first[1]
    if py == last[0]:
        place, py = place + 1, first[0]
    return place, py, px


@inline_always
def lay_bins(box: Any, first: Any, last: Any, boxes: Any, lists: Any, g: Any) -> None:
    """The bins first <= bin < last of each axis (y, x) of a box that nothing moves, into the slots of their numbers."""
    begin_y, size_y, begin_x, size_x, _ = box
    real = boxes.dtype.type
    for axis in range(2):
        begin, size = (begin_x, size_x) if axis else (begin_y, size_y)
        bin_size = size / real(g.pooled_w if axis else g.pooled_h)
        for bin_ in range(first[axis], last[axis]):
            slot = axis * lists.of_axis + bin_
            lists.starts[slot] = begin + real(bin_) * bin_size if g.points else begin
            lists.starts[lists.beyond + slot] = bin_size


@inline_always
def move_bin(sy: int, box: Any, r: int, cls: int, bin_: Any, offset: Any, lists: Any, g: Any) -> None:
    """A bin where its offset moves it: into slot sy and its like of x."""
    begin_y, size_y, begin_x, size_x, state = box
    real = offset.dtype.type
    offset_y, offset_x = offset[r, cls, 1, bin_.part], offset[r, cls, 0, bin_.part]
    scale = real(g.offset_scale)
    move_y, move_x = offset_y * scale * size_y, offset_x * scale * size_x  # eq. 2
    if state != BROKEN:
        state = worse(state, state_of(offset_y, offset_x, move_y, move_x))
    sx, sizes = lists.of_axis + sy, lists.beyond
    lists.entries[lists.beyond + sy] = state
    sound = state == SOUND
    bin_h, bin_w = size_y / real(g.pooled_h), size_x / real(g.pooled_w)
    lists.starts[sy] = begin_y + real(bin_.y) * bin_h + move_y if sound else real(0)
    lists.starts[sx] = begin_x + real(bin_.x) * bin_w + move_x if sound else real(0)
    lists.starts[sizes + sy] = bin_h if sound else real(0)
    lists.starts[sizes + sx] = bin_w if sound else real(0)


@inline_always
def slots_of(py: int, px: int, place: int, state: int, lists: Any, p: Any) -> tuple[int, int, int]:
    """Slots (y, x) and the state of the bin in row py, column px, which is number `place` of those listed together."""
    if p.has_offset:
        return place, lists.of_axis + place, lists.entries[lists.beyond + place]
    return py, lists.of_axis + px, state


@inline_always
def list_bins(first: Any, last: Any, boxes: Any, lists: Any, g: Any, sloped: bool) -> None:
    """What the bins first <= bin < last of each axis (y, x) read, in whose slots are their starts and sizes.

    Derivatives of the weights are there only if `sloped`.
    """
    real = boxes.dtype.type
    in_lanes = g.points != 0 and g.samples <= BAND
    for axis in range(2):
        length = g.in_w if axis else g.in_h
        for bin0 in range(first[axis], last[axis], BAND):
            bins = min(BAND, last[axis] - bin0)
            slot0 = axis * lists.of_axis + bin0
            listed = False
            if in_lanes:
                listed = band_lists(
                    advance(lists.starts, slot0),
                    advance(lists.starts, lists.beyond + slot0),
                    advance(lists.index, slot0 * lists.row),
                    advance(lists.weights, 2 * slot0 * lists.row),
                    advance(lists.entries, slot0),
                    advance(lists.counts, slot0),
                    lists.row,
                    bins,
                    real(g.samples),
                    real(g.first_point),
                    real(g.reach),
                    rounded_down(length - 1, boxes),
                    g.count_inside != 0,
                    g.flat_at_pixels != 0,
                    sloped,
                )
            if listed:
                continue
            for slot in range(slot0, slot0 + bins):
                if in_lanes and lists.entries[slot] >= 0:
                    continue
                index, weights = advance(lists.index, slot * lists.row), advance(lists.weights, 2 * slot * lists.row)
                slopes = advance(weights, lists.row)
                start, size = lists.starts[slot], lists.starts[lists.beyond + slot]
                if g.points:
                    n, count = points_read(start, size, length, boxes, g, index, weights, slopes)
                else:
                    bin_ = slot - axis * lists.of_axis
                    n, count = pixels_read(bin_, start, size, length, boxes, g, index, weights, slopes)
                lists.entries[slot], lists.counts[slot] = n, count


@inline_always
def list_of_box(
    box: Any,
    r: int,
    cls: int,
    chunk: int,
    most: int,
    boxes: Any,
    offset: Any,
    bins: Any,
    lists: Any,
    g: Any,
    p: Any,
    sloped: bool,
) -> tuple[Lists, int]:
    """`list_bins` of a box: of up to `most` bins from number `chunk` on, up to eight, or all that there are slots for
    if nothing moves them. The lists in which their slots are, and how many bins they are.
    """
    y = chunk // g.pooled_w
    x = chunk - y * g.pooled_w
    first, last, count = bins_from(y, x, (0, 0), (g.pooled_h, g.pooled_w), lists)
    count = min(count, most)
    here = lists
    if p.has_offset:
        count = min(most, BAND)
        first, last = (0, 0), (count, count)
        for slot in range(count):
            move_bin(slot, box, r, cls, bin_at(y, x, bins, g), offset, lists, g)
            y, x = bin_after(y, x, g)
    else:
        here = lists_from(lists, first[0], first[1])
        if box[4] == SOUND:
            lay_bins(box, first, last, boxes, here, g)
    if p.has_offset or box[4] == SOUND:
        list_bins(first, last, boxes, here, g, sloped)
    return here, count


@inline_always
def list_of_cell(
    current: Any,
    left: int,
    first: Any,
    last: Any,
    cls: int,
    extents: Any,
    states: Any,
    order: Any,
    offset: Any,
    bins: Any,
    lists: Any,
    g: Any,
    p: Any,
    sloped: bool,
) -> tuple[Lists, int]:
    """`list_bins` of some boxes, from `current` on: up to eight, or those of one box that there are slots for if
    nothing moves them. The lists in which their slots are, and how many bins they are."""
    here_first, here_last, count = bins_from(current[1], current[2], first, last, lists)
    here = lists
    sound = True
    if p.has_offset:
        count = min(left, BAND)
        for slot in range(count):
            place, py, px = current
            r = order[place]
            move_bin(slot, found_box(extents, states, r), r, cls, bin_at(py, px, bins, g), offset, lists, g)
            current = next_bin(current, first, last)
        here_first, here_last = (0, 0), (count, count)
    else:
        r = order[current[0]]
        here = lists_from(lists, here_first[0], here_first[1])
        sound = states[r] == SOUND
        if sound:
            lay_bins(found_box(extents, states, r), here_first, here_last, extents, here, g)
    if sound:
        list_bins(here_first, here_last, extents, here, g, sloped)
    return here, count


@inline_always
def scale_of(state: int, sy: int, sx: int, boxes: Any, lists: Any, g: Any) -> Any:
    """What the sum over a bin is multiplied by: 1/count; NaN for a broken bin."""
    real = boxes.dtype.type
    if state == BROKEN:
        return real(np.nan)
    if state != SOUND:
        return real(0)
    count = lists.counts[sy] * lists.counts[sx]
    if g.points == 0 or g.least_count != 0:
        count = max(count, real(1))
    return real(1) / count


@inline_always
def entries_of(state: int, sy: int, sx: int, lists: Any) -> int:
    """How many pixels a bin reads."""
    return lists.entries[sy] * lists.entries[sx] if state == SOUND else 0


@inline_always
def list_pixels(sy: int, sx: int, first: int, last: int, g: Any, lists: Any, places: Any, products: Any) -> None:
    """Entries [first, last) of a bin's rows x columns: the pixels and A(row) * B(column)."""
    columns = lists.entries[sx]
    row = first // columns if first else 0
    column = first - row * columns
    rows, row_weights = advance(lists.index, sy * lists.row), advance(lists.weights, 2 * sy * lists.row)
    x, x_weights = advance(lists.index, sx * lists.row), advance(lists.weights, 2 * sx * lists.row)
    place, product = at(places, (0,)), at(products, (0, 0))
    n = 0
    while n < last - first:
        base = rows[row] * g.in_w
        weight = row_weights[row]
        until = min(columns, column + (last - first) - n)
        for i in range(until - column):
            place[n + i] = base + x[column + i]
            product[n + i] = weight * x_weights[column + i]
        n += until - column
        row += 1
        column = 0


@inline_always
def is_run(sx: int, lists: Any) -> bool:
    """Whether the columns of a bin are neighbours."""
    n, columns = lists.entries[sx], advance(lists.index, sx * lists.row)
    return n > 0 and columns[n - 1] - columns[0] == n - 1


@inline_always
def list_slopes(sy: int, sx: int, first: int, last: int, lists: Any, products: Any) -> None:
    """A'(row) * B(column) and A(row) * B'(column) beside what `list_pixels` lists."""
    columns = lists.entries[sx]
    row = first // columns if first else 0
    column = first - row * columns
    y_weights, x_weights = advance(lists.weights, 2 * sy * lists.row), advance(lists.weights, 2 * sx * lists.row)
    y_slopes, x_slopes = advance(y_weights, lists.row), advance(x_weights, lists.row)
    along_y, along_x = at(products, (1, 0)), at(products, (2, 0))
    for n in range(last - first):
        along_y[n] = y_slopes[row] * x_weights[column]
        along_x[n] = y_weights[row] * x_slopes[column]
        column += 1
        if column == columns:
            row, column = row + 1, 0


@inline_always
def write_moves(
    r: int,
    cls: int,
    i: int,
    state: int,
    listed: int,
    scale: Any,
    value: Any,
    along_y: Any,
    along_x: Any,
    extents: Any,
    mask: Any,
    grad_moves: Any,
    grad_mask: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 8 and 9 of one bin, of which `value`, `along_y` and `along_x` are the sums, for what its offset moves."""
    real = grad_mask.dtype.type
    if listed == 0 and state != BROKEN:
        grad_mask[r, cls, i] = 0
        if p.has_offset:
            grad_moves[r, cls, 0, i] = grad_moves[r, cls, 1, i] = 0
        return
    grad_mask[r, cls, i] = value * scale
    if p.has_offset:
        if p.has_mask:
            scale *= mask[r, i]
        scale *= real(g.offset_scale)
        # A broken size would do as well; but eq. 9 has NaN for both axes where one coordinate is NaN.
        size_y = extents[r, 1] if state == SOUND else real(1)
        size_x = extents[r, 3] if state == SOUND else real(1)
        grad_moves[r, cls, 0, i] = along_x * scale * size_x
        grad_moves[r, cls, 1, i] = along_y * scale * size_y


@inline
def convert_image(counters: Any, phase: int, input: Any, starts: Any, image: Any, blocks: Any, g: Any, p: Any) -> None:
    """A phase: images that have boxes are copied to channels last."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    cells = g.group_h * g.group_w
    units = g.batch * parts
    unit = claim(counters, phase)
    while unit < units:
        b = unit // parts
        if starts[b + 1] > starts[b]:
            for cell in range(cells):
                for cls in range(g.classes):
                    for block in range(len(blocks)):
                        row = blocks[block]
                        first = (cls * p.per_class + row.first) * cells + cell
                        origin = copy_origin(b, cell, cls, row.before, g, p)
                        to_channels_last(
                            input, b, first, cells, image, origin, row.channels, row.width, unit - b * parts, pixels
                        )
        finish(counters, phase)
        unit = claim(counters, phase)
    wait_for(counters, phase, units)

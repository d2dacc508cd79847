"""How one RoI problem is cut up and where its arrays lie, for forward and backward (docs/math/roi.md)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from pydeform._runtime import get_num_threads
from pydeform.cpu._arrays import contiguous
from pydeform.cpu._channels_last import pixel_parts, to_channels_last
from pydeform.cpu._conv_common import SERIAL_FLOPS, round_up, table
from pydeform.cpu._jit import inline, inline_always
from pydeform.cpu._roi_bins import BROKEN, SHORT, SOUND, extent, pixels_read, points_read, state_of, worse
from pydeform.cpu._simd import VECTOR_BYTES, at
from pydeform.cpu._simd_roi import BAND
from pydeform.cpu._threads import claim, finish, wait_for

CHANNELS = 64  # of a block whose gradients one thread adds up
SLICE_CHANNELS = 128  # at least, of those that the forward puts last at a time: each slice lists the bins anew
SLICE_BYTES = 1 << 23  # at most, of an image, if there are more channels: what the caches keep while boxes read it
FEW_CHANNELS = 4  # of a class: below, a copy that puts channels last brings nothing
LISTED = 512  # pixels of a bin in a list at a time
TILE = 1 << 14  # numbers in a thread's tile of results
# For estimates of the work:
TYPICAL_PIXELS = 16  # that a bin reads
LISTING = 300  # operations that it takes to list them


class RoiPlan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result but `bands`, which depends on
    the channels of a class alone."""

    planes: int  # 1: planes of the input are read as they lie; 0: copies with channels last are
    bands: int  # 1: and in them neighbouring columns at a time, for each channel by itself
    per_class: int  # channels of a class
    width: int  # of a class in a copy, blocks rounded up to vectors
    tile_bins: int  # bins whose results are turned to channels first at once
    has_offset: int
    has_mask: int


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
    """Of each bin: its row and column, the group of channels that it reads, and the cell of `offset` that moves it.

    Kernels look these up: the divisions would take as long as the rest of a bin of one channel.
    """
    rows = []
    for y in range(pooled[0]):
        for x in range(pooled[1]):
            cells = [y * n[0] // pooled[0] * n[1] + x * n[1] // pooled[1] for n in (group, part)]
            rows.append((y, x, *cells))
    return table("y x cell part", rows)


def bins_of(g: Any) -> Any:
    return bins_table((g.pooled_h, g.pooled_w), (g.group_h, g.group_w), (g.part_h, g.part_w))


def cells_of(g: Any) -> int:
    """Groups of channels of the input, of which each bin reads one."""
    return int(g.group_h * g.group_w)


def copy_size(g: Any, width: int) -> int:
    return int(g.batch * cells_of(g) * g.classes * width * (g.in_h * g.in_w + 1))


def most_listed(g: Any) -> int:
    """Entries that an axis of a bin may have, whichever way it lists them, and then some: eight are read at once."""
    longest = max(g.in_h, g.in_w)
    if g.points and g.is_max:
        return int(g.samples + 2 if g.samples else 2 * longest + 16)
    return int(max(SHORT, (min(2 * g.samples, longest) if g.samples and g.points else longest) + BAND))


def by_image(boxes: Any, batch: int) -> tuple[Any, Any]:
    """The boxes' numbers, image by image and in order, and where each image begins among them."""
    index = boxes[:, 0].astype(np.int64)
    order = np.argsort(index, kind="stable")
    return order, np.searchsorted(index[order], np.arange(batch + 1))


def threads_for(g: Any, products: int) -> int:
    per_bin = products * (2 * TYPICAL_PIXELS * g.out_channels + LISTING * g.classes)
    flops = g.boxes * g.pooled_h * g.pooled_w * per_bin
    if not prefers_planes(g):
        flops += products * g.batch * g.in_channels * g.in_h * g.in_w
    return 1 if flops < SERIAL_FLOPS else get_num_threads()


def prefers_planes(g: Any) -> bool:
    """A class with few channels gains nothing from a copy, and for few boxes the copy would be most of the work."""
    reads = TYPICAL_PIXELS * g.boxes * g.pooled_h * g.pooled_w
    return bool(g.out_channels // g.classes < FEW_CHANNELS or reads < g.batch * cells_of(g) * g.in_h * g.in_w)


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(dtype.itemsize)


def flat_arguments(input: Any, boxes: Any, offset: Any, mask: Any, g: Any, dtype: Any) -> tuple[Any, ...]:
    """input, boxes, offset, mask in the kernels' shapes; an absent one is empty."""
    return (
        contiguous(input, dtype, (g.batch, g.in_channels, g.in_h * g.in_w)),
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


@inline_always
def list_axis(
    axis: int,
    bin_: int,
    begin: Any,
    size: Any,
    move: Any,
    boxes: Any,
    g: Any,
    index: Any,
    weights: Any,
    counts: Any,
    sloped: bool,
) -> int:
    """What bin number `bin_` of an axis (0: y, 1: x) reads, into row (axis, bin_); counts there. Gives the entries.

    Derivatives of the weights are there only if `sloped`.
    """
    real = boxes.dtype.type
    length = g.in_w if axis else g.in_h
    bin_size = size / real(g.pooled_w if axis else g.pooled_h)
    # Pointers: a slice of an array would be counted in and out, which takes longer than filling it.
    row, weight, slope = at(index, (axis, bin_, 0)), at(weights, (axis, bin_, 0, 0)), at(weights, (axis, bin_, 1, 0))
    if g.points:
        n, count = points_read(bin_, begin, bin_size, move, length, boxes, g, row, weight, slope, sloped)
    else:
        n, count = pixels_read(bin_, begin, bin_size, length, boxes, g, row, weight, slope)
    counts[axis, bin_] = count
    return n


@inline
def box_of(boxes: Any, r: int, g: Any) -> tuple[Any, Any, Any, Any, int]:
    """begin and size along y, then along x, and the state."""
    begin_y, size_y, state_y = extent(boxes, r, 2, g)
    begin_x, size_x, state_x = extent(boxes, r, 1, g)
    return begin_y, size_y, begin_x, size_x, worse(state_y, state_x)


@inline
def list_box(
    box: Any,
    boxes: Any,
    first: Any,
    last: Any,
    g: Any,
    index: Any,
    weights: Any,
    counts: Any,
    entries: Any,
    sloped: bool,
) -> None:
    """The bins first <= bin < last of each axis (y, x) of a box that nothing moves."""
    begin_y, size_y, begin_x, size_x, state = box
    zero = boxes.dtype.type(0)
    if state == SOUND:
        for axis in range(2):
            begin, size = (begin_x, size_x) if axis else (begin_y, size_y)
            for bin_ in range(first[axis], last[axis]):
                entries[axis, bin_] = list_axis(axis, bin_, begin, size, zero, boxes, g, index, weights, counts, sloped)


@inline_always
def list_moved(
    box: Any,
    r: int,
    cls: int,
    bin_: Any,
    offset: Any,
    boxes: Any,
    g: Any,
    index: Any,
    weights: Any,
    counts: Any,
    entries: Any,
    sloped: bool,
) -> int:
    """One bin, a row of `bins_table`, that its offset moves; gives its state."""
    begin_y, size_y, begin_x, size_x, state = box
    offset_y, offset_x = offset[r, cls, 1, bin_.part], offset[r, cls, 0, bin_.part]
    scale = boxes.dtype.type(g.offset_scale)
    move_y, move_x = offset_y * scale * size_y, offset_x * scale * size_x  # eq. 2
    if state != BROKEN:
        state = worse(state, state_of(offset_y, offset_x, move_y, move_x))
    if state == SOUND:
        for axis in range(2):
            begin, size, move = (begin_x, size_x, move_x) if axis else (begin_y, size_y, move_y)
            p = bin_.x if axis else bin_.y
            entries[axis, p] = list_axis(axis, p, begin, size, move, boxes, g, index, weights, counts, sloped)
    return state


@inline_always
def scale_of(state: int, py: int, px: int, boxes: Any, g: Any, counts: Any) -> Any:
    """What the sum over a bin is multiplied by: 1/count; NaN for a broken bin."""
    real = boxes.dtype.type
    if state == BROKEN:
        return real(np.nan)
    if state != SOUND:
        return real(0)
    count = counts[0, py] * counts[1, px]
    if g.points == 0 or g.least_count != 0:
        count = max(count, real(1))
    return real(1) / count


@inline_always
def list_pixels(
    py: int, px: int, first: int, last: int, g: Any, index: Any, weights: Any, entries: Any, places: Any, products: Any
) -> None:
    """Entries [first, last) of a bin's rows x columns: the pixels and A(row) * B(column)."""
    columns = entries[1, px]
    row = first // columns if first else 0
    column = first - row * columns
    rows, row_weights = at(index, (0, py, 0)), at(weights, (0, py, 0, 0))
    x, x_weights = at(index, (1, px, 0)), at(weights, (1, px, 0, 0))
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
def is_run(px: int, index: Any, entries: Any) -> bool:
    """Whether the columns of a bin are neighbours."""
    n = entries[1, px]
    return n > 0 and index[1, px, n - 1] - index[1, px, 0] == n - 1


@inline_always
def list_slopes(py: int, px: int, first: int, last: int, weights: Any, entries: Any, products: Any) -> None:
    """A'(row) * B(column) and A(row) * B'(column) beside what `list_pixels` lists."""
    columns = entries[1, px]
    row = first // columns if first else 0
    column = first - row * columns
    y_weights, y_slopes = at(weights, (0, py, 0, 0)), at(weights, (0, py, 1, 0))
    x_weights, x_slopes = at(weights, (1, px, 0, 0)), at(weights, (1, px, 1, 0))
    along_y, along_x = at(products, (1, 0)), at(products, (2, 0))
    for n in range(last - first):
        along_y[n] = y_slopes[row] * x_weights[column]
        along_x[n] = y_weights[row] * x_slopes[column]
        column += 1
        if column == columns:
            row, column = row + 1, 0


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

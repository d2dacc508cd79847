"""Means over bins by the vector, forward and backward (docs/math/roi.md, eq. 5 to 9).

Forward: a unit of work is one box and class, and owns its outputs. Backward: a unit is either some channels of one
image, which owns their part of the input's gradient and goes through the boxes of that image in their order, or one box
and class, which owns its part of the gradients of offset and mask. Units go class by class, so that all boxes read the
channels of one class before the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.layout import to_channels_first
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import at, vectors_of
from pydeform.cpu.core.weighted import Pixels, plane_scatter, scatter, weighted_dots, weighted_sum
from pydeform.cpu.roi.boxes import find_boxes
from pydeform.cpu.roi.copies import (
    Channels,
    block_pixels,
    clear_blocks,
    convert_grads,
    convert_image,
    copy_origin,
    grad_place,
    input_channel,
    write_blocks,
)
from pydeform.cpu.roi.lists import (
    Cursor,
    Span,
    after,
    bin_of,
    bins_in,
    cell_at,
    list_bins,
    list_pixels,
    list_slopes,
    lists_of,
    masked_scale,
    products_of,
    scale_of,
    span_of_cell,
)
from pydeform.cpu.roi.offsets import write_moves
from pydeform.cpu.roi.plan import LISTED, blocks_plan, blocks_threads, run, slices_plan, threads_for
from pydeform.cpu.roi.records import Kind


class BoxOfClass(NamedTuple):
    """A unit of work, and the thread that does it."""

    thread: int
    place: int  # of the box in `order`
    cls: int


def forward(given: Any, output: Any, kind: Kind) -> None:
    threads = threads_for(kind.g, 1, kind.gathers, kind.g.boxes * kind.g.classes)
    run(_mean, slices_plan, kind, threads, given, output)


def backward(given: Any, grads: Any, kind: Kind) -> None:
    run(_mean_backward, blocks_plan, kind, blocks_threads(kind), given, grads)


@Kernel
def _mean(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    units = g.boxes * g.classes
    for s in range(len(tables.blocks)):
        if not p.gathers:
            convert_image(counters, 2 * s + 1, given, scratch.image, tables.blocks[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 2)
        while unit < units:
            part = BoxOfClass(thread, unit % g.boxes, unit // g.boxes)
            _mean_of_box(part, tables.blocks[s], given, output, scratch, tables, g, p)
            finish(counters, 2 * s + 2)
            unit = claim(counters, 2 * s + 2)
        wait_for(counters, 2 * s + 2, units)
    let_helpers_go(thread, counters)


@inline
def _mean_of_box(part: Any, row: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Eq. 5 and 6 for one box, one slice of a class's channels."""
    r = given.order[part.place]
    b = np.int64(given.boxes[r, 0])
    lists, span = lists_of(part.thread, given, scratch), Span((0, 0), (g.pooled_h, g.pooled_w), part.cls, False)
    cursor = Cursor(part.place, 0, 0)
    for bin0 in range(0, bins_in(span), p.tile_bins):
        count = left = min(p.tile_bins, bins_in(span) - bin0)
        while left > 0:
            here, listed = list_bins(cursor, left, span, lists, given.offset, tables.bins, g, p)
            for slot in range(listed):
                bin_ = bin_of(cursor, slot, here, g, p)
                channels = Channels(b, cell_at(cursor, tables.bins, g), part.cls)
                target = at(scratch.tiles, (part.thread, bin_.i - bin0, 0))
                _mean_of_bin(bin_, channels, row, target, here, given.mask, scratch.image, g, p)
                cursor = after(cursor, span)
            left -= listed
        channel = part.cls * p.per_class + row.first
        to_channels_first(scratch.tiles[part.thread], output, r, channel, row.channels, bin0, count, tables.no_shift)


@inline_always
def _mean_of_bin(
    bin_: Any, channels: Any, row: Any, target: Any, here: Any, mask: Any, image: Any, g: Any, p: Any
) -> None:
    scale, one = masked_scale(bin_, here, mask, g, p), image.dtype.type(1)
    done, more = 0, False
    while done < bin_.listed or not more:  # once at least: a bin that reads nothing has a value too
        count, until = list_pixels(bin_, done, here, g)
        pixels, index = block_pixels(channels, row, count, here, image, g, p)
        listed, vectors = Pixels(pixels, index, here.products, count, row.width), vectors_of(pixels, row.width)
        weighted_sum(target, listed, vectors, scale if until == bin_.listed else one, more)
        done, more = until, True


@Kernel
def _mean_backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    if p.need_dots and not p.gathers:
        convert_image(counters, 1, given, scratch.image, tables.blocks, g, p)
    if p.copies:
        convert_grads(counters, 2, grads.output, scratch.grads, tables.blocks, g, p)
    of_class = -(-len(tables.blocks) // p.blocks_of_unit)
    of_image = g.group_h * g.group_w * g.classes * of_class
    scattering = g.batch * of_image * p.need_input
    units = scattering + g.boxes * g.classes * p.need_dots
    unit = claim(counters, 3)
    while unit < units:
        if unit < scattering:
            b = unit // of_image
            channels = Channels(b, (unit - b * of_image) // (g.classes * of_class), unit // of_class % g.classes)
            first = unit % of_class * p.blocks_of_unit
            blocks = tables.blocks[first : min(first + p.blocks_of_unit, len(tables.blocks))]
            _add_to_image(thread, channels, blocks, given, grads, scratch, tables.bins, g, p)
        else:
            part = BoxOfClass(thread, (unit - scattering) % g.boxes, (unit - scattering) // g.boxes)
            _dots_of_box(part, given, grads, scratch, tables, g, p)
        finish(counters, 3)
        unit = claim(counters, 3)
    wait_for(counters, 3, units)
    let_helpers_go(thread, counters)


@inline
def _add_to_image(
    thread: int, channels: Any, blocks: Any, given: Any, grads: Any, scratch: Any, bins: Any, g: Any, p: Any
) -> None:
    """Eq. 7 for some blocks of an image's channels."""
    if not p.gathers:
        clear_blocks(channels, blocks, scratch.grad_image, g, p)
    lists, span = lists_of(thread, given, scratch), span_of_cell(channels.cell, channels.cls, False, g)
    cursor = Cursor(given.starts[channels.b], span.first[0], span.first[1])
    left = (given.starts[channels.b + 1] - cursor.place) * bins_in(span)
    while left > 0:
        here, count = list_bins(cursor, left, span, lists, given.offset, bins, g, p)
        for slot in range(count):
            bin_ = bin_of(cursor, slot, here, g, p)
            cursor = after(cursor, span)
            scale = masked_scale(bin_, here, given.mask, g, p)
            done = 0
            while done < bin_.listed:
                pixels, done = list_pixels(bin_, done, here, g)
                for block in range(len(blocks)):
                    row = blocks[block]
                    if p.gathers:
                        _add_to_planes(bin_, channels, row, pixels, scale, here, grads, g, p)
                    else:
                        scatter(
                            at(scratch.grads, (grad_place(bin_, channels.cls, row, g, p),)),
                            at(scratch.grad_image, (copy_origin(channels, row.before, g, p),)),
                            here.places,
                            here.products,
                            pixels,
                            row.width,
                            vectors_of(at(scratch.grads, (0,)), row.width),
                            scale,
                        )
        left -= count
    if not p.gathers:
        write_blocks(channels, blocks, scratch.grad_image, grads.input, g, p)


@inline_always
def _add_to_planes(
    bin_: Any, channels: Any, row: Any, count: int, scale: Any, here: Any, grads: Any, g: Any, p: Any
) -> None:
    for c in range(row.first, row.first + row.channels):
        grad = at(grads.output, (bin_.r, channels.cls * p.per_class + c, bin_.i))
        target = at(grads.input, (channels.b, input_channel(channels, c, g, p), 0))
        plane_scatter(grad, target, here.places, here.products, count, 1, 1, scale)


@inline
def _dots_of_box(part: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Eq. 8 and 9 for one box and class."""
    b = np.int64(given.boxes[given.order[part.place], 0])
    lists, span = lists_of(part.thread, given, scratch), Span((0, 0), (g.pooled_h, g.pooled_w), part.cls, True)
    cursor, left = Cursor(part.place, 0, 0), bins_in(span)
    while left > 0:
        here, count = list_bins(cursor, left, span, lists, given.offset, tables.bins, g, p)
        for slot in range(count):
            bin_ = bin_of(cursor, slot, here, g, p)
            channels = Channels(b, cell_at(cursor, tables.bins, g), part.cls)
            cursor = after(cursor, span)
            sums = _dots_of_bin(bin_, channels, tables.blocks, here, scratch.image, scratch.grads, g, p)
            scale = scale_of(bin_, here, given.mask, g)
            write_moves(bin_, part.cls, sums, scale, given.mask, grads, scratch.extents, g, p)
        left -= count


@inline_always
def _dots_of_bin(
    bin_: Any, channels: Any, blocks: Any, here: Any, image: Any, copy: Any, g: Any, p: Any
) -> tuple[Any, Any, Any]:
    """Sums of values, and of slopes along y and x, times the output's gradient."""
    value = along_y = along_x = image.dtype.type(0)
    for done in range(0, bin_.listed, LISTED):
        until = min(done + LISTED, bin_.listed)
        list_pixels(bin_, done, here, g)
        list_slopes(bin_, done, until, here)
        for block in range(len(blocks)):
            row = blocks[block]
            pixels, index = block_pixels(channels, row, until - done, here, image, g, p)
            grad = at(copy, (grad_place(bin_, channels.cls, row, g, p),))
            listed = Pixels(pixels, index, products_of(here), until - done, row.width)
            dots = weighted_dots(grad, listed, vectors_of(pixels, row.width))
            value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
    return value, along_y, along_x

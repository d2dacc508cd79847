"""Backward of every RoI operator (eq. 7 to 9).

A unit of work is either some channels of one image, which owns their part of the input's gradient and goes through the
boxes of that image in their order, or one box and class, which owns its part of the gradients of offset and mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.layout import PIXELS, block_to_channels_first, pixel_parts, to_channels_last
from pydeform.cpu.core.memory import compute_dtype, contiguous, empty, to_result, workspace
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.planes import NO_PLANES, gather, is_as_computed, planes_of, reader_of, reader_parts
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at
from pydeform.cpu.core.sizes import pixel_dtype
from pydeform.cpu.core.weighted import plane_scatter, scatter, weighted_dots
from pydeform.cpu.roi import common as roi_common
from pydeform.cpu.roi import few as roi_few
from pydeform.cpu.roi.bins import SOUND
from pydeform.cpu.roi.common import (
    LISTED,
    bin_after,
    bin_at,
    bins_of,
    bins_of_cell,
    blocks_of_class,
    box_of,
    convert_image,
    copy_origin,
    entries_of,
    find_boxes,
    found_box,
    list_of_box,
    list_of_cell,
    list_pixels,
    list_slopes,
    lists_of,
    next_bin,
    scale_of,
    slots_of,
    write_moves,
)
from pydeform.cpu.roi.largest import largest_of_bin, list_candidates, list_part


class BackwardPlan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result."""

    planes: int  # 1: pixels are gathered from the input, and its gradient added up, as they lie; 0: with channels last
    per_class: int  # channels of a class
    width: int  # of a class in a copy, blocks rounded up to vectors
    has_offset: int
    has_mask: int
    need_input: int
    need_dots: int  # for offset and mask
    copies: int  # 1: something reads a copy of grad_output with channels last
    blocks_of_unit: int  # blocks of the input's gradient that one thread adds up together


def backward(grad_output: Any, input: Any, boxes: Any, offset: Any, mask: Any, g: Any, needs: Any) -> dict[str, Any]:
    dtype = compute_dtype(input.dtype)
    bins = g.pooled_h * g.pooled_w
    need_input, need_dots = "input" in needs, "offset" in needs or "mask" in needs
    few, planes = roi_common.has_few_channels(g), roi_common.prefers_planes(g, dtype)
    planes = planes and not (few and is_as_computed(input, dtype))
    shape = (g.batch, g.in_channels, g.in_h * g.in_w)
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if few or planes or g.boxes == 0 else empty
    grad_input = make(shape if need_input else (0, 1, 1), dtype)
    has_dots = need_dots and g.boxes > 0
    boxes_with_dots = g.boxes if need_dots else 0
    grad_moves = empty((boxes_with_dots if offset is not None else 0, g.classes, 2, bins), dtype)
    grad_mask = empty((boxes_with_dots, g.classes, bins), dtype)
    # Where only the input's gradient is wanted, a mean needs none of the input's numbers.
    read = not planes and (has_dots or g.is_max)
    arguments = roi_common.flat_arguments(input if read else None, boxes, offset, mask, g, dtype)
    grad_output = contiguous(grad_output, dtype, (g.boxes, g.out_channels, bins))
    wanted = g.boxes > 0 and (need_input or need_dots)
    if wanted and few:
        given = offset is not None, mask is not None
        where = planes_of(input) if planes else None
        roi_few.backward(grad_output, arguments, where, grad_input, grad_moves, grad_mask, *given, g)
    elif wanted:
        lanes = roi_common.lanes_of(dtype)
        per_class = g.out_channels // g.classes
        groups = g.batch * roi_common.cells_of(g) * g.classes
        blocks, width = blocks_of_class(per_class, lanes)
        units = groups * len(blocks) * need_input + g.boxes * g.classes * need_dots
        parts = -(-g.in_h * g.in_w // PIXELS)
        threads = roi_common.threads_for(g, 1 + 2 * need_dots, planes, max(units, g.batch * parts))
        plan = BackwardPlan(
            planes=int(planes),
            per_class=per_class,
            width=width,
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
            need_input=int(need_input),
            need_dots=int(has_dots),
            copies=int((need_input and not planes) or (has_dots and not g.is_max)),
            # What a bin reads is listed once for each unit, so there are no more than keep the threads at work.
            blocks_of_unit=-(-len(blocks) // max(1, threads // groups)),
        )
        order, starts = roi_common.by_image(arguments[1], g.batch)
        corners = 4 if g.is_max and g.points else 1
        copied = not planes and (has_dots or g.is_max)
        gathered = planes and (has_dots or g.is_max)
        parallel.run(
            _largest_backward if g.is_max else _mean_backward,
            dtype.char + pixel_dtype(g.in_h * g.in_w).char,
            threads,
            parallel.new_counters(4),
            grad_output,
            *arguments,
            planes_of(input) if planes else NO_PLANES,
            order,
            starts,
            grad_input,
            grad_moves,
            grad_mask,
            *workspace(
                ((g.boxes, 4), dtype),
                ((g.boxes,), np.dtype(np.int64)),
                ((roi_common.copy_size(g, width) if copied else 0,), dtype),
                ((roi_common.copy_size(g, width) if need_input and not planes else 0,), dtype),
                ((g.boxes * g.classes * width * (bins + 1) if plan.copies else 0,), dtype),
                *roi_common.lists_of_threads(threads, g, arguments[1]),
                ((threads, corners * LISTED), pixel_dtype(g.in_h * g.in_w)),
                ((threads, 3, corners * LISTED), dtype),
                ((threads, max(blocks["width"])), np.dtype(f"i{dtype.itemsize}")),
                ((threads, max(blocks["width"])), dtype),
                *reader_parts(
                    threads, corners * LISTED * gathered, max(blocks["width"]), pixel_dtype(g.in_h * g.in_w), dtype
                ),
            ),
            bins_of(g),
            blocks,
            g,
            plan,
        )
    taken = {
        "input": (grad_input, (g.batch, g.in_channels, g.in_h, g.in_w)),
        "offset": (_by_part(grad_moves, g), (g.boxes, 2 * g.classes, g.part_h, g.part_w)),
        "mask": (grad_mask.sum(axis=1), (g.boxes, 1, g.pooled_h, g.pooled_w)),
    }
    return {
        name: to_result(grad, (offset if name == "offset" else input).dtype, shape) if name in needs else None
        for name, (grad, shape) in taken.items()
    }


def _by_part(grad_moves: Any, g: Any) -> Any:
    """What moves a bin is a cell of `offset`, which may move several: their gradients add up, in the bins' order."""
    if (g.part_h, g.part_w) == (g.pooled_h, g.pooled_w) or not grad_moves.size:
        return grad_moves
    parts = g.part_h * g.part_w
    grad_offset = np.zeros((math.prod(grad_moves.shape[:3]), parts), grad_moves.dtype)
    table = bins_of(g)["part"]
    part_of_bin = np.add.outer(table[: g.pooled_h], table[g.pooled_h :]).reshape(-1)
    place = parts * np.arange(len(grad_offset))[:, None] + part_of_bin
    np.add.at(grad_offset.reshape(-1), place.reshape(-1), grad_moves.reshape(-1))
    return grad_offset


@inline
def _convert_grads(counters: Any, grad_output: Any, grads: Any, blocks: Any, g: Any, p: Any) -> None:
    """Phase 1: grad_output of each box, class and block with channels last."""
    bins = g.pooled_h * g.pooled_w
    unit = claim(counters, 1)
    while unit < g.boxes:
        for cls in range(g.classes):
            for block in range(len(blocks)):
                row = blocks[block]
                first = cls * p.per_class + row.first
                for part in range(pixel_parts(bins)):
                    origin = _grad_place(unit, cls, row.before, row.width, 0, g, p)
                    to_channels_last(grad_output, unit, first, 1, grads, origin, row.channels, row.width, part, bins)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, g.boxes)


@inline
def _grad_place(r: int, cls: int, before: int, width: int, bin_: int, g: Any, p: Any) -> int:
    """Place of a bin in the copy of grad_output."""
    return ((r * g.classes + cls) * p.width + before) * (g.pooled_h * g.pooled_w + 1) + bin_ * width


@inline
def _zero_blocks(
    b: int, cell: int, cls: int, blocks: Any, first: int, last: int, grad_image: Any, g: Any, p: Any
) -> None:
    """Zeros in the places of some blocks of the input's gradient."""
    start = copy_origin(b, cell, cls, blocks[first].before, g, p)
    length = (blocks[last - 1].before + blocks[last - 1].width - blocks[first].before) * (g.in_h * g.in_w + 1)
    target = at(grad_image, (start,))
    for i in range(length):
        target[i] = 0


@inline
def _write_blocks(
    b: int,
    cell: int,
    cls: int,
    blocks: Any,
    first: int,
    last: int,
    grad_image: Any,
    grad_input: Any,
    g: Any,
    p: Any,
) -> None:
    cells = g.group_h * g.group_w
    pixels = g.in_h * g.in_w
    for block in range(first, last):
        row = blocks[block]
        channel = (cls * p.per_class + row.first) * cells + cell
        origin = copy_origin(b, cell, cls, row.before, g, p)
        for part in range(pixel_parts(pixels)):
            block_to_channels_first(
                grad_image, origin, row.channels, row.width, grad_input, b, channel, cells, part, pixels
            )


@Kernel
def _mean_backward(
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
    image: Any,
    grad_image: Any,
    grads: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    all_values: Any,
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 3, boxes, extents, states, g)
    if p.need_dots and not p.planes:
        convert_image(counters, 0, input, starts, image, blocks, g, p)
    if p.copies:
        _convert_grads(counters, grad_output, grads, blocks, g, p)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products = all_places[thread], all_products[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    cells = g.group_h * g.group_w
    of_class = -(-len(blocks) // p.blocks_of_unit)
    of_image = cells * g.classes * of_class
    scattering = g.batch * of_image * p.need_input
    units = scattering + g.boxes * g.classes * p.need_dots
    unit = claim(counters, 2)
    while unit < units:
        if unit >= scattering:
            # Class by class: all boxes read the same channels.
            cls = (unit - scattering) // g.boxes
            r = unit - scattering - cls * g.boxes
            _dots_of_box(
                r,
                cls,
                boxes,
                offset,
                mask,
                grad_moves,
                grad_mask,
                extents,
                states,
                image,
                grads,
                lists,
                places,
                products,
                reader,
                bins,
                blocks,
                g,
                p,
            )
            finish(counters, 2)
            unit = claim(counters, 2)
            continue
        b = unit // of_image
        cell = (unit - b * of_image) // (g.classes * of_class)
        cls = unit // of_class % g.classes
        first_block = unit % of_class * p.blocks_of_unit
        last_block = min(first_block + p.blocks_of_unit, len(blocks))
        if not p.planes:
            _zero_blocks(b, cell, cls, blocks, first_block, last_block, grad_image, g, p)
        first, last = bins_of_cell(cell, g)
        current = starts[b], first[0], first[1]
        left = (starts[b + 1] - starts[b]) * (last[0] - first[0]) * (last[1] - first[1])
        while left > 0:
            here, count = list_of_cell(
                current, left, first, last, cls, extents, states, order, offset, bins, lists, g, p, False
            )
            for slot in range(count):
                place, py, px = current
                r, i = order[place], py * g.pooled_w + px
                current = next_bin(current, first, last)
                sy, sx, state = slots_of(py, px, slot, states[r], here, p)
                if state != SOUND:
                    continue
                scale = scale_of(SOUND, sy, sx, boxes, here, g)
                if p.has_mask:
                    scale *= mask[r, i]
                listed = entries_of(state, sy, sx, here)
                for done in range(0, listed, LISTED):
                    until = min(done + LISTED, listed)
                    list_pixels(sy, sx, done, until, g, here, places, products)
                    for block in range(first_block, last_block):
                        row = blocks[block]
                        if p.planes:
                            channel = cls * p.per_class + row.first
                            for c in range(channel, channel + row.channels):
                                plane_scatter(
                                    at(grad_output, (r, c, i)),
                                    at(grad_input, (b, c * cells + cell, 0)),
                                    at(places, (0,)),
                                    at(products, (0, 0)),
                                    until - done,
                                    1,
                                    1,
                                    scale,
                                )
                        else:
                            scatter(
                                at(grads, (_grad_place(r, cls, row.before, row.width, i, g, p),)),
                                at(grad_image, (copy_origin(b, cell, cls, row.before, g, p),)),
                                at(places, (0,)),
                                at(products, (0, 0)),
                                until - done,
                                row.width,
                                row.width * boxes.itemsize // VECTOR_BYTES,
                                scale,
                            )
            left -= count
        if not p.planes:
            _write_blocks(b, cell, cls, blocks, first_block, last_block, grad_image, grad_input, g, p)
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, units)
    let_helpers_go(thread, counters)


@inline
def _dots_of_box(
    r: int,
    cls: int,
    boxes: Any,
    offset: Any,
    mask: Any,
    grad_moves: Any,
    grad_mask: Any,
    extents: Any,
    states: Any,
    image: Any,
    grads: Any,
    lists: Any,
    places: Any,
    products: Any,
    reader: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 8 and 9 for one box and class."""
    zero = boxes.dtype.type(0)
    b = np.int64(boxes[r, 0])
    box = found_box(extents, states, r)
    cells = g.group_h * g.group_w
    bins_of_box = g.pooled_h * g.pooled_w
    chunk = 0
    while chunk < bins_of_box:
        here, count = list_of_box(box, r, cls, chunk, bins_of_box - chunk, boxes, offset, bins, lists, g, p, True)
        y = chunk // g.pooled_w
        x = chunk - y * g.pooled_w
        for i in range(chunk, chunk + count):
            cell = bin_at(y, x, bins, g).cell
            sy, sx, state = slots_of(y, x, i - chunk, box[4], here, p)
            y, x = bin_after(y, x, g)
            scale = scale_of(state, sy, sx, boxes, here, g)
            listed = entries_of(state, sy, sx, here)
            value, along_y, along_x = zero, zero, zero
            for done in range(0, listed, LISTED):
                until = min(done + LISTED, listed)
                list_pixels(sy, sx, done, until, g, here, places, products)
                list_slopes(sy, sx, done, until, here, products)
                for block in range(len(blocks)):
                    row = blocks[block]
                    index, pixels = at(places, (0,)), at(image, (0,))
                    if p.planes:
                        first = (cls * p.per_class + row.first) * cells + cell
                        gather(reader, b, first, cells, row.channels, row.width, places, until - done, g.in_w)
                        index, pixels = reader.own, reader.pixels
                    else:
                        pixels = advance(pixels, copy_origin(b, cell, cls, row.before, g, p))
                    dots = weighted_dots(
                        at(grads, (_grad_place(r, cls, row.before, row.width, i, g, p),)),
                        pixels,
                        index,
                        at(products, (0, 0)),
                        at(products, (1, 0)),
                        at(products, (2, 0)),
                        until - done,
                        row.width,
                        row.width * boxes.itemsize // VECTOR_BYTES,
                    )
                    value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
            write_moves(
                r, cls, i, state, listed, scale, value, along_y, along_x, extents, mask, grad_moves, grad_mask, g, p
            )
        chunk += count


@Kernel
def _largest_backward(
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
    image: Any,
    grad_image: Any,
    grads: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    all_values: Any,
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    if not p.planes:
        convert_image(counters, 0, input, starts, image, blocks, g, p)
        _convert_grads(counters, grad_output, grads, blocks, g, p)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products, winners = all_places[thread], all_products[thread], all_winners[thread]
    values = all_values[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    bins_of_box = g.pooled_h * g.pooled_w
    units = g.batch * len(blocks)
    unit = claim(counters, 2)
    while unit < units:
        b = unit // len(blocks)
        block = unit - b * len(blocks)
        row = blocks[block]
        origin = copy_origin(b, 0, 0, row.before, g, p) * (1 - p.planes)
        if not p.planes:
            _zero_blocks(b, 0, 0, blocks, block, block + 1, grad_image, g, p)
        for place in range(starts[b], starts[b + 1]):
            r = order[place]
            box = box_of(boxes, r, g)
            if box[4] != SOUND:
                continue
            here, known = lists, 0  # as in the forward
            y, x = 0, 0
            for i in range(bins_of_box):
                if i == known:
                    here, count = list_candidates(box, i, boxes, lists, g)
                    known += count
                sy, sx = y, here.of_axis + x
                y, x = bin_after(y, x, g)
                largest_of_bin(
                    box[4],
                    sy,
                    sx,
                    at(values, (0,)),
                    winners,
                    at(image, (origin,)),
                    row,
                    boxes,
                    here,
                    g,
                    places,
                    products,
                    b,
                    reader,
                    p,
                )
                is_short = entries_of(SOUND, sy, sx, here) <= LISTED
                grad_place = _grad_place(r, 0, row.before, row.width, i, g, p)
                for c in range(row.channels):
                    winner = np.int64(winners[c])
                    if winner < 0:
                        continue
                    if not is_short:  # else all candidates are still there
                        list_part(sy, sx, winner, winner + 1, boxes, g, here, places, products)
                        winner = 0
                    grad = grad_output[r, row.first + c, i] if p.planes else grads[grad_place + c]
                    target, step = at(grad_image, (origin + c,)), row.width  # pixel 0 of the channel, to the next one
                    if p.planes:
                        target, step = at(grad_input, (b, row.first + c, 0)), 1
                    if not g.points:
                        target[np.int64(places[winner]) * step] += grad
                    elif places[4 * winner] >= 0:
                        for k in range(4 * winner, 4 * winner + 4):
                            target[np.int64(places[k]) * step] += grad * products[0, k]
        if not p.planes:
            _write_blocks(b, 0, 0, blocks, block, block + 1, grad_image, grad_input, g, p)
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, units)
    let_helpers_go(thread, counters)

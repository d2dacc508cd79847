"""Backward of every RoI operator (eq. 7 to 9).

A unit of work is either some channels of one image, which owns their part of the input's gradient and goes through the
boxes of that image in their order, or one box and class, which owns its part of the gradients of offset and mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu import _roi_common, _threads
from pydeform.cpu._arrays import compute_dtype, contiguous, empty, to_result, workspace
from pydeform.cpu._channels_last import block_to_channels_first, pixel_parts, to_channels_last
from pydeform.cpu._conv_common import pixel_dtype
from pydeform.cpu._jit import Kernel, inline
from pydeform.cpu._roi_bins import BROKEN, SOUND
from pydeform.cpu._roi_common import (
    LISTED,
    bins_of,
    blocks_of_class,
    box_of,
    convert_image,
    copy_origin,
    is_run,
    list_box,
    list_moved,
    list_pixels,
    list_slopes,
    scale_of,
)
from pydeform.cpu._roi_largest import largest_of_bin, list_candidates, list_part
from pydeform.cpu._simd import VECTOR_BYTES, at
from pydeform.cpu._simd_roi import (
    BAND,
    band_dots,
    band_scatter,
    plane_scatter,
    plane_weighted_dots,
    scatter,
    weighted_dots,
)
from pydeform.cpu._threads import claim, finish, wait_for


class BackwardPlan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result but `bands`, which depends on
    the channels of a class alone."""

    planes: int  # 1: the input's gradient is added up in its planes as they lie; 0: with channels last
    bands: int  # 1: a class has few channels, each of which is read or written for itself, in its plane
    per_class: int  # channels of a class
    width: int  # of a class in a copy, blocks rounded up to vectors
    has_offset: int
    has_mask: int
    need_input: int
    need_dots: int  # for offset and mask
    copies: int  # 1: something reads a copy of grad_output with channels last
    blocks_of_unit: int  # blocks of the input's gradient that one thread adds up together


def backward(
    grad_output: Any, input: Any, boxes: Any, offset: Any, mask: Any, g: Any, needs: Any
) -> tuple[Any, Any, Any]:
    dtype = compute_dtype(input.dtype)
    bins = bins_of(g)
    need_input, need_dots = "input" in needs, "offset" in needs or "mask" in needs
    planes = bool(_roi_common.prefers_planes(g) and not g.is_max)
    shape = (g.batch, g.in_channels, g.in_h * g.in_w)
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if planes or g.boxes == 0 else empty
    grad_input = make(shape if need_input else (0, 1, 1), dtype)
    has_dots = need_dots and g.boxes > 0
    grad_offset = empty((g.boxes if need_dots else 0, g.classes, 2, g.part_h * g.part_w), dtype)
    grad_mask = empty((g.boxes if need_dots else 0, g.classes, len(bins)), dtype)
    if g.boxes and (need_input or need_dots):
        lanes = _roi_common.lanes_of(dtype)
        per_class = g.out_channels // g.classes
        threads = _roi_common.threads_for(g, 1 + 2 * need_dots)
        groups = g.batch * _roi_common.cells_of(g) * g.classes
        blocks, width = blocks_of_class(per_class, lanes)
        few = per_class < _roi_common.FEW_CHANNELS
        plan = BackwardPlan(
            planes=int(planes),
            bands=int(few),
            per_class=per_class,
            width=width,
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
            need_input=int(need_input),
            need_dots=int(has_dots),
            copies=int((need_input and not planes) or (has_dots and not few)),
            # What a bin reads is listed once for each unit, so there are no more than keep the threads at work.
            blocks_of_unit=-(-len(blocks) // max(1, threads // groups)),
        )
        arguments = _roi_common.flat_arguments(input, boxes, offset, mask, g, dtype)
        order, starts = _roi_common.by_image(arguments[1], g.batch)
        most_bins, most_listed = max(g.pooled_h, g.pooled_w), _roi_common.most_listed(g)
        corners = 4 if g.is_max and g.points else 1
        copied = (has_dots and not few) or g.is_max
        _threads.run(
            _largest_backward if g.is_max else _mean_backward,
            dtype.char + pixel_dtype(g).char,
            threads,
            _threads.new_counters(3),
            contiguous(grad_output, dtype, (g.boxes, g.out_channels, len(bins))),
            *arguments,
            order,
            starts,
            grad_input,
            grad_offset,
            grad_mask,
            *workspace(
                ((_roi_common.copy_size(g, width) if copied else 0,), dtype),
                ((_roi_common.copy_size(g, width) if need_input and not planes else 0,), dtype),
                ((g.boxes * g.classes * width * (len(bins) + 1) if plan.copies else 0,), dtype),
                ((threads, 2, most_bins, most_listed), pixel_dtype(g)),
                ((threads, 2, most_bins, 2, most_listed), dtype),
                ((threads, 2, most_bins), dtype),
                ((threads, 2, most_bins), np.dtype(np.int64)),
                ((threads, corners * LISTED), pixel_dtype(g)),
                ((threads, 3, corners * LISTED), dtype),
                ((threads, max(blocks["width"])), np.dtype(f"i{dtype.itemsize}")),
                ((threads, max(blocks["width"])), dtype),
            ),
            bins,
            blocks,
            g,
            plan,
        )
    taken = {
        "input": (grad_input, (g.batch, g.in_channels, g.in_h, g.in_w)),
        "offset": (grad_offset, (g.boxes, 2 * g.classes, g.part_h, g.part_w)),
        "mask": (grad_mask.sum(axis=1), (g.boxes, 1, g.pooled_h, g.pooled_w)),
    }
    grads = [to_result(grad, input.dtype, shape) if name in needs else None for name, (grad, shape) in taken.items()]
    return tuple(grads)  # type: ignore[return-value]


@inline
def _convert_grads(counters: Any, grad_output: Any, grads: Any, bins: Any, blocks: Any, g: Any, p: Any) -> None:
    """Phase 1: grad_output of each box, class and block with channels last."""
    unit = claim(counters, 1)
    while unit < g.boxes:
        for cls in range(g.classes):
            for block in range(len(blocks)):
                row = blocks[block]
                first = cls * p.per_class + row.first
                for part in range(pixel_parts(len(bins))):
                    origin = _grad_place(unit, cls, row.before, row.width, 0, g, p)
                    to_channels_last(
                        grad_output, unit, first, 1, grads, origin, row.channels, row.width, part, len(bins)
                    )
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
    order: Any,
    starts: Any,
    grad_input: Any,
    grad_offset: Any,
    grad_mask: Any,
    image: Any,
    grad_image: Any,
    grads: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    all_values: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    if p.need_dots and not p.bands:
        convert_image(counters, 0, input, starts, image, blocks, g, p)
    if p.copies:
        _convert_grads(counters, grad_output, grads, bins, blocks, g, p)
    index, weights, counts, entries = all_index[thread], all_weights[thread], all_counts[thread], all_entries[thread]
    places, products = all_places[thread], all_products[thread]
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
                grad_output,
                input,
                boxes,
                offset,
                mask,
                grad_offset,
                grad_mask,
                image,
                grads,
                index,
                weights,
                counts,
                entries,
                places,
                products,
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
        # The bins that read this cell.
        gy = cell // g.group_w
        gx = cell - gy * g.group_w
        first_y, last_y = -(-gy * g.pooled_h // g.group_h), -(-(gy + 1) * g.pooled_h // g.group_h)
        first_x, last_x = -(-gx * g.pooled_w // g.group_w), -(-(gx + 1) * g.pooled_w // g.group_w)
        for place in range(starts[b], starts[b + 1]):
            r = order[place]
            box = box_of(boxes, r, g)
            if box[4] != SOUND:
                continue
            if not p.has_offset:
                list_box(box, boxes, (first_y, first_x), (last_y, last_x), g, index, weights, counts, entries, False)
            for py in range(first_y, last_y):
                for px in range(first_x, last_x):
                    i = py * g.pooled_w + px
                    if p.has_offset and SOUND != list_moved(
                        box, r, cls, bins[i], offset, boxes, g, index, weights, counts, entries, False
                    ):
                        continue
                    scale = scale_of(SOUND, py, px, boxes, g, counts)
                    if p.has_mask:
                        scale *= mask[r, i]
                    listed = entries[0, py] * entries[1, px]
                    if p.bands and listed > 0 and is_run(px, index, entries):
                        for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                            for k in range(0, entries[1, px], BAND):
                                band_scatter(
                                    at(grad_input, (b, c * cells + cell, index[1, px, k])),
                                    at(index, (0, py, 0)),
                                    at(weights, (0, py, 0, 0)),
                                    entries[0, py],
                                    g.in_w,
                                    g.in_h * g.in_w - index[1, px, k],
                                    at(weights, (1, px, 0, k)),
                                    min(BAND, entries[1, px] - k),
                                    grad_output[r, c, i] * scale,
                                )
                        continue
                    for first in range(0, listed, LISTED):
                        last = min(first + LISTED, listed)
                        list_pixels(py, px, first, last, g, index, weights, entries, places, products)
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
                                        last - first,
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
                                    last - first,
                                    row.width,
                                    row.width * boxes.itemsize // VECTOR_BYTES,
                                    scale,
                                )
        if not p.planes:
            _write_blocks(b, cell, cls, blocks, first_block, last_block, grad_image, grad_input, g, p)
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, units)


@inline
def _dots_of_box(
    r: int,
    cls: int,
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    grad_offset: Any,
    grad_mask: Any,
    image: Any,
    grads: Any,
    index: Any,
    weights: Any,
    counts: Any,
    entries: Any,
    places: Any,
    products: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    """Eq. 8 and 9 for one box and class."""
    real = boxes.dtype.type
    zero = real(0)
    cells = g.group_h * g.group_w
    b = np.int64(boxes[r, 0])
    box = box_of(boxes, r, g)
    for axis in range(2):
        for part in range(grad_offset.shape[3]):
            grad_offset[r, cls, axis, part] = 0
    if not p.has_offset:
        list_box(box, boxes, (0, 0), (g.pooled_h, g.pooled_w), g, index, weights, counts, entries, True)
    for i in range(len(bins)):
        bin_ = bins[i]
        py, px = bin_.y, bin_.x
        state = box[4]
        if p.has_offset:
            state = list_moved(box, r, cls, bin_, offset, boxes, g, index, weights, counts, entries, True)
        scale = scale_of(state, py, px, boxes, g, counts)
        listed = entries[0, py] * entries[1, px] if state == SOUND else 0
        value, along_y, along_x = zero, zero, zero
        if p.bands and listed > 0 and is_run(px, index, entries):
            for c in range(cls * p.per_class, (cls + 1) * p.per_class):
                for k in range(0, entries[1, px], BAND):
                    dots = band_dots(
                        at(input, (b, c * cells + bin_.cell, index[1, px, k])),
                        at(index, (0, py, 0)),
                        at(weights, (0, py, 0, 0)),
                        at(weights, (0, py, 1, 0)),
                        entries[0, py],
                        g.in_w,
                        g.in_h * g.in_w - index[1, px, k],
                        at(weights, (1, px, 0, k)),
                        at(weights, (1, px, 1, k)),
                        min(BAND, entries[1, px] - k),
                    )
                    grad = grad_output[r, c, i]
                    value += dots[0] * grad
                    along_y += dots[1] * grad
                    along_x += dots[2] * grad
            listed = 0
            summed = True
        else:
            summed = listed > 0
        for first in range(0, listed, LISTED):
            last = min(first + LISTED, listed)
            list_pixels(py, px, first, last, g, index, weights, entries, places, products)
            list_slopes(py, px, first, last, weights, entries, products)
            for block in range(len(blocks)):
                row = blocks[block]
                if p.bands:
                    channel = cls * p.per_class + row.first
                    for c in range(channel, channel + row.channels):
                        dots = plane_weighted_dots(
                            at(grad_output, (r, c, i)),
                            at(input, (b, c * cells + bin_.cell, 0)),
                            at(places, (0,)),
                            at(products, (0, 0)),
                            at(products, (1, 0)),
                            at(products, (2, 0)),
                            last - first,
                            1,
                            1,
                        )
                        value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
                else:
                    dots = weighted_dots(
                        at(grads, (_grad_place(r, cls, row.before, row.width, i, g, p),)),
                        at(image, (copy_origin(b, bin_.cell, cls, row.before, g, p),)),
                        at(places, (0,)),
                        at(products, (0, 0)),
                        at(products, (1, 0)),
                        at(products, (2, 0)),
                        last - first,
                        row.width,
                        row.width * boxes.itemsize // VECTOR_BYTES,
                    )
                    value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
        if not summed and state != BROKEN:
            scale = zero
        grad_mask[r, cls, i] = value * scale
        if p.has_offset:
            if p.has_mask:
                scale *= mask[r, i]
            scale *= real(g.offset_scale)
            # A broken size would do as well; but eq. 9 has NaN for both axes where one coordinate is NaN.
            size_y = box[1] if state == SOUND else real(1)
            size_x = box[3] if state == SOUND else real(1)
            grad_offset[r, cls, 0, bin_.part] += along_x * scale * size_x
            grad_offset[r, cls, 1, bin_.part] += along_y * scale * size_y


@Kernel
def _largest_backward(
    thread: int,
    counters: Any,
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    order: Any,
    starts: Any,
    grad_input: Any,
    grad_offset: Any,
    grad_mask: Any,
    image: Any,
    grad_image: Any,
    grads: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    all_values: Any,
    bins: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    convert_image(counters, 0, input, starts, image, blocks, g, p)
    _convert_grads(counters, grad_output, grads, bins, blocks, g, p)
    index, weights, entries = all_index[thread], all_weights[thread], all_entries[thread]
    places, products, winners = all_places[thread], all_products[thread], all_winners[thread]
    values = all_values[thread]
    units = g.batch * len(blocks)
    unit = claim(counters, 2)
    while unit < units:
        b = unit // len(blocks)
        block = unit - b * len(blocks)
        row = blocks[block]
        origin = copy_origin(b, 0, 0, row.before, g, p)
        _zero_blocks(b, 0, 0, blocks, block, block + 1, grad_image, g, p)
        for place in range(starts[b], starts[b + 1]):
            r = order[place]
            box = box_of(boxes, r, g)
            if box[4] != SOUND:
                continue
            list_candidates(box, boxes, g, index, weights, entries)
            for i in range(len(bins)):
                py, px = bins[i].y, bins[i].x
                largest_of_bin(
                    box[4],
                    py,
                    px,
                    at(values, (0,)),
                    winners,
                    at(image, (origin,)),
                    row.width,
                    boxes,
                    g,
                    index,
                    weights,
                    entries,
                    places,
                    products,
                )
                is_short = entries[0, py] * entries[1, px] <= LISTED
                grad_place = _grad_place(r, 0, row.before, row.width, i, g, p)
                for c in range(row.channels):
                    winner = np.int64(winners[c])
                    if winner < 0:
                        continue
                    if not is_short:  # else all candidates are still there
                        list_part(py, px, winner, winner + 1, g, index, weights, entries, places, products)
                        winner = 0
                    grad = grads[grad_place + c]
                    if not g.points:
                        grad_image[origin + np.int64(places[winner]) * row.width + c] += grad
                    elif places[4 * winner] >= 0:
                        for k in range(4 * winner, 4 * winner + 4):
                            grad_image[origin + np.int64(places[k]) * row.width + c] += grad * products[0, k]
        _write_blocks(b, 0, 0, blocks, block, block + 1, grad_image, grad_input, g, p)
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, units)

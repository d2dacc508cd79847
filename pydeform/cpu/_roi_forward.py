"""Forward of every RoI operator: a unit of work is one box and class, and owns its outputs (eq. 5 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu import _roi_common, _roi_few, _threads
from pydeform.cpu._arrays import compute_dtype, empty, to_result, workspace
from pydeform.cpu._channels_last import to_channels_first
from pydeform.cpu._conv_common import pixel_dtype
from pydeform.cpu._jit import Kernel
from pydeform.cpu._roi_common import (
    LISTED,
    TILE,
    RoiPlan,
    bins_of,
    box_of,
    convert_image,
    copy_origin,
    entries_of,
    list_of_box,
    list_pixels,
    lists_of,
    scale_of,
    slices_of_class,
    slots_of,
)
from pydeform.cpu._roi_largest import largest_of_bin, list_candidates
from pydeform.cpu._simd import VECTOR_BYTES, at
from pydeform.cpu._simd_bands import BAND
from pydeform.cpu._simd_roi import plane_weighted_sum, weighted_sum
from pydeform.cpu._threads import claim, finish, wait_for


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    bins = bins_of(g)
    output = empty((g.boxes, g.out_channels, len(bins)), dtype)
    arguments = _roi_common.flat_arguments(input, boxes, offset, mask, g, dtype)
    if g.boxes and _roi_common.has_few_channels(g):
        _roi_few.forward(arguments, output, offset is not None, mask is not None, g)
    elif g.boxes:
        lanes = _roi_common.lanes_of(dtype)
        per_class = g.out_channels // g.classes
        planes = _roi_common.prefers_planes(g)
        channel_bytes = g.in_h * g.in_w * _roi_common.cells_of(g) * g.classes * dtype.itemsize
        slices, width = slices_of_class(per_class, lanes, 1 if planes else max(channel_bytes, 1))
        plan = RoiPlan(
            planes=int(planes),
            per_class=per_class,
            width=width,
            tile_bins=min(len(bins), max(lanes, TILE // width)),
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
        )
        threads = _roi_common.threads_for(g, 1, g.boxes * g.classes)
        corners = 4 if g.is_max and g.points else 1
        _threads.run(
            _largest if g.is_max else _mean,
            dtype.char + pixel_dtype(g).char,
            threads,
            _threads.new_counters(2 * len(slices)),
            *arguments,
            _roi_common.by_image(arguments[1], g.batch)[1],
            output,
            *workspace(
                ((0 if planes else _roi_common.copy_size(g, width),), dtype),
                ((threads, 0 if planes else plan.tile_bins, width), dtype),
                *_roi_common.lists_of_threads(threads, g, dtype),
                ((threads, corners * LISTED), pixel_dtype(g)),
                ((threads, 3, corners * LISTED), dtype),
                ((threads, width), np.dtype(f"i{dtype.itemsize}")),
            ),
            np.full(g.out_channels, -0.0, dtype),  # added to every output: +0.0 would change -0.0
            bins,
            slices,
            g,
            plan,
        )
    return to_result(output, input.dtype, (g.boxes, g.out_channels, g.pooled_h, g.pooled_w))


@Kernel
def _mean(
    thread: int,
    counters: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    starts: Any,
    output: Any,
    image: Any,
    tiles: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    no_shift: Any,
    bins: Any,
    slices: Any,
    g: Any,
    p: Any,
) -> None:
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products = all_places[thread], all_products[thread]
    one = output.dtype.type(1)
    cells = g.group_h * g.group_w
    units = g.boxes * g.classes
    for s in range(len(slices)):
        row = slices[s]
        if not p.planes:
            convert_image(counters, 2 * s, input, starts, image, slices[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 1)
        while unit < units:
            cls = unit // g.boxes  # class by class: all boxes read the same channels
            r = unit - cls * g.boxes
            b = np.int64(boxes[r, 0])
            channel = cls * p.per_class + row.first
            box = box_of(boxes, r, g)
            for bin0 in range(0, len(bins), p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, len(bins))
                step = BAND if p.has_offset else bin1 - bin0
                for chunk in range(bin0, bin1, step):
                    count = min(step, bin1 - chunk)
                    list_of_box(box, r, cls, chunk, count, boxes, offset, bins, lists, g, p, False)
                    for i in range(chunk, chunk + count):
                        bin_ = bins[i]
                        sy, sx, state = slots_of(bin_.y, bin_.x, i - chunk, box[4], lists, p)
                        scale = scale_of(state, sy, sx, boxes, lists, g)
                        if p.has_mask:
                            scale *= mask[r, i]
                        listed = entries_of(state, sy, sx, lists)
                        done, more = 0, False
                        while done < listed or not more:  # once at least: a bin that reads nothing has a value too
                            until = min(done + LISTED, listed)
                            if until > done:
                                list_pixels(sy, sx, done, until, g, lists, places, products)
                            factor = scale if until == listed else one
                            if p.planes:
                                for c in range(channel, channel + row.channels):
                                    plane_weighted_sum(
                                        at(output, (r, c, i)),
                                        at(input, (b, c * cells + bin_.cell, 0)),
                                        at(places, (0,)),
                                        at(products, (0, 0)),
                                        until - done,
                                        1,
                                        1,
                                        factor,
                                        more,
                                    )
                            else:
                                weighted_sum(
                                    at(tiles, (thread, i - bin0, 0)),
                                    at(image, (copy_origin(b, bin_.cell, cls, row.before, g, p),)),
                                    at(places, (0,)),
                                    at(products, (0, 0)),
                                    until - done,
                                    row.width,
                                    row.width * image.itemsize // VECTOR_BYTES,
                                    factor,
                                    more,
                                )
                            done, more = until, True
                if not p.planes:
                    to_channels_first(tiles[thread], output, r, channel, row.channels, bin0, bin1 - bin0, no_shift)
            finish(counters, 2 * s + 1)
            unit = claim(counters, 2 * s + 1)
        wait_for(counters, 2 * s + 1, units)


@Kernel
def _largest(
    thread: int,
    counters: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    starts: Any,
    output: Any,
    image: Any,
    tiles: Any,
    all_starts: Any,
    all_index: Any,
    all_weights: Any,
    all_counts: Any,
    all_entries: Any,
    all_places: Any,
    all_products: Any,
    all_winners: Any,
    no_shift: Any,
    bins: Any,
    slices: Any,
    g: Any,
    p: Any,
) -> None:
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products, winners = all_places[thread], all_products[thread], all_winners[thread]
    for s in range(len(slices)):
        row = slices[s]
        convert_image(counters, 2 * s, input, starts, image, slices[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 1)
        while unit < g.boxes:
            b = np.int64(boxes[unit, 0])
            box = box_of(boxes, unit, g)
            list_candidates(box, boxes, lists, g)
            for bin0 in range(0, len(bins), p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, len(bins))
                for i in range(bin0, bin1):
                    largest_of_bin(
                        box[4],
                        bins[i].y,
                        lists.of_axis + bins[i].x,
                        at(tiles, (thread, i - bin0, 0)),
                        winners,
                        at(image, (copy_origin(b, 0, 0, row.before, g, p),)),
                        row.width,
                        boxes,
                        lists,
                        g,
                        places,
                        products,
                    )
                to_channels_first(tiles[thread], output, unit, row.first, row.channels, bin0, bin1 - bin0, no_shift)
            finish(counters, 2 * s + 1)
            unit = claim(counters, 2 * s + 1)
        wait_for(counters, 2 * s + 1, g.boxes)

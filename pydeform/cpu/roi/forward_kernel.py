"""Forward of every RoI operator: a unit of work is one box and class, and owns its outputs (eq. 5 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.jit import Kernel
from pydeform.cpu.core.layout import to_channels_first
from pydeform.cpu.core.memory import compute_dtype, empty, to_result, workspace
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.planes import NO_PLANES, gather, is_as_computed, planes_of, reader_of, reader_parts
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at
from pydeform.cpu.core.sizes import pixel_dtype
from pydeform.cpu.core.weighted import weighted_sum
from pydeform.cpu.roi import common as roi_common
from pydeform.cpu.roi import few as roi_few
from pydeform.cpu.roi.common import (
    LISTED,
    SLICE_BYTES,
    TILE,
    RoiPlan,
    bin_after,
    bin_at,
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
from pydeform.cpu.roi.largest import largest_of_bin, list_candidates


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    bins = g.pooled_h * g.pooled_w
    output = empty((g.boxes, g.out_channels, bins), dtype)
    planes, few = roi_common.prefers_planes(g, dtype), roi_common.has_few_channels(g)
    planes = planes and not (few and is_as_computed(input, dtype))
    arguments = roi_common.flat_arguments(None if planes else input, boxes, offset, mask, g, dtype)
    if g.boxes and few:
        given = offset is not None, mask is not None
        roi_few.forward(arguments, planes_of(input) if planes else None, output, *given, g)
    elif g.boxes:
        lanes = roi_common.lanes_of(dtype)
        per_class = g.out_channels // g.classes
        channel_bytes = g.in_h * g.in_w * roi_common.cells_of(g) * g.classes * dtype.itemsize
        # Few channels at a time are gathered, so that a thread's pixels stay in its caches.
        slices, width = slices_of_class(per_class, lanes, SLICE_BYTES if planes else max(channel_bytes, 1))
        plan = RoiPlan(
            planes=int(planes),
            per_class=per_class,
            width=width,
            tile_bins=min(bins, max(lanes, TILE // width)),
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
        )
        threads = roi_common.threads_for(g, 1, planes, g.boxes * g.classes)
        corners = 4 if g.is_max and g.points else 1
        parallel.run(
            _largest if g.is_max else _mean,
            dtype.char + pixel_dtype(g.in_h * g.in_w).char,
            threads,
            parallel.new_counters(2 * len(slices)),
            *arguments,
            planes_of(input) if planes else NO_PLANES,
            roi_common.by_image(arguments[1], g.batch)[1],
            output,
            *workspace(
                ((0 if planes else roi_common.copy_size(g, width),), dtype),
                ((threads, plan.tile_bins, width), dtype),
                *roi_common.lists_of_threads(threads, g, arguments[1]),
                ((threads, corners * LISTED), pixel_dtype(g.in_h * g.in_w)),
                ((threads, 3, corners * LISTED), dtype),
                ((threads, width), np.dtype(f"i{dtype.itemsize}")),
                *reader_parts(threads, corners * LISTED * planes, width, pixel_dtype(g.in_h * g.in_w), dtype),
            ),
            np.full(g.out_channels, -0.0, dtype),  # added to every output: +0.0 would change -0.0
            bins_of(g),
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
    planes: Any,
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
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    no_shift: Any,
    bins: Any,
    slices: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products = all_places[thread], all_products[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    one = output.dtype.type(1)
    cells = g.group_h * g.group_w
    bins_of_box = g.pooled_h * g.pooled_w
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
            for bin0 in range(0, bins_of_box, p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, bins_of_box)
                chunk = bin0
                while chunk < bin1:
                    here, count = list_of_box(box, r, cls, chunk, bin1 - chunk, boxes, offset, bins, lists, g, p, False)
                    y = chunk // g.pooled_w
                    x = chunk - y * g.pooled_w
                    for i in range(chunk, chunk + count):
                        cell = bin_at(y, x, bins, g).cell
                        sy, sx, state = slots_of(y, x, i - chunk, box[4], here, p)
                        y, x = bin_after(y, x, g)
                        scale = scale_of(state, sy, sx, boxes, here, g)
                        if p.has_mask:
                            scale *= mask[r, i]
                        listed = entries_of(state, sy, sx, here)
                        done, more = 0, False
                        while done < listed or not more:  # once at least: a bin that reads nothing has a value too
                            until = min(done + LISTED, listed)
                            index, pixels = at(places, (0,)), at(image, (0,))
                            if until > done:
                                list_pixels(sy, sx, done, until, g, here, places, products)
                            if p.planes:
                                first = channel * cells + cell
                                gather(reader, b, first, cells, row.channels, row.width, places, until - done, g.in_w)
                                index, pixels = reader.own, reader.pixels
                            else:
                                pixels = advance(pixels, copy_origin(b, cell, cls, row.before, g, p))
                            weighted_sum(
                                at(tiles, (thread, i - bin0, 0)),
                                pixels,
                                index,
                                at(products, (0, 0)),
                                until - done,
                                row.width,
                                row.width * image.itemsize // VECTOR_BYTES,
                                scale if until == listed else one,
                                more,
                            )
                            done, more = until, True
                    chunk += count
                to_channels_first(tiles[thread], output, r, channel, row.channels, bin0, bin1 - bin0, no_shift)
            finish(counters, 2 * s + 1)
            unit = claim(counters, 2 * s + 1)
        wait_for(counters, 2 * s + 1, units)
    let_helpers_go(thread, counters)


@Kernel
def _largest(
    thread: int,
    counters: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    planes: Any,
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
    all_own: Any,
    all_offsets: Any,
    all_pixels: Any,
    no_shift: Any,
    bins: Any,
    slices: Any,
    g: Any,
    p: Any,
) -> None:
    call_helpers(thread, counters)
    lists = lists_of(thread, all_starts, all_index, all_weights, all_counts, all_entries)
    places, products, winners = all_places[thread], all_products[thread], all_winners[thread]
    reader = reader_of(thread, planes, all_own, all_offsets, all_pixels)
    bins_of_box = g.pooled_h * g.pooled_w
    for s in range(len(slices)):
        row = slices[s]
        if not p.planes:
            convert_image(counters, 2 * s, input, starts, image, slices[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 1)
        while unit < g.boxes:
            b = np.int64(boxes[unit, 0])
            box = box_of(boxes, unit, g)
            here, listed = lists, 0  # bins before number `listed` have their candidates in `here`, the latest of them
            y, x = 0, 0
            for bin0 in range(0, bins_of_box, p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, bins_of_box)
                for i in range(bin0, bin1):
                    if i == listed:
                        here, count = list_candidates(box, i, boxes, lists, g)
                        listed += count
                    largest_of_bin(
                        box[4],
                        y,
                        here.of_axis + x,
                        at(tiles, (thread, i - bin0, 0)),
                        winners,
                        at(image, (copy_origin(b, 0, 0, row.before, g, p) * (1 - p.planes),)),
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
                    y, x = bin_after(y, x, g)
                to_channels_first(tiles[thread], output, unit, row.first, row.channels, bin0, bin1 - bin0, no_shift)
            finish(counters, 2 * s + 1)
            unit = claim(counters, 2 * s + 1)
        wait_for(counters, 2 * s + 1, g.boxes)
    let_helpers_go(thread, counters)

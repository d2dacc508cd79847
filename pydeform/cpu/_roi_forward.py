"""Forward of every RoI operator: a unit of work is one box and class, and owns its outputs (eq. 5 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu import _roi_common, _threads
from pydeform.cpu._arrays import compute_dtype, empty, to_result, workspace
from pydeform.cpu._channels_last import to_channels_first
from pydeform.cpu._conv_common import pixel_dtype
from pydeform.cpu._jit import Kernel
from pydeform.cpu._roi_bins import SOUND
from pydeform.cpu._roi_common import (
    LISTED,
    TILE,
    RoiPlan,
    bins_of,
    box_of,
    convert_image,
    copy_origin,
    is_run,
    list_box,
    list_moved,
    list_pixels,
    scale_of,
    slices_of_class,
)
from pydeform.cpu._roi_largest import largest_of_bin, list_candidates
from pydeform.cpu._simd import VECTOR_BYTES, at
from pydeform.cpu._simd_roi import BAND, band_sum, plane_weighted_sum, weighted_sum
from pydeform.cpu._threads import claim, finish, wait_for


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    bins = bins_of(g)
    output = empty((g.boxes, g.out_channels, len(bins)), dtype)
    if g.boxes:
        lanes = _roi_common.lanes_of(dtype)
        per_class = g.out_channels // g.classes
        planes = bool(_roi_common.prefers_planes(g) and not g.is_max)
        channel_bytes = g.in_h * g.in_w * _roi_common.cells_of(g) * g.classes * dtype.itemsize
        slices, width = slices_of_class(per_class, lanes, 1 if planes else max(channel_bytes, 1))
        plan = RoiPlan(
            planes=int(planes),
            bands=int(per_class < _roi_common.FEW_CHANNELS),
            per_class=per_class,
            width=width,
            tile_bins=min(len(bins), max(lanes, TILE // width)),
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
        )
        arguments = _roi_common.flat_arguments(input, boxes, offset, mask, g, dtype)
        threads = min(_roi_common.threads_for(g, 1), g.boxes * g.classes)
        most_bins, most_listed = max(g.pooled_h, g.pooled_w), _roi_common.most_listed(g)
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
                ((threads, 2, most_bins, most_listed), pixel_dtype(g)),
                ((threads, 2, most_bins, 2, most_listed), dtype),
                ((threads, 2, most_bins), dtype),
                ((threads, 2, most_bins), np.dtype(np.int64)),
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
    index, weights, counts, entries = all_index[thread], all_weights[thread], all_counts[thread], all_entries[thread]
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
            if not p.has_offset:
                list_box(box, boxes, (0, 0), (g.pooled_h, g.pooled_w), g, index, weights, counts, entries, False)
            for bin0 in range(0, len(bins), p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, len(bins))
                for i in range(bin0, bin1):
                    bin_ = bins[i]
                    py, px = bin_.y, bin_.x
                    state = box[4]
                    if p.has_offset:
                        state = list_moved(box, r, cls, bin_, offset, boxes, g, index, weights, counts, entries, False)
                    scale = scale_of(state, py, px, boxes, g, counts)
                    if p.has_mask:
                        scale *= mask[r, i]
                    listed = entries[0, py] * entries[1, px] if state == SOUND else 0
                    if p.bands and listed > 0 and is_run(px, index, entries):
                        for c in range(channel, channel + row.channels):
                            total = output.dtype.type(0)
                            for k in range(0, entries[1, px], BAND):
                                total += band_sum(
                                    at(input, (b, c * cells + bin_.cell, index[1, px, k])),
                                    at(index, (0, py, 0)),
                                    at(weights, (0, py, 0, 0)),
                                    entries[0, py],
                                    g.in_w,
                                    g.in_h * g.in_w - index[1, px, k],
                                    at(weights, (1, px, 0, k)),
                                    min(BAND, entries[1, px] - k),
                                )
                            output[r, c, i] = total * scale
                        continue
                    first, more = 0, False
                    while first < listed or not more:  # once at least: a bin that reads nothing has a value too
                        last = min(first + LISTED, listed)
                        if last > first:
                            list_pixels(py, px, first, last, g, index, weights, entries, places, products)
                        factor = scale if last == listed else one
                        if p.planes:
                            for c in range(channel, channel + row.channels):
                                plane_weighted_sum(
                                    at(output, (r, c, i)),
                                    at(input, (b, c * cells + bin_.cell, 0)),
                                    at(places, (0,)),
                                    at(products, (0, 0)),
                                    last - first,
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
                                last - first,
                                row.width,
                                row.width * image.itemsize // VECTOR_BYTES,
                                factor,
                                more,
                            )
                        first, more = last, True
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
    index, weights, entries = all_index[thread], all_weights[thread], all_entries[thread]
    places, products, winners = all_places[thread], all_products[thread], all_winners[thread]
    for s in range(len(slices)):
        row = slices[s]
        convert_image(counters, 2 * s, input, starts, image, slices[s : s + 1], g, p)
        unit = claim(counters, 2 * s + 1)
        while unit < g.boxes:
            b = np.int64(boxes[unit, 0])
            box = box_of(boxes, unit, g)
            list_candidates(box, boxes, g, index, weights, entries)
            for bin0 in range(0, len(bins), p.tile_bins):
                bin1 = min(bin0 + p.tile_bins, len(bins))
                for i in range(bin0, bin1):
                    largest_of_bin(
                        box[4],
                        bins[i].y,
                        bins[i].x,
                        at(tiles, (thread, i - bin0, 0)),
                        winners,
                        at(image, (copy_origin(b, 0, 0, row.before, g, p),)),
                        row.width,
                        boxes,
                        g,
                        index,
                        weights,
                        entries,
                        places,
                        products,
                    )
                to_channels_first(tiles[thread], output, unit, row.first, row.channels, bin0, bin1 - bin0, no_shift)
            finish(counters, 2 * s + 1)
            unit = claim(counters, 2 * s + 1)
        wait_for(counters, 2 * s + 1, g.boxes)

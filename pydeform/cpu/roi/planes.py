"""Means over bins where a class has few channels, in planes as they lie, forward and backward (eq. 5 to 9).

A unit of work goes plane by plane, in each through all boxes of its image: so its pixels stay in the nearest cache.
Columns that are neighbours are read and written as one vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.bands import BAND, Band, band_dots, band_scatter, band_sum
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.planes import gather, gather_band
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.weighted import Pixels, plane_scatter, plane_weighted_dots, plane_weighted_sum
from pydeform.cpu.roi.boxes import find_boxes
from pydeform.cpu.roi.copies import Channels, input_channel
from pydeform.cpu.roi.lists import (
    Cursor,
    after,
    bin_of,
    bins_in,
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
from pydeform.cpu.roi.plan import LISTED, cells_of, planes_plan, run, threads_for
from pydeform.cpu.roi.records import Kind


class Task(NamedTuple):
    """What is to be done with each bin: the one field that is not None. So each task is compiled by itself."""

    output: Any  # eq. 5 and 6 are written there
    added: Any  # `Gradients`: eq. 7 is added to the input's
    dotted: Any  # `Gradients`: eq. 8 and 9 are written to `moves` and `mask`


def forward(given: Any, output: Any, kind: Kind) -> None:
    g = kind.g
    run(_planes, planes_plan, kind, threads_for(g, 1, True, g.boxes * cells_of(g) * g.classes), given, output)


def backward(given: Any, grads: Any, kind: Kind) -> None:
    g = kind.g
    units = (g.batch * kind.need_input + g.boxes * kind.need_dots) * cells_of(g) * g.classes
    run(_planes_backward, planes_plan, kind, threads_for(g, 1 + 2 * kind.need_dots, True, units), given, grads)


@Kernel
def _planes(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    unit = claim(counters, 1)
    while unit < p.units:
        _do_unit(thread, unit, Task(output, None, None), given, scratch, tables.bins, g, p)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, p.units)
    let_helpers_go(thread, counters)


@Kernel
def _planes_backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    find_boxes(counters, 0, given.boxes, scratch, g)
    scattering = p.units * p.need_input
    units = scattering + p.units * p.need_dots
    unit = claim(counters, 1)
    while unit < units:
        if unit < scattering:
            _do_unit(thread, unit, Task(None, grads, None), given, scratch, tables.bins, g, p)
        else:
            _do_unit(thread, unit - scattering, Task(None, None, grads), given, scratch, tables.bins, g, p)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, units)
    let_helpers_go(thread, counters)


@inline
def _do_unit(thread: int, unit: int, task: Any, given: Any, scratch: Any, bins: Any, g: Any, p: Any) -> None:
    """Some planes one after the other, or parts of the boxes that read a plane. Where boxes add to a plane it is not
    parted: all boxes of its image add to it in one unit."""
    lists, cells = lists_of(thread, given, scratch), g.group_h * g.group_w
    is_sloped = task.dotted is not None
    parts = p.parts if task.added is None else 1
    pieces = g.batch * g.classes * cells * parts
    for piece in range(pieces * unit // p.units, pieces * (unit + 1) // p.units):
        plane, part = piece // parts, piece % parts
        image = plane // cells
        channels = Channels(image // g.classes, plane - image * cells, image % g.classes)
        start = given.starts[channels.b]
        n = given.starts[channels.b + 1] - start
        span = span_of_cell(channels.cell, channels.cls, is_sloped, g)
        cursor = Cursor(start + n * part // parts, span.first[0], span.first[1])
        left = (start + n * (part + 1) // parts - cursor.place) * bins_in(span)
        while left > 0:
            here, count = list_bins(cursor, left, span, lists, given.offset, bins, g, p)
            for slot in range(count):
                bin_ = bin_of(cursor, slot, here, g, p)
                cursor = after(cursor, span)
                if task.output is not None:
                    _mean_of_bin(bin_, channels, task.output, here, given.input, given.mask, g, p)
                elif task.added is not None:
                    _add_to_planes(bin_, channels, task.added, here, given.mask, g, p)
                else:
                    sums = _dots_of_bin(bin_, channels, task.dotted.output, here, given.input, g, p)
                    scale = scale_of(bin_, here, given.mask, g)
                    write_moves(bin_, channels.cls, sums, scale, given.mask, task.dotted, scratch.extents, g, p)
            left -= count


@inline_always
def _is_run(bin_: Any, here: Any) -> bool:
    """Whether a bin reads columns that are neighbours."""
    if here.turns is not None:
        return False
    n, columns = here.entries[bin_.sx], advance(here.index, bin_.sx * here.row)
    return bin_.listed > 0 and columns[n - 1] - columns[0] == n - 1


@inline_always
def _axis(slot: int, here: Any) -> tuple[Any, Any, Any, int]:
    """What a bin reads on an axis: pixels, their weights and derivatives, and how many."""
    weights = advance(here.weights, 2 * slot * here.row)
    return advance(here.index, slot * here.row), weights, advance(weights, here.row), here.entries[slot]


@inline_always
def _band_of(b: int, channel: int, x: int, columns: int, bin_: Any, here: Any, input: Any, g: Any, p: Any) -> Band:
    """A bin's columns from x on."""
    rows, _, _, count = _axis(bin_.sy, here)
    if p.gathers:
        gather_band(here.reader, b, channel, rows, count, x, columns, BAND)
        return Band(here.reader.pixels, here.reader.own, count, BAND, count * BAND, columns)
    return Band(at(input, (b, channel, x)), rows, count, g.in_w, g.in_h * g.in_w - x, columns)


@inline_always
def _listed_of(b: int, channel: int, count: int, here: Any, input: Any, g: Any, p: Any) -> tuple[Any, Any]:
    """A plane, and where in it the listed pixels are."""
    if p.gathers:
        gather(here.reader, b, channel, 1, 1, 1, here.places, count, g.in_w)
        return here.reader.pixels, here.reader.own
    return at(input, (b, channel, 0)), here.places


@inline_always
def _mean_of_bin(bin_: Any, channels: Any, output: Any, here: Any, input: Any, mask: Any, g: Any, p: Any) -> None:
    b, r, i, first = channels.b, bin_.r, bin_.i, channels.cls * p.per_class
    scale, one = masked_scale(bin_, here, mask, g, p), output.dtype.type(1)
    is_band = _is_run(bin_, here)
    x, x_weights, _, columns = _axis(bin_.sx, here)
    _, y_weights, _, _ = _axis(bin_.sy, here)
    for c in range(p.per_class):
        total, channel = output.dtype.type(0), input_channel(channels, c, g, p)
        for k in range(0, columns if is_band else 0, BAND):
            width = min(BAND, columns - k)
            band = _band_of(b, channel, np.int64(x[k]), width, bin_, here, input, g, p)
            total += band_sum(band, y_weights, advance(x_weights, k))
        output[r, first + c, i] = total * scale
    done = 0
    while not is_band and done < bin_.listed:
        count, stop = list_pixels(bin_, done, here, g)
        factor = scale if stop == bin_.listed else one
        for c in range(p.per_class):
            pixels, index = _listed_of(b, input_channel(channels, c, g, p), count, here, input, g, p)
            target = at(output, (r, first + c, i))
            plane_weighted_sum(target, Pixels(pixels, index, here.products, count, 1), 1, factor, done > 0)
        done = stop


@inline_always
def _add_to_planes(bin_: Any, channels: Any, grads: Any, here: Any, mask: Any, g: Any, p: Any) -> None:
    if bin_.listed == 0:
        return
    b, r, i, first = channels.b, bin_.r, bin_.i, channels.cls * p.per_class
    scale, is_band = masked_scale(bin_, here, mask, g, p), _is_run(bin_, here)
    x, x_weights, _, columns = _axis(bin_.sx, here)
    rows, y_weights, _, count = _axis(bin_.sy, here)
    for c in range(p.per_class):
        channel = input_channel(channels, c, g, p)
        for k in range(0, columns if is_band else 0, BAND):
            target, room = at(grads.input, (b, channel, np.int64(x[k]))), g.in_h * g.in_w - x[k]
            band = Band(target, rows, count, g.in_w, room, min(BAND, columns - k))
            band_scatter(band, y_weights, advance(x_weights, k), grads.output[r, first + c, i] * scale)
    done = 0
    while not is_band and done < bin_.listed:
        pixels, done = list_pixels(bin_, done, here, g)
        for c in range(p.per_class):
            target = at(grads.input, (b, input_channel(channels, c, g, p), 0))
            grad = at(grads.output, (r, first + c, i))
            plane_scatter(grad, target, here.places, here.products, pixels, 1, 1, scale)


@inline_always
def _dots_of_bin(
    bin_: Any, channels: Any, grad_output: Any, here: Any, input: Any, g: Any, p: Any
) -> tuple[Any, Any, Any]:
    """Sums of values, and of slopes along y and x, times the output's gradient."""
    b, r, i, first = channels.b, bin_.r, bin_.i, channels.cls * p.per_class
    value = along_y = along_x = grad_output.dtype.type(0)
    is_band = _is_run(bin_, here)
    x, x_weights, x_slopes, columns = _axis(bin_.sx, here)
    _, y_weights, y_slopes, _ = _axis(bin_.sy, here)
    for c in range(p.per_class):
        grad, channel = grad_output[r, first + c, i], input_channel(channels, c, g, p)
        for k in range(0, columns if is_band else 0, BAND):
            width = min(BAND, columns - k)
            band = _band_of(b, channel, np.int64(x[k]), width, bin_, here, input, g, p)
            dots = band_dots(band, y_weights, y_slopes, advance(x_weights, k), advance(x_slopes, k))
            value, along_y, along_x = value + dots[0] * grad, along_y + dots[1] * grad, along_x + dots[2] * grad
    for done in range(0, 0 if is_band else bin_.listed, LISTED):
        stop = min(done + LISTED, bin_.listed)
        list_pixels(bin_, done, here, g)
        list_slopes(bin_, done, stop, here)
        for c in range(p.per_class):
            pixels, index = _listed_of(b, input_channel(channels, c, g, p), stop - done, here, input, g, p)
            listed = Pixels(pixels, index, products_of(here), stop - done, 1)
            dots = plane_weighted_dots(at(grad_output, (r, first + c, i)), listed, 1)
            value, along_y, along_x = value + dots[0], along_y + dots[1], along_x + dots[2]
    return value, along_y, along_x

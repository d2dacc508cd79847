"""Forward of a convolution with or without offsets (eq. 1): a tile of columns is sampled into cache and multiplied."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pydeform.cpu.conv.columns import blend_columns, copy_columns, gather_columns
from pydeform.cpu.conv.depthwise import multiply_channels, pack_depthwise
from pydeform.cpu.conv.forward_plan import PAIRS_ROW, ROW, Scratch, prepared
from pydeform.cpu.conv.plan import given_arrays, is_shared, numbers_of, threads_for
from pydeform.cpu.conv.weights import pack_forward
from pydeform.cpu.core import parallel
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.layout import pixel_parts, to_channels_first, to_channels_last
from pydeform.cpu.core.memory import compute_dtype, empty, to_result
from pydeform.cpu.core.pair_products import (
    begin_products,
    end_products,
    multiply_narrow,
    multiply_tile,
    multiply_wide,
    pick,
    put,
)
from pydeform.cpu.core.parallel import call_helpers, claim_near, finish, let_helpers_go, wait_for
from pydeform.cpu.core.product import PANEL, ROWS
from pydeform.cpu.core.simd import advance, at, fetch_ahead
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.sampling.corners import (
    blend_infinite,
    is_any_infinite,
    locate_tap,
    samples_of,
    tile_origins,
)


def forward(arrays: Any, g: Any) -> Any:
    data, offset = arrays.input.dtype, arrays.offset
    dtype = compute_dtype(data)
    output = empty((g.batch, g.out_channels, math.prod(g.out_size)), dtype)
    if output.size:
        threads = threads_for(g, 1, g.batch * -(-math.prod(g.out_size) // (4 * ROWS)))
        numbers = numbers_of(data, g)
        has_mask = arrays.mask is not None
        how = prepared(g, dtype, numbers, threads, offset is not None, has_mask, is_shared(offset))
        own = how.workspace.take()
        parallel.run(
            _forward,
            how.key,
            how.threads,
            parallel.new_counters(2),
            given_arrays(arrays, g, dtype, how.planes, how.plan.positions),
            output,
            Scratch(*own),
            how.tables,
            g,
            how.plan,
        )
        how.workspace.give_back(own)
    return to_result(output, data, (g.batch, g.out_channels, *g.out_size))


class Tile(NamedTuple):
    """Positions start to start + positions of one image, and the thread whose memory they are computed in."""

    thread: int
    image: int
    start: int
    positions: int


@Kernel
def _forward(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """A kernel is compiled without what those would take that are None: given.input or given.planes, given.offset in a
    plain convolution, and tables.depthwise where it is not."""
    call_helpers(thread, counters)
    _prepare_forward(thread, counters, given, scratch, tables, g, p)
    # Phase 1: every unit is one tile of positions of one image, and owns its outputs.
    units = g.batch * p.tiles
    begin_products(at(scratch.columns, (0, 0, 0)))
    unit = claim_near(counters, 1, thread, units)
    while unit < units:
        image = unit // p.tiles
        start = (unit - image * p.tiles) * p.positions
        tile = Tile(thread, image, start, min(p.positions, volume(g.out_size) - start))
        _compute_tile(tile, given, output, scratch, tables, g, p)
        finish(counters, 1)
        unit = claim_near(counters, 1, thread, units)
    end_products(at(scratch.columns, (0, 0, 0)))
    wait_for(counters, 1, units)
    let_helpers_go(thread, counters)


@inline
def _prepare_forward(thread: int, counters: Any, given: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Phase 0: the image to channels-last, the weight into panels."""
    taps, pixels = volume(g.kernel), volume(g.in_size)
    parts = pixel_parts(pixels)
    converting = g.batch * parts if given.planes is None else 0
    packs = p.panels if tables.depthwise is None else 1  # of a block
    units = converting + len(tables.blocks) * packs
    unit = claim_near(counters, 0, thread, units)
    while unit < units:
        if unit >= converting:
            number = (unit - converting) // packs
            first = number * taps
            if tables.depthwise is None:
                panel, squares = unit - converting - number * packs, at(scratch.squares, (thread, 0))
                pack_forward(given.weight, scratch.packed, squares, tables.entries, tables.chunks, first, panel)
            else:
                for e in range(first, first + taps):
                    entry = tables.entries[e]
                    start = tables.chunks[entry.chunk].packed_at
                    pack_depthwise(given.weight, scratch.packed, entry.channel, entry.channels, entry.tap, start)
        elif given.planes is None:
            b, part = unit // parts, unit % parts
            for number in range(len(tables.blocks)):
                channel, channels = tables.blocks[number].channel, tables.blocks[number].channels
                origin = (b * g.in_channels + channel) * (pixels + 1)
                to_channels_last(given.input, b, channel, 1, scratch.image, origin, channels, channels, part, pixels)
        finish(counters, 0)
        unit = claim_near(counters, 0, thread, units)
    wait_for(counters, 0, units)


@inline
def _compute_tile(tile: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    sum_row = scratch.sums.shape[2]
    panel = sum_row // p.panels
    columns, sums = at(scratch.columns, (tile.thread, 0, 0)), at(scratch.sums, (tile.thread, 0, 0))
    tile_origins(tile.start, tile.positions, samples_of(tile.thread, scratch), g)
    for chunk in range(len(tables.chunks)):
        product = tables.chunks[chunk]
        add = product.is_first == 0
        _sample_chunk(tile, product, given, scratch, tables, g, p)
        if tables.depthwise is not None:
            scale = at(scratch.packed, (product.packed_at,))
            multiply_channels(columns, scale, sums, sum_row, tile.positions, product.outs, add)
        else:
            for j in range(p.panels):
                weights = at(scratch.packed, (product.packed_at + j * product.depth * panel,))
                target, outs = advance(sums, j * panel), product.outs - j * panel
                _multiply_panel(columns, weights, target, sum_row, add, tile.positions, product.depth, outs, p)
        if product.is_last:
            to_channels_first(
                scratch.sums[tile.thread],
                output,
                tile.image,
                product.first_out,
                product.outs,
                tile.start,
                tile.positions,
                given.bias,
            )


@inline
def _sample_chunk(tile: Any, product: Any, given: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """The columns of one chunk of entries."""
    nothing, has_mask = given.bias.dtype.type(0), p.has_mask != 0
    thread, b, start, count = tile
    samples, axes = samples_of(thread, scratch), tables.axes
    row = pick(at(scratch.columns, (0, 0, 0)), ROW, PAIRS_ROW)
    at_tap, at_group, masks = -1, -1, at(given.mask, (0, 0, 0, 0))
    for e in range(product.first_entry, product.last_entry):
        entry = tables.entries[e]
        if entry.tap != at_tap or entry.og != at_group:
            at_tap, at_group = entry.tap, entry.og
            if has_mask:
                masks = at(given.mask, (b, at_group, at_tap, start))
            first = b * p.offset_step, at_group, at_tap, 0, start * p.offset_step
            locate_tap(given.offset, first, masks, at_tap, count, samples, g)
        channels = entry.channels
        columns = at(scratch.columns, (thread, 0, entry.column))
        if given.planes is None:
            source = at(scratch.image, ((b * g.in_channels + entry.channel) * (volume(g.in_size) + 1),))
            if given.offset is None:
                copy_columns(columns, row, source, samples, count, channels)
            else:
                blend_columns(columns, row, source, samples, count, channels, axes)
                if has_mask and is_any_infinite(masks, count):
                    blend_infinite(columns, row, source, masks, count, channels, samples, axes)
        else:
            gather_columns(given.planes, tile, entry, samples, masks, scratch, columns, axes, g)
        if entry.width > channels:  # what stands there may be no number, and its weights are zeros
            for i in range(count):
                for k in range(channels, entry.width):
                    put(columns, i * row + k, nothing)


@inline
def _multiply_panel(
    columns: Any, weights: Any, sums: Any, sum_row: int, add: bool, count: int, depth: int, outs: int, p: Any
) -> None:
    """sums[i, o] (+)= sum_k columns[i, k] * weights[k, o] of a panel: all its vectors at once, or those that have some
    of the `outs` outputs, two and one at a time."""
    row = pick(columns, ROW, PAIRS_ROW)
    panel = sum_row // p.panels
    lanes = panel // PANEL
    if outs > panel - lanes:
        for i in range(0, count, p.wide_rows):
            following = advance(weights, depth * panel + i // p.wide_rows * p.ahead)
            fetch_ahead(following, p.ahead_lines)
            multiply_wide(
                advance(columns, i * row), row, 1, weights, panel, depth, advance(sums, i * sum_row), sum_row, add
            )
        return
    vectors = -(-outs // lanes)
    if PANEL > 2 and vectors > 1:
        for i in range(0, count, p.rows):
            multiply_tile(
                advance(columns, i * row), row, 1, weights, panel, depth, advance(sums, i * sum_row), sum_row, add
            )
    if vectors % 2:
        last = (vectors - 1) * lanes
        for i in range(0, count, p.narrow_rows):
            multiply_narrow(
                advance(columns, i * row),
                row,
                1,
                advance(weights, last * pick(columns, 1, 2)),
                panel,
                depth,
                advance(sums, i * sum_row + last),
                sum_row,
                add,
            )

"""Forward of a convolution with or without offsets (eq. 1): a tile of columns is sampled into cache and multiplied."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from pydeform.cpu import _conv_common, _threads
from pydeform.cpu._arrays import compute_dtype, empty, to_result, workspace
from pydeform.cpu._channels_last import pixel_parts, to_channels_first, to_channels_last
from pydeform.cpu._conv_common import (
    CHANNELS,
    INT32,
    channel_blocks,
    channels_last_size,
    corners_size,
    flat_arguments,
    is_depthwise,
    is_small,
    period_of,
    prefers_planes,
    repeated,
    round_up,
    table,
    threads_for,
)
from pydeform.cpu._jit import Kernel, inline
from pydeform.cpu._planes import NO_PLANES, gather_corners, planes_of
from pydeform.cpu._sampling import blend_infinite, infinite_sample, locate_tap, lowest_coordinate, tile_origins
from pydeform.cpu._simd import ROWS, VECTOR_BYTES, advance, at, blend, multiply_tile
from pydeform.cpu._threads import claim, finish, wait_for

# Sizes that keep a tile's columns in the second-level cache and a panel of weights in the first.
POSITIONS = 96
DEPTH = 256  # of one product


class ForwardPlan(NamedTuple):
    """How one forward problem is cut up."""

    positions: int  # of a tile
    tiles: int  # of an image
    panels: int  # of 2 vectors of output channels
    row: int  # elements of a row of columns
    depthwise: int
    planes: int  # 1: corners are gathered from the input as it lies; 0: a copy with channels last is made
    has_offset: int
    has_mask: int


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    output = empty((g.batch, g.out_channels, g.out_h * g.out_w), dtype)
    if output.size:
        pixel_dtype = _conv_common.pixel_dtype(g)
        lanes = VECTOR_BYTES // dtype.itemsize
        blocks, entries, chunks, depth, panels, packed_size = _forward_steps(g, 2 * lanes)
        planes = prefers_planes(g)
        positions = out_positions = g.out_h * g.out_w
        threads = threads_for(g, 1, g.batch * -(-positions // (4 * ROWS)))
        tiles = -(-positions // POSITIONS)
        if threads > 1:  # enough tiles for all; no sum depends on where a tile ends
            tiles = max(tiles, min(-(-4 * threads // g.batch), -(-positions // (4 * ROWS))))
        positions = round_up(-(-out_positions // tiles), ROWS)
        plan = ForwardPlan(
            positions=positions,
            tiles=-(-out_positions // positions),
            panels=panels,
            depthwise=int(is_depthwise(g)),
            planes=int(planes),
            row=depth + lanes,
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
        )
        threads = min(threads, g.batch * plan.tiles)
        _threads.run(
            _forward,
            dtype.char + pixel_dtype.char,
            threads,
            _threads.new_counters(2),
            *flat_arguments(None if planes else input, offset, weight, bias, mask, g, dtype),
            planes_of(input) if planes else NO_PLANES,
            output,
            *workspace(
                ((0 if planes else channels_last_size(g) + lanes,), dtype),
                ((packed_size,), dtype),
                ((threads, positions, plan.row), dtype),
                ((threads, positions, panels * 2 * lanes), dtype),
                ((threads, 4, positions), pixel_dtype),
                ((threads, 6, positions), dtype),
                ((threads, 2, positions), INT32),
                ((threads, corners_size(blocks) if planes else 0), dtype),
            ),
            blocks,
            entries,
            chunks,
            g,
            plan,
        )
    return to_result(output, input.dtype, (g.batch, g.out_channels, g.out_h, g.out_w))


@Kernel
def _forward(
    thread: int,
    counters: Any,
    input: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    planes: Any,
    output: Any,
    image: Any,
    packed: Any,
    columns: Any,
    sums: Any,
    corners: Any,
    weights: Any,
    bases: Any,
    all_pixels: Any,
    blocks: Any,
    entries: Any,
    chunks: Any,
    g: Any,
    p: Any,
) -> None:
    # Phase 0: the image to channels-last, the weight into panels.
    parts = pixel_parts(g.in_h * g.in_w)
    converting = 0 if p.planes else g.batch * parts
    preparing = converting + len(chunks) * p.panels
    unit = claim(counters, 0)
    while unit < preparing:
        if unit < converting:
            b = unit // parts
            for block in range(len(blocks)):
                channel, channels = blocks[block].channel, blocks[block].channels
                origin = (b * g.in_channels + channel) * (g.in_h * g.in_w + 1)
                to_channels_last(input, b, channel, 1, image, origin, channels, channels, unit % parts, g.in_h * g.in_w)
        else:
            _pack_forward(
                weight, packed, entries, chunks[(unit - converting) // p.panels], (unit - converting) % p.panels, p
            )
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, preparing)

    # Phase 1: every unit is one tile of positions of one image, and owns its outputs.
    low = lowest_coordinate(g.boundary, bias)
    has_offset, has_mask = p.has_offset != 0, p.has_mask != 0
    length = g.out_h * g.out_w
    pixels = g.in_h * g.in_w + 1
    tile_columns = columns[thread]
    tile_sums = sums[thread]
    corner = corners[thread]
    blending = weights[thread]
    base = bases[thread]
    gathered = at(all_pixels, (thread, 0))
    panel = sums.shape[2] // p.panels
    unit = claim(counters, 1)
    while unit < g.batch * p.tiles:
        b = unit // p.tiles
        start = (unit - b * p.tiles) * p.positions
        count = min(p.positions, length - start)
        tile_origins(start, count, base, g)
        at_tap, at_group, is_infinite = -1, -1, False
        for chunk in range(len(chunks)):
            product = chunks[chunk]
            depth = product.depth
            for e in range(product.first_entry, product.last_entry):
                entry = entries[e]
                if entry.tap != at_tap or entry.og != at_group:
                    at_tap, at_group = entry.tap, entry.og
                    is_infinite = locate_tap(
                        offset,
                        mask,
                        b,
                        at_group,
                        at_tap,
                        start,
                        count,
                        low,
                        base,
                        corner,
                        blending,
                        g,
                        has_offset,
                        has_mask,
                    )
                channels, column = entry.channels, entry.column
                vectors = -(-channels * image.itemsize // VECTOR_BYTES)
                if p.planes:
                    _gather_columns(
                        planes,
                        b,
                        entry.channel,
                        channels,
                        corner,
                        blending,
                        at(mask, (b, at_group, at_tap, start)),
                        is_infinite,
                        count,
                        gathered,
                        at(tile_columns, (0, column)),
                        p.row,
                        g,
                    )
                    continue
                source = at(image, ((b * g.in_channels + entry.channel) * pixels,))
                for i in range(count):
                    blend(
                        at(tile_columns, (i, column)),
                        source,
                        corner[0, i] * channels,
                        corner[1, i] * channels,
                        corner[2, i] * channels,
                        corner[3, i] * channels,
                        blending[0, i],
                        blending[1, i],
                        blending[2, i],
                        blending[3, i],
                        vectors,
                    )
                if is_infinite:
                    here = at(mask, (b, at_group, at_tap, start))
                    blend_infinite(
                        at(tile_columns, (0, column)), p.row, source, corner, blending, here, count, channels
                    )
            if p.depthwise:
                for e in range(product.first_entry, product.last_entry):
                    column = entries[e].column
                    _multiply_channels(
                        at(tile_columns, (0, column)),
                        p.row,
                        at(packed, (product.packed_at + column,)),
                        at(tile_sums, (0, 0)),
                        p.panels * panel,
                        count,
                        entries[e].channels,
                        product.is_first == 0 or e > product.first_entry,
                    )
            else:
                for j in range(p.panels):
                    for i in range(0, count, ROWS):
                        multiply_tile(
                            at(tile_columns, (i, 0)),
                            p.row,
                            1,
                            at(packed, (product.packed_at + j * depth * panel,)),
                            panel,
                            depth,
                            at(tile_sums, (i, j * panel)),
                            p.panels * panel,
                            product.is_first == 0,
                        )
            if product.is_last:
                to_channels_first(tile_sums, output, b, product.first_out, product.outs, start, count, bias)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, g.batch * p.tiles)


@inline
def _multiply_channels(
    columns: Any, column_row: int, scale: Any, sums: Any, sum_row: int, count: int, channels: int, add: bool
) -> None:
    """sums[i, c] (+)= columns[i, c] * scale[c]: one tap of a depthwise convolution."""
    for i in range(count):
        source = advance(columns, i * column_row)
        target = advance(sums, i * sum_row)
        if add:
            for c in range(channels):
                target[c] += source[c] * scale[c]
        else:
            for c in range(channels):
                target[c] = source[c] * scale[c]


@inline
def _gather_columns(
    planes: Any,
    b: int,
    channel: int,
    channels: int,
    corner: Any,
    weights: Any,
    mask: Any,
    is_infinite: bool,
    count: int,
    pixels: Any,
    columns: Any,
    row: int,
    g: Any,
) -> None:
    """The columns of one tap of a tile from planes as they lie. Apart from the kernel, where its code would be in the
    way of the usual loop."""
    vectors = -(-channels * weights.itemsize // VECTOR_BYTES)
    i1, i2, i3 = channels, 2 * channels, 3 * channels
    for i in range(count):
        w0, w1, w2, w3 = weights[0, i], weights[1, i], weights[2, i], weights[3, i]
        out = advance(columns, i * row)
        gather_corners(planes, b, channel, channels, corner, i, g, pixels)
        blend(out, pixels, 0, i1, i2, i3, w0, w1, w2, w3, vectors)
        if is_infinite:
            infinite_sample(out, mask[i], pixels, 0, i1, i2, i3, weights[4, i], weights[5, i], channels)


@inline
def _pack_forward(weight: Any, packed: Any, entries: Any, product: Any, j: int, p: Any) -> None:
    """Panel j of one chunk: packed[panel][column][o], zeros behind the last output channel of the group.

    Depthwise: packed[column], one weight for each.
    """
    panel = 2 * VECTOR_BYTES // packed.itemsize
    first = product.first_out + j * panel
    width = min(panel, product.outs - j * panel)
    for e in range(product.first_entry, product.last_entry):
        tap, channel, channels, column = entries[e].tap, entries[e].channel, entries[e].channels, entries[e].column
        if p.depthwise:
            if j == 0:
                for c in range(channels):
                    packed[product.packed_at + column + c] = weight[channel + c, 0, tap]
            continue
        for c in range(channels):
            row = product.packed_at + (j * product.depth + column + c) * panel
            for o in range(width):
                packed[row + o] = weight[first + o, channel - product.first_in + c, tap]
            for o in range(width, panel):
                packed[row + o] = 0


def _forward_steps(g: Any, panel: int) -> tuple[Any, Any, Any, int, int, int]:
    return (_kept_steps if is_small(g) else _kept_steps.__wrapped__)(g, panel)


@functools.lru_cache(maxsize=64)
def _kept_steps(g: Any, panel: int) -> tuple[Any, Any, Any, int, int, int]:
    one, times = period_of(g)
    blocks, entries, chunks, deepest, panels, packed_size = _steps_of_period(one, panel, is_depthwise(g))
    count = len(entries)
    entries = repeated(entries, times, channel=one.in_channels)
    entries["og"] = entries["channel"] // (g.in_channels // g.offset_groups)
    return (
        repeated(blocks, times, channel=one.in_channels),
        entries,
        repeated(
            chunks,
            times,
            first_out=one.out_channels,
            first_in=one.in_channels,
            first_entry=count,
            last_entry=count,
            packed_at=packed_size,
        ),
        deepest,
        panels,
        packed_size * times,
    )


def _steps_of_period(g: Any, panel: int, depthwise: bool) -> tuple[Any, Any, Any, int, int, int]:
    """The blocks of channels, the entries in the order of a tile's work, and the chunks of entries multiplied at once.

    `is_first` and `is_last` say whether a chunk begins or ends the sums of its outputs. After the tables: the greatest
    depth, the panels of a chunk, the elements of packed.
    """
    taps = g.kernel_h * g.kernel_w
    blocks = channel_blocks(g, CHANNELS, depthwise)
    if depthwise:
        products = [(channel, channels, channel, [(og, channel, channels)]) for _, og, channel, channels in blocks]
    else:
        outs, ins = g.out_channels // g.groups, g.in_channels // g.groups
        members: list[list[tuple[int, int, int]]] = [[] for _ in range(g.groups)]
        for block in blocks:
            members[block[0]].append(block[1:])
        products = [(group * outs, outs, group * ins, members[group]) for group in range(g.groups)]
    panels = max(-(-product[1] // panel) for product in products)
    entries: list[tuple[int, ...]] = []
    chunks: list[list[int]] = []
    packed_size = 0
    for first_out, out_channels, first_in, blocks_in in products:
        steps = [(tap, *block) for block in blocks_in for tap in range(taps)]
        total = sum(step[3] for step in steps)
        target = -(-total // -(-total // DEPTH))  # chunks of about equal depth
        first_chunk = len(chunks)
        depth, first = 0, len(entries)
        for number, step in enumerate(steps):
            entries.append((*step, depth))
            depth += step[3]
            if depth >= target or number == len(steps) - 1:
                chunks.append([first_out, out_channels, first_in, first, len(entries), depth, packed_size, 0, 0])
                packed_size += depth * (1 if depthwise else panels * panel)
                depth, first = 0, len(entries)
        chunks[first_chunk][7] = 1
        chunks[-1][8] = 1
    deepest = max(chunk[5] for chunk in chunks)
    return (
        table("channel channels", [block[2:] for block in blocks]),
        table("tap og channel channels column", entries),
        table("first_out outs first_in first_entry last_entry depth packed_at is_first is_last", chunks),
        deepest,
        panels,
        packed_size,
    )

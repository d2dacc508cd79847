"""Forward of a convolution with or without offsets (eq. 1): a tile of columns is sampled into cache and multiplied."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.conv.plan import (
    CHANNELS,
    INT32,
    channel_blocks,
    channels_last_size,
    corners_size,
    flat_arguments,
    is_depthwise,
    is_small,
    numbers_of,
    period_of,
    prefers_planes,
    repeated,
    round_up,
    table,
    threads_for,
)
from pydeform.cpu.conv.weights import pack_depthwise, pack_forward, squares_size
from pydeform.cpu.core import pair_products, parallel
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.layout import pixel_parts, to_channels_first, to_channels_last
from pydeform.cpu.core.memory import Workspace, compute_dtype, empty, to_result
from pydeform.cpu.core.pair_products import (
    begin_products,
    end_products,
    multiply_narrow,
    multiply_tile,
    multiply_wide,
    pick,
    put,
    rows_of,
)
from pydeform.cpu.core.parallel import call_helpers, claim_near, finish, let_helpers_go, wait_for
from pydeform.cpu.core.planes import gather_corners, planes_of
from pydeform.cpu.core.simd import (
    CACHE_LINE,
    PANEL,
    ROWS,
    VECTOR_BYTES,
    advance,
    at,
    blend,
    copy_vectors,
    fetch_ahead,
    second_level_cache,
)
from pydeform.cpu.sampling.corners import blend_infinite, infinite_sample, locate_tap, lowest_coordinate, tile_origins

# Sizes that keep a tile's columns and sums in the second-level cache and a panel of weights in the first. The more
# positions, the less often are all weights read, which may come from further away.
POSITIONS, MOST_POSITIONS = 192, 384
DEPTH, PAIRS_DEPTH = 512 // PANEL, 256  # of one product, or as many channels more as a block has
# Elements from a sample's columns to the next one's: a number that the compiler knows, so that one register is the
# address of all rows of a product. No power of two, which would crowd them into few cache lines; of pairs, whole lines.
ROW, PAIRS_ROW = DEPTH + CHANNELS + 16, PAIRS_DEPTH + CHANNELS + 32


class ForwardPlan(NamedTuple):
    """How one forward problem is cut up."""

    positions: int  # of a tile
    tiles: int  # of an image
    panels: int  # of PANEL vectors of output channels
    wide_rows: int  # positions of a block of a product that is as wide as a panel, two vectors, one vector
    rows: int
    narrow_rows: int
    ahead: int  # weights that are asked for while a whole panel's block is multiplied, so many more than a panel on
    ahead_lines: int  # the same in cache lines
    has_mask: int


class Prepared(NamedTuple):
    """All that is decided before the arrays are known."""

    threads: int
    key: str  # of the kernel's types
    planes: bool  # corners are gathered from the input as it lies; else a copy with channels last is made
    workspace: Workspace
    tables: tuple[Any, Any, Any]
    depthwise: int | None
    plan: ForwardPlan


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    output = empty((g.batch, g.out_channels, g.out_h * g.out_w), dtype)
    if output.size:
        threads = threads_for(g, 1, g.batch * -(-g.out_h * g.out_w // (4 * ROWS)))
        numbers = numbers_of(input.dtype, g)
        how = _prepared(g, dtype, numbers, threads, offset is not None, mask is not None)
        arrays = how.workspace.take()
        parallel.run(
            _forward,
            how.key,
            how.threads,
            parallel.new_counters(2),
            *flat_arguments(None if how.planes else input, offset, weight, bias, mask, g, dtype, how.plan.positions),
            planes_of(input) if how.planes else None,
            output,
            *arrays,
            *how.tables,
            how.depthwise,
            g,
            how.plan,
        )
        how.workspace.give_back(arrays)
    return to_result(output, input.dtype, (g.batch, g.out_channels, g.out_h, g.out_w))


def _prepared(g: Any, *rest: Any) -> Prepared:
    return (_kept if is_small(g) else _kept.__wrapped__)(g, *rest)


@functools.lru_cache(maxsize=64)
def _kept(g: Any, dtype: Any, numbers: Any, threads: int, has_offset: bool, has_mask: bool) -> Prepared:
    pixel_dtype = conv_plan.pixel_dtype(g)
    lanes = VECTOR_BYTES // dtype.itemsize
    wide_rows, rows, narrow_rows = rows_of(numbers)
    panel = PANEL * lanes
    blocks, entries, chunks, panels, packed_size = _steps(g, panel, numbers != dtype)
    planes = prefers_planes(g)
    out_positions = g.out_h * g.out_w
    itemsize = numbers.itemsize
    row = ROW if numbers == dtype else PAIRS_ROW
    of_position = row * itemsize + panels * panel * dtype.itemsize
    tiles = -(-out_positions // max(POSITIONS, min(second_level_cache() * 2 // (5 * of_position), MOST_POSITIONS)))
    if threads > 1:  # enough tiles for all, and as many for each; no sum depends on where a tile ends
        tiles = max(tiles, min(-(-4 * threads // g.batch), -(-out_positions // (4 * ROWS))))
        tiles = round_up(tiles, threads // math.gcd(threads, g.batch))
    positions = round_up(-(-out_positions // tiles), math.lcm(rows, narrow_rows))
    ahead_lines = 0
    if packed_size * itemsize > second_level_cache() // 2:
        ahead_lines = -(-int(max(chunks["depth"])) * panel * wide_rows * itemsize // (positions * CACHE_LINE))
    plan = ForwardPlan(
        positions=positions,
        tiles=-(-out_positions // positions),
        panels=panels,
        wide_rows=wide_rows,
        rows=rows,
        narrow_rows=narrow_rows,
        ahead=ahead_lines * CACHE_LINE // itemsize,
        ahead_lines=ahead_lines,
        has_mask=int(has_mask),
    )
    threads = min(threads, g.batch * plan.tiles)
    multiplied = round_up(positions, wide_rows)
    arrays = Workspace(
        ((0 if planes else channels_last_size(g) + lanes,), dtype),
        ((packed_size,), numbers),
        ((threads, squares_size(g, lanes)), dtype),
        ((threads, multiplied, row), numbers),
        ((threads, multiplied, panels * panel), dtype),
        ((threads, 4, positions), pixel_dtype),
        ((threads, 6, positions), dtype),
        ((threads, 2, positions), INT32),
        ((threads, corners_size(blocks) if planes else 0), dtype),
    )
    depthwise = 1 if is_depthwise(g) else None
    key = dtype.char + numbers.char + pixel_dtype.char + planes * "p" + has_offset * "o" + bool(depthwise) * "d"
    return Prepared(threads, key, planes, arrays, (blocks, entries, chunks), depthwise, plan)


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
    packing: Any,
    columns: Any,
    sums: Any,
    corners: Any,
    weights: Any,
    bases: Any,
    all_pixels: Any,
    blocks: Any,
    entries: Any,
    chunks: Any,
    depthwise: Any,
    g: Any,
    p: Any,
) -> None:
    """One of input and planes is None, offset is None in a plain convolution, and depthwise where it is not: a kernel
    is compiled without what they would take."""
    call_helpers(thread, counters)
    # Phase 0: the image to channels-last, the weight into panels.
    parts = pixel_parts(g.in_h * g.in_w)
    taps = g.kernel_h * g.kernel_w
    converting = g.batch * parts if planes is None else 0
    packs = p.panels if depthwise is None else 1  # of a block
    preparing = converting + len(blocks) * packs
    unit = claim_near(counters, 0, thread, preparing)
    while unit < preparing:
        if unit >= converting:
            block = (unit - converting) // packs
            number = unit - converting - block * packs
            if depthwise is None:
                pack_forward(weight, packed, at(packing, (thread, 0)), entries, chunks, block * taps, number)
            else:
                for e in range(block * taps, (block + 1) * taps):
                    start = chunks[entries[e].chunk].packed_at + entries[e].column
                    pack_depthwise(weight, packed, entries[e].channel, entries[e].channels, entries[e].tap, start)
        elif planes is None:
            b = unit // parts
            for number in range(len(blocks)):
                channel, channels = blocks[number].channel, blocks[number].channels
                origin = (b * g.in_channels + channel) * (g.in_h * g.in_w + 1)
                to_channels_last(input, b, channel, 1, image, origin, channels, channels, unit % parts, g.in_h * g.in_w)
        finish(counters, 0)
        unit = claim_near(counters, 0, thread, preparing)
    wait_for(counters, 0, preparing)

    # Phase 1: every unit is one tile of positions of one image, and owns its outputs.
    low, nothing = lowest_coordinate(g.boundary, bias), bias.dtype.type(0)
    has_mask = p.has_mask != 0
    length = g.out_h * g.out_w
    pixels = g.in_h * g.in_w + 1
    tile_columns = columns[thread]
    tile_sums = sums[thread]
    corner = corners[thread]
    blending = weights[thread]
    base = bases[thread]
    gathered = at(all_pixels, (thread, 0))
    panel = sums.shape[2] // p.panels
    row = pick(at(tile_columns, (0, 0)), ROW, PAIRS_ROW)
    begin_products(at(tile_columns, (0, 0)))
    unit = claim_near(counters, 1, thread, g.batch * p.tiles)
    while unit < g.batch * p.tiles:
        b = unit // p.tiles
        start = (unit - b * p.tiles) * p.positions
        count = min(p.positions, length - start)
        tile_origins(start, count, base, g)
        at_tap, at_group, is_infinite, masks = -1, -1, False, at(mask, (0, 0, 0, 0))
        for chunk in range(len(chunks)):
            product = chunks[chunk]
            depth = product.depth
            for e in range(product.first_entry, product.last_entry):
                entry = entries[e]
                if entry.tap != at_tap or entry.og != at_group:
                    at_tap, at_group = entry.tap, entry.og
                    masks = at(mask, (b, at_group, at_tap, start)) if has_mask else at(mask, (0, 0, 0, 0))
                    is_infinite = locate_tap(
                        offset,
                        masks,
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
                        has_mask,
                    )
                channels, column = entry.channels, entry.column
                vectors = -(-channels * image.itemsize // VECTOR_BYTES)
                if planes is None:
                    source = at(image, ((b * g.in_channels + entry.channel) * pixels,))
                    if offset is None:
                        for i in range(count):
                            copy_vectors(
                                at(tile_columns, (i, column)), advance(source, corner[0, i] * channels), vectors
                            )
                    else:
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
                            blend_infinite(
                                at(tile_columns, (0, column)), row, source, corner, blending, masks, count, channels
                            )
                else:
                    _gather_columns(
                        planes,
                        b,
                        entry.channel,
                        channels,
                        corner,
                        blending,
                        masks,
                        is_infinite,
                        count,
                        gathered,
                        at(tile_columns, (0, column)),
                        row,
                        g,
                    )
                if entry.width > channels:  # what stands there may be no number, and its weights are zeros
                    for i in range(count):
                        for k in range(channels, entry.width):
                            put(at(tile_columns, (i, column)), k, nothing)
            if depthwise is not None:
                for e in range(product.first_entry, product.last_entry):
                    column = entries[e].column
                    _multiply_channels(
                        at(tile_columns, (0, column)),
                        row,
                        at(packed, (product.packed_at + column,)),
                        at(tile_sums, (0, 0)),
                        p.panels * panel,
                        count,
                        entries[e].channels,
                        product.is_first == 0 or e > product.first_entry,
                    )
            else:
                for j in range(p.panels):
                    _multiply_panel(
                        at(tile_columns, (0, 0)),
                        at(packed, (product.packed_at + j * depth * panel,)),
                        at(tile_sums, (0, j * panel)),
                        p.panels * panel,
                        product.is_first == 0,
                        count,
                        depth,
                        product.outs - j * panel,
                        p,
                    )
            if product.is_last:
                to_channels_first(tile_sums, output, b, product.first_out, product.outs, start, count, bias)
        finish(counters, 1)
        unit = claim_near(counters, 1, thread, g.batch * p.tiles)
    end_products(at(tile_columns, (0, 0)))
    wait_for(counters, 1, g.batch * p.tiles)
    let_helpers_go(thread, counters)


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


def _steps(g: Any, panel: int, has_pairs: bool) -> tuple[Any, Any, Any, int, int]:
    one, times = period_of(g)
    blocks, entries, chunks, panels, packed_size = _steps_of_period(one, panel, is_depthwise(g), has_pairs)
    count = len(entries)
    entries = repeated(entries, times, channel=one.in_channels, chunk=len(chunks))
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
        panels,
        packed_size * times,
    )


def _steps_of_period(g: Any, panel: int, depthwise: bool, has_pairs: bool) -> tuple[Any, Any, Any, int, int]:
    """The blocks of channels, the entries in the order of a tile's work, and the chunks of entries multiplied at once.

    An entry has `width` columns, its channels and what fills up pairs and, at the end of a chunk, a product's depth.
    `is_first` and `is_last` say whether a chunk begins or ends the sums of its outputs. After the tables: the panels of
    a chunk, the elements of packed.
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
        most = PAIRS_DEPTH if has_pairs else DEPTH
        target = -(-total // -(-total // most))  # chunks of about equal depth
        first_chunk = len(chunks)
        depth, first = 0, len(entries)
        for number, step in enumerate(steps):
            is_end = depth + step[3] >= target or number == len(steps) - 1
            fill = (pair_products.DEPTH if is_end else 2) if has_pairs else 1
            after = round_up(depth + step[3], fill)
            entries.append((*step, after - depth, depth, len(chunks)))
            depth = after
            if is_end:
                chunks.append([first_out, out_channels, first_in, first, len(entries), depth, packed_size, 0, 0])
                packed_size += depth * (1 if depthwise else panels * panel)
                depth, first = 0, len(entries)
        chunks[first_chunk][7] = 1
        chunks[-1][8] = 1
    return (
        table("channel channels", [block[2:] for block in blocks]),
        table("tap og channel channels width column chunk", entries),
        table("first_out outs first_in first_entry last_entry depth packed_at is_first is_last", chunks),
        panels,
        packed_size,
    )

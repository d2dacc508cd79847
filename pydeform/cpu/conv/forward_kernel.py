"""Forward of a convolution with or without offsets (eq. 1): a tile of columns is sampled into cache and multiplied."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.conv.plan import (
    CHANNELS,
    channel_blocks,
    channels_last_size,
    corners_size,
    given_arrays,
    is_depthwise,
    is_shared,
    is_small,
    kernel_key,
    numbers_of,
    period_of,
    prefers_planes,
    repeated,
    threads_for,
)
from pydeform.cpu.conv.weights import pack_depthwise, pack_forward, squares_size
from pydeform.cpu.core import pair_products, parallel, sizes
from pydeform.cpu.core.blend import blend, copy_vectors
from pydeform.cpu.core.jit import Kernel, inline, inline_always
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
from pydeform.cpu.core.planes import gather_corners
from pydeform.cpu.core.product import PANEL, ROWS
from pydeform.cpu.core.simd import (
    CACHE_LINE,
    VECTOR_BYTES,
    advance,
    at,
    column,
    corner_numbers,
    fetch_ahead,
    second_level_cache,
    times,
    vectors_of,
)
from pydeform.cpu.core.sizes import round_up, table, volume
from pydeform.cpu.sampling.corners import (
    blend_infinite,
    infinite_sample,
    is_any_infinite,
    locate_tap,
    places,
    sample_tables,
    samples_of,
    tile_origins,
)

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
    offset_step: int  # 0 if all images and positions share one offset


class Scratch(NamedTuple):
    """A call's own memory. All but the first two are a thread's each."""

    image: Any  # block by block of channels, channels last
    packed: Any  # the weight, in panels
    squares: Any  # of the weight, while it is turned
    columns: Any  # of a tile: (position, entry's channels)
    sums: Any  # of a tile: (position, output channel)
    bases: Any  # and the tables of a tap's samples: see `Samples`
    corners: Any
    weights: Any
    cells: Any
    dots: Any
    pixels: Any  # corners of one sample, where they are gathered


class Tables(NamedTuple):
    """How the channels are cut up."""

    blocks: Any
    entries: Any
    chunks: Any
    depthwise: int | None
    axes: tuple[int, ...]  # of a sample's cell: none in a plain convolution, whose taps read one pixel


class Prepared(NamedTuple):
    """All that is decided before the arrays are known."""

    threads: int
    key: str  # of the kernel's types
    planes: bool  # corners are gathered from the input as it lies; else a copy with channels last is made
    workspace: Workspace
    tables: Tables
    plan: ForwardPlan


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    output = empty((g.batch, g.out_channels, math.prod(g.out_size)), dtype)
    if output.size:
        threads = threads_for(g, 1, g.batch * -(-math.prod(g.out_size) // (4 * ROWS)))
        numbers = numbers_of(input.dtype, g)
        how = _prepared(g, dtype, numbers, threads, offset is not None, mask is not None, is_shared(offset))
        arrays = how.workspace.take()
        parallel.run(
            _forward,
            how.key,
            how.threads,
            parallel.new_counters(2),
            given_arrays(input, offset, weight, bias, mask, g, dtype, how.planes, how.plan.positions),
            output,
            Scratch(*arrays),
            how.tables,
            g,
            how.plan,
        )
        how.workspace.give_back(arrays)
    return to_result(output, input.dtype, (g.batch, g.out_channels, *g.out_size))


def _prepared(g: Any, *rest: Any) -> Prepared:
    return (_kept if is_small(g) else _kept.__wrapped__)(g, *rest)


@functools.lru_cache(maxsize=64)
def _kept(g: Any, dtype: Any, numbers: Any, threads: int, has_offset: bool, has_mask: bool, shared: bool) -> Prepared:
    pixel_dtype, axes = sizes.pixel_dtype(math.prod(g.in_size)), g.in_size if has_offset else ()
    lanes = VECTOR_BYTES // dtype.itemsize
    wide_rows, rows, narrow_rows = rows_of(numbers)
    panel = PANEL * lanes
    blocks, entries, chunks, panels, packed_size = _steps(g, panel, numbers != dtype)
    planes = prefers_planes(g)
    out_positions = math.prod(g.out_size)
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
        offset_step=int(not shared),
    )
    threads = min(threads, g.batch * plan.tiles)
    multiplied = round_up(positions, wide_rows)
    arrays = Workspace(
        ((0 if planes else channels_last_size(g) + lanes,), dtype),
        ((packed_size,), numbers),
        ((threads, squares_size(g, lanes)), dtype),
        ((threads, multiplied, row), numbers),
        ((threads, multiplied, panels * panel), dtype),
        *sample_tables(threads, len(g.out_size), len(axes), positions, pixel_dtype, dtype, has_dots=False),
        ((threads, corners_size(blocks, axes) if planes else 0), dtype),
    )
    depthwise = 1 if is_depthwise(g) else None
    key = kernel_key(g, dtype, numbers, pixel_dtype, planes, has_offset)
    return Prepared(threads, key, planes, arrays, Tables(blocks, entries, chunks, depthwise, axes), plan)


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
                    start = tables.chunks[entry.chunk].packed_at + entry.column
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
            for e in range(product.first_entry, product.last_entry):
                column = tables.entries[e].column
                scale = at(scratch.packed, (product.packed_at + column,))
                more = add or e > product.first_entry
                _multiply_channels(
                    advance(columns, column), scale, sums, sum_row, tile.positions, tables.entries[e].channels, more
                )
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
    at_tap, at_group, is_infinite, masks = -1, -1, False, at(given.mask, (0, 0, 0, 0))
    for e in range(product.first_entry, product.last_entry):
        entry = tables.entries[e]
        if entry.tap != at_tap or entry.og != at_group:
            at_tap, at_group = entry.tap, entry.og
            if has_mask:
                masks = at(given.mask, (b, at_group, at_tap, start))
            first = b * p.offset_step, at_group, at_tap, 0, start * p.offset_step
            locate_tap(given.offset, first, masks, at_tap, count, samples, g)
            is_infinite = has_mask and is_any_infinite(masks, count)
        channels = entry.channels
        columns = at(scratch.columns, (thread, 0, entry.column))
        if given.planes is None:
            source = at(scratch.image, ((b * g.in_channels + entry.channel) * (volume(g.in_size) + 1),))
            if given.offset is None:
                _copy_columns(columns, row, source, samples, count, channels)
            else:
                _blend_columns(columns, row, source, samples, count, channels, axes)
                if is_infinite:
                    blend_infinite(columns, row, source, masks, count, channels, samples, axes)
        else:
            pixels = at(scratch.pixels, (thread, 0))
            _gather_columns(given.planes, b, entry, samples, masks, is_infinite, count, pixels, columns, row, axes, g)
        if entry.width > channels:  # what stands there may be no number, and its weights are zeros
            for i in range(count):
                for k in range(channels, entry.width):
                    put(columns, i * row + k, nothing)


@inline_always
def _copy_columns(columns: Any, row: int, source: Any, samples: Any, count: int, channels: int) -> None:
    vectors = vectors_of(source, channels)
    for i in range(count):
        copy_vectors(advance(columns, i * row), advance(source, np.int64(samples.corners[i]) * channels), vectors)


@inline_always
def _blend_columns(columns: Any, row: int, source: Any, samples: Any, count: int, channels: int, axes: Any) -> None:
    vectors = vectors_of(source, channels)
    for i in range(count):
        weights = column(advance(samples.weights, i), samples.row, axes)
        blend(advance(columns, i * row), source, places(samples, i, channels, axes), weights, vectors)


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
def _multiply_channels(columns: Any, scale: Any, sums: Any, sum_row: int, count: int, channels: int, add: bool) -> None:
    """sums[i, c] (+)= columns[i, c] * scale[c]: one tap of a depthwise convolution."""
    for i in range(count):
        source = advance(columns, i * ROW)
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
    entry: Any,
    samples: Any,
    mask: Any,
    is_infinite: bool,
    count: int,
    pixels: Any,
    columns: Any,
    row: int,
    axes: Any,
    g: Any,
) -> None:
    """The columns of one tap of a tile from planes as they lie. Apart from the kernel, where its code would be in the
    way of the usual loop."""
    channels, gathered = entry.channels, times(corner_numbers(axes), entry.channels)
    vectors = vectors_of(pixels, channels)
    for i in range(count):
        out = advance(columns, i * row)
        gather_corners(
            planes, b, entry.channel, channels, column(advance(samples.corners, i), samples.row, axes), g, pixels
        )
        blend(out, pixels, gathered, column(advance(samples.weights, i), samples.row, axes), vectors)
        if is_infinite and mask[i] - mask[i] != 0:
            infinite_sample(out, mask[i], pixels, gathered, i, channels, samples, axes)


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
    taps = math.prod(g.kernel)
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

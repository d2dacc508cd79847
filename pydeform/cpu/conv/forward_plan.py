"""How one forward problem is cut up, decided before its arrays are known."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from pydeform.cpu.conv.plan import (
    CHANNELS,
    channel_blocks,
    channels_last_size,
    corners_size,
    is_depthwise,
    is_small,
    kernel_key,
    period_of,
    prefers_planes,
    repeated,
)
from pydeform.cpu.conv.weights import squares_size
from pydeform.cpu.core import pair_products, sizes
from pydeform.cpu.core.memory import Workspace
from pydeform.cpu.core.pair_products import rows_of
from pydeform.cpu.core.product import PANEL, ROWS
from pydeform.cpu.core.simd import CACHE_LINE, VECTOR_BYTES, second_level_cache
from pydeform.cpu.core.sizes import round_up, table
from pydeform.cpu.sampling.corners import sample_tables

# Sizes that keep a tile's columns and sums in the second-level cache and a panel of weights in the first. The more
# positions, the less often are all weights read, which may come from further away.
POSITIONS, MOST_POSITIONS = 192, 384
DEPTHWISE_POSITIONS = 128  # a depthwise convolution reads weights hardly at all; its image is to stay in that cache
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


def prepared(g: Any, *rest: Any) -> Prepared:
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
    most = max(POSITIONS, min(second_level_cache() * 2 // (5 * of_position), MOST_POSITIONS))
    tiles = -(-out_positions // (DEPTHWISE_POSITIONS if is_depthwise(g) else most))
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
        threads=threads,
        own=(
            ((squares_size(g, lanes),), dtype),
            ((multiplied, row), numbers),
            ((multiplied, panels * panel), dtype),
            *sample_tables(len(g.out_size), len(axes), positions, pixel_dtype, dtype, has_dots=False),
            ((corners_size(blocks, axes) if planes else 0,), dtype),
        ),
    )
    depthwise = 1 if is_depthwise(g) else None
    key = kernel_key(g, dtype, numbers, pixel_dtype, planes, has_offset)
    return Prepared(threads, key, planes, arrays, Tables(blocks, entries, chunks, depthwise, axes), plan)


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
    """The blocks of channels, the entries in the order of a tile's work, and the chunks of entries multiplied at once:
    depthwise each by itself, while its columns are in the first cache.

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
        most = 1 if depthwise else PAIRS_DEPTH if has_pairs else DEPTH
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

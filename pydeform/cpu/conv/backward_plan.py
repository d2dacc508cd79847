"""How one backward problem is cut up, decided before its arrays are known."""

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
    is_depthwise,
    is_small,
    kernel_key,
    period_of,
    prefers_planes,
    repeated,
)
from pydeform.cpu.conv.weights import squares_size
from pydeform.cpu.core import pair_products, sizes
from pydeform.cpu.core.layout import PIXELS
from pydeform.cpu.core.memory import Workspace
from pydeform.cpu.core.pair_products import rows_of
from pydeform.cpu.core.parallel import own_counters
from pydeform.cpu.core.product import PANEL
from pydeform.cpu.core.simd import VECTOR_BYTES
from pydeform.cpu.core.sizes import round_up, table
from pydeform.cpu.sampling.corners import sample_tables

POSITIONS = 192  # of a tile: its columns, their gradient and that of the output stay in the second-level cache
DEPTH = 128  # of one product over output channels: panel and gradients stay in the first-level cache
# Elements from an output channel's gradients of a tile to the next one's, and from a sample's columns to the next
# one's: see forward_plan.ROW.
ROW = POSITIONS + 16
COLUMN_ROW = CHANNELS + 16
SMALL_IMAGE = 8 << 20  # bytes of an image of which each piece may have a gradient of its own
WEIGHT_COPIES = 16 << 20  # bytes for partial weight gradients, one for each range of images
PROGRESS = own_counters(3)  # and on, (piece, block): taps of tiles whose part of the dots a block has added


class BackwardPlan(NamedTuple):
    """How one backward problem is cut up. None of it depends on threads, and only `splits` on the batch.

    A unit of work is one block of channels of some pieces, which are an image or a part of its tiles.
    """

    positions: int  # of a tile
    tiles: int  # of an image
    pieces: int  # of an image, each with a gradient of it
    apart: int  # elements from one such gradient of all images to the next
    splits: int  # ranges of pieces, each with a weight gradient of its own
    panel: int  # numbers of PANEL vectors
    wide_lines: int  # rows of a block of a product that is as wide as a panel, and of two vectors
    lines: int
    rows: int  # output channels of a group, rounded up to those
    depth: int  # output channels of a group, for pairs rounded up to the depth of a product
    weight_size: int  # elements of one partial weight gradient
    has_mask: int
    offset_step: int  # 0 if all images and positions share one offset
    need_input: int
    need_dots: int  # for offset and mask
    need_weight: int
    need_bias: int


class Gradients(NamedTuple):
    """That of the output, which is given, and those that are asked for, in the kernels' shapes; others are empty."""

    output: Any
    input: Any
    offset: Any
    mask: Any
    weight: Any
    bias: Any
    shared: Any  # of an offset that all positions share, or None: parts of it, (piece of an image, block, tap, axis)


class Scratch(NamedTuple):
    """A call's own memory. All but the first four are a thread's each."""

    image: Any  # block by block of channels, channels last
    grad_image: Any  # its gradient, for each piece
    packed: Any  # the weight, as products read it
    partial: Any  # the weight's gradient, for each range of pieces
    squares: Any  # of the weight, while it is turned
    grads: Any  # the output's gradient in a tile: (output channel, position), depthwise (position, channel)
    columns: Any  # of a tap of a tile: (position, channel),
    grad_columns: Any  # and their gradient
    bases: Any  # and the tables of a tap's samples: see `Samples`
    corners: Any
    weights: Any
    cells: Any
    dots: Any
    pixels: Any  # corners of one sample, where they are gathered,
    places: Any  # those of them that are inside,
    products: Any  # and their weights


class Pairs(NamedTuple):
    """What products of pairs take besides."""

    by_position: Any  # the output's gradient: (image, group, position, output of the group),
    by_output: Any  # and (output, position)
    columns: Any  # of a tap of a tile, each thread's


class Tables(NamedTuple):
    """How the channels are cut up."""

    blocks: Any
    depthwise: int | None
    axes: tuple[int, ...]  # of a sample's cell: none in a plain convolution, whose taps read one pixel


class Part(NamedTuple):
    """One block of channels of one tile, and the thread that computes it."""

    thread: int
    image: int
    piece: int  # of the image
    block: int
    split: int  # the partial weight gradient that it is added to
    is_first: bool  # nothing is there yet
    start: int  # the tile's first position
    positions: int
    ordinal: int  # of the tile in its piece
    progress: int  # the counter of the piece's first block


class Prepared(NamedTuple):
    """All that is decided before the arrays are known."""

    threads: int
    key: str  # of the kernel's types
    planes: bool  # corners are gathered from the input, and its gradient added up, as they lie; else channels last
    workspace: Workspace
    pairs: Workspace | None  # what pairs take besides, if there are any
    tables: Tables
    plan: BackwardPlan


def prepared(g: Any, *rest: Any) -> Prepared:
    return (_kept if is_small(g) else _kept.__wrapped__)(g, *rest)


@functools.lru_cache(maxsize=64)
def _kept(
    g: Any,
    dtype: Any,
    numbers: Any,
    most_threads: int,
    has_offset: bool,
    has_mask: bool,
    shared: bool,
    needs: frozenset[str],
) -> Prepared:
    axes, lanes, has_pairs = g.in_size if has_offset else (), VECTOR_BYTES // dtype.itemsize, numbers != dtype
    wide_lines, lines, _ = rows_of(numbers)
    depth, fill = g.out_channels // g.groups, math.lcm(wide_lines, lines)
    rows = max(round_up(depth, wide_lines), round_up(depth, lines))
    if has_pairs:
        depth, fill = round_up(depth, pair_products.DEPTH), math.lcm(fill, pair_products.DEPTH)
    # An image of few channels, too, is work for two threads: it has two pieces of tiles or, since these cost a copy of
    # its gradient, two blocks of channels. Never by batch, which must not show.
    halves = g.in_channels * math.prod(g.in_size) * dtype.itemsize > SMALL_IMAGE
    blocks, weight_size, packed_size = _blocks(g, 2 * lanes, rows, depth, halves)
    out_positions = math.prod(g.out_size)
    positions = round_up(-(-out_positions // -(-out_positions // POSITIONS)), fill)
    tiles = -(-out_positions // positions)
    planes = prefers_planes(g)
    pieces = 2 if len(blocks) == 1 and tiles > 1 and not (planes or halves) else 1
    splits = max(1, min(g.batch * pieces, WEIGHT_COPIES // (weight_size * dtype.itemsize)))
    plan = BackwardPlan(
        positions=positions,
        tiles=tiles,
        pieces=pieces,
        apart=channels_last_size(g) + lanes,
        splits=splits,
        panel=PANEL * lanes,
        wide_lines=wide_lines,
        lines=lines,
        rows=rows,
        depth=depth,
        weight_size=weight_size,
        has_mask=int(has_mask),
        offset_step=int(not shared),
        need_input=int("input" in needs),
        need_dots=int("offset" in needs or "mask" in needs),
        need_weight=int("weight" in needs),
        need_bias=int("bias" in needs),
    )
    parts = -(-math.prod(g.in_size) // PIXELS)
    threads = min(most_threads, max(len(blocks) * g.batch * parts, splits * len(blocks), g.out_channels))
    pixel_dtype, depthwise = sizes.pixel_dtype(math.prod(g.in_size)), 1 if is_depthwise(g) else None
    return Prepared(
        threads,
        kernel_key(g, dtype, numbers, pixel_dtype, planes, has_offset) + shared * "s",
        planes,
        _workspace(g, plan, threads, packed_size, blocks, axes, planes, numbers, dtype),
        _pairs(g, plan, threads, numbers) if has_pairs else None,
        Tables(blocks, depthwise, axes),
        plan,
    )


def _workspace(
    g: Any, p: Any, threads: int, packed_size: int, blocks: Any, axes: Any, planes: bool, numbers: Any, dtype: Any
) -> Workspace:
    pixel_dtype, lanes = sizes.pixel_dtype(math.prod(g.in_size)), VECTOR_BYTES // dtype.itemsize
    grads = 0 if numbers != dtype else COLUMN_ROW if is_depthwise(g) else p.rows
    return Workspace(
        ((0 if planes else p.apart,), dtype),
        ((p.pieces * p.apart if p.need_input and not planes else lanes,), dtype),
        ((packed_size,), numbers),
        ((p.splits if p.need_weight else 0, p.weight_size), dtype),
        threads=threads,
        own=(
            ((squares_size(g, lanes),), dtype),
            ((grads, ROW), dtype),
            ((p.positions, COLUMN_ROW), dtype),
            ((p.positions, COLUMN_ROW), dtype),
            *sample_tables(len(g.out_size), len(axes), p.positions, pixel_dtype, dtype, has_dots=True),
            ((corners_size(blocks, axes) if planes else 0,), dtype),
            ((2 ** len(axes),), pixel_dtype),
            ((2 ** len(axes),), dtype),
        ),
    )


def _pairs(g: Any, p: Any, threads: int, numbers: Any) -> Workspace:
    """Rows of an odd number of cache lines: else those of a tile would crowd into few of them."""
    lines, places = max(p.wide_lines, p.lines), p.tiles * p.positions
    return Workspace(
        ((g.batch, g.groups, places, _odd_lines(p.depth)), numbers),
        ((g.batch * g.out_channels + lines, _odd_lines(places)), numbers),
        threads=threads,
        own=(((p.positions // 2, COLUMN_ROW, 2), numbers),),
    )


def _odd_lines(count: int) -> int:
    """At least `count` numbers of a pair, an odd number of cache lines."""
    lines = -(-count // 32)
    return 32 * (lines + 1 - lines % 2)


def _blocks(g: Any, panel: int, rows: int, depth: int, halves: bool) -> tuple[Any, int, int]:
    one, times = period_of(g)
    half = max(CHANNELS // 4, round_up(-(-g.in_channels // 2), panel))
    largest = min(CHANNELS, half) if halves else CHANNELS
    blocks, weight_size, packed_size = _blocks_of_period(one, panel, largest, is_depthwise(g), rows, depth)
    every = repeated(
        blocks,
        times,
        first_out=one.out_channels,
        first_in=one.in_channels,
        channel=one.in_channels,
        packed_at=packed_size,
        partial_at=weight_size,
    )
    every["og"] = every["channel"] // (g.in_channels // g.offset_groups)
    first = np.diff(every["og"], prepend=-1) > 0
    every["previous"] = np.where(first, -1, np.arange(len(every)) - 1)
    every["is_last"] = np.append(first[1:], True)
    return every, weight_size * times, packed_size * times


def _blocks_of_period(g: Any, panel: int, largest: int, depthwise: bool, rows: int, depth: int) -> tuple[Any, int, int]:
    """The blocks of channels, the elements of a partial weight gradient and of packed. `previous` is the block before
    in the same offset group, or -1; `is_last` says that none follows in it.
    """
    taps = math.prod(g.kernel)
    outs, ins = g.out_channels // g.groups, g.in_channels // g.groups
    table_rows: list[tuple[int, ...]] = []
    weight_size = packed_size = 0
    for group, og, channel, channels in channel_blocks(g, largest, depthwise):
        width = round_up(channels, panel)
        table_rows.append((group * outs, group * ins, og, channel, channels, width, -1, packed_size, weight_size, 0))
        packed_size += taps * width * (1 if depthwise else depth)
        weight_size += taps * width * (1 if depthwise else rows)
    names = "first_out first_in og channel channels width previous packed_at partial_at is_last"
    return table(names, table_rows), weight_size, packed_size

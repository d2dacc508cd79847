"""Backward of a convolution with or without offsets: every gradient in one pass over the tiles (eq. 3 to 7)."""

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
from pydeform.cpu.conv.weights import (
    pack_backward,
    pack_depthwise,
    reduce_depthwise,
    reduce_weight,
    squares_size,
)
from pydeform.cpu.core import pair_products, parallel, sizes
from pydeform.cpu.core.blend import blend, blend_dots, blend_dots_scatter, copy_vectors, sum_values
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.layout import PIXELS, block_to_channels_first, pixel_parts, to_channels_last, transpose_block
from pydeform.cpu.core.memory import Workspace, compute_dtype, contiguous, empty, to_result
from pydeform.cpu.core.pair_products import (
    begin_products,
    end_products,
    multiply_tile,
    multiply_wide,
    pack_rows,
    pick,
    put,
    rows_of,
)
from pydeform.cpu.core.parallel import (
    advance_counter,
    call_helpers,
    claim,
    claim_near,
    finish,
    let_helpers_go,
    own_counters,
    wait_for,
    wait_until,
)
from pydeform.cpu.core.planes import gather_corners
from pydeform.cpu.core.product import PANEL
from pydeform.cpu.core.simd import (
    VECTOR_BYTES,
    advance,
    at,
    column,
    corner_numbers,
    put_column,
    times,
    use_widest_vectors,
    vectors_of,
)
from pydeform.cpu.core.sizes import round_up, table, volume
from pydeform.cpu.core.weighted import plane_scatter
from pydeform.cpu.sampling.corners import (
    blend_dots_of,
    blend_infinite,
    infinite_sample,
    is_any_infinite,
    locate_tap,
    places,
    sample_tables,
    samples_of,
    tile_origins,
)

POSITIONS = 192  # of a tile: its columns, their gradient and that of the output stay in the second-level cache
DEPTH = 128  # of one product over output channels: panel and gradients stay in the first-level cache
# Elements from an output channel's gradients of a tile to the next one's, and from a sample's columns to the next
# one's: see forward_kernel.ROW.
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
    shared: (
        Any  # that of an offset which all images and positions share: (piece of an image, block, tap, axis); or None
    )


class Scratch(NamedTuple):
    """A call's own memory; squares, and from `grads` on, each thread's."""

    image: Any  # block by block of channels, channels last
    grad_image: Any  # its gradient, for each piece
    packed: Any  # the weight, as products read it
    squares: Any  # of the weight, while it is turned
    partial: Any  # the weight's gradient, for each range of pieces
    grads: Any  # the output's gradient in a tile: (output channel, position), depthwise (position, channel)
    columns: Any  # of a tap of a tile: (position, channel), and their gradient
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


def backward(
    grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, needs: Any
) -> dict[str, Any]:
    dtype = compute_dtype(input.dtype)
    taps = math.prod(g.kernel)
    positions = math.prod(g.out_size)
    axes, shared = len(g.out_size), is_shared(offset)
    need_dots = not shared and ("offset" in needs or "mask" in needs)
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if prefers_planes(g) else empty
    grad_input = make((g.batch, g.in_channels, math.prod(g.in_size)) if "input" in needs else (0, 1, 1), dtype)
    grad_offset = empty((g.batch, g.offset_groups, taps, axes, positions) if need_dots else (0, 1, 1, 1, 1), dtype)
    grad_mask = empty((g.batch, g.offset_groups, taps, positions) if need_dots else (0, 1, 1, 1), dtype)
    grad_weight = empty((g.out_channels, g.in_channels // g.groups, taps) if "weight" in needs else (0, 1, 1), dtype)
    grad_bias = empty((g.out_channels,) if "bias" in needs else (0,), dtype)
    grad_shared = np.zeros((g.offset_groups, taps, axes))
    if g.batch == 0:
        grad_weight[...] = 0
        grad_bias[...] = 0
    elif needs:
        numbers = numbers_of(input.dtype, g)
        most_threads = threads_for(g, 3, g.batch * g.in_channels * positions)
        how = _prepared(g, dtype, numbers, most_threads, offset is not None, mask is not None, shared, needs)
        blocks = how.tables.blocks
        sums = np.zeros((g.batch * how.plan.pieces, len(blocks), taps, axes), dtype) if shared else None
        arrays = how.workspace.take()
        pairs = how.pairs.take() if how.pairs else None
        parallel.run(
            _backward,
            how.key,
            how.threads,
            parallel.new_counters(3, g.batch * how.plan.pieces * len(how.tables.blocks)),
            given_arrays(input, offset, weight, bias, mask, g, dtype, how.planes, how.plan.positions),
            Gradients(
                contiguous(grad_output, dtype, (g.batch, g.out_channels, positions)),
                grad_input,
                grad_offset,
                grad_mask,
                grad_weight,
                grad_bias,
                sums,
            ),
            Scratch(*arrays),
            Pairs(*pairs) if pairs else None,
            how.tables,
            g,
            how.plan,
        )
        how.workspace.give_back(arrays)
        if how.pairs and pairs:
            how.pairs.give_back(pairs)
        if sums is not None:
            for block, og in zip(sums.swapaxes(0, 1), blocks["og"], strict=True):
                grad_shared[og] += block.sum(axis=0, dtype=np.float64)
    taken = {
        "input": (grad_input, (g.batch, g.in_channels, *g.in_size)),
        "offset": (
            (grad_shared.astype(dtype), (grad_shared.size,))
            if shared
            else (grad_offset, (g.batch, axes * g.offset_groups * taps, *g.out_size))
        ),
        "weight": (grad_weight, (g.out_channels, g.in_channels // g.groups, *g.kernel)),
        "bias": (grad_bias, (g.out_channels,)),
        "mask": (grad_mask, (g.batch, g.offset_groups * taps, *g.out_size)),
    }
    return {
        name: to_result(grad, (offset if name == "offset" else input).dtype, shape) if name in needs else None
        for name, (grad, shape) in taken.items()
    }


def _prepared(g: Any, *rest: Any) -> Prepared:
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
    pixel_dtype, axes = sizes.pixel_dtype(math.prod(g.in_size)), g.in_size if has_offset else ()
    lanes = VECTOR_BYTES // dtype.itemsize
    has_pairs = numbers != dtype
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
    tiles = -(-out_positions // POSITIONS)
    positions = round_up(-(-out_positions // tiles), fill)
    tiles = -(-out_positions // positions)
    planes = prefers_planes(g)
    pieces = 2 if len(blocks) == 1 and tiles > 1 and not (planes or halves) else 1
    splits = max(1, min(g.batch * pieces, WEIGHT_COPIES // (weight_size * dtype.itemsize)))
    image_size = channels_last_size(g) + lanes
    plan = BackwardPlan(
        positions=positions,
        tiles=tiles,
        pieces=pieces,
        apart=image_size,
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
    arrays = Workspace(
        ((0 if planes else image_size,), dtype),
        ((pieces * image_size if plan.need_input and not planes else lanes,), dtype),
        ((packed_size,), numbers),
        ((threads, squares_size(g, lanes)), dtype),
        ((splits if plan.need_weight else 0, weight_size), dtype),
        ((threads, 0 if has_pairs else COLUMN_ROW if is_depthwise(g) else rows, ROW), dtype),
        ((threads, 2, positions, COLUMN_ROW), dtype),
        *sample_tables(threads, len(g.out_size), len(axes), positions, pixel_dtype, dtype, has_dots=True),
        ((threads, corners_size(blocks, axes) if planes else 0), dtype),
        ((threads, 2 ** len(axes)), pixel_dtype),
        ((threads, 2 ** len(axes)), dtype),
    )
    # Rows of an odd number of cache lines: else those of a tile would crowd into few of them.
    pairs = Workspace(
        ((g.batch, g.groups, tiles * positions, _odd_lines(depth)), numbers),
        ((g.batch * g.out_channels + max(wide_lines, lines), _odd_lines(tiles * positions)), numbers),
        ((threads, positions // 2, COLUMN_ROW, 2), numbers),
    )
    depthwise = 1 if is_depthwise(g) else None
    key = kernel_key(g, dtype, numbers, pixel_dtype, planes, has_offset) + shared * "s"
    return Prepared(threads, key, planes, arrays, pairs if has_pairs else None, Tables(blocks, depthwise, axes), plan)


@Kernel
def _backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, pairs: Any, tables: Any, g: Any, p: Any
) -> None:
    """A kernel is compiled without what those would take that are None: given.input or given.planes, given.offset in a
    plain convolution, tables.depthwise where it is not, and pairs where there are none."""
    call_helpers(thread, counters)
    _prepare_backward(thread, counters, given, grads.output, scratch, pairs, tables, g, p)
    # Phase 1: every unit is one block of channels of one range of pieces, and owns its slices of all gradients.
    units = p.splits * len(tables.blocks) * (p.need_input | p.need_dots | p.need_weight)
    if pairs is not None:
        begin_products(at(pairs.columns, (thread, 0, 0, 0)))
    unit = claim(counters, 1)
    while unit < units:
        split = unit // len(tables.blocks)
        block = unit - split * len(tables.blocks)
        first = split * g.batch * p.pieces // p.splits
        for piece in range(first, (split + 1) * g.batch * p.pieces // p.splits):
            image = piece // p.pieces
            number = piece - image * p.pieces
            first_tile = number * p.tiles // p.pieces
            for tile in range(first_tile, (number + 1) * p.tiles // p.pieces):
                start = tile * p.positions
                count = min(p.positions, volume(g.out_size) - start)
                progress = PROGRESS + piece * len(tables.blocks)
                is_first = piece == first and tile == first_tile
                part = Part(thread, image, number, block, split, is_first, start, count, tile - first_tile, progress)
                _block_of_tile(counters, part, given, grads, scratch, pairs, tables, g, p)
        finish(counters, 1)
        unit = claim(counters, 1)
    if pairs is not None:
        end_products(at(pairs.columns, (thread, 0, 0, 0)))
    wait_for(counters, 1, units)
    _finish_backward(thread, counters, given.planes, grads, scratch, tables, g, p)
    let_helpers_go(thread, counters)


@inline
def _prepare_backward(
    thread: int, counters: Any, given: Any, grad_output: Any, scratch: Any, pairs: Any, tables: Any, g: Any, p: Any
) -> None:
    """Phase 0: the image to channels-last, its gradient to zero, the weight into panels; the output's gradient into
    pairs."""
    use_widest_vectors()
    blocks, pixels = tables.blocks, volume(g.in_size)
    parts = pixel_parts(pixels)
    converting = len(blocks) * g.batch * parts if given.input is not None else 0
    packing_too = converting + len(blocks)
    units = packing_too + (0 if pairs is None else g.batch * p.tiles)
    unit = claim_near(counters, 0, thread, units)
    while unit < units:
        if unit >= packing_too:
            if pairs is not None:
                b = (unit - packing_too) // p.tiles
                start = (unit - packing_too - b * p.tiles) * p.positions
                turned = at(scratch.columns, (thread, 0, 0, 0))
                _pair_gradients(grad_output, b, start, pairs.by_position, pairs.by_output, turned, g, p)
        elif unit >= converting:
            row, squares = blocks[unit - converting], at(scratch.squares, (thread, 0))
            _pack_block(given.weight, scratch.packed, squares, row, tables.depthwise, g, p)
        elif given.input is not None:  # block by block, as phase 1 goes on
            block, b, part = _part_of(unit, parts, g)
            channel, channels = blocks[block].channel, blocks[block].channels
            origin = (b * g.in_channels + channel) * (pixels + 1)
            to_channels_last(given.input, b, channel, 1, scratch.image, origin, channels, channels, part, pixels)
            if p.need_input:
                last = pixels + 1 if part == parts - 1 else (part + 1) * PIXELS
                for start in range(origin, origin + p.pieces * p.apart, p.apart):
                    for i in range(start + part * PIXELS * channels, start + last * channels):
                        scratch.grad_image[i] = 0
        finish(counters, 0)
        unit = claim_near(counters, 0, thread, units)
    wait_for(counters, 0, units)


@inline
def _pack_block(weight: Any, packed: Any, squares: Any, row: Any, depthwise: Any, g: Any, p: Any) -> None:
    if depthwise is None:
        pack_backward(weight, packed, squares, row, g.out_channels // g.groups, p.depth)
    else:
        for tap in range(volume(g.kernel)):
            pack_depthwise(weight, packed, row.channel, row.channels, tap, row.packed_at + tap * row.width)


@inline
def _block_of_tile(
    counters: Any, part: Any, given: Any, grads: Any, scratch: Any, pairs: Any, tables: Any, g: Any, p: Any
) -> None:
    """What one block of channels of one tile adds to all gradients, tap by tap."""
    thread, b, start, count = part.thread, part.image, part.start, part.positions
    row, taps = tables.blocks[part.block], volume(g.kernel)
    has_mask, samples, axes = p.has_mask != 0, samples_of(thread, scratch), tables.axes
    columns, grad_columns = at(scratch.columns, (thread, 0, 0, 0)), at(scratch.columns, (thread, 1, 0, 0))
    origin = (b * g.in_channels + row.channel) * (volume(g.in_size) + 1)
    source = at(scratch.image, (origin,))
    target = at(scratch.grad_image, ((part.piece * p.apart + origin) * p.need_input,))
    tile_origins(start, count, samples, g)
    _copy_gradient(part, row, grads.output, scratch.grads, pairs, tables.depthwise, g)
    for tap in range(taps):
        masks = at(given.mask, (b, row.og, tap, start)) if has_mask else at(given.mask, (0, 0, 0, 0))
        first = b * p.offset_step, row.og, tap, 0, start * p.offset_step
        locate_tap(given.offset, first, masks, tap, count, samples, g)
        is_infinite = has_mask and is_any_infinite(masks, count)
        if p.need_input | p.need_dots:
            _gradient_of_columns(part, row, tap, scratch, pairs, tables.depthwise, g, p)
        if given.planes is None:
            _sample_backward(columns, grad_columns, source, target, samples, count, row.channels, axes, p)
            if is_infinite:
                blend_infinite(columns, COLUMN_ROW, source, masks, count, row.channels, samples, axes)
        else:
            _sample_planes(given.planes, part, row, scratch, grads.input, masks, is_infinite, axes, g, p)
        if p.need_dots and grads.shared is not None:
            _sum_offset_gradient(samples, grads.shared, part, tap, axes, p)
        elif p.need_dots:
            if row.previous >= 0:
                # Sums over channels go from block to block: this one adds where the one before has been.
                wait_until(counters, part.progress + row.previous, part.ordinal * taps + tap + 1)
            _add_offset_gradient(samples, masks, grads, part, row, tap, axes)
            advance_counter(counters, part.progress + part.block)
        if p.need_weight:
            _gradient_of_weight(part, row, tap, scratch, pairs, tables.depthwise, g, p)


@inline
def _copy_gradient(part: Any, row: Any, grad_output: Any, grads: Any, pairs: Any, depthwise: Any, g: Any) -> None:
    """The output's gradient in the tile, for the block's products: depthwise (position, channel), else (output channel,
    position); pairs are there already."""
    use_widest_vectors()
    if depthwise is not None:
        turned = at(grads, (part.thread, 0, 0))
        for c in range(row.channels):
            source = at(grad_output, (part.image, row.channel + c, part.start))
            for i in range(part.positions):
                turned[i * COLUMN_ROW + c] = source[i]
    elif pairs is None:
        for o in range(g.out_channels // g.groups):
            for i in range(part.positions):
                grads[part.thread, o, i] = grad_output[part.image, row.first_out + o, part.start + i]


@inline
def _gradient_of_columns(
    part: Any, row: Any, tap: int, scratch: Any, pairs: Any, depthwise: Any, g: Any, p: Any
) -> None:
    """grad_columns[i, c] = sum_o grad_output[o, i] * weight[o, c, tap]."""
    thread, width, outs, count = part.thread, row.width, g.out_channels // g.groups, part.positions
    target = at(scratch.columns, (thread, 1, 0, 0))
    if depthwise is not None:
        scale = at(scratch.packed, (row.packed_at + tap * width,))
        _scale_channels(at(scratch.grads, (thread, 0, 0)), scale, target, COLUMN_ROW, count, row.channels)
    elif pairs is None:
        for o in range(0, outs, DEPTH):
            weights = at(scratch.packed, (row.packed_at + (tap * p.depth + o) * width,))
            grads, depth = at(scratch.grads, (thread, o, 0)), min(DEPTH, outs - o)
            _multiply(grads, 1, ROW, count, weights, width, depth, target, COLUMN_ROW, o > 0, width, p)
    else:
        weights, of_row = at(scratch.packed, (row.packed_at + tap * p.depth * width,)), pairs.by_position.shape[3]
        grads = at(pairs.by_position, (part.image, row.first_out // outs, part.start, 0))
        _multiply(grads, of_row, 1, count, weights, width, p.depth, target, COLUMN_ROW, False, width, p)


@inline
def _gradient_of_weight(
    part: Any, row: Any, tap: int, scratch: Any, pairs: Any, depthwise: Any, g: Any, p: Any
) -> None:
    """Eq. 6 for one tap of one tile: partial[o, c] += sum_i grad_output[o, i] * columns[i, c]."""
    use_widest_vectors()
    thread, width, outs, count = part.thread, row.width, g.out_channels // g.groups, part.positions
    columns, more = at(scratch.columns, (thread, 0, 0, 0)), not part.is_first
    if depthwise is not None:
        sums = at(scratch.partial, (part.split, row.partial_at + tap * width))
        _sum_channels(at(scratch.grads, (thread, 0, 0)), columns, sums, COLUMN_ROW, count, row.channels, more)
        return
    sums = at(scratch.partial, (part.split, row.partial_at + tap * p.rows * width))
    if pairs is None:
        grads = at(scratch.grads, (thread, 0, 0))
        _multiply(grads, ROW, 1, outs, columns, COLUMN_ROW, count, sums, width, more, width, p)
    else:
        paired, of_row = at(pairs.columns, (thread, 0, 0, 0)), pairs.by_output.shape[1]
        _pair_columns(columns, paired, count, width)
        grads = at(pairs.by_output, (part.image * g.out_channels + row.first_out, part.start))
        _multiply(grads, of_row, 1, outs, paired, COLUMN_ROW, _filled(count), sums, width, more, width, p)


@inline_always
def _multiply(
    a: Any,
    a_row: int,
    a_step: int,
    rows: int,
    b: Any,
    b_step: int,
    depth: int,
    c: Any,
    c_row: int,
    add: bool,
    width: int,
    p: Any,
) -> None:
    """c[i, j] (+)= sum_k a[i * a_row + k * a_step] * b[k, j] for j < width, whole panels and then two vectors."""
    together = pick(b, 1, 2)
    for j in range(0, width, p.panel):
        if PANEL == 2 or width - j >= p.panel:
            for i in range(0, rows, p.wide_lines):
                part, sums = advance(b, j * together), advance(c, i * c_row + j)
                multiply_wide(advance(a, i * a_row), a_row, a_step, part, b_step, depth, sums, c_row, add)
        else:
            for k in range(j, width, p.panel // 2):
                for i in range(0, rows, p.lines):
                    part, sums = advance(b, k * together), advance(c, i * c_row + k)
                    multiply_tile(advance(a, i * a_row), a_row, a_step, part, b_step, depth, sums, c_row, add)


@inline_always
def _part_of(unit: int, parts: int, g: Any) -> tuple[int, int, int]:
    """Block, image, and part of its pixels."""
    image = unit // parts
    block = image // g.batch
    return block, image - block * g.batch, unit - image * parts


@inline_always
def _filled(depth: int) -> int:
    """What a product of pairs takes for this depth: behind it both factors have zeros."""
    return -(-depth // pair_products.DEPTH) * pair_products.DEPTH


@inline
def _pair_gradients(
    grad_output: Any, b: int, start: int, by_position: Any, by_output: Any, scratch: Any, g: Any, p: Any
) -> None:
    """The output's gradient at one tile's positions of image b: by_position[group, position, output of the group] and
    by_output[output, position], zeros behind the last output and the last position."""
    nothing = grad_output.dtype.type(0)
    lanes = VECTOR_BYTES // grad_output.itemsize
    outs, length = g.out_channels // g.groups, volume(g.out_size)
    last = min(start + p.positions, length)
    whole = start + (last - start) // lanes * lanes
    for o in range(g.out_channels):
        target = at(by_output, (b * g.out_channels + o, 0))
        copy_vectors(advance(target, start), at(grad_output, (b, o, start)), (whole - start) // lanes)
        for i in range(whole, last):
            put(target, i, grad_output[b, o, i])
        for i in range(last, start + p.positions):
            put(target, i, nothing)
    for group in range(g.groups):
        first = group * outs
        for o in range(0, outs, lanes):
            some = min(lanes, outs - o)
            for i in range(start, last if some < lanes else whole, lanes):
                if some < lanes:
                    for k in range(i, min(i + lanes, last)):
                        for n in range(some):
                            put(at(by_position, (b, group, k, o)), n, grad_output[b, first + o + n, k])
                    continue
                transpose_block(at(grad_output, (b, first + o, i)), length, scratch, lanes, scratch)
                for k in range(lanes):
                    copy_vectors(at(by_position, (b, group, i + k, o)), advance(scratch, k * lanes), 1)
            if some == lanes:
                for k in range(whole, last):
                    for n in range(lanes):
                        put(at(by_position, (b, group, k, o)), n, grad_output[b, first + o + n, k])
        for k in range(start, last):
            for n in range(outs, p.depth):
                put(at(by_position, (b, group, k, 0)), n, nothing)


@inline
def _pair_columns(columns: Any, paired: Any, count: int, width: int) -> None:
    """paired[i // 2, c, i % 2] = columns[i, c], rounded; zeros behind the last position."""
    lanes = VECTOR_BYTES // 4
    for i in range(count, _filled(count)):
        for c in range(width):
            columns[i * COLUMN_ROW + c] = 0
    for i in range(0, _filled(count), 2):
        row = advance(columns, i * COLUMN_ROW)
        for c in range(0, width, lanes):
            target = advance(paired, i * COLUMN_ROW + 2 * c)
            pack_rows(target, advance(row, c), advance(row, COLUMN_ROW + c))


@inline
def _finish_backward(
    thread: int, counters: Any, planes: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    """Phase 2: gradients into the caller's layout."""
    use_widest_vectors()
    blocks, pixels = tables.blocks, volume(g.in_size)
    parts = pixel_parts(pixels)
    inputs = len(blocks) * g.batch * parts * p.need_input if planes is None else 0
    lanes = VECTOR_BYTES // scratch.partial.itemsize
    rows = 1 if tables.depthwise is not None else -(-(g.out_channels // g.groups) // lanes)
    outputs = inputs + len(blocks) * rows * p.need_weight
    units = outputs + g.out_channels * p.need_bias
    unit = claim_near(counters, 2, thread, units)
    while unit < units:
        if unit < inputs:
            block, b, part = _part_of(unit, parts, g)
            channel, channels = blocks[block].channel, blocks[block].channels
            image, origin = scratch.grad_image, (b * g.in_channels + channel) * (pixels + 1)
            first, last = part * PIXELS * channels, min((part + 1) * PIXELS, pixels) * channels
            for start in range(p.apart, p.pieces * p.apart, p.apart):
                for i in range(origin + first, origin + last):
                    image[i] += image[start + i]
            block_to_channels_first(image, origin, channels, channels, grads.input, b, channel, 1, part, pixels)
        elif unit < outputs:
            block = (unit - inputs) // rows
            first, outs = (unit - inputs - block * rows) * lanes, g.out_channels // g.groups
            if tables.depthwise is None:
                squares = at(scratch.squares, (thread, 0))
                reduce_weight(scratch.partial, grads.weight, squares, blocks[block], first, outs, p.rows, p.splits)
            else:
                reduce_depthwise(scratch.partial, grads.weight, blocks[block], p.splits)
        else:
            _sum_bias(grads.output, grads.bias, unit - outputs, g)
        finish(counters, 2)
        unit = claim_near(counters, 2, thread, units)
    wait_for(counters, 2, units)


@inline
def _sum_bias(grad_output: Any, grad_bias: Any, o: int, g: Any) -> None:
    """Eq. 7."""
    total = sum_values(at(grad_output, (0, o, 0)), volume(g.out_size))
    for b in range(1, g.batch):
        total += sum_values(at(grad_output, (b, o, 0)), volume(g.out_size))
    grad_bias[o] = total


@inline
def _sample_backward(
    columns: Any,
    grad_columns: Any,
    image: Any,
    grad_image: Any,
    samples: Any,
    count: int,
    channels: int,
    axes: Any,
    p: Any,
) -> None:
    """One tap of a tile: its columns, eq. 5 into grad_image, and the dots for eq. 3 and 4."""
    vectors = vectors_of(image, channels)
    for i in range(count):
        corners = places(samples, i, channels, axes)
        weights = column(advance(samples.weights, i), samples.row, axes)
        out, grad = advance(columns, i * COLUMN_ROW), advance(grad_columns, i * COLUMN_ROW)
        dots = advance(samples.dots, i)
        if p.need_input:
            put_column(dots, samples.row, blend_dots_scatter(out, grad, image, grad_image, corners, weights, channels))
        elif p.need_dots:
            put_column(dots, samples.row, blend_dots(out, grad, image, grad_image, corners, weights, channels))
        else:
            blend(out, image, corners, weights, vectors)


@inline
def _sample_planes(
    planes: Any,
    part: Any,
    row: Any,
    scratch: Any,
    grad_input: Any,
    mask: Any,
    is_infinite: bool,
    axes: Any,
    g: Any,
    p: Any,
) -> None:
    """`_sample_backward` on planes as they lie, in the same order: the same bits."""
    thread, channels, samples = part.thread, row.channels, samples_of(part.thread, scratch)
    columns, grad_columns = at(scratch.columns, (thread, 0, 0, 0)), at(scratch.columns, (thread, 1, 0, 0))
    pixels, gathered = at(scratch.pixels, (thread, 0)), times(corner_numbers(axes), channels)
    for i in range(part.positions):
        out, grad = advance(columns, i * COLUMN_ROW), advance(grad_columns, i * COLUMN_ROW)
        corners = column(advance(samples.corners, i), samples.row, axes)
        weights = column(advance(samples.weights, i), samples.row, axes)
        gather_corners(planes, part.image, row.channel, channels, corners, g, pixels)
        if p.need_input | p.need_dots:
            dots = blend_dots(out, grad, pixels, pixels, gathered, weights, channels)
            put_column(advance(samples.dots, i), samples.row, dots)
        else:
            blend(out, pixels, gathered, weights, vectors_of(pixels, channels))
        if is_infinite and mask[i] - mask[i] != 0:
            infinite_sample(out, mask[i], pixels, gathered, i, channels, samples, axes)
        if p.need_input:
            _scatter_to_planes(grad, grad_input, part, row, corners, weights, scratch, g)


@inline
def _scatter_to_planes(
    grad: Any, grad_input: Any, part: Any, row: Any, corners: Any, weights: Any, scratch: Any, g: Any
) -> None:
    """Eq. 5 of one sample."""
    places, products = at(scratch.places, (part.thread, 0)), at(scratch.products, (part.thread, 0))
    listed, one = 0, type(weights[0])(1)
    for k in range(len(corners)):
        if corners[k] != volume(g.in_size):
            places[listed], products[listed] = corners[k], weights[k]
            listed += 1
    for c in range(row.channels):
        target = at(grad_input, (part.image, row.channel + c, 0))
        plane_scatter(advance(grad, c), target, places, products, listed, 1, 1, one)


@inline
def _add_offset_gradient(samples: Any, masks: Any, grads: Any, part: Any, row: Any, tap: int, axes: Any) -> None:
    """Eq. 3 and 4 from the dots of the column gradient with the corners."""
    last = len(axes)
    for axis in range(last + 1):
        blend_dots_of(samples, axis, part.positions, axes)
        if axis < last:
            target = at(grads.offset, (part.image, row.og, tap, axis, part.start))
        else:
            target = at(grads.mask, (part.image, row.og, tap, part.start))
        _add_to_gradient(target, samples.weights, masks, axis < last, part.positions, row)


@inline
def _sum_offset_gradient(samples: Any, shared: Any, part: Any, tap: int, axes: Any, p: Any) -> None:
    """Eq. 3 where all positions have one offset: a tile's sum onto those of the same piece and block."""
    for axis in range(len(axes)):
        blend_dots_of(samples, axis, part.positions, axes)
        shared[part.image * p.pieces + part.piece, part.block, tap, axis] += sum_values(samples.weights, part.positions)


@inline
def _add_to_gradient(target: Any, sums: Any, mask: Any, is_scaled: bool, count: int, row: Any) -> None:
    """The mask multiplies what each block adds to an offset's gradient; an infinite one the whole sum, which may be
    finite where parts are not."""
    one, add = type(mask[0])(1), row.previous >= 0
    for i in range(count):
        m = mask[i] if is_scaled else one
        is_finite = m - m == 0
        total = sums[i] * (m if is_finite else one)
        if add:
            total += target[i]
        target[i] = total * (one if is_finite or not row.is_last else m)


@inline
def _scale_channels(grads: Any, scale: Any, target: Any, row: int, count: int, channels: int) -> None:
    """target[i, c] = grads[i, c] * scale[c]."""
    for i in range(count):
        first = advance(grads, i * row)
        second = advance(target, i * row)
        for c in range(channels):
            second[c] = first[c] * scale[c]


@inline
def _sum_channels(grads: Any, columns: Any, target: Any, row: int, count: int, channels: int, add: bool) -> None:
    """target[c] (+)= sum_i grads[i, c] * columns[i, c]."""
    if not add:
        for c in range(channels):
            target[c] = 0
    for i in range(count):
        first = advance(grads, i * row)
        second = advance(columns, i * row)
        for c in range(channels):
            target[c] += first[c] * second[c]


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

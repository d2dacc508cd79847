"""Backward of a convolution with or without offsets: every gradient in one pass over the tiles (eq. 3 to 7)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

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
from pydeform.cpu.conv.weights import (
    pack_backward,
    pack_depthwise,
    reduce_depthwise,
    reduce_weight,
    squares_size,
)
from pydeform.cpu.core import pair_products, parallel
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.layout import PIXELS, block_to_channels_first, pixel_parts, to_channels_last
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
from pydeform.cpu.core.planes import gather_corners, planes_of
from pydeform.cpu.core.simd import (
    PANEL,
    VECTOR_BYTES,
    advance,
    at,
    blend,
    blend_dots,
    blend_dots_scatter,
    copy_vectors,
    sum_values,
    transpose_block,
    use_widest_vectors,
)
from pydeform.cpu.core.weighted import plane_scatter
from pydeform.cpu.sampling.corners import blend_infinite, infinite_sample, locate_tap, lowest_coordinate, tile_origins

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
    need_input: int
    need_dots: int  # for offset and mask
    need_weight: int
    need_bias: int


class Prepared(NamedTuple):
    """All that is decided before the arrays are known."""

    threads: int
    key: str  # of the kernel's types
    planes: bool  # corners are gathered from the input, and its gradient added up, as they lie; else channels last
    workspace: Workspace
    pairs: Workspace | None  # what pairs take besides, if there are any
    blocks: Any
    depthwise: int | None
    plan: BackwardPlan


def backward(
    grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, needs: Any
) -> dict[str, Any]:
    dtype = compute_dtype(input.dtype)
    taps = g.kernel_h * g.kernel_w
    positions = g.out_h * g.out_w
    need_dots = "offset" in needs or "mask" in needs
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if prefers_planes(g) else empty
    grad_input = make((g.batch, g.in_channels, g.in_h * g.in_w) if "input" in needs else (0, 1, 1), dtype)
    grad_offset = empty((g.batch, g.offset_groups, taps, 2, positions) if need_dots else (0, 1, 1, 2, 1), dtype)
    grad_mask = empty((g.batch, g.offset_groups, taps, positions) if need_dots else (0, 1, 1, 1), dtype)
    grad_weight = empty((g.out_channels, g.in_channels // g.groups, taps) if "weight" in needs else (0, 1, 1), dtype)
    grad_bias = empty((g.out_channels,) if "bias" in needs else (0,), dtype)
    if g.batch == 0:
        grad_weight[...] = 0
        grad_bias[...] = 0
    elif needs:
        numbers = numbers_of(input.dtype, g)
        most_threads = threads_for(g, 3, g.batch * g.in_channels * positions)
        how = _prepared(g, dtype, numbers, most_threads, offset is not None, mask is not None, needs)
        arrays = how.workspace.take()
        pairs = how.pairs.take() if how.pairs else [None, None, None]
        parallel.run(
            _backward,
            how.key,
            how.threads,
            parallel.new_counters(3, g.batch * how.plan.pieces * len(how.blocks)),
            contiguous(grad_output, dtype, (g.batch, g.out_channels, positions)),
            *flat_arguments(None if how.planes else input, offset, weight, bias, mask, g, dtype, how.plan.positions),
            planes_of(input) if how.planes else None,
            grad_input,
            grad_offset,
            grad_mask,
            grad_weight,
            grad_bias,
            *arrays,
            *pairs,
            how.blocks,
            how.depthwise,
            g,
            how.plan,
        )
        how.workspace.give_back(arrays)
        if how.pairs:
            how.pairs.give_back(pairs)
    taken = {
        "input": (grad_input, (g.batch, g.in_channels, g.in_h, g.in_w)),
        "offset": (grad_offset, (g.batch, 2 * g.offset_groups * taps, g.out_h, g.out_w)),
        "weight": (grad_weight, (g.out_channels, g.in_channels // g.groups, g.kernel_h, g.kernel_w)),
        "bias": (grad_bias, (g.out_channels,)),
        "mask": (grad_mask, (g.batch, g.offset_groups * taps, g.out_h, g.out_w)),
    }
    return {
        name: to_result(grad, (offset if name == "offset" else input).dtype, shape) if name in needs else None
        for name, (grad, shape) in taken.items()
    }


def _prepared(g: Any, *rest: Any) -> Prepared:
    return (_kept if is_small(g) else _kept.__wrapped__)(g, *rest)


@functools.lru_cache(maxsize=64)
def _kept(
    g: Any, dtype: Any, numbers: Any, most_threads: int, has_offset: bool, has_mask: bool, needs: frozenset[str]
) -> Prepared:
    pixel_dtype = conv_plan.pixel_dtype(g)
    lanes = VECTOR_BYTES // dtype.itemsize
    has_pairs = numbers != dtype
    wide_lines, lines, _ = rows_of(numbers)
    depth, fill = g.out_channels // g.groups, math.lcm(wide_lines, lines)
    rows = max(round_up(depth, wide_lines), round_up(depth, lines))
    if has_pairs:
        depth, fill = round_up(depth, pair_products.DEPTH), math.lcm(fill, pair_products.DEPTH)
    # An image of few channels, too, is work for two threads: it has two pieces of tiles or, since these cost a copy of
    # its gradient, two blocks of channels. Never by batch, which must not show.
    halves = g.in_channels * g.in_h * g.in_w * dtype.itemsize > SMALL_IMAGE
    blocks, weight_size, packed_size = _blocks(g, 2 * lanes, rows, depth, halves)
    out_positions = g.out_h * g.out_w
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
        need_input=int("input" in needs),
        need_dots=int("offset" in needs or "mask" in needs),
        need_weight=int("weight" in needs),
        need_bias=int("bias" in needs),
    )
    parts = -(-g.in_h * g.in_w // PIXELS)
    threads = min(most_threads, max(len(blocks) * g.batch * parts, splits * len(blocks), g.out_channels))
    arrays = Workspace(
        ((0 if planes else image_size,), dtype),
        ((pieces * image_size if plan.need_input and not planes else lanes,), dtype),
        ((packed_size,), numbers),
        ((threads, squares_size(g, lanes)), dtype),
        ((splits if plan.need_weight else 0, weight_size), dtype),
        ((threads, 0 if has_pairs else COLUMN_ROW if is_depthwise(g) else rows, ROW), dtype),
        ((threads, 2, positions, COLUMN_ROW), dtype),
        ((threads, 4, positions), pixel_dtype),
        ((threads, 10, positions), dtype),
        ((threads, 2, positions), INT32),
        ((threads, corners_size(blocks) if planes else 0), dtype),
        ((threads, 4), pixel_dtype),
        ((threads, 4), dtype),
    )
    # Rows of an odd number of cache lines: else those of a tile would crowd into few of them.
    pairs = Workspace(
        ((g.batch, g.groups, tiles * positions, _odd_lines(depth)), numbers),
        ((g.batch * g.out_channels + max(wide_lines, lines), _odd_lines(tiles * positions)), numbers),
        ((threads, positions // 2, COLUMN_ROW, 2), numbers),
    )
    depthwise = 1 if is_depthwise(g) else None
    key = dtype.char + numbers.char + pixel_dtype.char + planes * "p" + has_offset * "o" + bool(depthwise) * "d"
    return Prepared(threads, key, planes, arrays, pairs if has_pairs else None, blocks, depthwise, plan)


@Kernel
def _backward(
    thread: int,
    counters: Any,
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    planes: Any,
    grad_input: Any,
    grad_offset: Any,
    grad_mask: Any,
    grad_weight: Any,
    grad_bias: Any,
    image: Any,
    grad_image: Any,
    packed: Any,
    packing: Any,
    partial: Any,
    tile_grad: Any,
    tile_columns: Any,
    corners: Any,
    weights: Any,
    bases: Any,
    all_pixels: Any,
    all_places: Any,
    all_products: Any,
    by_position: Any,
    by_output: Any,
    paired: Any,
    blocks: Any,
    depthwise: Any,
    g: Any,
    p: Any,
) -> None:
    """`by_position`, `by_output` and `paired`: the output's gradient and a tile's columns in pairs, or None. One of
    input and planes is None, offset is None in a plain convolution, and depthwise where it is not: a kernel is compiled
    without what they would take."""
    call_helpers(thread, counters)
    use_widest_vectors()
    scratch = at(tile_columns, (thread, 0, 0, 0))
    _prepare_backward(
        thread,
        counters,
        input,
        image,
        grad_image,
        weight,
        packed,
        at(packing, (thread, 0)),
        grad_output,
        by_position,
        by_output,
        scratch,
        blocks,
        depthwise,
        g,
        p,
    )

    # Phase 1: every unit is one block of channels of one range of images, and owns its slices of all gradients.
    low = lowest_coordinate(g.boundary, image)
    has_mask = p.has_mask != 0
    taps = g.kernel_h * g.kernel_w
    length = g.out_h * g.out_w
    out_channels = g.out_channels // g.groups
    corner = corners[thread]
    blending = weights[thread]
    base = bases[thread]
    working = p.splits * len(blocks) * (p.need_input | p.need_dots | p.need_weight)
    if paired is not None:
        begin_products(at(paired, (thread, 0, 0, 0)))
    unit = claim(counters, 1)
    while unit < working:
        split = unit // len(blocks)
        block = unit - split * len(blocks)
        row = blocks[block]
        og, channel, channels, width, previous = row.og, row.channel, row.channels, row.width, row.previous
        first_piece = split * g.batch * p.pieces // p.splits
        for piece in range(first_piece, (split + 1) * g.batch * p.pieces // p.splits):
            b = piece // p.pieces
            part = piece - b * p.pieces
            origin = (b * g.in_channels + channel) * (g.in_h * g.in_w + 1)
            grad_origin = (part * p.apart + origin) * p.need_input
            progress = PROGRESS + piece * len(blocks)
            first_tile = part * p.tiles // p.pieces
            for tile in range(first_tile, (part + 1) * p.tiles // p.pieces):
                start = tile * p.positions
                count = min(p.positions, length - start)
                tile_origins(start, count, base, g)
                if depthwise is not None:  # (position, channel)
                    grads = at(tile_grad, (thread, 0, 0))
                    for c in range(channels):
                        for i in range(count):
                            grads[i * COLUMN_ROW + c] = grad_output[b, channel + c, start + i]
                elif paired is None:  # (output channel, position)
                    for o in range(out_channels):
                        for i in range(count):
                            tile_grad[thread, o, i] = grad_output[b, row.first_out + o, start + i]
                for tap in range(taps):
                    masks = at(mask, (b, og, tap, start)) if has_mask else at(mask, (0, 0, 0, 0))
                    is_infinite = locate_tap(
                        offset, masks, b, og, tap, start, count, low, base, corner, blending, g, has_mask
                    )
                    if not (p.need_input | p.need_dots):
                        pass
                    elif depthwise is not None:
                        # grad_columns[i, c] = grad_output[c, i] * weight[c, tap]
                        _scale_channels(
                            at(tile_grad, (thread, 0, 0)),
                            at(packed, (row.packed_at + tap * width,)),
                            at(tile_columns, (thread, 1, 0, 0)),
                            COLUMN_ROW,
                            count,
                            channels,
                        )
                    else:
                        # grad_columns[i, c] = sum_o grad_output[o, i] * weight[o, c, tap]
                        panel_at = row.packed_at + tap * width * p.depth
                        if paired is None:
                            for o in range(0, out_channels, DEPTH):
                                _multiply(
                                    at(tile_grad, (thread, o, 0)),
                                    1,
                                    ROW,
                                    count,
                                    at(packed, (panel_at + o * width,)),
                                    width,
                                    min(DEPTH, out_channels - o),
                                    at(tile_columns, (thread, 1, 0, 0)),
                                    COLUMN_ROW,
                                    o > 0,
                                    width,
                                    p,
                                )
                        else:
                            _multiply(
                                at(by_position, (b, row.first_out // out_channels, start, 0)),
                                by_position.shape[3],
                                1,
                                count,
                                at(packed, (panel_at,)),
                                width,
                                p.depth,
                                at(tile_columns, (thread, 1, 0, 0)),
                                COLUMN_ROW,
                                False,
                                width,
                                p,
                            )
                    if planes is None:
                        _sample_backward(
                            at(tile_columns, (thread, 0, 0, 0)),
                            at(tile_columns, (thread, 1, 0, 0)),
                            at(image, (origin,)),
                            at(grad_image, (grad_origin,)),
                            corner,
                            blending,
                            count,
                            channels,
                            p,
                        )
                        if is_infinite:
                            blend_infinite(
                                at(tile_columns, (thread, 0, 0, 0)),
                                COLUMN_ROW,
                                at(image, (origin,)),
                                corner,
                                blending,
                                masks,
                                count,
                                channels,
                            )
                    else:
                        _sample_planes(
                            planes,
                            b,
                            channel,
                            channels,
                            at(tile_columns, (thread, 0, 0, 0)),
                            at(tile_columns, (thread, 1, 0, 0)),
                            grad_input,
                            corner,
                            blending,
                            masks,
                            is_infinite,
                            count,
                            at(all_pixels, (thread, 0)),
                            at(all_places, (thread, 0)),
                            at(all_products, (thread, 0)),
                            g,
                            p,
                        )
                    if p.need_dots and previous >= 0:
                        # Sums over channels go from block to block: this one adds where the one before has been.
                        wait_until(counters, progress + previous, (tile - first_tile) * taps + tap + 1)
                    if p.need_dots:
                        _add_offset_gradient(
                            blending,
                            masks,
                            at(grad_offset, (b, og, tap, 0, start)),
                            at(grad_offset, (b, og, tap, 1, start)),
                            at(grad_mask, (b, og, tap, start)),
                            count,
                            previous >= 0,
                            row.is_last != 0,
                        )
                        advance_counter(counters, progress + block)
                    if not p.need_weight:
                        pass
                    elif depthwise is not None:
                        # partial[c] += sum_i grad_output[c, i] * columns[i, c]
                        _sum_channels(
                            at(tile_grad, (thread, 0, 0)),
                            at(tile_columns, (thread, 0, 0, 0)),
                            at(partial, (split, row.partial_at + tap * width)),
                            COLUMN_ROW,
                            count,
                            channels,
                            piece > first_piece or tile > first_tile,
                        )
                    else:
                        # partial[o, c] += sum_i grad_output[o, i] * columns[i, c]: eq. 6 for one tap of one tile
                        more = piece > first_piece or tile > first_tile
                        if paired is not None:
                            _pair_columns(
                                at(tile_columns, (thread, 0, 0, 0)), at(paired, (thread, 0, 0, 0)), count, width
                            )
                            _multiply(
                                at(by_output, (b * g.out_channels + row.first_out, start)),
                                by_output.shape[1],
                                1,
                                out_channels,
                                at(paired, (thread, 0, 0, 0)),
                                COLUMN_ROW,
                                _filled(count),
                                at(partial, (split, row.partial_at + tap * p.rows * width)),
                                width,
                                more,
                                width,
                                p,
                            )
                        else:
                            _multiply(
                                at(tile_grad, (thread, 0, 0)),
                                ROW,
                                1,
                                out_channels,
                                at(tile_columns, (thread, 0, 0, 0)),
                                COLUMN_ROW,
                                count,
                                at(partial, (split, row.partial_at + tap * p.rows * width)),
                                width,
                                more,
                                width,
                                p,
                            )
        finish(counters, 1)
        unit = claim(counters, 1)
    if paired is not None:
        end_products(at(paired, (thread, 0, 0, 0)))
    wait_for(counters, 1, working)

    _finish_backward(
        thread,
        counters,
        grad_output,
        grad_image,
        partial,
        at(packing, (thread, 0)),
        grad_input,
        grad_weight,
        grad_bias,
        blocks,
        planes,
        depthwise,
        g,
        p,
    )
    let_helpers_go(thread, counters)


@inline
def _prepare_backward(
    thread: int,
    counters: Any,
    input: Any,
    image: Any,
    grad_image: Any,
    weight: Any,
    packed: Any,
    packing: Any,
    grad_output: Any,
    by_position: Any,
    by_output: Any,
    scratch: Any,
    blocks: Any,
    depthwise: Any,
    g: Any,
    p: Any,
) -> None:
    """Phase 0: the image to channels-last, its gradient to zero, the weight into panels; the output's gradient into
    pairs."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    converting = len(blocks) * g.batch * parts if input is not None else 0
    packing_too = converting + len(blocks)
    preparing = packing_too
    if by_position is not None:
        preparing += g.batch * p.tiles
    unit = claim_near(counters, 0, thread, preparing)
    while unit < preparing:
        if unit >= packing_too:
            if by_position is not None:
                b = (unit - packing_too) // p.tiles
                start = (unit - packing_too - b * p.tiles) * p.positions
                _pair_gradients(grad_output, b, start, by_position, by_output, scratch, g, p)
        elif unit >= converting:
            row = blocks[unit - converting]
            if depthwise is None:
                pack_backward(weight, packed, packing, row, g.out_channels // g.groups, p.depth)
            else:
                for tap in range(g.kernel_h * g.kernel_w):
                    pack_depthwise(weight, packed, row.channel, row.channels, tap, row.packed_at + tap * row.width)
        elif input is not None:  # block by block, as phase 1 goes on
            block, b, part = _part_of(unit, parts, g)
            channel, channels = blocks[block].channel, blocks[block].channels
            origin = (b * g.in_channels + channel) * (pixels + 1)
            to_channels_last(input, b, channel, 1, image, origin, channels, channels, part, pixels)
            if p.need_input:
                last = pixels + 1 if part == parts - 1 else (part + 1) * PIXELS
                for start in range(origin, origin + p.pieces * p.apart, p.apart):
                    for i in range(start + part * PIXELS * channels, start + last * channels):
                        grad_image[i] = 0
        finish(counters, 0)
        unit = claim_near(counters, 0, thread, preparing)
    wait_for(counters, 0, preparing)


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
    outs, length = g.out_channels // g.groups, g.out_h * g.out_w
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
    thread: int,
    counters: Any,
    grad_output: Any,
    grad_image: Any,
    partial: Any,
    packing: Any,
    grad_input: Any,
    grad_weight: Any,
    grad_bias: Any,
    blocks: Any,
    planes: Any,
    depthwise: Any,
    g: Any,
    p: Any,
) -> None:
    """Phase 2: gradients into the caller's layout."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    inputs = len(blocks) * g.batch * parts * p.need_input if planes is None else 0
    lanes = VECTOR_BYTES // partial.itemsize
    rows = 1 if depthwise is not None else -(-(g.out_channels // g.groups) // lanes)
    outputs = inputs + len(blocks) * rows * p.need_weight
    biases = outputs + g.out_channels * p.need_bias
    unit = claim_near(counters, 2, thread, biases)
    while unit < biases:
        if unit < inputs:
            block, b, part = _part_of(unit, parts, g)
            channel, channels = blocks[block].channel, blocks[block].channels
            origin = (b * g.in_channels + channel) * (pixels + 1)
            first, last = part * PIXELS * channels, min((part + 1) * PIXELS, pixels) * channels
            for start in range(p.apart, p.pieces * p.apart, p.apart):
                for i in range(origin + first, origin + last):
                    grad_image[i] += grad_image[start + i]
            block_to_channels_first(grad_image, origin, channels, channels, grad_input, b, channel, 1, part, pixels)
        elif unit < outputs:
            block = (unit - inputs) // rows
            first = (unit - inputs - block * rows) * lanes
            if depthwise is None:
                outs = g.out_channels // g.groups
                reduce_weight(partial, grad_weight, packing, blocks[block], first, outs, p.rows, p.splits)
            else:
                reduce_depthwise(partial, grad_weight, blocks[block], p.splits)
        else:  # eq. 7
            o = unit - outputs
            total = sum_values(at(grad_output, (0, o, 0)), g.out_h * g.out_w)
            for b in range(1, g.batch):
                total += sum_values(at(grad_output, (b, o, 0)), g.out_h * g.out_w)
            grad_bias[o] = total
        finish(counters, 2)
        unit = claim_near(counters, 2, thread, biases)
    wait_for(counters, 2, biases)


@inline
def _sample_backward(
    columns: Any,
    grad_columns: Any,
    image: Any,
    grad_image: Any,
    corner: Any,
    weights: Any,
    count: int,
    channels: int,
    p: Any,
) -> None:
    """One tap of a tile: its columns, eq. 5 into grad_image, and the dots for eq. 3 and 4 in rows 6-9 of weights."""
    vectors = -(-channels * weights.itemsize // VECTOR_BYTES)
    for i in range(count):
        i0, i1 = corner[0, i] * channels, corner[1, i] * channels
        i2, i3 = corner[2, i] * channels, corner[3, i] * channels
        w0, w1, w2, w3 = weights[0, i], weights[1, i], weights[2, i], weights[3, i]
        out = advance(columns, i * COLUMN_ROW)
        grad = advance(grad_columns, i * COLUMN_ROW)
        if p.need_input:
            dots = blend_dots_scatter(out, grad, image, grad_image, i0, i1, i2, i3, w0, w1, w2, w3, channels)
            weights[6, i], weights[7, i], weights[8, i], weights[9, i] = dots
        elif p.need_dots:
            dots = blend_dots(out, grad, image, grad_image, i0, i1, i2, i3, w0, w1, w2, w3, channels)
            weights[6, i], weights[7, i], weights[8, i], weights[9, i] = dots
        else:
            blend(out, image, i0, i1, i2, i3, w0, w1, w2, w3, vectors)


@inline
def _sample_planes(
    planes: Any,
    b: int,
    channel: int,
    channels: int,
    columns: Any,
    grad_columns: Any,
    grad_input: Any,
    corner: Any,
    weights: Any,
    mask: Any,
    is_infinite: bool,
    count: int,
    pixels: Any,
    places: Any,
    products: Any,
    g: Any,
    p: Any,
) -> None:
    """`_sample_backward` on planes as they lie, in the same order: the same bits."""
    vectors = -(-channels * weights.itemsize // VECTOR_BYTES)
    one = weights.dtype.type(1)
    i1, i2, i3 = channels, 2 * channels, 3 * channels
    for i in range(count):
        w0, w1, w2, w3 = weights[0, i], weights[1, i], weights[2, i], weights[3, i]
        out = advance(columns, i * COLUMN_ROW)
        grad = advance(grad_columns, i * COLUMN_ROW)
        gather_corners(planes, b, channel, channels, corner, i, g, pixels)
        if p.need_input | p.need_dots:
            dots = blend_dots(out, grad, pixels, pixels, 0, i1, i2, i3, w0, w1, w2, w3, channels)
            weights[6, i], weights[7, i], weights[8, i], weights[9, i] = dots
        else:
            blend(out, pixels, 0, i1, i2, i3, w0, w1, w2, w3, vectors)
        if is_infinite:
            infinite_sample(out, mask[i], pixels, 0, i1, i2, i3, weights[4, i], weights[5, i], channels)
        if p.need_input:
            listed = 0
            for k in range(4):
                if corner[k, i] != g.in_h * g.in_w:
                    places[listed], products[listed] = corner[k, i], weights[k, i]
                    listed += 1
            for c in range(channels):
                target = at(grad_input, (b, channel + c, 0))
                plane_scatter(advance(grad, c), target, places, products, listed, 1, 1, one)


@inline
def _add_offset_gradient(
    weights: Any,
    mask: Any,
    grad_y: Any,
    grad_x: Any,
    grad_mask: Any,
    count: int,
    add: bool,
    is_last: bool,
) -> None:
    """Eq. 3 and 4 from the dots of the column gradient with the four corners.

    The mask multiplies what each block adds; an infinite one the whole sum, which may be finite where parts are not.
    """
    one = weights.dtype.type(1)
    for i in range(count):
        ly, lx = weights[4, i], weights[5, i]
        d00, d01, d10, d11 = weights[6, i], weights[7, i], weights[8, i], weights[9, i]
        hy, hx = 1 - ly, 1 - lx
        y = hx * (d10 - d00) + lx * (d11 - d01)
        x = hy * (d01 - d00) + ly * (d11 - d10)
        value = hy * (hx * d00 + lx * d01) + ly * (hx * d10 + lx * d11)
        m = mask[i]
        is_finite = m - m == 0
        part = m if is_finite else one
        y *= part
        x *= part
        if add:
            y += grad_y[i]
            x += grad_x[i]
            value += grad_mask[i]
        whole = one if is_finite or not is_last else m
        y *= whole
        x *= whole
        grad_y[i] = y
        grad_x[i] = x
        grad_mask[i] = value


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
    taps = g.kernel_h * g.kernel_w
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

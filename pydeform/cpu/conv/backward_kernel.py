"""Backward of a convolution with or without offsets: every gradient in one pass over the tiles (eq. 3 to 7)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform.cpu.conv.backward_plan import COLUMN_ROW, PROGRESS, Gradients, Pairs, Part, Scratch, prepared
from pydeform.cpu.conv.columns import sample_backward, sample_planes
from pydeform.cpu.conv.depthwise import pack_depthwise, reduce_depthwise
from pydeform.cpu.conv.gradients import (
    add_offset_gradient,
    copy_gradient,
    gradient_of_columns,
    gradient_of_weight,
    sum_bias,
    sum_offset_gradient,
)
from pydeform.cpu.conv.pairs import pair_gradients
from pydeform.cpu.conv.plan import given_arrays, is_shared, numbers_of, prefers_planes, threads_for
from pydeform.cpu.conv.weights import pack_backward, reduce_weight
from pydeform.cpu.core import parallel
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.layout import PIXELS, block_to_channels_first, pixel_parts, to_channels_last
from pydeform.cpu.core.memory import compute_dtype, contiguous, empty, to_result
from pydeform.cpu.core.pair_products import begin_products, end_products
from pydeform.cpu.core.parallel import (
    advance_counter,
    call_helpers,
    claim,
    claim_near,
    finish,
    let_helpers_go,
    wait_for,
    wait_until,
)
from pydeform.cpu.core.simd import VECTOR_BYTES, at, use_widest_vectors
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.sampling.corners import (
    blend_infinite,
    is_any_infinite,
    locate_tap,
    samples_of,
    tile_origins,
)


def backward(grad_output: Any, arrays: Any, g: Any, needs: Any) -> dict[str, Any]:
    data, offset = arrays.input.dtype, arrays.offset
    dtype, positions = compute_dtype(data), math.prod(g.out_size)
    grads = _empty_gradients(contiguous(grad_output, dtype, (g.batch, g.out_channels, positions)), g, offset, needs)
    if g.batch == 0:
        grads.weight[...] = 0
        grads.bias[...] = 0
        if is_shared(offset):
            grads = grads._replace(offset=np.zeros(offset.shape))
    elif needs:
        numbers, most_threads = numbers_of(data, g), threads_for(g, 3, g.batch * g.in_channels * positions)
        has_mask = arrays.mask is not None
        how = prepared(g, dtype, numbers, most_threads, offset is not None, has_mask, is_shared(offset), needs)
        blocks, pieces = len(how.tables.blocks), g.batch * how.plan.pieces
        if is_shared(offset):
            sums = np.zeros((pieces, blocks, math.prod(g.kernel), len(g.kernel)), dtype)
            grads = grads._replace(shared=sums)
        own = how.workspace.take()
        pairs = how.pairs.take() if how.pairs else None
        parallel.run(
            _backward,
            how.key,
            how.threads,
            parallel.new_counters(3, pieces * blocks),
            given_arrays(arrays, g, dtype, how.planes, how.plan.positions),
            grads,
            Scratch(*own),
            Pairs(*pairs) if pairs else None,
            how.tables,
            g,
            how.plan,
        )
        how.workspace.give_back(own)
        if how.pairs and pairs:
            how.pairs.give_back(pairs)
        if grads.shared is not None:
            grads = grads._replace(offset=_sum_of_pieces(grads.shared, how.tables.blocks["og"], g).astype(dtype))
    results: dict[str, Any] = dict.fromkeys(arrays._fields)
    for name in needs:
        of_name = getattr(arrays, name)
        results[name] = to_result(getattr(grads, name), offset.dtype if name == "offset" else data, of_name.shape)
    return results


def _empty_gradients(grad_output: Any, g: Any, offset: Any, needs: Any) -> Gradients:
    dtype, axes, taps, positions = grad_output.dtype, len(g.kernel), math.prod(g.kernel), math.prod(g.out_size)
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if prefers_planes(g) else empty
    with_dots = 0 if is_shared(offset) or needs.isdisjoint(("offset", "mask")) else g.batch
    return Gradients(
        output=grad_output,
        input=make((g.batch * ("input" in needs), g.in_channels, math.prod(g.in_size)), dtype),
        offset=empty((with_dots, g.offset_groups, taps, axes, positions), dtype),
        mask=empty((with_dots, g.offset_groups, taps, positions), dtype),
        weight=empty((g.out_channels * ("weight" in needs), g.in_channels // g.groups, taps), dtype),
        bias=empty((g.out_channels * ("bias" in needs),), dtype),
        shared=None,
    )


def _sum_of_pieces(sums: Any, offset_groups: Any, g: Any) -> Any:
    """The gradient of an offset that all positions share, in their order."""
    total = np.zeros((g.offset_groups, *sums.shape[2:]))
    for block, og in zip(sums.swapaxes(0, 1), offset_groups, strict=True):
        total[og] += block.sum(axis=0, dtype=np.float64)
    return total


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
                turned = at(scratch.columns, (thread, 0, 0))
                pair_gradients(grad_output, b, start, pairs.by_position, pairs.by_output, turned, g, p)
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
    columns, grad_columns = at(scratch.columns, (thread, 0, 0)), at(scratch.grad_columns, (thread, 0, 0))
    origin = (b * g.in_channels + row.channel) * (volume(g.in_size) + 1)
    source = at(scratch.image, (origin,))
    target = at(scratch.grad_image, ((part.piece * p.apart + origin) * p.need_input,))
    tile_origins(start, count, samples, g)
    copy_gradient(part, row, grads.output, scratch.grads, pairs, tables.depthwise, g)
    for tap in range(taps):
        masks = at(given.mask, (b, row.og, tap, start)) if has_mask else at(given.mask, (0, 0, 0, 0))
        first = b * p.offset_step, row.og, tap, 0, start * p.offset_step
        locate_tap(given.offset, first, masks, tap, count, samples, g)
        if p.need_input | p.need_dots:
            gradient_of_columns(part, row, tap, scratch, pairs, tables.depthwise, g, p)
        if given.planes is None:
            sample_backward(columns, grad_columns, source, target, samples, count, row.channels, axes, p)
            if has_mask and is_any_infinite(masks, count):
                blend_infinite(columns, COLUMN_ROW, source, masks, count, row.channels, samples, axes)
        else:
            sample_planes(given.planes, part, row, scratch, grads.input, masks, axes, g, p)
        if p.need_dots and grads.shared is not None:
            sum_offset_gradient(samples, grads.shared, part, tap, axes, p)
        elif p.need_dots:
            if row.previous >= 0:
                # Sums over channels go from block to block: this one adds where the one before has been.
                wait_until(counters, part.progress + row.previous, part.ordinal * taps + tap + 1)
            add_offset_gradient(samples, masks, grads, part, row, tap, axes)
            advance_counter(counters, part.progress + part.block)
        if p.need_weight:
            gradient_of_weight(part, row, tap, scratch, pairs, tables.depthwise, g, p)


@inline_always
def _part_of(unit: int, parts: int, g: Any) -> tuple[int, int, int]:
    """Block, image, and part of its pixels."""
    image = unit // parts
    block = image // g.batch
    return block, image - block * g.batch, unit - image * parts


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
            sum_bias(grads.output, grads.bias, unit - outputs, g)
        finish(counters, 2)
        unit = claim_near(counters, 2, thread, units)
    wait_for(counters, 2, units)

"""Deformable convolution on NumPy arrays: tiles of output positions, sampled into cache and multiplied at once.

The image is copied once to channels-last, so that a corner is one contiguous run of channels, and a tile of sampled
columns never leaves the cache: no column buffer of the whole problem exists. Equation numbers: docs/math/deform_conv2d.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from pydeform._runtime import get_num_threads
from pydeform.cpu import _threads
from pydeform.cpu._arrays import compute_dtype, contiguous, empty, to_result, workspace
from pydeform.cpu._channels_last import PIXELS, block_to_channels_first, pixel_parts, to_channels_first, to_channels_last
from pydeform.cpu._jit import Kernel, inline
from pydeform.cpu._sampling import locate, locate_plain, lowest_coordinate, tile_origins
from pydeform.cpu._simd import (
    ROWS,
    VECTOR_BYTES,
    advance,
    at,
    blend,
    blend_dots,
    blend_dots_scatter,
    multiply_tile,
    sum_values,
)
from pydeform.cpu._threads import advance_counter, claim, finish, wait_for, wait_until

# Sizes that keep a tile's columns in the second-level cache and a panel of weights in the first.
FORWARD_POSITIONS = 192
BACKWARD_POSITIONS = 96
CHANNELS = 64  # sampled together
DEPTH = 320  # of one product
SERIAL_FLOPS = 2e7  # below this a second thread costs more than it saves
WEIGHT_COPIES = 16 << 20  # bytes for partial weight gradients, one for each range of images


INT32 = np.dtype(np.int32)


class ForwardPlan(NamedTuple):
    """How one forward problem is cut up."""

    positions: int  # of a tile
    tiles: int  # of an image
    panels: int  # of 2 vectors of output channels
    row: int  # elements of a row of columns
    has_offset: int
    has_mask: int


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any) -> Any:
    dtype = compute_dtype(input.dtype)
    output = empty((g.batch, g.out_channels, g.out_h * g.out_w), dtype)
    if output.size:
        lanes = VECTOR_BYTES // dtype.itemsize
        blocks, entries, chunks, depth, packed_size = _forward_steps(g, 2 * lanes)
        threads = _threads_for(g, 1)
        positions = out_positions = g.out_h * g.out_w
        tiles = -(-positions // FORWARD_POSITIONS)
        if threads > 1:  # enough tiles for all; no sum depends on where a tile ends
            tiles = max(tiles, min(-(-4 * threads // g.batch), -(-positions // (4 * ROWS))))
        positions = _round_up(-(-out_positions // tiles), ROWS)
        plan = ForwardPlan(
            positions=positions,
            tiles=-(-out_positions // positions),
            panels=-(-(g.out_channels // g.groups) // (2 * lanes)),
            row=depth + lanes,
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
        )
        threads = min(threads, max(g.batch * plan.tiles, 1))
        _threads.run(
            _forward,
            dtype.char + pixel_dtype(g).char,
            threads,
            _threads.new_counters(2),
            *_flat_arguments(input, offset, weight, bias, mask, g, dtype),
            output,
            *workspace(
                ((_channels_last_size(g) + lanes,), dtype),
                ((packed_size,), dtype),
                ((threads, positions, plan.row), dtype),
                ((threads, positions, plan.panels * 2 * lanes), dtype),
                ((threads, 4, positions), pixel_dtype(g)),
                ((threads, 6, positions), dtype),
                ((threads, 2, positions), INT32),
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
    output: Any,
    image: Any,
    packed: Any,
    columns: Any,
    sums: Any,
    corners: Any,
    weights: Any,
    bases: Any,
    blocks: Any,
    entries: Any,
    chunks: Any,
    g: Any,
    p: Any,
) -> None:
    # Phase 0: the image to channels-last, the weight into panels.
    parts = pixel_parts(g.in_h * g.in_w)
    converting = g.batch * parts
    preparing = converting + len(chunks) * p.panels
    unit = claim(counters, 0)
    while unit < preparing:
        if unit < converting:
            for block in range(len(blocks)):
                channel, channels = blocks[block]
                to_channels_last(
                    input, image, unit // parts, channel, channels, unit % parts, g.in_h * g.in_w
                )
        else:
            _pack_forward(weight, packed, entries, chunks, (unit - converting) // p.panels, (unit - converting) % p.panels, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, preparing)

    # Phase 1: every unit is one tile of positions of one image, and owns its outputs.
    low = lowest_coordinate(g.boundary, bias)
    has_offset, has_mask = p.has_offset != 0, p.has_mask != 0
    length = g.out_h * g.out_w
    pixels = g.in_h * g.in_w + 1
    group_channels = g.out_channels // g.groups
    tile_columns = columns[thread]
    tile_sums = sums[thread]
    corner = corners[thread]
    blending = weights[thread]
    base = bases[thread]
    panel = sums.shape[2] // p.panels
    unit = claim(counters, 1)
    while unit < g.batch * p.tiles:
        b = unit // p.tiles
        start = (unit - b * p.tiles) * p.positions
        count = min(p.positions, length - start)
        tile_origins(start, count, base, g)
        at_tap, at_group = -1, -1
        for chunk in range(len(chunks)):
            group, first_entry, last_entry, depth, packed_at, is_first, is_last = chunks[chunk]
            for e in range(first_entry, last_entry):
                tap, og, channel, channels, column = entries[e]
                if tap != at_tap or og != at_group:
                    at_tap, at_group = tap, og
                    _locate_tap(offset, mask, b, og, tap, start, count, low, base, corner, blending, g, has_offset, has_mask)
                source = at(image, ((b * g.in_channels + channel) * pixels,))
                vectors = -(-channels * image.itemsize // VECTOR_BYTES)
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
            for j in range(p.panels):
                for i in range(0, count, ROWS):
                    multiply_tile(
                        at(tile_columns, (i, 0)),
                        p.row,
                        1,
                        at(packed, (packed_at + j * depth * panel,)),
                        panel,
                        depth,
                        at(tile_sums, (i, j * panel)),
                        p.panels * panel,
                        is_first == 0,
                    )
            if is_last:
                first = group * group_channels
                to_channels_first(
                    tile_sums, output, b, first, group_channels, start, count, bias
                )
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, g.batch * p.tiles)


@inline
def _locate_tap(
    offset: Any, mask: Any, b: int, og: int, tap: int, start: int, count: int, low: Any, base: Any, corner: Any, weights: Any, g: Any, has_offset: bool, has_mask: bool
) -> None:
    """Corners, weights (rows 0-3 of `weights`) and positions within the cell (rows 4, 5) of one tap of a tile."""
    shift_y = tap // g.kernel_w * g.dilation_h
    shift_x = tap % g.kernel_w * g.dilation_w
    if has_offset:
        locate(
            at(offset, (b, og, tap, 0, start)),
            at(offset, (b, og, tap, 1, start)),
            at(mask, (b, og, tap, start)),
            has_mask,
            base,
            shift_y,
            shift_x,
            count,
            low,
            g,
            corner,
            weights,
        )
    else:
        locate_plain(base, shift_y, shift_x, count, g, corner, weights)


@inline
def _pack_forward(weight: Any, packed: Any, entries: Any, chunks: Any, chunk: int, j: int, g: Any, p: Any) -> None:
    """Panel j of one chunk: packed[panel][column][o], zeros behind the last output channel of the group."""
    group, first_entry, last_entry, depth, packed_at, _, _ = chunks[chunk]
    out_channels = g.out_channels // g.groups
    panel = 2 * VECTOR_BYTES // packed.itemsize
    first = group * out_channels + j * panel
    width = min(panel, out_channels - j * panel)
    for e in range(first_entry, last_entry):
        tap, _, channel, channels, column = entries[e]
        local = channel - group * (g.in_channels // g.groups)
        for c in range(channels):
            row = packed_at + (j * depth + column + c) * panel
            for o in range(width):
                packed[row + o] = weight[first + o, local + c, tap]
            for o in range(width, panel):
                packed[row + o] = 0


class BackwardPlan(NamedTuple):
    """How one backward problem is cut up. None of it depends on threads, and only `splits` on the batch."""

    positions: int  # of a tile
    tiles: int  # of an image
    splits: int  # ranges of images, each with a weight gradient of its own
    rows: int  # output channels of a group, rounded up to the register block
    width: int  # widest block of channels, rounded up to a panel
    weight_size: int  # elements of one partial weight gradient
    has_offset: int
    has_mask: int
    need_input: int
    need_dots: int  # for offset and mask
    need_weight: int
    need_bias: int


def backward(
    grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, needs: Any
) -> tuple[Any, Any, Any, Any, Any]:
    dtype = compute_dtype(input.dtype)
    taps = g.kernel_h * g.kernel_w
    positions_out = g.out_h * g.out_w
    need_dots = "offset" in needs or "mask" in needs
    grad_input = empty((g.batch, g.in_channels, g.in_h * g.in_w) if "input" in needs else (0, 1, 1), dtype)
    grad_offset = empty((g.batch, g.offset_groups, taps, 2, positions_out) if need_dots else (0, 1, 1, 2, 1), dtype)
    grad_mask = empty((g.batch, g.offset_groups, taps, positions_out) if need_dots else (0, 1, 1, 1), dtype)
    grad_weight = empty((g.out_channels, g.in_channels // g.groups, taps) if "weight" in needs else (0, 1, 1), dtype)
    grad_bias = empty((g.out_channels,) if "bias" in needs else (0,), dtype)
    if g.batch == 0:
        grad_weight[...] = 0
        grad_bias[...] = 0
    elif needs:
        lanes = VECTOR_BYTES // dtype.itemsize
        panel = 2 * lanes
        blocks, weight_size, packed_size, width = _backward_blocks(g, panel)
        splits = max(1, min(g.batch, WEIGHT_COPIES // (weight_size * dtype.itemsize)))
        tiles = -(-positions_out // BACKWARD_POSITIONS)
        positions = _round_up(-(-positions_out // tiles), ROWS)
        plan = BackwardPlan(
            positions=positions,
            tiles=-(-positions_out // positions),
            splits=splits,
            rows=_round_up(g.out_channels // g.groups, ROWS),
            width=width,
            weight_size=weight_size,
            has_offset=int(offset is not None),
            has_mask=int(mask is not None),
            need_input=int("input" in needs),
            need_dots=int(need_dots),
            need_weight=int("weight" in needs),
            need_bias=int("bias" in needs),
        )
        threads = _threads_for(g, 3)
        image_size = _channels_last_size(g) + lanes
        _threads.run(
            _backward,
            dtype.char + pixel_dtype(g).char,
            threads,
            _threads.new_counters(3),
            np.zeros((g.batch, len(blocks)), np.int64),
            contiguous(grad_output, dtype, (g.batch, g.out_channels, positions_out)),
            *_flat_arguments(input, offset, weight, bias, mask, g, dtype),
            grad_input,
            grad_offset,
            grad_mask,
            grad_weight,
            grad_bias,
            *workspace(
                ((image_size,), dtype),
                ((image_size if plan.need_input else lanes,), dtype),
                ((packed_size,), dtype),
                ((splits if plan.need_weight else 0, weight_size), dtype),
                ((threads, plan.rows, positions), dtype),
                ((threads, 2, positions, width), dtype),
                ((threads, 4, positions), pixel_dtype(g)),
                ((threads, 10, positions), dtype),
                ((threads, 2, positions), INT32),
            ),
            blocks,
            g,
            plan,
        )
    taken = {
        "input": (grad_input, (g.batch, g.in_channels, g.in_h, g.in_w)),
        "offset": (grad_offset, (g.batch, 2 * g.offset_groups * taps, g.out_h, g.out_w)),
        "weight": (grad_weight, (g.out_channels, g.in_channels // g.groups, g.kernel_h, g.kernel_w)),
        "bias": (grad_bias, (g.out_channels,)),
        "mask": (grad_mask, (g.batch, g.offset_groups * taps, g.out_h, g.out_w)),
    }
    grads = [to_result(grad, input.dtype, shape) if name in needs else None for name, (grad, shape) in taken.items()]
    return tuple(grads)  # type: ignore[return-value]


@Kernel
def _backward(
    thread: int,
    counters: Any,
    progress: Any,
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    grad_input: Any,
    grad_offset: Any,
    grad_mask: Any,
    grad_weight: Any,
    grad_bias: Any,
    image: Any,
    grad_image: Any,
    packed: Any,
    partial: Any,
    tile_grad: Any,
    tile_columns: Any,
    corners: Any,
    weights: Any,
    bases: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    _prepare_backward(counters, input, image, grad_image, weight, packed, blocks, g, p)

    # Phase 1: every unit is one block of channels of one range of images, and owns its slices of all gradients.
    low = lowest_coordinate(g.boundary, image)
    has_offset, has_mask = p.has_offset != 0, p.has_mask != 0
    taps = g.kernel_h * g.kernel_w
    length = g.out_h * g.out_w
    out_channels = g.out_channels // g.groups
    panel = 2 * VECTOR_BYTES // image.itemsize
    corner = corners[thread]
    blending = weights[thread]
    base = bases[thread]
    working = p.splits * len(blocks) * (p.need_input | p.need_dots | p.need_weight)
    unit = claim(counters, 1)
    while unit < working:
        split = unit // len(blocks)
        block = unit - split * len(blocks)
        group, og, channel, channels, width, previous, packed_at, partial_at = blocks[block]
        first_image = split * g.batch // p.splits
        for b in range(first_image, (split + 1) * g.batch // p.splits):
            origin = (b * g.in_channels + channel) * (g.in_h * g.in_w + 1)
            for tile in range(p.tiles):
                start = tile * p.positions
                count = min(p.positions, length - start)
                tile_origins(start, count, base, g)
                for o in range(out_channels):
                    for i in range(count):
                        tile_grad[thread, o, i] = grad_output[b, group * out_channels + o, start + i]
                if p.need_dots and previous >= 0:
                    # Sums over channels go from block to block: this one adds where the one before has been.
                    wait_until(progress, b * len(blocks) + previous, tile + 1)
                for tap in range(taps):
                    _locate_tap(
                        offset, mask, b, og, tap, start, count, low, base, corner, blending, g, has_offset, has_mask
                    )
                    if p.need_input | p.need_dots:
                        # grad_columns[i, c] = sum_o grad_output[o, i] * weight[o, c, tap]
                        for j in range(0, width, panel):
                            for i in range(0, count, ROWS):
                                multiply_tile(
                                    at(tile_grad, (thread, 0, i)),
                                    1,
                                    p.positions,
                                    at(packed, (packed_at + (tap * width + j) * out_channels,)),
                                    panel,
                                    out_channels,
                                    at(tile_columns, (thread, 1, i, j)),
                                    p.width,
                                    False,
                                )
                    _sample_backward(
                        at(tile_columns, (thread, 0, 0, 0)),
                        at(tile_columns, (thread, 1, 0, 0)),
                        at(image, (origin,)),
                        at(grad_image, (origin * p.need_input,)),
                        corner,
                        blending,
                        count,
                        channels,
                        p,
                    )
                    if p.need_dots:
                        _add_offset_gradient(
                            blending,
                            at(mask, (b, og, tap, start)),
                            at(grad_offset, (b, og, tap, 0, start)),
                            at(grad_offset, (b, og, tap, 1, start)),
                            at(grad_mask, (b, og, tap, start)),
                            count,
                            previous >= 0,
                            has_mask,
                        )
                    if p.need_weight:
                        # partial[o, c] += sum_i grad_output[o, i] * columns[i, c]: eq. 6 for one tap of one tile
                        for j in range(0, width, panel):
                            for o in range(0, out_channels, ROWS):
                                multiply_tile(
                                    at(tile_grad, (thread, o, 0)),
                                    p.positions,
                                    1,
                                    at(tile_columns, (thread, 0, 0, j)),
                                    p.width,
                                    count,
                                    at(partial, (split, partial_at + (tap * p.rows + o) * width + j)),
                                    width,
                                    b > first_image or tile > 0,
                                )
                if p.need_dots:
                    advance_counter(progress, b * len(blocks) + block)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, working)

    _finish_backward(counters, grad_output, grad_image, partial, grad_input, grad_weight, grad_bias, blocks, g, p)


@inline
def _prepare_backward(
    counters: Any, input: Any, image: Any, grad_image: Any, weight: Any, packed: Any, blocks: Any, g: Any, p: Any
) -> None:
    """Phase 0: the image to channels-last, its gradient to zero, the weight into panels."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    converting = g.batch * parts
    preparing = converting + len(blocks)
    unit = claim(counters, 0)
    while unit < preparing:
        if unit < converting:
            b = unit // parts
            part = unit - b * parts
            for block in range(len(blocks)):
                channel, channels = blocks[block, 2], blocks[block, 3]
                to_channels_last(input, image, b, channel, channels, part, pixels)
                if p.need_input:
                    origin = (b * g.in_channels + channel) * (pixels + 1)
                    last = pixels + 1 if part == parts - 1 else (part + 1) * PIXELS
                    for i in range(origin + part * PIXELS * channels, origin + last * channels):
                        grad_image[i] = 0
        else:
            _pack_backward(weight, packed, blocks[unit - converting], g)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, preparing)


@inline
def _finish_backward(
    counters: Any,
    grad_output: Any,
    grad_image: Any,
    partial: Any,
    grad_input: Any,
    grad_weight: Any,
    grad_bias: Any,
    blocks: Any,
    g: Any,
    p: Any,
) -> None:
    """Phase 2: gradients into the caller's layout."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    inputs = g.batch * parts * p.need_input
    outputs = inputs + g.out_channels
    unit = claim(counters, 2)
    while unit < outputs:
        if unit < inputs:
            b = unit // parts
            for block in range(len(blocks)):
                channel, channels = blocks[block, 2], blocks[block, 3]
                block_to_channels_first(grad_image, grad_input, b, channel, channels, unit - b * parts, pixels)
        else:
            o = unit - inputs
            if p.need_weight:
                _reduce_weight(partial, grad_weight, blocks, o, g, p)
            if p.need_bias:  # eq. 7
                total = sum_values(at(grad_output, (0, o, 0)), g.out_h * g.out_w)
                for b in range(1, g.batch):
                    total += sum_values(at(grad_output, (b, o, 0)), g.out_h * g.out_w)
                grad_bias[o] = total
        finish(counters, 2)
        unit = claim(counters, 2)
    wait_for(counters, 2, outputs)


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
        out = advance(columns, i * p.width)
        grad = advance(grad_columns, i * p.width)
        if p.need_input:
            dots = blend_dots_scatter(out, grad, image, grad_image, i0, i1, i2, i3, w0, w1, w2, w3, channels)
            weights[6, i], weights[7, i], weights[8, i], weights[9, i] = dots
        elif p.need_dots:
            dots = blend_dots(out, grad, image, grad_image, i0, i1, i2, i3, w0, w1, w2, w3, channels)
            weights[6, i], weights[7, i], weights[8, i], weights[9, i] = dots
        else:
            blend(out, image, i0, i1, i2, i3, w0, w1, w2, w3, vectors)


@inline
def _add_offset_gradient(
    weights: Any, mask: Any, grad_y: Any, grad_x: Any, grad_mask: Any, count: int, add: bool, has_mask: bool
) -> None:
    """Eq. 3 and 4 from the dots of the column gradient with the four corners."""
    for i in range(count):
        ly, lx = weights[4, i], weights[5, i]
        d00, d01, d10, d11 = weights[6, i], weights[7, i], weights[8, i], weights[9, i]
        hy, hx = 1 - ly, 1 - lx
        y = hx * (d10 - d00) + lx * (d11 - d01)
        x = hy * (d01 - d00) + ly * (d11 - d10)
        value = hy * (hx * d00 + lx * d01) + ly * (hx * d10 + lx * d11)
        if has_mask:
            y *= mask[i]
            x *= mask[i]
        if add:
            y += grad_y[i]
            x += grad_x[i]
            value += grad_mask[i]
        grad_y[i] = y
        grad_x[i] = x
        grad_mask[i] = value


@inline
def _pack_backward(weight: Any, packed: Any, block: Any, g: Any) -> None:
    """packed[tap][panel][o][c] of one block, zeros behind its last channel."""
    group, _, channel, channels, width, _, packed_at, _ = block
    out_channels = g.out_channels // g.groups
    panel = 2 * VECTOR_BYTES // packed.itemsize
    local = channel - group * (g.in_channels // g.groups)
    for o in range(out_channels):
        for c in range(width):
            row = packed_at + (c // panel * out_channels + o) * panel + c % panel
            for tap in range(g.kernel_h * g.kernel_w):
                value = weight[group * out_channels + o, local + c, tap] if c < channels else packed[0] * 0
                packed[row + tap * width * out_channels] = value


@inline
def _reduce_weight(partial: Any, grad_weight: Any, blocks: Any, o: int, g: Any, p: Any) -> None:
    """Eq. 6 for one output channel: the partial gradients added in the order of their images."""
    group = o // (g.out_channels // g.groups)
    row = o % (g.out_channels // g.groups)
    for block in range(len(blocks)):
        if blocks[block, 0] != group:
            continue
        _, _, channel, channels, width, _, _, partial_at = blocks[block]
        local = channel - group * (g.in_channels // g.groups)
        for tap in range(g.kernel_h * g.kernel_w):
            first = partial_at + (tap * p.rows + row) * width
            for c in range(channels):
                total = partial[0, first + c]
                for split in range(1, p.splits):
                    total += partial[split, first + c]
                grad_weight[o, local + c, tap] = total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _channels_last_size(g: Any) -> int:
    return int(g.batch * (g.in_h * g.in_w + 1) * g.in_channels)


def pixel_dtype(g: Any) -> Any:
    """Type of a pixel's index; the wide one halves the speed of `locate`, so only where it must be."""
    return np.dtype(np.int32 if g.in_h * g.in_w < 2**31 - 1 else np.int64)


def _threads_for(g: Any, products: int) -> int:
    taps = g.kernel_h * g.kernel_w
    per_output = 2 * products * (g.out_channels // g.groups) + 16
    flops = per_output * g.batch * g.out_h * g.out_w * g.in_channels * taps
    return 1 if flops < SERIAL_FLOPS else get_num_threads()


def _flat_arguments(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, dtype: Any) -> tuple[Any, ...]:
    """input, offset, mask, weight, bias in the kernels' shapes; an absent one is empty, or zeros for bias."""
    taps = g.kernel_h * g.kernel_w
    positions = g.out_h * g.out_w
    shape = (g.batch, g.offset_groups, taps)
    return (
        contiguous(input, dtype, (g.batch, g.in_channels, g.in_h * g.in_w)),
        np.empty((0, 1, 1, 2, 1), dtype) if offset is None else contiguous(offset, dtype, (*shape, 2, positions)),
        np.empty((0, 1, 1, 1), dtype) if mask is None else contiguous(mask, dtype, (*shape, positions)),
        contiguous(weight, dtype, (g.out_channels, g.in_channels // g.groups, taps)),
        np.zeros(g.out_channels, dtype) if bias is None else contiguous(bias, dtype, (g.out_channels,)),
    )


def _channel_blocks(g: Any, largest: int) -> list[tuple[int, int, int, int]]:
    """(group, offset group, first channel, channels): no block crosses a border of either kind of group."""
    per_group = g.in_channels // g.groups
    per_offset = g.in_channels // g.offset_groups
    borders = sorted({*range(0, g.in_channels + 1, per_group), *range(0, g.in_channels, per_offset)})
    blocks = []
    for first, last in zip(borders, borders[1:], strict=False):
        parts = -(-(last - first) // largest)
        size = -(-(last - first) // parts)
        for channel in range(first, last, size):
            blocks.append((channel // per_group, channel // per_offset, channel, min(size, last - channel)))
    return blocks


@functools.lru_cache(maxsize=64)
def _forward_steps(g: Any, panel: int) -> tuple[Any, Any, Any, int, int]:
    """The order of a tile's work: entries (tap, offset group, channel, channels, column) and the chunks they make up.

    A chunk (group, first entry, last entry, depth, start in packed, is first, is last of its group) is one product.
    """
    taps = g.kernel_h * g.kernel_w
    panels = -(-(g.out_channels // g.groups) // panel)
    blocks = _channel_blocks(g, CHANNELS)
    entries, chunks = [], []
    packed_size = 0
    for group in range(g.groups):
        steps = [(tap, *block[1:]) for block in blocks if block[0] == group for tap in range(taps)]
        total = sum(step[3] for step in steps)
        target = -(-total // -(-total // DEPTH))  # chunks of about equal depth
        first_of_group = len(chunks)
        depth, first = 0, len(entries)
        for number, step in enumerate(steps):
            entries.append((*step, depth))
            depth += step[3]
            if depth >= target or number == len(steps) - 1:
                chunks.append([group, first, len(entries), depth, packed_size, 0, 0])
                packed_size += depth * panels * panel
                depth, first = 0, len(entries)
        chunks[first_of_group][5] = 1
        chunks[-1][6] = 1
    deepest = max(chunk[3] for chunk in chunks)
    table = np.array([block[2:] for block in blocks], np.int64)
    return table, np.array(entries, np.int64), np.array(chunks, np.int64), deepest, packed_size


@functools.lru_cache(maxsize=64)
def _backward_blocks(g: Any, panel: int) -> tuple[Any, int, int, int]:
    """Rows (group, offset group, channel, channels, width, previous block of the offset group, start in packed,

    start in the partial weight gradient), then the sizes of those two and the largest width.
    """
    taps = g.kernel_h * g.kernel_w
    out_channels = g.out_channels // g.groups
    rows = _round_up(out_channels, ROWS)
    # Two blocks at least, where channels allow it: a block is a unit of work. Never by batch, which must not show.
    largest = CHANNELS if g.in_channels >= 2 * CHANNELS else max(CHANNELS // 4, _round_up(-(-g.in_channels // 2), panel))
    table, latest = [], {}
    weight_size = packed_size = 0
    for group, og, channel, channels in _channel_blocks(g, largest):
        width = _round_up(channels, panel)
        table.append((group, og, channel, channels, width, latest.get(og, -1), packed_size, weight_size))
        latest[og] = len(table) - 1
        packed_size += taps * width * out_channels
        weight_size += taps * rows * width
    return np.array(table, np.int64), weight_size, packed_size, max(row[4] for row in table)

"""Gradients of one block of channels of a tile: of columns and weight by products, of offset and mask from dots."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.conv.backward_plan import COLUMN_ROW, DEPTH, ROW
from pydeform.cpu.conv.depthwise import scale_channels, sum_channels
from pydeform.cpu.conv.pairs import filled, pair_columns
from pydeform.cpu.core.blend import sum_values
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.pair_products import multiply_tile, multiply_wide, pick
from pydeform.cpu.core.product import PANEL
from pydeform.cpu.core.simd import advance, at, use_widest_vectors
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.sampling.corners import blend_dots_of


class Turned(NamedTuple):
    """The first factor of a product: number (i, k) at start[i * row + k * step]."""

    start: Any
    row: int
    step: int


class Rows(NamedTuple):
    """Its second factor, or the sums: number (k, j) at start[k * row + j], of pairs two of k side by side."""

    start: Any
    row: int


@inline_always
def _multiply(a: Any, b: Any, sums: Any, rows: int, depth: int, width: int, add: bool, p: Any) -> None:
    """sums[i, j] (+)= sum_k a[i, k] * b[k, j] for i < rows, j < width, whole panels of j and then two vectors."""
    together = pick(b.start, 1, 2)
    for j in range(0, width, p.panel):
        if PANEL == 2 or width - j >= p.panel:
            for i in range(0, rows, p.wide_lines):
                first, second = advance(a.start, i * a.row), advance(b.start, j * together)
                target = advance(sums.start, i * sums.row + j)
                multiply_wide(first, a.row, a.step, second, b.row, depth, target, sums.row, add)
        else:
            for k in range(j, width, p.panel // 2):
                for i in range(0, rows, p.lines):
                    first, second = advance(a.start, i * a.row), advance(b.start, k * together)
                    target = advance(sums.start, i * sums.row + k)
                    multiply_tile(first, a.row, a.step, second, b.row, depth, target, sums.row, add)


@inline
def copy_gradient(part: Any, row: Any, grad_output: Any, grads: Any, pairs: Any, depthwise: Any, g: Any) -> None:
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
def gradient_of_columns(
    part: Any, row: Any, tap: int, scratch: Any, pairs: Any, depthwise: Any, g: Any, p: Any
) -> None:
    """grad_columns[i, c] = sum_o grad_output[o, i] * weight[o, c, tap]."""
    thread, width, outs, count = part.thread, row.width, g.out_channels // g.groups, part.positions
    target = Rows(at(scratch.grad_columns, (thread, 0, 0)), COLUMN_ROW)
    if depthwise is not None:
        scale = at(scratch.packed, (row.packed_at + tap * width,))
        scale_channels(at(scratch.grads, (thread, 0, 0)), scale, target.start, COLUMN_ROW, count, row.channels)
    elif pairs is None:
        for o in range(0, outs, DEPTH):
            weights = at(scratch.packed, (row.packed_at + (tap * p.depth + o) * width,))
            grads, depth = Turned(at(scratch.grads, (thread, o, 0)), 1, ROW), min(DEPTH, outs - o)
            _multiply(grads, Rows(weights, width), target, count, depth, width, o > 0, p)
    else:
        weights = at(scratch.packed, (row.packed_at + tap * p.depth * width,))
        paired = at(pairs.by_position, (part.image, row.first_out // outs, part.start, 0))
        grads = Turned(paired, pairs.by_position.shape[3], 1)
        _multiply(grads, Rows(weights, width), target, count, p.depth, width, False, p)


@inline
def gradient_of_weight(part: Any, row: Any, tap: int, scratch: Any, pairs: Any, depthwise: Any, g: Any, p: Any) -> None:
    """Eq. 6 for one tap of one tile: partial[o, c] += sum_i grad_output[o, i] * columns[i, c]."""
    use_widest_vectors()
    thread, width, outs, count = part.thread, row.width, g.out_channels // g.groups, part.positions
    columns, more = at(scratch.columns, (thread, 0, 0)), not part.is_first
    if depthwise is not None:
        sums = at(scratch.partial, (part.split, row.partial_at + tap * width))
        sum_channels(at(scratch.grads, (thread, 0, 0)), columns, sums, COLUMN_ROW, count, row.channels, more)
        return
    target = Rows(at(scratch.partial, (part.split, row.partial_at + tap * p.rows * width)), width)
    if pairs is None:
        grads = Turned(at(scratch.grads, (thread, 0, 0)), ROW, 1)
        _multiply(grads, Rows(columns, COLUMN_ROW), target, outs, count, width, more, p)
    else:
        paired, by_output = at(pairs.columns, (thread, 0, 0, 0)), pairs.by_output
        pair_columns(columns, paired, count, width)
        first = at(by_output, (part.image * g.out_channels + row.first_out, part.start))
        grads = Turned(first, by_output.shape[1], 1)
        _multiply(grads, Rows(paired, COLUMN_ROW), target, outs, filled(count), width, more, p)


@inline
def add_offset_gradient(samples: Any, masks: Any, grads: Any, part: Any, row: Any, tap: int, axes: Any) -> None:
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
def sum_offset_gradient(samples: Any, shared: Any, part: Any, tap: int, axes: Any, p: Any) -> None:
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
def sum_bias(grad_output: Any, grad_bias: Any, o: int, g: Any) -> None:
    """Eq. 7."""
    total = sum_values(at(grad_output, (0, o, 0)), volume(g.out_size))
    for b in range(1, g.batch):
        total += sum_values(at(grad_output, (b, o, 0)), volume(g.out_size))
    grad_bias[o] = total

"""What the backward multiplies in pairs of bfloat16: the output's gradient, by position and by output, and columns."""

from __future__ import annotations

from typing import Any

from pydeform.cpu.conv.backward_plan import COLUMN_ROW
from pydeform.cpu.core import pair_products
from pydeform.cpu.core.blend import copy_vectors
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.layout import transpose_block
from pydeform.cpu.core.pair_products import pack_rows, put
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at
from pydeform.cpu.core.sizes import volume


@inline_always
def filled(depth: int) -> int:
    """What a product of pairs takes for this depth: behind it both factors have zeros."""
    return -(-depth // pair_products.DEPTH) * pair_products.DEPTH


@inline
def pair_gradients(
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
def pair_columns(columns: Any, paired: Any, count: int, width: int) -> None:
    """paired[i // 2, c, i % 2] = columns[i, c], rounded; zeros behind the last position."""
    lanes = VECTOR_BYTES // 4
    for i in range(count, filled(count)):
        for c in range(width):
            columns[i * COLUMN_ROW + c] = 0
    for i in range(0, filled(count), 2):
        row = advance(columns, i * COLUMN_ROW)
        for c in range(0, width, lanes):
            target = advance(paired, i * COLUMN_ROW + 2 * c)
            pack_rows(target, advance(row, c), advance(row, COLUMN_ROW + c))

"""A convolution's weight, turned into what products read, and its gradient back: square by square, one vector of output
channels times one of input channels at up to TAPS taps. A square that is not whole is copied, with zeros behind its
end."""

from __future__ import annotations

import math
from typing import Any

from pydeform.cpu.conv.plan import is_depthwise
from pydeform.cpu.core.jit import inline
from pydeform.cpu.core.layout import transpose_block
from pydeform.cpu.core.pair_products import pack_rows
from pydeform.cpu.core.product import PANEL
from pydeform.cpu.core.simd import VECTOR_BYTES, advance, at

TAPS = 64  # of a square: kernels of hundreds of taps would make it larger than the weight


def squares_size(g: Any, lanes: int) -> int:
    """Numbers that a thread needs for one square as it is and turned."""
    return 0 if is_depthwise(g) else 2 * lanes * lanes * min(math.prod(g.kernel), TAPS)


@inline
def _turn(
    weight: Any, first_out: int, first_in: int, outs: int, ins: int, first_tap: int, taps: int, squares: Any
) -> Any:
    """turned[channel][tap][output] of a square of `outs` and `ins` channels, of which there may be none."""
    lanes, every = VECTOR_BYTES // weight.itemsize, weight.shape[2]
    row = lanes * taps
    turned = advance(squares, lanes * row)
    source, source_row = squares, row
    if outs == lanes and ins == lanes and taps == every:
        source, source_row = at(weight, (first_out, first_in, 0)), weight.shape[1] * taps
    else:
        for i in range(lanes * row):
            squares[i] = 0
        for o in range(outs):
            there = at(weight, (first_out + o, first_in, first_tap))
            for c in range(ins):
                for tap in range(taps):
                    squares[o * row + c * taps + tap] = there[c * every + tap]
    for i in range(0, row, lanes):
        target = advance(turned, i * lanes)
        transpose_block(advance(source, i), source_row, target, lanes, target)
    return turned


@inline
def pack_forward(
    weight: Any, packed: Any, squares: Any, entries: Any, chunks: Any, first_entry: int, panel_number: int
) -> None:
    """One panel of one block of channels: packed[panel][column][o] of each chunk, zeros behind the last output channel
    in its vector, and in the columns that only fill up. Of pairs, two columns number by number."""
    lanes, taps = VECTOR_BYTES // weight.itemsize, weight.shape[2]
    together = weight.itemsize // packed.itemsize  # 2 of pairs
    panel = PANEL * lanes
    entry = entries[first_entry]
    product = chunks[entry.chunk]
    outs_left = product.outs - panel_number * panel
    width = entry.width
    for tap in range(1, taps):
        width = max(width, entries[first_entry + tap].width)
    for part in range(0, min(panel, outs_left), lanes):
        first_out, outs = product.first_out + panel_number * panel + part, min(lanes, outs_left - part)
        for c in range(0, width, lanes):
            ins, first_in = max(min(lanes, entry.channels - c), 0), entry.channel - product.first_in + c
            for first_tap in range(0, taps, TAPS):
                some = min(TAPS, taps - first_tap)
                turned = _turn(weight, first_out, first_in, outs, ins, first_tap, some, squares)
                for tap in range(some):
                    to = entries[first_entry + first_tap + tap]
                    chunk = chunks[to.chunk]
                    first_row = panel_number * chunk.depth + to.column + c
                    for i in range(0, min(lanes, to.width - c), together):
                        target = at(packed, (chunk.packed_at + (first_row + i) * panel + part * together,))
                        row = advance(turned, (i * some + tap) * lanes)
                        pack_rows(target, row, advance(row, (together - 1) * some * lanes))


@inline
def pack_backward(weight: Any, packed: Any, squares: Any, block: Any, outs: int, depth: int) -> None:
    """packed[tap][o][c] of one block, zeros behind its last channel. Of pairs, two of its `outs` outputs number
    by number, and zeros behind the last one, `depth` in all."""
    lanes, taps = VECTOR_BYTES // weight.itemsize, weight.shape[2]
    together = weight.itemsize // packed.itemsize  # 2 of pairs
    for o in range(0, depth, lanes):
        some_outs = max(min(lanes, outs - o), 0)
        for c in range(0, block.width, lanes):
            ins = max(min(lanes, block.channels - c), 0)
            first_in = block.channel - block.first_in + c
            for first_tap in range(0, taps, TAPS):
                some = min(TAPS, taps - first_tap)
                turned = _turn(weight, block.first_out + o, first_in, some_outs, ins, first_tap, some, squares)
                first_row = block.packed_at + (first_tap * depth + o) * block.width + c * together
                for tap in range(some):  # turned again, to (output, channel)
                    square = advance(turned, tap * lanes)
                    transpose_block(square, some * lanes, square, some * lanes, square)
                    for i in range(0, min(lanes, depth - o), together):
                        row = advance(square, i * some * lanes)
                        target = at(packed, (first_row + (tap * depth + i) * block.width,))
                        pack_rows(target, row, advance(row, (together - 1) * some * lanes))


@inline
def reduce_weight(
    partial: Any, grad_weight: Any, squares: Any, block: Any, first_out: int, outs: int, rows: int, splits: int
) -> None:
    """Eq. 6 for one block and one vector of output channels: the partial gradients, each of `rows` output channels at
    each tap, added in the order of their images, as (output, channel, tap)."""
    taps, channels, width = grad_weight.shape[2], block.channels, block.width
    lanes = VECTOR_BYTES // partial.itemsize
    outs = min(lanes, outs - first_out)
    for tap in range(taps):
        for o in range(outs):
            add_partials(partial, block.partial_at + (tap * rows + first_out + o) * width, channels, splits)
    for c in range(0, channels, lanes):
        ins = min(lanes, channels - c)
        is_whole = outs == lanes and ins == lanes and taps <= TAPS
        target = at(grad_weight, (block.first_out + first_out, block.channel - block.first_in + c, 0))
        target_row = grad_weight.shape[1] * taps
        for tap in range(taps):
            source = at(partial, (0, block.partial_at + (tap * rows + first_out) * width + c))
            if is_whole:  # turned, to (channel, tap, output)
                turned = advance(squares, tap * lanes)
                transpose_block(source, width, turned, taps * lanes, turned)
            else:
                for o in range(outs):
                    for k in range(ins):
                        target[o * target_row + k * taps + tap] = source[o * width + k]
        if is_whole:
            for i in range(0, lanes * taps, lanes):
                there = advance(target, i)
                transpose_block(advance(squares, i * lanes), lanes, there, target_row, there)


@inline
def add_partials(partial: Any, start: int, count: int, splits: int) -> None:
    """To the first one all others."""
    first = at(partial, (0, start))
    for split in range(1, splits):
        other = at(partial, (split, start))
        for k in range(count):
            first[k] += other[k]

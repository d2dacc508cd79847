"""A depthwise convolution, one input and one output channel in each group: columns times one weight each."""

from __future__ import annotations

from typing import Any

from pydeform.cpu.conv.forward_plan import ROW
from pydeform.cpu.conv.weights import add_partials
from pydeform.cpu.core.jit import inline
from pydeform.cpu.core.simd import advance


@inline
def pack_depthwise(weight: Any, packed: Any, first_channel: int, channels: int, tap: int, start: int) -> None:
    """packed[start + c]: the weights of one tap."""
    for c in range(channels):
        packed[start + c] = weight[first_channel + c, 0, tap]


@inline
def multiply_channels(columns: Any, scale: Any, sums: Any, sum_row: int, count: int, channels: int, add: bool) -> None:
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
def scale_channels(grads: Any, scale: Any, target: Any, row: int, count: int, channels: int) -> None:
    """target[i, c] = grads[i, c] * scale[c]."""
    for i in range(count):
        first = advance(grads, i * row)
        second = advance(target, i * row)
        for c in range(channels):
            second[c] = first[c] * scale[c]


@inline
def sum_channels(grads: Any, columns: Any, target: Any, row: int, count: int, channels: int, add: bool) -> None:
    """target[c] (+)= sum_i grads[i, c] * columns[i, c]."""
    if not add:
        for c in range(channels):
            target[c] = 0
    for i in range(count):
        first = advance(grads, i * row)
        second = advance(columns, i * row)
        for c in range(channels):
            target[c] += first[c] * second[c]


@inline
def reduce_depthwise(partial: Any, grad_weight: Any, block: Any, splits: int) -> None:
    """`reduce_weight` of a depthwise convolution, for all channels of a block."""
    for tap in range(grad_weight.shape[2]):
        start = block.partial_at + tap * block.width
        add_partials(partial, start, block.channels, splits)
        for c in range(block.channels):
            grad_weight[block.channel + c, 0, tap] = partial[0, start + c]

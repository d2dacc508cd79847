"""Copies with channels last: of images, of their gradients and of that of the output, block by block of channels.

A cell is a group of input channels: position-sensitive pooling has several, of which each bin reads one. A copy of
images has, one after the other, the blocks of each class of each cell of each image; a block is (in_h*in_w + 1, width),
its last pixel zeros. The copy of the output's gradient has the blocks of each class of each box.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.layout import block_to_channels_first, pixel_parts, to_channels_last
from pydeform.cpu.core.parallel import claim, finish, wait_for
from pydeform.cpu.core.planes import gather
from pydeform.cpu.core.simd import advance, at


class Channels(NamedTuple):
    """Channels of the input: in image b, those of class `cls` that the bins of a cell read."""

    b: int
    cell: int
    cls: int


@inline_always
def input_channel(channels: Any, channel: int, g: Any, p: Any) -> int:
    """The number that a class's channel `channel` has in the input."""
    return (channels.cls * p.per_class + channel) * (g.group_h * g.group_w) + channels.cell


@inline_always
def copy_origin(channels: Any, before: int, g: Any, p: Any) -> int:
    """Where in the copy of images a block begins that has `before` channels of its class before it."""
    number = (channels.b * g.group_h * g.group_w + channels.cell) * g.classes + channels.cls
    return (number * p.width + before) * (g.in_h * g.in_w + 1)


@inline_always
def grad_place(bin_: Any, cls: int, row: Any, g: Any, p: Any) -> int:
    """Place of a bin in the copy of the output's gradient."""
    return ((bin_.r * g.classes + cls) * p.width + row.before) * (g.pooled_h * g.pooled_w + 1) + bin_.i * row.width


@inline
def convert_image(counters: Any, phase: int, given: Any, image: Any, blocks: Any, g: Any, p: Any) -> None:
    """A phase: images that have boxes are copied to channels last."""
    pixels = g.in_h * g.in_w
    parts = pixel_parts(pixels)
    cells = g.group_h * g.group_w
    units = g.batch * parts
    unit = claim(counters, phase)
    while unit < units:
        b = unit // parts
        if given.starts[b + 1] > given.starts[b]:
            for cell in range(cells):
                for cls in range(g.classes):
                    channels = Channels(b, cell, cls)
                    for block in range(len(blocks)):
                        row = blocks[block]
                        first, origin = (
                            input_channel(channels, row.first, g, p),
                            copy_origin(channels, row.before, g, p),
                        )
                        to_channels_last(
                            given.input, b, first, cells, image, origin, row.channels, row.width, unit % parts, pixels
                        )
        finish(counters, phase)
        unit = claim(counters, phase)
    wait_for(counters, phase, units)


@inline
def convert_grads(counters: Any, phase: int, grad_output: Any, copy: Any, blocks: Any, g: Any, p: Any) -> None:
    """A phase: the output's gradient of each box, class and block is copied to channels last."""
    bins = g.pooled_h * g.pooled_w
    unit = claim(counters, phase)
    while unit < g.boxes:
        for cls in range(g.classes):
            for block in range(len(blocks)):
                row = blocks[block]
                first = cls * p.per_class + row.first
                origin = ((unit * g.classes + cls) * p.width + row.before) * (bins + 1)
                for part in range(pixel_parts(bins)):
                    to_channels_last(grad_output, unit, first, 1, copy, origin, row.channels, row.width, part, bins)
        finish(counters, phase)
        unit = claim(counters, phase)
    wait_for(counters, phase, g.boxes)


@inline
def clear_blocks(channels: Any, blocks: Any, grad_image: Any, g: Any, p: Any) -> None:
    """Zeros in the places of some neighbouring blocks of the input's gradient."""
    start, last = blocks[0].before, blocks[len(blocks) - 1]
    target = at(grad_image, (copy_origin(channels, start, g, p),))
    for i in range((last.before + last.width - start) * (g.in_h * g.in_w + 1)):
        target[i] = 0


@inline
def write_blocks(channels: Any, blocks: Any, grad_image: Any, grad_input: Any, g: Any, p: Any) -> None:
    """The input's gradient of some blocks, from the copy with channels last to grad_input."""
    b, cells, pixels = channels.b, g.group_h * g.group_w, g.in_h * g.in_w
    for block in range(len(blocks)):
        row = blocks[block]
        first, origin = input_channel(channels, row.first, g, p), copy_origin(channels, row.before, g, p)
        for part in range(pixel_parts(pixels)):
            block_to_channels_first(
                grad_image, origin, row.channels, row.width, grad_input, b, first, cells, part, pixels
            )


@inline_always
def block_pixels(channels: Any, row: Any, count: int, here: Any, image: Any, g: Any, p: Any) -> tuple[Any, Any]:
    """Pixels of a block of channels, and where among them the `count` listed ones are. The pixels are those of the
    copy, or were gathered from the input as it lies."""
    index, pixels = here.places, at(image, (0,))
    if p.gathers:
        first, cells = input_channel(channels, row.first, g, p), g.group_h * g.group_w
        gather(here.reader, channels.b, first, cells, row.channels, row.width, index, count, g.in_w)
        index, pixels = here.reader.own, here.reader.pixels
    else:
        pixels = advance(pixels, copy_origin(channels, row.before, g, p))
    return pixels, index

"""Gradients of samples of images (docs/math/grid.md, eq. 6 and 7).

A unit of work is either some channels of an image, which owns their part of the input's gradient and goes through all
queries in order; or some queries of an image, which own their part of the grid's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.core.cells import dot_cells, scatter_cells
from pydeform.cpu.core.gathered import place_in
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.layout import transpose_to_first, transpose_to_last
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import at
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.core.vector import lanes_of, load, store
from pydeform.cpu.grid.forward import copy_images, image_of, tile_of
from pydeform.cpu.grid.places import corners_of, locate, tap_of


class Gradients(NamedTuple):
    """The output's gradient, which is given, and those that are asked for; others are empty."""

    output: Any  # (image, channel, query)
    input: Any  # (image, channel, pixel)
    grid: Any  # (image, number)


@Kernel
def sample_backward(thread: int, counters: Any, given: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    if grads.grid.size > 0:
        copy_images(counters, given.input, scratch.image, g, p)
    tiles = -(-g.queries // p.queries)
    scattering = g.batch * p.blocks * (grads.input.size > 0)
    units = scattering + g.batch * tiles * (grads.grid.size > 0)
    unit = claim(counters, 1)
    while unit < units:
        if unit < scattering:
            _scatter(thread, unit // p.blocks, unit % p.blocks, given, grads, scratch, g, p)
        else:
            tile = tile_of(thread, unit - scattering, tiles, g, p)
            locate(tile, image_of(tile, scratch, g, p), p.width, given, scratch, g, p)
            _bring_rows(tile, 0, g.channels, p.width, grads.output, scratch)
            dots, rows = at(scratch.dots, (thread, 0)), at(scratch.rows, (thread, 0))
            dot_cells(dots, rows, corners_of(tile, scratch), p.axes, tile.count, p.width, p.narrow)
            _write_numbers(tile, grads.grid, scratch, g, p)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, units)
    let_helpers_go(thread, counters)


@inline
def _bring_rows(tile: Any, first: int, channels: int, width: int, grad_output: Any, scratch: Any) -> None:
    """The output's gradient of some channels, channels last, zeros up to the width."""
    rows, (_, _, queries) = at(scratch.rows, (tile.thread, 0)), grad_output.shape
    transpose_to_last(at(grad_output, (tile.image, first, tile.query)), queries, rows, width, channels, tile.count)
    for c in range(channels, width):
        for i in range(tile.count):
            rows[i * width + c] = 0


@inline
def _scatter(thread: int, image: int, block: int, given: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 6 for a block of channels."""
    first, pixels = block * p.block, volume(g.in_size)
    channels = min(p.block, g.channels - first)
    target = at(scratch.grad_image, (thread, 0))
    for i in range((pixels + 1) * p.block):
        target[i] = 0
    tiles = -(-g.queries // p.queries)
    for unit in range(image * tiles, (image + 1) * tiles):
        tile = tile_of(thread, unit, tiles, g, p)
        locate(tile, target, p.block, given, scratch, g, p)
        _bring_rows(tile, first, channels, p.block, grads.output, scratch)
        rows = at(scratch.rows, (thread, 0))
        scatter_cells(rows, corners_of(tile, scratch), p.axes, tile.count, p.block, p.narrow)
    transpose_to_first(target, p.block, at(grads.input, (image, first, 0)), pixels, channels, pixels)


@inline
def _write_numbers(tile: Any, grid: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 7."""
    thread = tile.thread
    dots = at(scratch.dots, (thread, 0))
    lanes = lanes_of(dots)
    for axis in range(len(g.in_size)):
        moves = at(scratch.numbers, (thread, axis, 0))
        for i in range(0, tile.count, lanes):
            place = place_in(i, dots, p.axes)
            total = _part(0, place, axis, i, thread, scratch, g, p)
            for corner in range(1, 1 << len(p.axes)):
                total = total + _part(corner, place + corner * lanes, axis, i, thread, scratch, g, p)
            store(total, at(scratch.numbers, (thread, axis, i)))
        target = at(grid, (tile.image, tile.query * g.number_step + g.number_first[axis]))
        for i in range(tile.count):
            target[i * g.number_step] = moves[i]


@inline
def _part(corner: int, place: int, axis: int, i: int, thread: int, scratch: Any, g: Any, p: Any) -> Any:
    part = load(at(scratch.dots, (thread, place)))
    for other in range(len(g.in_size)):
        tap = tap_of(corner, other, g, p)
        if other == axis:
            part = part * load(at(scratch.slopes, (thread, tap, i)))
        else:
            part = part * load(at(scratch.parts, (thread, tap, i)))
    return part

"""Gradients of samples of images (docs/math/grid.md, eq. 6 and 7).

A unit of work is either some channels of an image, which owns their part of the input's gradient and goes through all
queries in order; or some queries of an image, which own their part of the grid's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.core.vector import fma, lanes_of, load, load_first, store
from pydeform.cpu.grid.forward import tile_of
from pydeform.cpu.grid.places import corner_values, locate, pair_values, tap_of

# Channels: neighbouring queries add to the same pixels, and wait for one another in each channel. See forward.py.
TOGETHER = 4


class Gradients(NamedTuple):
    """The output's gradient, which is given, and those that are asked for; others are empty."""

    output: Any  # (image, channel, query)
    input: Any  # (image, channel, pixel), zeros at first
    grid: Any  # (image, number)


@Kernel
def sample_backward(thread: int, counters: Any, given: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    tiles = -(-g.queries // p.queries)
    scattering = g.batch * p.blocks * (grads.input.size > 0)
    units = scattering + g.batch * tiles * (grads.grid.size > 0)
    unit = claim(counters, 0)
    while unit < units:
        if unit < scattering:
            image, first = unit // p.blocks, unit % p.blocks * p.block
            last = min(first + p.block, g.channels)
            for number in range(image * tiles, (image + 1) * tiles):
                tile = tile_of(thread, number, tiles, g, p)
                locate(tile, given.grid, scratch.slopes, scratch, g, p)
                for c in range(first, last, TOGETHER):
                    grad, planes = at(grads.output, (image, c, tile.query)), at(grads.input, (image, c, 0))
                    _scatter_planes(tile, grad, planes, min(TOGETHER, last - c), scratch, g, p)
        else:
            tile = tile_of(thread, unit - scattering, tiles, g, p)
            locate(tile, given.grid, scratch.slopes, scratch, g, p)
            _clear_dots(tile, scratch, p)
            for c in range(g.channels):
                plane = at(given.input, (tile.image, c, 0))
                _add_dots(tile, at(grads.output, (tile.image, c, tile.query)), plane, scratch, p)
            _write_numbers(tile, grads.grid, scratch, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _scatter_planes(tile: Any, grad: Any, planes: Any, channels: int, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 6 for some channels, query by query."""
    corners, shares = at(scratch.corners, (tile.thread, 0, 0)), at(scratch.shares, (tile.thread, 0, 0))
    pixels = volume(g.in_size)
    for i in range(tile.queries):
        for place in range(i, i + p.corners * p.queries, p.queries):
            if corners[place] >= 0:
                target = advance(planes, np.int64(corners[place]))
                for c in range(channels):
                    target[c * pixels] += shares[place] * grad[i + c * g.queries]


@inline
def _clear_dots(tile: Any, scratch: Any, p: Any) -> None:
    dots = at(scratch.dots, (tile.thread, 0, 0))
    for i in range(p.corners * p.queries):
        dots[i] = 0


@inline
def _add_dots(tile: Any, grad: Any, plane: Any, scratch: Any, p: Any) -> None:
    """Of the output's gradient with the corners, one channel."""
    thread = tile.thread
    for i in range(0, tile.queries, lanes_of(grad)):
        grads, dots = load_first(advance(grad, i), tile.queries - i), at(scratch.dots, (thread, 0, i))
        if p.pairs is None:
            for corner in range(p.corners):
                values = corner_values(corner, i, plane, thread, scratch, grads)
                _add(grads, values, advance(dots, corner * p.queries))
        else:
            for corner in range(0, p.corners, 2):
                one, other = pair_values(corner, i, plane, thread, scratch, grads)
                _add(grads, one, advance(dots, corner * p.queries))
                _add(grads, other, advance(dots, (corner + 1) * p.queries))


@inline_always
def _add(grads: Any, values: Any, dots: Any) -> None:
    store(fma(grads, values, load(dots)), dots)


@inline
def _write_numbers(tile: Any, grid: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 7."""
    for axis in range(len(g.in_size)):
        moves = at(scratch.numbers, (tile.thread, axis, 0))
        for i in range(0, tile.queries, lanes_of(moves)):
            total = _part(0, axis, i, tile.thread, scratch, g, p)
            for corner in range(1, p.corners):
                total = total + _part(corner, axis, i, tile.thread, scratch, g, p)
            store(total, advance(moves, i))
        target = at(grid, (tile.image, tile.query * g.number_step + g.number_first[axis]))
        for i in range(tile.queries):
            target[i * g.number_step] = moves[i]


@inline
def _part(corner: int, axis: int, i: int, thread: int, scratch: Any, g: Any, p: Any) -> Any:
    """A corner's part of the gradient along an axis."""
    part = load(at(scratch.dots, (thread, corner, i)))
    for other in range(len(g.in_size)):
        tap = tap_of(corner, other, g, p)
        if other == axis:
            part = part * load(at(scratch.slopes, (thread, tap, i)))
        else:
            part = part * load(at(scratch.parts, (thread, tap, i)))
    return part

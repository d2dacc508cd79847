"""Samples of images (docs/math/grid.md, eq. 5). A unit of work is some queries of an image, whose outputs it owns."""

from __future__ import annotations

from typing import Any

from pydeform.cpu.core.cells import sum_cells
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.layout import pixel_parts, to_channels_last, transpose_to_first
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import at
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.grid.places import Tile, corners_of, locate


@Kernel
def sample(thread: int, counters: Any, given: Any, output: Any, scratch: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    copy_images(counters, given.input, scratch.image, g, p)
    tiles = -(-g.queries // p.queries)
    units = g.batch * tiles
    unit = claim(counters, 1)
    while unit < units:
        tile = tile_of(thread, unit, tiles, g, p)
        locate(tile, image_of(tile, scratch, g, p), p.width, given, scratch, g, p)
        rows = at(scratch.rows, (thread, 0))
        sum_cells(rows, corners_of(tile, scratch), p.axes, tile.count, p.width, p.narrow)
        transpose_to_first(rows, p.width, at(output, (tile.image, 0, tile.query)), g.queries, g.channels, tile.count)
        finish(counters, 1)
        unit = claim(counters, 1)
    wait_for(counters, 1, units)
    let_helpers_go(thread, counters)


@inline
def copy_images(counters: Any, input: Any, image: Any, g: Any, p: Any) -> None:
    """Phase 0: all images, channels last, each with a pixel of zeros behind it."""
    pixels = volume(g.in_size)
    parts = pixel_parts(pixels)
    units = g.batch * parts
    unit = claim(counters, 0)
    while unit < units:
        b = unit // parts
        origin = b * (pixels + 1) * p.width
        to_channels_last(input, b, 0, 1, image, origin, g.channels, p.width, unit - b * parts, pixels)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)


@inline
def tile_of(thread: int, unit: int, tiles: int, g: Any, p: Any) -> Any:
    image = unit // tiles
    query = (unit - image * tiles) * p.queries
    return Tile(thread, image, query, min(p.queries, g.queries - query))


@inline
def image_of(tile: Any, scratch: Any, g: Any, p: Any) -> Any:
    """Pointer to the copy of the tile's image."""
    return at(scratch.image, (tile.image * (volume(g.in_size) + 1) * p.width,))

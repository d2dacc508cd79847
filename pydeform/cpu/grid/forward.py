"""Samples of images (docs/math/grid.md, eq. 5). A unit of work is some queries of an image, whose outputs it owns."""

from __future__ import annotations

from typing import Any

from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.core.vector import (
    first_lanes,
    fma,
    gather_numbered,
    lanes_of,
    load,
    splat,
    store,
    store_where,
)
from pydeform.cpu.grid.places import Tile, corner_values, locate, pair_values

# Channels: what is read and written of more than so many, often a power of two apart, has no room in a cache's set.
TOGETHER = 4


@Kernel
def sample(thread: int, counters: Any, given: Any, output: Any, scratch: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    tiles = -(-g.queries // p.queries)
    units = g.batch * tiles
    unit = claim(counters, 0)
    while unit < units:
        tile = tile_of(thread, unit, tiles, g, p)
        locate(tile, given.grid, None, scratch, g, p)
        if p.nearest is None:
            for c in range(g.channels):
                target = at(output, (tile.image, c, tile.query))
                _sample_plane(tile, at(given.input, (tile.image, c, 0)), target, scratch, p)
        else:
            for c in range(0, g.channels, TOGETHER):
                planes, targets = at(given.input, (tile.image, c, 0)), at(output, (tile.image, c, tile.query))
                _copy_pixels(tile, planes, targets, min(TOGETHER, g.channels - c), scratch, g)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline_always
def tile_of(thread: int, unit: int, tiles: int, g: Any, p: Any) -> Any:
    image = unit // tiles
    query = (unit - image * tiles) * p.queries
    return Tile(thread, image, query, min(p.queries, g.queries - query))


@inline
def _copy_pixels(tile: Any, planes: Any, targets: Any, channels: int, scratch: Any, g: Any) -> None:
    """Samples of one pixel, some channels of it before the next."""
    pixels, lanes = volume(g.in_size), lanes_of(targets)
    for i in range(0, tile.queries, lanes):
        share = load(at(scratch.shares, (tile.thread, 0, i)))
        numbers = at(scratch.corners, (tile.thread, 0, i))
        for c in range(channels):
            values = gather_numbered(advance(planes, c * pixels), numbers, share)
            _put(fma(share, values, splat(0, share)), tile.queries - i, advance(targets, c * g.queries + i))


@inline
def _sample_plane(tile: Any, plane: Any, target: Any, scratch: Any, p: Any) -> None:
    thread, lanes = tile.thread, lanes_of(target)
    for i in range(0, tile.queries, lanes):
        shares = at(scratch.shares, (thread, 0, i))
        total = splat(0, load(shares))
        if p.pairs is None:
            for corner in range(p.corners):
                values = corner_values(corner, i, plane, thread, scratch, total)
                total = fma(load(advance(shares, corner * p.queries)), values, total)
        else:
            for corner in range(0, p.corners, 2):
                one, other = pair_values(corner, i, plane, thread, scratch, total)
                total = fma(load(advance(shares, corner * p.queries)), one, total)
                total = fma(load(advance(shares, (corner + 1) * p.queries)), other, total)
        _put(total, tile.queries - i, advance(target, i))


@inline_always
def _put(samples: Any, left: int, target: Any) -> None:
    """Those of the queries that are left: only a tile's last vector is masked, which takes some processors long."""
    if left >= lanes_of(target):
        store(samples, target)
    else:
        store_where(first_lanes(left, samples), samples, target)

"""Sums of weighted samples (docs/math/gather.md, eq. 2). A unit of work is some queries of an image, whose outputs it
owns."""

from __future__ import annotations

from typing import Any

from pydeform.cpu.core.gathered import sum_samples
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import at
from pydeform.cpu.gather.places import (
    Tile,
    clear_nothing,
    corners_of,
    count_of,
    entry_of,
    groups_of,
    locate,
    make_weights,
    maps_of,
    weights_of,
)


@Kernel
def gather(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    clear_nothing(thread, scratch)
    tiles = -(-g.queries // p.queries)
    units = g.batch * tiles
    unit = claim(counters, 0)
    while unit < units:
        image = unit // tiles
        query = (unit - image * tiles) * p.queries
        tile = Tile(thread, image, query, min(p.queries, g.queries - query), 0, g.location_groups)
        locate(tile, maps_of(at(given.value, (image, 0, 0)), 0, thread, scratch, g), given, scratch, tables, g, p)
        if given.reference is not None:
            make_weights(tile, given, scratch, g)
        _sum_tile(tile, given, output, scratch, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _sum_tile(tile: Any, given: Any, output: Any, scratch: Any, g: Any, p: Any) -> None:
    apart = groups_of(g.groups, tile, given, g)
    for query in range(tile.queries):
        count, entry = count_of(tile, query, scratch, g, p), entry_of(tile, query, 0, scratch, g, p)
        weights = weights_of(tile, query, 0, entry, given, scratch, g)
        corners = corners_of(entry, 0, tile, at(given.value, (tile.image, 0, 0)), scratch, p)
        out = at(output, (tile.image, tile.query + query, 0))
        sum_samples(out, corners, apart, p.axes, weights, p.weight_step, count, g.channels)

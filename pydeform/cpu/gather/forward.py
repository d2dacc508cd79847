"""Sums of weighted samples (docs/math/gather.md, eq. 2). A unit of work is some queries of an image, whose outputs it
owns; or, where pixels are read many times, one group, whose pixels are brought together first."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.core.gathered import sum_samples
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.parallel import call_helpers, claim_near, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import at
from pydeform.cpu.gather.places import (
    Maps,
    Tile,
    clear_nothing,
    copy_group,
    corners_of,
    count_of,
    entry_of,
    fetch_next,
    groups_of,
    locate,
    make_weights,
    maps_of,
    queries_of,
    weights_of,
)


class Work(NamedTuple):
    """A unit of it: groups of an image, and queries."""

    image: int
    group: int
    groups: int
    query: int
    end: int
    value: Any  # a pointer to the pixels that they read,
    maps: Any  # and how these lie


@Kernel
def gather(thread: int, counters: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    call_helpers(thread, counters)
    clear_nothing(thread, scratch)
    tiles = -(-g.queries // p.queries)
    units = g.batch * (g.groups if p.apart else tiles)
    unit = claim_near(counters, 0, thread, units)
    while unit < units:
        if p.apart:
            maps = Maps(p.block, g.pixels * p.block, 0, g.pixels * p.block)
            image, group = unit // g.groups, unit % g.groups
            value = at(scratch.maps, (thread, 0))
            copy_group(image, group, given.value, value, g, p)
            work = Work(image, group, 1, 0, g.queries, value, maps)
        else:
            image = unit // tiles
            value = at(given.value, (image, 0, 0))
            maps = maps_of(value, 0, thread, scratch, g)
            query = (unit - image * tiles) * p.queries
            work = Work(image, 0, g.groups, query, min(query + p.queries, g.queries), value, maps)
        _do(thread, work, given, output, scratch, tables, g, p)
        finish(counters, 0)
        unit = claim_near(counters, 0, thread, units)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _do(thread: int, work: Any, given: Any, output: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    groups = work.groups if g.location_groups > 1 else 1
    queries = p.queries * g.location_groups // groups
    for query in range(work.query, work.end, queries):
        tile = Tile(thread, work.image, query, min(queries, work.end - query), work.group, groups)
        if p.apart:
            fetch_next(tile, given, g, p)
        locate(tile, work.maps, given, scratch, tables, g, p)
        if given.reference is not None:
            make_weights(tile, given, scratch, g, p)
        _sum_tile(tile, work, given, output, scratch, g, p)


@inline
def _sum_tile(tile: Any, work: Any, given: Any, output: Any, scratch: Any, g: Any, p: Any) -> None:
    runs = queries_of(tile, given, g) if p.apart else groups_of(work.groups, tile, given, g)
    for query in range(1 if p.apart else tile.queries):
        count, entry = count_of(tile, query, scratch, g, p), entry_of(tile, query, 0, scratch, g, p)
        weights = weights_of(tile, query, tile.group, entry, given, scratch, g)
        corners = corners_of(entry, 0, tile, work.value, scratch, p)
        out = at(output, (tile.image, tile.query + query, tile.group * g.channels))
        sum_samples(out, corners, runs, p.axes, weights, p.weight_step, count, g.channels)

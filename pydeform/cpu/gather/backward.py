"""Gradients of sums of weighted samples (docs/math/gather.md, eq. 3 to 6).

A unit of work is either some channels of one group of an image, which owns their part of the value's gradient and goes
through all queries in order; or some queries of an image, which own their gradients of locations, weights and reference
points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.core.gathered import corner_dots, scatter_samples
from pydeform.cpu.core.jit import Kernel, inline, inline_always
from pydeform.cpu.core.parallel import call_helpers, claim, finish, let_helpers_go, wait_for
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.vector import evens, lanes_of, load, odds, store
from pydeform.cpu.gather.places import (
    Tile,
    clear_nothing,
    corners_of,
    entry_of,
    locate,
    make_weights,
    reach_of,
    reference_at,
    seen_of,
    weights_of,
)


class Gradients(NamedTuple):
    """The output's gradient, which is given, and those that are asked for; others are empty."""

    output: Any  # (image, query, all channels)
    value: Any
    locations: Any
    weights: Any
    reference: Any


@Kernel
def gather_backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    clear_nothing(thread, scratch)
    tiles = -(-g.queries // p.queries)
    parts = -(-g.groups // p.groups) * p.blocks  # of an image's channels
    scattering = g.batch * parts * (grads.value.size > 0)
    units = scattering + g.batch * tiles * (grads.weights.size > 0)
    unit = claim(counters, 0)
    while unit < units:
        if unit < scattering:
            _scatter(thread, unit // parts, unit % parts, given, grads, scratch, tables, g, p)
        else:
            image = (unit - scattering) // tiles
            query = (unit - scattering - image * tiles) * p.queries
            tile = Tile(thread, image, query, min(p.queries, g.queries - query), 0, g.location_groups)
            _dots_of_tile(tile, given, grads, scratch, tables, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _scatter(
    thread: int, image: int, part: int, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    """Eq. 5 for some groups, or a block of the channels of one."""
    first_group, block = part // p.blocks * p.groups, part % p.blocks * p.block
    groups, channels = min(p.groups, g.groups - first_group), min(p.block, g.channels - block)
    of_place = g.location_groups // g.groups  # 0: all groups have the same
    apart = groups if of_place else 1
    queries = p.queries * g.location_groups // apart
    for query in range(0, g.queries, queries):
        tile = Tile(thread, image, query, min(queries, g.queries - query), first_group * of_place, apart)
        locate(tile, grads.value, 1, given, scratch, tables, g, p)
        if given.reference is not None:
            make_weights(tile, given, scratch, g)
        for q in range(tile.queries):
            count = seen_of(tile, q, scratch, g, p)
            for i in range(groups):
                entry, channel = entry_of(tile, q, i * of_place, g), (first_group + i) * g.channels + block
                weights = weights_of(tile, q, first_group + i, entry, given, scratch, g)
                grad = at(grads.output, (image, query + q, channel))
                corners = corners_of(entry, channel, tile, grads.value, scratch, p)
                scatter_samples(grad, corners, p.axes, weights, p.weight_step, count, channels)


@inline
def _dots_of_tile(tile: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Eq. 3 and 4, and of them eq. 6."""
    locate(tile, given.value, 0, given, scratch, tables, g, p)
    if given.reference is not None:
        make_weights(tile, given, scratch, g)
    for first in range(0, g.groups, tile.groups):  # groups that share their places, one after the other
        for i in range(tile.queries * tile.groups * g.samples << len(p.axes)):
            scratch.dots[tile.thread, i] = 0
        for query in range(tile.queries):
            count = seen_of(tile, query, scratch, g, p)
            for i in range(tile.groups):
                entry, channel = entry_of(tile, query, i, g), (first + i) * g.channels
                corners = corners_of(entry, channel, tile, given.value, scratch, p)
                dots = at(scratch.dots, (tile.thread, entry * (1 << len(p.axes))))
                grad = at(grads.output, (tile.image, tile.query + query, channel))
                corner_dots(dots, grad, corners, p.axes, count, g.channels)
                if given.reference is None:
                    _bring_weights(tile, query, first + i, entry, count, given, scratch, g, p)
        _blend_dots(tile, first > 0, scratch, tables, g, p)
        _write_weights(tile, first, given, grads, scratch, g, p)
    if p.discrete is None:
        if given.reference is None:
            _write_locations(tile, grads, scratch, tables, g, p)
        else:
            _write_offsets(tile, given, grads, scratch, tables, g)


@inline_always
def _bring_weights(
    tile: Any, query: int, group: int, entry: int, count: int, given: Any, scratch: Any, g: Any, p: Any
) -> None:
    source = weights_of(tile, query, group, entry, given, scratch, g)
    target = at(scratch.weights, (tile.thread, entry))
    if p.lists is None:
        for s in range(g.samples):
            target[s] = source[s * p.weight_step]
    else:
        for s in range(g.samples):
            target[s] = 0  # a sample that nothing is read for has no part, whatever its weight
        for i in range(count):
            s = scratch.listed[tile.thread, entry + i]
            target[s] = source[s * p.weight_step]


@inline
def _blend_dots(tile: Any, add: bool, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """values = gradients of the weights; moves[axis] (+)= gradients of the numbers y and x."""
    thread, count = tile.thread, tile.queries * tile.groups * g.samples
    lanes = lanes_of(at(scratch.values, (thread, 0)))
    for i in range(0, count, lanes):
        values = at(scratch.values, (thread, i))
        dots = at(scratch.dots, (thread, i * (1 << len(p.axes))))
        if p.discrete is None:
            down, along = load(at(scratch.cells, (thread, 0, i))), load(at(scratch.cells, (thread, 1, i)))
            one, two = load(dots), load(advance(dots, lanes))
            three, four = load(advance(dots, 2 * lanes)), load(advance(dots, 3 * lanes))
            one, two, three, four = evens(one, two), odds(one, two), evens(three, four), odds(three, four)
            one, two, three, four = evens(one, three), evens(two, four), odds(one, three), odds(two, four)
            top, bottom = (1 - along) * one + along * two, (1 - along) * three + along * four
            store((1 - down) * top + down * bottom, values)
            by_y, by_x = bottom - top, (1 - down) * (two - one) + down * (four - three)
            weights = load(at(scratch.weights, (thread, i)))
            to_y, to_x = at(scratch.moves, (thread, 0, i)), at(scratch.moves, (thread, 1, i))
            by_y = weights * (load(at(tables.scale, (0, i))) * by_y)
            by_x = weights * (load(at(tables.scale, (1, i))) * by_x)
            if add:
                by_y, by_x = load(to_y) + by_y, load(to_x) + by_x
            store(by_y, to_y)
            store(by_x, to_x)
        else:
            store(load(at(scratch.shares, (thread, i))) * load(dots), values)


@inline
def _write_weights(tile: Any, first: int, given: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 3; of logits eq. 6."""
    for query in range(tile.queries):
        for i in range(tile.groups):
            entry = entry_of(tile, query, i, g)
            place = g.first_weight + (tile.query + query) * g.weight_steps[1] + (first + i) * g.weight_steps[2]
            target, values = at(grads.weights, (tile.image, place)), at(scratch.values, (tile.thread, entry))
            if given.reference is None:
                for s in range(g.samples):
                    target[s * p.weight_step] = values[s]
            else:
                weights = at(scratch.weights, (tile.thread, entry))
                mean = weights[0] * values[0]
                for s in range(1, g.samples):
                    mean += weights[s] * values[s]
                for s in range(g.samples):
                    target[s] = weights[s] * (values[s] - mean)


@inline
def _write_locations(tile: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Eq. 4. Samples of one place, in maps of several scales, are added in their order."""
    moves, entry = at(scratch.moves, (tile.thread, 0, 0)), 0
    for q in range(tile.query, tile.query + tile.queries):
        for group in range(tile.groups):
            target = at(grads.locations, (tile.image, q * g.number_steps[1] + group * g.number_steps[2]))
            before = -1
            for s in range(g.samples):
                x = tables.number[s]
                if x == before:
                    target[x] += moves[p.row + entry]
                    target[x + 1] += moves[entry]
                else:
                    target[x] = moves[p.row + entry]
                    target[x + 1] = moves[entry]
                before = x
                entry += 1


@inline_always
def _part(move: Any, factor: Any) -> Any:
    """Of a sample that does not move anything, which may be infinitely far away: 0."""
    return move * factor if move != 0 else move


@inline
def _write_offsets(tile: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any) -> None:
    """Eq. 6: of raw offsets, and of the points or boxes that they start from, over all groups and samples in order."""
    for q in range(tile.query, tile.query + tile.queries):
        of_query = g.reference_levels * g.reference_numbers
        for i in range(of_query):
            grads.reference[tile.image, q * of_query + i] = 0
        for group in range(tile.groups):
            entry, place = entry_of(tile, q - tile.query, group, g), q * g.number_steps[1] + group * g.number_steps[2]
            target, offsets = at(grads.locations, (tile.image, place)), at(given.locations, (tile.image, place))
            for s in range(g.samples):
                box = reference_at(given.reference, tile, q, tables.level[s], g)
                to_box = reference_at(grads.reference, tile, q, tables.level[s], g)
                for axis in range(2):
                    move = scratch.moves[tile.thread, 1 - axis, entry + s]
                    divisor = tables.divisor[1 - axis, s]
                    target[2 * s + axis] = _part(move, reach_of(box, axis, divisor, g))
                    to_box[axis] += move
                    if g.reference_numbers == 4:
                        parts = offsets[2 * s + axis] / divisor * type(move)(g.offset_scale)
                        to_box[2 + axis] += _part(move, parts)

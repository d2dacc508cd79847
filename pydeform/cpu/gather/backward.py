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
from pydeform.cpu.core.simd import advance, at, fetch_ahead
from pydeform.cpu.core.vector import evens, lanes_of, load, odds, store
from pydeform.cpu.gather.places import (
    Maps,
    Tile,
    clear_nothing,
    corners_of,
    entry_of,
    groups_of,
    locate,
    make_weights,
    maps_of,
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


class Work(NamedTuple):
    """A unit of it: some groups of an image, or a block of the channels of one, and queries."""

    image: int
    group: int
    groups: int
    channel: int  # of a group, where the block begins
    channels: int
    query: int
    end: int
    scatters: bool  # adds to the value's gradient,
    dots: bool  # makes all others
    apart: bool  # in maps of the groups' own


@Kernel
def gather_backward(
    thread: int, counters: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    call_helpers(thread, counters)
    clear_nothing(thread, scratch)
    tiles = -(-g.queries // p.queries)
    parts = -(-g.groups // p.groups) * p.blocks  # of an image's channels
    scatters, dots = grads.value.size > 0, grads.weights.size > 0
    of_channels = g.batch * parts * (scatters or p.along > 0)
    units = of_channels + g.batch * tiles * (dots and p.along == 0)
    unit = claim(counters, 0)
    while unit < units:
        if unit < of_channels:
            part = unit % parts
            group, channel = part // p.blocks * p.groups, part % p.blocks * p.block
            groups, channels = min(p.groups, g.groups - group), min(p.block, g.channels - channel)
            dots_too = dots and p.along > 0
            work = Work(unit // parts, group, groups, channel, channels, 0, g.queries, scatters, dots_too, p.apart > 0)
        else:
            image = (unit - of_channels) // tiles
            query = (unit - of_channels - image * tiles) * p.queries
            end = min(query + p.queries, g.queries)
            work = Work(image, 0, g.groups, 0, g.channels, query, end, False, True, False)
        _do(thread, work, given, grads, scratch, tables, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _do(thread: int, work: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    of_place = g.location_groups // g.groups  # 0: all groups have the same
    groups = work.groups if of_place else 1  # with places of their own
    channel = work.group * g.channels + work.channel
    value, grad = at(given.value, (work.image, 0, 0)), at(grads.value, (work.image, 0, 0))
    maps = maps_of(grad, 1, thread, scratch, g) if work.scatters else maps_of(value, 0, thread, scratch, g)
    if work.apart:
        value, grad = at(scratch.maps, (thread, 0, 0)), at(scratch.maps, (thread, 1, 0))
        maps, channel = Maps(p.block, g.pixels * p.block), 0
        _set_apart(thread, work, given, scratch, g, p)
    queries = p.queries * g.location_groups // groups
    for query in range(work.query, work.end, queries):
        tile = Tile(thread, work.image, query, min(queries, work.end - query), work.group * of_place, groups)
        if work.apart:
            _fetch_next(tile, work, given, grads, g, p)
        locate(tile, maps, given, scratch, tables, g, p)
        if given.reference is not None:
            make_weights(tile, given, scratch, g)
        if work.scatters:
            _scatter(tile, work, grad, channel, given, grads, scratch, g, p)
        if work.dots:
            _make_dots(tile, work, value, channel, given, grads, scratch, tables, g, p)
    if work.apart and work.scatters:
        _bring_back(thread, work, grads, scratch, g, p)


@inline_always
def _set_apart(thread: int, work: Any, given: Any, scratch: Any, g: Any, p: Any) -> None:
    """The groups' pixels side by side, behind them one of zeros; and zeros to add their gradient to."""
    value, grad = at(scratch.maps, (thread, 0, 0)), at(scratch.maps, (thread, 1, 0))
    if work.scatters:
        for i in range(g.pixels * p.block):
            grad[i] = 0
    if work.dots:
        for pixel in range(g.pixels):
            source = at(given.value, (work.image, pixel, work.group * g.channels))
            _copy(source, advance(value, pixel * p.block), work.groups * g.channels)
        for c in range(p.block):
            value[g.pixels * p.block + c] = 0


@inline_always
def _bring_back(thread: int, work: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    for pixel in range(g.pixels):
        target = at(grads.value, (work.image, pixel, work.group * g.channels))
        _copy(at(scratch.maps, (thread, 1, pixel * p.block)), target, work.groups * g.channels)


@inline_always
def _copy(source: Any, target: Any, count: int) -> None:
    for c in range(count):
        target[c] = source[c]


@inline_always
def _fetch_next(tile: Any, work: Any, given: Any, grads: Any, g: Any, p: Any) -> None:
    """Asks for what the next tile reads and writes: of a few groups it lies here and there."""
    after = tile.query + tile.queries
    for q in range(after, after + tile.queries):
        fetch_ahead(at(grads.output, (tile.image, q, work.group * g.channels)), p.lines[0])
        place = q * g.number_steps[1] + work.group * g.number_steps[2]
        fetch_ahead(at(given.locations, (tile.image, place)), p.lines[1])
        if work.dots:
            fetch_ahead(at(grads.locations, (tile.image, place)), p.lines[1])
        place = g.first_weight + q * g.weight_steps[1] + work.group * g.weight_steps[2]
        fetch_ahead(at(given.weights, (tile.image, place)), p.lines[2])
        if work.dots:
            fetch_ahead(at(grads.weights, (tile.image, place)), p.lines[2])


@inline_always
def _scatter(
    tile: Any, work: Any, maps: Any, channel: int, given: Any, grads: Any, scratch: Any, g: Any, p: Any
) -> None:
    """Eq. 5."""
    runs = groups_of(work.groups, tile, given, g)
    for q in range(tile.queries):
        count, entry = seen_of(tile, q, scratch, g, p), entry_of(tile, q, 0, g)
        weights = weights_of(tile, q, work.group, entry, given, scratch, g)
        grad = at(grads.output, (tile.image, tile.query + q, work.group * g.channels + work.channel))
        corners = corners_of(entry, channel, tile, maps, scratch, p)
        scatter_samples(grad, corners, runs, p.axes, weights, p.weight_step, count, work.channels)


@inline_always
def _make_dots(
    tile: Any, work: Any, maps: Any, channel: int, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    """Eq. 3 and 4, and of them eq. 6."""
    runs = groups_of(tile.groups, tile, given, g)
    for i in range(0, work.groups, tile.groups):  # groups that share their places, one after the other
        first = work.group + i
        if p.lists is not None:
            for k in range(tile.queries * tile.groups * g.samples << len(p.axes)):
                scratch.dots[tile.thread, k] = 0
        for q in range(tile.queries):
            count, entry = seen_of(tile, q, scratch, g, p), entry_of(tile, q, 0, g)
            corners = corners_of(entry, channel + i * g.channels, tile, maps, scratch, p)
            dots = at(scratch.dots, (tile.thread, entry * (1 << len(p.axes))))
            grad = at(grads.output, (tile.image, tile.query + q, first * g.channels))
            corner_dots(dots, grad, corners, runs, p.axes, count, g.channels)
        if given.reference is None:
            _bring_weights(tile, first, given, scratch, g, p)
        _blend_dots(tile, i > 0, scratch, tables, g, p)
        _write_weights(tile, first, given, grads, scratch, g, p)
    if p.discrete is None:
        if given.reference is None:
            _write_locations(tile, grads, scratch, tables, g, p)
        else:
            _write_offsets(tile, given, grads, scratch, tables, g)


@inline_always
def _bring_weights(tile: Any, first: int, given: Any, scratch: Any, g: Any, p: Any) -> None:
    for query in range(tile.queries):
        count = seen_of(tile, query, scratch, g, p)
        for i in range(tile.groups):
            entry = entry_of(tile, query, i, g)
            source = weights_of(tile, query, first + i, entry, given, scratch, g)
            target = at(scratch.weights, (tile.thread, entry))
            if p.lists is None:
                for s in range(g.samples):
                    target[s] = source[s * p.weight_step]
            else:
                for s in range(g.samples):
                    target[s] = 0  # a sample that nothing is read for has no part, whatever its weight
                for k in range(count):
                    s = scratch.listed[tile.thread, entry + k]
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
            target = at(grads.locations, (tile.image, q * g.number_steps[1] + (tile.group + group) * g.number_steps[2]))
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

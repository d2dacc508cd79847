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
    copy,
    copy_group,
    corners_of,
    count_of,
    entry_of,
    fetch_next,
    groups_of,
    locate,
    make_weights,
    maps_of,
    number_of,
    place_of_numbers,
    place_of_weights,
    queries_of,
    reach_of,
    reference_at,
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
    """A unit of it: some groups of an image, or a block of the channels of one, with a range of its pixels, and
    queries."""

    image: int
    group: int
    groups: int
    channel: int  # of a group, where the block begins
    channels: int
    range: int
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
    ranges = tables.bounds.size - 1
    parts = -(-g.groups // p.groups) * p.blocks * ranges  # of an image
    scatters, dots = grads.value.size > 0, grads.weights.size > 0
    of_parts = g.batch * parts * (scatters or p.along > 0)
    units = of_parts + g.batch * tiles * (dots and p.along == 0)
    unit = claim(counters, 0)
    while unit < units:
        if unit < of_parts:
            part = unit % parts // ranges
            group, channel = part // p.blocks * p.groups, part % p.blocks * p.block
            groups, channels = min(p.groups, g.groups - group), min(p.block, g.channels - channel)
            what = scatters, dots and p.along > 0, p.apart > 0
            work = Work(unit // parts, group, groups, channel, channels, unit % ranges, 0, g.queries, *what)
        else:
            image = (unit - of_parts) // tiles
            query = (unit - of_parts - image * tiles) * p.queries
            end = min(query + p.queries, g.queries)
            work = Work(image, 0, g.groups, 0, g.channels, 0, query, end, False, True, False)
        _do(thread, work, given, grads, scratch, tables, g, p)
        finish(counters, 0)
        unit = claim(counters, 0)
    wait_for(counters, 0, units)
    let_helpers_go(thread, counters)


@inline
def _do(thread: int, work: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    of_place = g.location_groups // g.groups  # 0: all groups have the same
    groups = work.groups if of_place else 1  # with places of their own
    value, grad = at(given.value, (work.image, 0, 0)), at(grads.value, (work.image, 0, 0))
    maps = maps_of(value, 0, thread, scratch, g)
    if work.scatters:
        maps = maps_of(grad, 1, thread, scratch, g)
        low, high = tables.bounds[work.range], tables.bounds[work.range + 1]
        maps = Maps(maps.pixel, maps.nothing, low * maps.pixel, high * maps.pixel)
    if work.apart:
        value, grad = at(scratch.maps, (thread, 0)), at(scratch.grad_maps, (thread, 0))
        maps = Maps(p.block, g.pixels * p.block, 0, g.pixels * p.block)
        _set_apart(thread, work, given, scratch, g, p)
    elif p.lists is not None and work.scatters:
        # Memory that is read before it is written is mapped twice, and all processors are told.
        for start in range(maps.low, maps.high, p.step * maps.pixel):
            grad[start] = 0
    queries = p.queries * g.location_groups // groups
    for query in range(work.query, work.end, queries):
        tile = Tile(thread, work.image, query, min(queries, work.end - query), work.group * of_place, groups)
        if work.apart:
            fetch_next(tile, given, g, p)
            _fetch_gradients(tile, work.dots, grads, g, p)
        locate(tile, maps, given, scratch, tables, g, p)
        if given.reference is not None:
            make_weights(tile, given, scratch, g, p)
        if work.scatters:
            _scatter(tile, work, grad, given, grads, scratch, g, p)
        if work.dots:
            _make_dots(tile, work, value, given, grads, scratch, tables, g, p)
    if work.apart and work.scatters:
        _bring_back(thread, work, grads, scratch, g, p)


@inline_always
def _channel_of(work: Any, g: Any) -> int:
    """Where those of a unit begin in a pixel."""
    return 0 if work.apart else work.group * g.channels + work.channel


@inline_always
def _set_apart(thread: int, work: Any, given: Any, scratch: Any, g: Any, p: Any) -> None:
    """The groups' pixels side by side, behind them one of zeros; and zeros to add their gradient to."""
    value, grad = at(scratch.maps, (thread, 0)), at(scratch.grad_maps, (thread, 0))
    if work.scatters:
        for i in range(g.pixels * p.block):
            grad[i] = 0
    if work.dots:
        copy_group(work.image, work.group, given.value, value, g, p)


@inline_always
def _bring_back(thread: int, work: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    for pixel in range(g.pixels):
        target = at(grads.value, (work.image, pixel, work.group * g.channels))
        copy(at(scratch.grad_maps, (thread, pixel * p.block)), target, g.channels)


@inline_always
def _fetch_gradients(tile: Any, dots: bool, grads: Any, g: Any, p: Any) -> None:
    """As `fetch_next`."""
    after = tile.query + tile.queries
    for q in range(after, after + tile.queries):
        fetch_ahead(at(grads.output, (tile.image, q, tile.group * g.channels)), p.lines[0])
        if dots:
            fetch_ahead(at(grads.locations, (tile.image, place_of_numbers(q, tile.group, g))), p.lines[1])
            fetch_ahead(at(grads.weights, (tile.image, place_of_weights(q, tile.group, g))), p.lines[2])


@inline_always
def _scatter(tile: Any, work: Any, maps: Any, given: Any, grads: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 5."""
    runs = queries_of(tile, given, g) if work.apart else groups_of(work.groups, tile, given, g)
    for q in range(1 if work.apart else tile.queries):
        count, entry = count_of(tile, q, scratch, g, p), entry_of(tile, q, 0, scratch, g, p)
        weights = weights_of(tile, q, work.group, entry, given, scratch, g)
        grad = at(grads.output, (tile.image, tile.query + q, work.group * g.channels + work.channel))
        corners = corners_of(entry, _channel_of(work, g), tile, maps, scratch, p)
        scatter_samples(grad, corners, runs, p.axes, weights, p.weight_step, count, work.channels)


@inline_always
def _make_dots(
    tile: Any, work: Any, maps: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any
) -> None:
    """Eq. 3 and 4, and of them eq. 6."""
    runs = queries_of(tile, given, g) if work.apart else groups_of(work.groups, tile, given, g)
    apart = (g.samples if tile.groups == work.groups else p.row) << len(p.axes)
    for q in range(1 if work.apart else tile.queries):
        count, entry = count_of(tile, q, scratch, g, p), entry_of(tile, q, 0, scratch, g, p)
        corners = corners_of(entry, _channel_of(work, g), tile, maps, scratch, p)
        dots = at(scratch.dots, (tile.thread, entry << len(p.axes)))
        grad = at(grads.output, (tile.image, tile.query + q, work.group * g.channels))
        corner_dots(dots, apart, grad, corners, runs, p.axes, count, g.channels)
    for i in range(0, work.groups, tile.groups):  # groups that share their places, one after the other
        first = work.group + i
        if given.reference is None:
            _bring_weights(tile, first, given, scratch, g, p)
        _blend_dots(tile, i, scratch, tables, g, p)
        _write_weights(tile, first, given, grads, scratch, g, p)
    if p.discrete is None:
        if given.reference is None:
            _write_locations(tile, grads, scratch, tables, g, p)
        else:
            _write_offsets(tile, given, grads, scratch, tables, g, p)


@inline_always
def _bring_weights(tile: Any, first: int, given: Any, scratch: Any, g: Any, p: Any) -> None:
    for query in range(tile.queries):
        for i in range(tile.groups):
            entry = entry_of(tile, query, i, scratch, g, p)
            source = weights_of(tile, query, first + i, entry, given, scratch, g)
            target = at(scratch.weights, (tile.thread, entry))
            for k in range(count_of(tile, query, scratch, g, p)):
                target[k] = source[number_of(k, entry, tile, scratch, p) * p.weight_step]


@inline
def _blend_dots(tile: Any, group: int, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """values = gradients of the weights; moves[axis] (+)= gradients of the numbers y and x."""
    thread, count = tile.thread, entry_of(tile, tile.queries, 0, scratch, g, p)
    scales = at(tables.scale, (0, 0)) if p.lists is None else at(scratch.scales, (thread, 0, 0))
    lanes = lanes_of(at(scratch.values, (thread, 0)))
    for i in range(0, count, lanes):
        values = at(scratch.values, (thread, i))
        dots = at(scratch.dots, (thread, (group * p.row + i) << len(p.axes)))
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
            by_y = weights * (load(advance(scales, i)) * by_y)
            by_x = weights * (load(advance(scales, p.row + i)) * by_x)
            if group > 0:
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
            entry = entry_of(tile, query, i, scratch, g, p)
            place = place_of_weights(tile.query + query, first + i, g)
            target, values = at(grads.weights, (tile.image, place)), at(scratch.values, (tile.thread, entry))
            if given.reference is None:
                for k in range(count_of(tile, query, scratch, g, p)):
                    target[number_of(k, entry, tile, scratch, p) * p.weight_step] = values[k]
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
    for query in range(tile.queries):
        for i in range(tile.groups):
            place = place_of_numbers(tile.query + query, tile.group + i, g)
            target, before, first = at(grads.locations, (tile.image, place)), -1, entry
            for k in range(count_of(tile, query, scratch, g, p)):
                x = tables.number[number_of(k, first, tile, scratch, p)]
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
def _write_offsets(tile: Any, given: Any, grads: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Eq. 6: of raw offsets, and of the points or boxes that they start from, over all groups and samples in order."""
    for q in range(tile.query, tile.query + tile.queries):
        of_query = g.reference_levels * g.reference_numbers
        for i in range(of_query):
            grads.reference[tile.image, q * of_query + i] = 0
        for group in range(tile.groups):
            entry, place = (
                entry_of(tile, q - tile.query, group, scratch, g, p),
                q * g.number_steps[1] + group * g.number_steps[2],
            )
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

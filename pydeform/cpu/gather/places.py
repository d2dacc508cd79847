"""Where the samples of some queries read: from a caller's numbers to corners and their shares (eq. 1), and from raw
offsets and logits to such numbers and to weights (eq. 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.gathered import Corners, Runs, place_in, starts_of, steps_to
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.simd import advance, at, fetch_ahead
from pydeform.cpu.core.vector import (
    convert,
    evens,
    lanes_of,
    load,
    load_beside,
    load_first,
    odds,
    select,
    splat,
    store,
)
from pydeform.cpu.sampling.axes import axis_corners


class Tile(NamedTuple):
    """Some queries of an image with some groups, and the thread that has their entries in its tables."""

    thread: int
    image: int
    query: int
    queries: int
    group: int
    groups: int  # as many as have places of their own, or one of them


class Maps(NamedTuple):
    """How the maps of an image lie, in numbers from their first."""

    pixel: int  # from one pixel to the next
    nothing: int  # to what is there in the place of a pixel that is outside,
    low: int  # or, where samples that read nothing are left out, before `low`
    high: int  # or from `high` on


@inline_always
def maps_of(first: Any, row: int, thread: int, scratch: Any, g: Any) -> Maps:
    """As a caller has them, from a pointer to their first number on; what is outside is in a row of `nothing`: 0 to
    read, 1 to write to."""
    pixel = g.groups * g.channels
    return Maps(pixel, steps_to(first, at(scratch.nothing, (thread, row, 0))), 0, g.pixels * pixel)


@inline_always
def entry_of(tile: Any, query: int, group: int, scratch: Any, g: Any, p: Any) -> int:
    """The first of a query and group, both counted from the tile's first."""
    if p.lists is None:
        return (query * tile.groups + group) * g.samples
    return scratch.firsts[tile.thread, query]


@inline_always
def count_of(tile: Any, query: int, scratch: Any, g: Any, p: Any) -> int:
    """How many entries each group of a query has."""
    if p.lists is None:
        return g.samples
    return scratch.firsts[tile.thread, query + 1] - scratch.firsts[tile.thread, query]


@inline_always
def number_of(k: int, entry: int, tile: Any, scratch: Any, p: Any) -> int:
    """Which of a query's samples the k-th entry from a query's first on is."""
    return k if p.lists is None else scratch.listed[tile.thread, entry + k]


@inline_always
def corners_of(entry: int, channel: int, tile: Any, maps: Any, scratch: Any, p: Any) -> Any:
    """Those of the samples from an entry on, from a channel on; `maps`: a pointer to what they were located in."""
    thread = tile.thread
    starts, shares = at(scratch.starts, (thread, 0)), at(scratch.shares, (thread, 0))
    if p.lists is None:
        return Corners(maps, starts, shares, entry, channel, None)
    return Corners(maps, starts, shares, entry, channel, at(scratch.listed, (thread, entry)))


@inline_always
def groups_of(groups: int, tile: Any, given: Any, g: Any) -> Runs:
    """How some groups of a query follow one another."""
    entries = g.samples if tile.groups > 1 else 0
    return Runs(groups, entries, g.channels, g.channels, g.weight_steps[2] if given.reference is None else entries)


@inline
def _keep_seen(tile: Any, maps: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Of the samples, which all groups share, those stay that read a pixel, or NaN, one after the other."""
    thread, kept = tile.thread, 0
    starts, shares = at(scratch.starts, (thread, 0)), at(scratch.shares, (thread, 0))
    lanes = lanes_of(shares)
    for query in range(tile.queries):
        scratch.firsts[thread, query] = kept
        for s in range(g.samples):
            entry = query * g.samples + s
            place, to = place_in(entry, shares, p.axes), place_in(kept, shares, p.axes)
            is_seen = shares[place] != shares[place]
            for k in range(0, lanes << len(p.axes), lanes):
                start = starts[place + k]
                has_pixel = (start >= maps.low) & (start < maps.high)
                is_seen |= has_pixel
                starts[to + k] = start if has_pixel else maps.nothing
                shares[to + k] = shares[place + k]
            if is_seen:
                scratch.listed[thread, kept] = s
                for axis in range(len(p.axes)):
                    scratch.cells[thread, axis, kept] = scratch.cells[thread, axis, entry]
                    scratch.scales[thread, axis, kept] = tables.scale[axis, entry]
                kept += 1
    scratch.firsts[thread, tile.queries] = kept


@inline
def clear_nothing(thread: int, scratch: Any) -> None:
    for c in range(scratch.nothing.shape[2]):
        scratch.nothing[thread, 0, c] = 0


@inline_always
def queries_of(tile: Any, given: Any, g: Any) -> Runs:
    """How the queries of a tile with one group follow one another."""
    weights = g.weight_steps[1] if given.reference is None else g.samples
    return Runs(tile.queries, g.samples, 0, g.groups * g.channels, weights)


@inline_always
def copy(source: Any, target: Any, count: int) -> None:
    for i in range(count):
        target[i] = source[i]


@inline_always
def copy_group(image: int, group: int, value: Any, to: Any, g: Any, p: Any) -> None:
    """A group's pixels side by side, behind them one of zeros."""
    for pixel in range(g.pixels):
        copy(at(value, (image, pixel, group * g.channels)), advance(to, pixel * p.block), g.channels)
    for c in range(p.block):
        to[g.pixels * p.block + c] = 0


@inline_always
def place_of_numbers(query: int, group: int, g: Any) -> int:
    return query * g.number_steps[1] + group * g.number_steps[2]


@inline_always
def place_of_weights(query: int, group: int, g: Any) -> int:
    return g.first_weight + query * g.weight_steps[1] + group * g.weight_steps[2]


@inline_always
def fetch_next(tile: Any, given: Any, g: Any, p: Any) -> None:
    """Asks for what the next tile of one group reads, which lies here and there."""
    after = tile.query + tile.queries
    for q in range(after, after + tile.queries):
        fetch_ahead(at(given.locations, (tile.image, place_of_numbers(q, tile.group, g))), p.lines[1])
        fetch_ahead(at(given.weights, (tile.image, place_of_weights(q, tile.group, g))), p.lines[2])


@inline
def locate(tile: Any, maps: Any, given: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Fills the tables of the tile's entries. No place is formed from a number that is not known to be in range."""
    numbers = at(scratch.numbers, (tile.thread, 0))
    if given.reference is not None:
        _add_references(tile, given.locations, given.reference, numbers, tables, g)
    elif p.is_direct and tile.groups == g.location_groups:
        numbers = at(given.locations, (tile.image, tile.query * g.number_steps[1]))
    else:
        _bring_together(tile, given.locations, numbers, tables.number, g)
    _lay_kernels(tile, at(scratch.bases, (tile.thread, 0, 0)), g, p)
    if p.discrete is None:
        _name_corners(tile, numbers, maps, scratch, tables, g, p)
    else:
        _name_pixels(tile, numbers, maps, scratch, tables, g)
    if p.lists is not None:
        _keep_seen(tile, maps, scratch, tables, g, p)


@inline
def _bring_together(tile: Any, locations: Any, numbers: Any, places: Any, g: Any) -> None:
    entry = 0
    for q in range(tile.query, tile.query + tile.queries):
        for group in range(tile.group, tile.group + tile.groups):
            source = at(locations, (tile.image, place_of_numbers(q, group, g)))
            for s in range(g.samples):
                numbers[2 * entry] = source[places[s]]
                numbers[2 * entry + 1] = source[places[s] + 1]
                entry += 1


@inline_always
def reference_at(reference: Any, tile: Any, query: int, level: int, g: Any) -> Any:
    """Pointer to the point or box of a query and level."""
    return at(reference, (tile.image, (query * g.reference_levels + level) * g.reference_numbers))


@inline_always
def reach_of(box: Any, axis: int, divisor: Any, g: Any) -> Any:
    """How far a raw offset of 1 goes along an axis (0: x), as a location."""
    one = type(divisor)(1)
    if g.reference_numbers == 4:
        return one / divisor * box[2 + axis] * type(divisor)(g.offset_scale)
    return one / divisor


@inline
def _add_references(tile: Any, offsets: Any, reference: Any, numbers: Any, tables: Any, g: Any) -> None:
    """Eq. 6: locations of raw offsets."""
    scale, entry = type(numbers[0])(g.offset_scale), 0
    for q in range(tile.query, tile.query + tile.queries):
        for group in range(tile.group, tile.group + tile.groups):
            source = at(offsets, (tile.image, place_of_numbers(q, group, g)))
            for s in range(g.samples):
                box = reference_at(reference, tile, q, tables.level[s], g)
                for axis in range(2):
                    part = source[2 * s + axis] / tables.divisor[1 - axis, s]
                    if g.reference_numbers == 4:
                        part = part * box[2 + axis] * scale
                    numbers[2 * entry + axis] = box[axis] + part
                entry += 1


@inline
def _lay_kernels(tile: Any, bases: Any, g: Any, p: Any) -> None:
    """bases[axis][entry]: where the number 0 of a sample without a shift reads."""
    real, of_query, entry = type(bases[0]), tile.groups * g.samples, 0
    for q in range(tile.query, tile.query + tile.queries):
        y = q // g.out_w
        base_y = real(g.start[0] + g.stride[0] * y) - real(g.back[0])
        base_x = real(g.start[1] + g.stride[1] * (q - y * g.out_w)) - real(g.back[1])
        for i in range(entry, entry + of_query):
            bases[i] = base_y
        for i in range(entry, entry + of_query):
            bases[p.row + i] = base_x
        entry += of_query


@inline_always
def _coordinates(numbers: Any, axis: int, i: int, thread: int, scratch: Any, tables: Any) -> Any:
    """Eq. 1 for a vector of entries."""
    base = load(at(scratch.bases, (thread, axis, i)))
    return base + (load(at(tables.shift, (axis, i))) + numbers) * load(at(tables.scale, (axis, i)))


@inline
def _name_corners(tile: Any, numbers: Any, maps: Any, scratch: Any, tables: Any, g: Any, p: Any) -> None:
    """Samples between pixels, of which those outside the map count as zeros."""
    thread, count, lanes = tile.thread, tile.queries * tile.groups * g.samples, lanes_of(numbers)
    # -1 itself is outside, with derivative 0.
    low = np.nextafter(type(numbers[0])(-1), type(numbers[0])(0))
    starts, shares, integer = at(scratch.starts, (thread, 0)), at(scratch.shares, (thread, 0)), at(tables.size, (0, 0))
    for i in range(0, count, lanes):
        one = load_first(advance(numbers, 2 * i), 2 * (count - i))
        two = load_first(advance(numbers, 2 * i + lanes), 2 * (count - i) - lanes)
        at_x, at_y = evens(one, two), odds(one, two)
        height = load_beside(at(tables.size, (0, i)), one)
        width = load_beside(at(tables.size, (1, i)), one)
        start = load_beside(at(tables.first_pixel, (i,)), one)
        y = _coordinates(at_y, 0, i, thread, scratch, tables)
        x = _coordinates(at_x, 1, i, thread, scratch, tables)
        top, _, has_top, has_bottom, down = axis_corners(y, low, convert(height, numbers), height, height, integer)
        left, _, has_left, has_right, along = axis_corners(x, low, convert(width, numbers), width, width, integer)
        if p.lists is not None:
            is_seen = (at_x > 0) & (at_x < 1) & (at_y > 0) & (at_y < 1)
            has_top, has_bottom = has_top & is_seen, has_bottom & is_seen
        place = place_in(i, numbers, p.axes)
        corner, share = advance(starts, place), advance(shares, place)
        first = start + top * width + left
        above, below = starts_of(first, maps.pixel), starts_of(first + width, maps.pixel)
        store(select(has_top & has_left, above, maps.nothing), corner)
        store(select(has_top & has_right, above + maps.pixel, maps.nothing), advance(corner, lanes))
        store(select(has_bottom & has_left, below, maps.nothing), advance(corner, 2 * lanes))
        store(select(has_bottom & has_right, below + maps.pixel, maps.nothing), advance(corner, 3 * lanes))
        store((1 - down) * (1 - along), share)
        store((1 - down) * along, advance(share, lanes))
        store(down * (1 - along), advance(share, 2 * lanes))
        store(down * along, advance(share, 3 * lanes))
        is_known = down + along == down + along
        store(select(is_known, down, np.nan), at(scratch.cells, (thread, 0, i)))
        store(select(is_known, along, np.nan), at(scratch.cells, (thread, 1, i)))


@inline
def _name_pixels(tile: Any, numbers: Any, maps: Any, scratch: Any, tables: Any, g: Any) -> None:
    """Samples that are the pixel which they lie in, or the nearest one of the map."""
    thread, count, lanes = tile.thread, tile.queries * tile.groups * g.samples, lanes_of(numbers)
    starts, integer = at(scratch.starts, (thread, 0)), at(tables.size, (0, 0))
    for i in range(0, count, lanes):
        one = load_first(advance(numbers, 2 * i), 2 * (count - i))
        two = load_first(advance(numbers, 2 * i + lanes), 2 * (count - i) - lanes)
        y = _coordinates(odds(one, two), 0, i, thread, scratch, tables)
        x = _coordinates(evens(one, two), 1, i, thread, scratch, tables)
        height = load_beside(at(tables.size, (0, i)), one)
        width = load_beside(at(tables.size, (1, i)), one)
        start = load_beside(at(tables.first_pixel, (i,)), one)
        pixel = start + _nearest(y, height, integer, numbers) * width + _nearest(x, width, integer, numbers)
        is_known = (x == x) & (y == y)
        corner = advance(starts, i)
        store(select(is_known, starts_of(pixel, maps.pixel), maps.nothing), corner)
        store(select(is_known, splat(1, x), np.nan), at(scratch.shares, (thread, i)))


@inline_always
def _nearest(p: Any, size: Any, integer: Any, real: Any) -> Any:
    end = convert(size, real)
    is_inside = (p >= 0) & (p < end)
    return select(is_inside, convert(select(is_inside, p, 0), integer), select(p >= end, size - 1, 0))


@inline
def make_weights(tile: Any, given: Any, scratch: Any, g: Any, p: Any) -> None:
    """Eq. 6: the softmax over the samples of each query and group."""
    weights = at(scratch.weights, (tile.thread, 0))
    for q in range(tile.queries):
        for group in range(tile.groups):
            logits = at(given.weights, (tile.image, place_of_weights(tile.query + q, tile.group + group, g)))
            target = advance(weights, entry_of(tile, q, group, scratch, g, p))
            largest = logits[0]
            for s in range(1, g.samples):
                if logits[s] > largest or logits[s] != logits[s]:
                    largest = logits[s]
            total = type(largest)(0)
            for s in range(g.samples):
                target[s] = np.exp(logits[s] - largest)
                total += target[s]
            for s in range(g.samples):
                target[s] /= total


@inline_always
def weights_of(tile: Any, query: int, group: int, entry: int, given: Any, scratch: Any, g: Any) -> Any:
    """Pointer to the weights of a query of the tile and a group of the image, `weight_step` apart."""
    if given.reference is not None:
        return at(scratch.weights, (tile.thread, entry))
    return at(given.weights, (tile.image, place_of_weights(tile.query + query, group, g)))

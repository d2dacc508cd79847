"""How the queries of a call are cut up, and the memory and tables that its kernels work with."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from pydeform._gather_geometry import BILINEAR_INSIDE, DISCRETE, Gather
from pydeform.cpu.core import parallel
from pydeform.cpu.core.memory import Part, Workspace, contiguous
from pydeform.cpu.core.simd import CACHE_LINE, VECTOR_BYTES, second_level_cache
from pydeform.cpu.core.sizes import PAGE, SERIAL_FLOPS, round_up

TILE = 512  # samples that are located together, about: their tables stay in the first-level cache
UNITS_OF_THREAD = 8  # so that none waits long for the last
LOCATING = 32  # what locating a sample costs, in multiply-adds
# From so many reads of a pixel on, backward and forward, it pays to bring a group's pixels together, where they take no
# more bytes than fit into caches.
READS, FORWARD_READS, MAP_BYTES = 8, 48, 1 << 22


class Given(NamedTuple):
    """What a caller gave, in the kernels' shapes; `reference` is None where locations and weights are given."""

    value: Any  # (image, pixel, all channels)
    locations: Any  # (image, number)
    weights: Any  # likewise, or the same array
    reference: Any


class Scratch(NamedTuple):
    """A call's own memory, each thread's. An entry is a sample of a query and group; what there is for each corner lies
    as `place_in` says, what there is for each axis (y, x) in rows."""

    numbers: Any  # x and y of each entry, side by side
    bases: Any  # where the kernel begins, for each entry and axis
    starts: Any  # of corners: addresses of their first channel,
    shares: Any  # and shares
    cells: Any  # the place within the cell
    dots: Any  # of the output's gradient with the corners
    weights: Any  # of entries, made or brought together here
    values: Any  # gradients of the weights,
    moves: Any  # and of the numbers x and y
    listed: Any  # of entries, if those that read no pixel are left out: which of a query's samples they are,
    firsts: Any  # where each query's begin,
    scales: Any  # and, of their maps, what is in a table else
    nothing: Any  # a row of zeros, and one to write to, for all that is outside
    maps: Any  # a group's pixels, which lie together here,
    grad_maps: Any  # and their gradients; behind each what is outside


class Tables(NamedTuple):
    """What is known of the sample of each entry, over and over again; rows are of y and x."""

    shift: Any
    scale: Any
    size: Any
    first_pixel: Any
    number: Any  # of a sample: where its x lies
    level: Any  # of a sample: that of its reference point
    divisor: Any  # of a sample and its axis
    bounds: Any  # of the ranges into which pixels are divided


class Plan(NamedTuple):
    axes: tuple[int, ...]  # of a cell; none where a sample is one pixel
    discrete: Any  # None: samples lie between pixels
    lists: Any  # None: all samples are summed; else those that read a pixel, found once for all groups
    queries: int  # of a tile
    row: int  # entries of a row in the tables
    weight_step: int  # from the weight of one sample to the next
    is_direct: int  # the numbers of a tile lie side by side already
    groups: int  # whose channels one thread takes together for the gradient of the value,
    blocks: int  # or into how many blocks those of a group are divided,
    block: int  # and their size
    apart: int  # 1: a group at a time, in `maps`,
    along: int  # 1: and all other gradients with it
    step: int  # in pixels, by which no page of memory is left out
    lines: tuple[int, ...]  # of the caches, for a group's gradients of outputs, locations and weights of a query


class Needs(NamedTuple):
    """The gradients that are asked for; none: the forward."""

    value: bool = False
    dots: bool = False  # all others


class Prepared(NamedTuple):
    key: str  # of the types of a kernel's arguments
    threads: int
    workspace: Workspace
    tables: Tables
    plan: Plan


def threads_for(g: Any, products: int, units: int) -> int:
    samples = g.batch * g.queries * g.groups * g.samples
    flops = products * samples * (8 * g.channels + LOCATING)
    return 1 if flops < SERIAL_FLOPS else parallel.threads_for(units)


@functools.lru_cache(maxsize=64)
def prepared(gather: Gather, dtype: Any, has_reference: bool, needs: Needs, threads: int) -> Prepared:
    g, samples = gather
    lanes = VECTOR_BYTES // dtype.itemsize
    is_discrete, is_seen = g.rule == DISCRETE, g.rule == BILINEAR_INSIDE
    of_query = g.location_groups * g.samples
    fair = -(-g.batch * g.queries // (UNITS_OF_THREAD * threads))
    queries = max(1, min(TILE // of_query, g.queries, fair))
    row = round_up(queries * of_query, lanes)
    corners = 1 if is_discrete else 4
    parts = -(-threads // g.batch)  # of an image, for the gradient of the value
    blocks = 1 if is_seen else min(-(-parts // g.groups), -(-g.channels // lanes))
    block = round_up(-(-g.channels // blocks), lanes)
    units = g.batch * g.groups
    is_balanced = units % threads == 0 or units >= UNITS_OF_THREAD * threads
    is_apart = blocks == 1 and _goes_apart(g, corners, block, dtype.itemsize, has_reference, needs, is_balanced)
    of_map = (g.pixels + 1) * block * is_apart
    own: tuple[Part, ...] = (
        ((2 * row + lanes,), dtype),
        ((2, row), dtype),
        ((corners * row,), np.dtype(np.int64)),
        ((corners * row,), dtype),
        ((2, row), dtype),
        ((corners * row * (g.groups if is_seen else 1) * needs.dots,), dtype),
        ((row,), dtype),
        ((row * needs.dots,), dtype),
        ((2, row * needs.dots), dtype),
        ((row * is_seen,), np.dtype(np.int64)),
        (((queries + 1) * is_seen,), np.dtype(np.int64)),
        ((2, row * is_seen), dtype),
        ((2, round_up(g.groups * g.channels, lanes)), dtype),
        ((of_map,), dtype),
        ((of_map * needs.value,), dtype),
    )
    plan = Plan(
        axes=() if is_discrete else (0, 0),
        discrete=1 if is_discrete else None,
        lists=1 if is_seen else None,
        queries=queries,
        row=row,
        weight_step=int(samples.weight[-1] // max(g.samples - 1, 1)) or 1,
        is_direct=int(not has_reference and g.first_weight == 0 and g.number_steps[1] == 2 * of_query),
        groups=1 if is_apart else g.groups if is_seen else max(1, g.groups // parts),
        blocks=-(-g.channels // block),
        block=block,
        apart=int(is_apart),
        along=int(is_apart and is_balanced and not has_reference),
        step=max(1, PAGE // (g.groups * g.channels * dtype.itemsize)),
        lines=tuple(_lines(n * dtype.itemsize, dtype) for n in (g.channels, 2 * g.samples, g.samples)),
    )
    key = dtype.char + "d" * is_discrete + "r" * has_reference + "l" * is_seen
    tables = _tables(samples, row, dtype, g, parts if is_seen else 1)
    return Prepared(key, threads, Workspace(threads=threads, own=own), tables, plan)


def _goes_apart(
    g: Any, corners: int, block: int, itemsize: int, has_reference: bool, needs: Needs, is_balanced: bool
) -> bool:
    """Whether each group's pixels are brought together first."""
    size, reads = g.pixels * block * itemsize, g.queries * g.samples * corners
    # What else belongs to a query and group should not be less than a line of the caches.
    if not g.location_groups == g.groups > 1 or 2 * g.samples * itemsize < CACHE_LINE or size > MAP_BYTES:
        return False
    if not (needs.value or needs.dots):
        return is_balanced and reads >= FORWARD_READS * g.pixels
    in_one_go = needs.value and needs.dots and is_balanced and not has_reference
    return reads >= READS * g.pixels and (in_one_go or 2 * g.groups * size > second_level_cache())


def _lines(size: int, dtype: Any) -> int:
    """How many lines of the caches so many bytes lie in, wherever they begin."""
    return (size + CACHE_LINE - 2 * int(dtype.itemsize)) // CACHE_LINE + 1


def _tables(samples: Any, row: int, dtype: Any, g: Any, ranges: int) -> Tables:
    times = -(-row // len(samples.level))

    def over(numbers: Any, kind: Any) -> Any:
        return np.ascontiguousarray(np.tile(numbers, times)[..., :row], kind)

    return Tables(
        over(samples.shift, dtype),
        over(samples.scale, dtype),
        over(samples.size, np.int32),
        over(samples.first_pixel, np.int32),
        samples.number.astype(np.int64),
        samples.level * (g.reference_levels > 1),
        np.ascontiguousarray(samples.divisor, dtype),
        _bounds(samples.first_pixel, g.pixels, ranges),
    )


def _bounds(first_pixel: Any, pixels: int, ranges: int) -> Any:
    """Of ranges of pixels that as many samples read each, if those of a map lie evenly in it."""
    maps = np.append(np.unique(first_pixel), pixels)
    return np.interp(np.linspace(0, len(maps) - 1, ranges + 1), np.arange(len(maps)), maps).astype(np.int64)


def given_arrays(arrays: Any, g: Any, dtype: Any) -> Given:
    value, locations, weights, reference = arrays
    locations = contiguous(locations, dtype, (g.batch, g.number_steps[0]))
    return Given(
        contiguous(value, dtype, (g.batch, g.pixels, g.groups * g.channels)),
        locations,
        locations if weights is None else contiguous(weights, dtype, (g.batch, g.weight_steps[0])),
        None if reference is None else contiguous(reference, dtype, (g.batch, _reference_numbers(g))),
    )


def _reference_numbers(g: Any) -> int:
    return int(g.queries * g.reference_levels * g.reference_numbers)

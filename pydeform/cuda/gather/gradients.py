"""Gradients of sums of weighted samples: launches of gather/backward.cuh, fused.cuh and cells.cuh."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from pydeform import _checks
from pydeform.cuda.core.launch import device, geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, own_types
from pydeform.cuda.core.sizes import WORKSPACE
from pydeform.cuda.core.sums import convert, sort_bins
from pydeform.cuda.gather.launches import CODE, Given, launch_items, launch_teams, launch_threads
from pydeform.cuda.gather.plan import THREADS, Chunk, Team, bytes_of_load, cells_of, maps_of, places_of, team_of

SHARED = 48 << 10  # bytes of a block's rows, where that holds one


def value_gradient(given: Given, grad_output: Any, grad_value: Any, *, deterministic: bool) -> None:
    """Eq. 5. `grad_value` is zeros."""
    sums, dtype = grad_value, compute_dtype(grad_value.dtype)
    if grad_value.dtype != dtype:
        sums = cupy.zeros(grad_value.shape, dtype)
    if grad_output.size and deterministic:
        _gather_cells(given, grad_output, sums)
    elif grad_output.size:
        launch_teams("scatter_samples", given, grad_output, sums)
    if sums is not grad_value:
        convert(CODE, sums, grad_value)


def number_gradients(given: Given, grad_output: Any, grad_locations: Any, grad_weights: Any) -> None:
    """Eq. 3 and 4; None where one is not needed."""
    n, places = given.g.numbers, places_of(given.g)
    value, locations = given.arrays.value, given.arrays.locations
    wide = bytes_of_load(n, value, grad_output)
    owners, samples = (places, n.samples // places * n.groups) if places else (n.groups, n.samples)
    team = team_of(n, wide // value.dtype.itemsize, n.queries * owners, samples, device().processors)
    launch_items(
        f"number_gradients<{given.types(grad_output)}, {wide}{own_types(value, locations)}>",
        n.batch * n.queries * owners,
        team,
        (
            *(grad_output, value, locations, given.weights, given.table),
            *(grad_locations, grad_weights, given.numbers),
        ),
        np.int32(places),
    )


def fused_gradients(given: Given, grad_output: Any, grad_offsets: Any, grad_logits: Any, grad_reference: Any) -> None:
    """Eq. 6; None where one is not needed."""
    n, (value, offsets, logits, reference) = given.g.numbers, given.arrays
    wide = bytes_of_load(n, value, grad_output)
    queries = n.batch * n.queries
    team = team_of(n, wide // value.dtype.itemsize, n.queries * n.groups, n.samples, device().processors)
    of_query = n.reference_levels * n.reference_numbers
    sums = compute_dtype(value.dtype).itemsize
    row = n.samples * (1 if grad_reference is None else 3) * sums

    def shared(threads: int, team: int, queries: int) -> int:
        return threads // team * row + queries * of_query * sums

    threads, own = THREADS, 1
    while shared(threads, team.team, own) > SHARED and (threads > 32 or team.team < 32):
        threads, team = (threads // 2, team) if threads > 32 else (threads, Team(team.lanes, 2 * team.team))
    own = max(1, threads // team.team // n.groups)
    if own == 1:  # no more rows than a query has
        threads = min(threads, -(-n.groups * team.team // 32) * 32)
    while own > 1 and shared(threads, team.team, own) > SHARED:
        own -= 1
    needed = shared(threads, team.team, own)
    if needed > device().shared:
        most = (device().shared - of_query * sums) // (row // n.samples)
        raise ValueError(f"a query and head must have at most {most} points on this device, got {n.samples}")
    launch(
        kernel(
            CODE, f"fused_gradients<{given.types(grad_output)}, {wide}{own_types(value, offsets, reference)}>", needed
        ),
        (ceil_div(queries, own),),
        threads,
        (
            *(grad_output, value, offsets, logits, reference, given.table, grad_offsets, grad_logits, grad_reference),
            *(given.numbers, geometry(team), np.int32(own)),
        ),
        needed,
    )


# The same bits on every run -------------------------------------------------------------------------------------------


def _gather_cells(given: Given, grad_output: Any, sums: Any) -> None:
    n, queries = given.g.numbers, given.g.numbers.batch * given.g.numbers.queries
    if given.arrays.reference is not None:
        of_query = n.groups * 2 * compute_dtype(sums.dtype).itemsize
    else:
        of_query = 0
    of_query += n.location_groups * n.samples * 4
    count = max(1, min(queries, WORKSPACE // of_query, _checks.MOST // (n.location_groups * n.samples)))
    for first in range(0, queries, count):
        _gather_chunk(given, grad_output, sums, Chunk(first, min(count, queries - first), cells_of(given.g)))


def _gather_chunk(given: Given, grad_output: Any, sums: Any, chunk: Chunk) -> None:
    """Adds what the samples of some queries give back to their pixels."""
    n, (value, locations, _, reference) = given.g.numbers, given.arrays
    images = (chunk.first + chunk.count - 1) // n.queries - chunk.first // n.queries + 1
    samples = n.location_groups * chunk.count * n.samples
    bins = images * n.location_groups * chunk.cells
    index = index_type(samples, bins, *(a.size for a in (*given.arrays, grad_output) if a is not None))
    types, places = f"{C_TYPES[value.dtype.name]}, {index}", (given.numbers, geometry(chunk))
    own = own_types(value, reference, locations)
    counts = cupy.zeros((bins + 1,), np.int32)
    launch_threads(f"count_points<{types}{own}>", samples, (locations, reference, given.table, counts, *places))
    starts = cupy.cumsum(counts, dtype=np.int32 if index == "int" else np.int64)
    ids = cupy.empty((samples,), np.int32)
    arguments = (locations, reference, given.table, counts, starts, ids, *places)
    launch_threads(f"fill_cells<{types}{own}>", samples, arguments)
    sort_bins(CODE, starts, ids, bins, index)
    softmax = None
    if reference is not None:
        softmax = cupy.empty((chunk.count * n.groups, 2), compute_dtype(value.dtype))
        arguments = (given.weights, given.table, softmax, *places)
        launch_threads(f"softmax_sums<{types}>", chunk.count * n.groups, arguments)
    maps = len(maps_of(given.g.samples)[0])
    launch_threads(
        f"gather_cells<{types}{own_types(value, locations, reference)}>",
        32 * images * n.groups * n.pixels,
        (
            *(grad_output, locations, given.weights, reference, given.table, softmax, starts, ids, sums),
            *(*places, np.int32(images), np.int32(maps)),
        ),
    )

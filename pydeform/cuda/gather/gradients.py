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
from pydeform.cuda.gather.plan import Chunk, bytes_of_load, cells_of, maps_of, places_of, rows_of, team_of


def value_gradient(given: Given, grad_output: Any, *, deterministic: bool) -> Any:
    """Eq. 5."""
    value = given.arrays.value
    sums = cupy.zeros(value.shape, compute_dtype(value.dtype))
    if grad_output.size and deterministic:
        _gather_cells(given, grad_output, sums)
    elif grad_output.size:
        launch_teams("scatter_samples", given, grad_output, sums)
    if sums.dtype == value.dtype:
        return sums
    result = cupy.empty_like(value)
    convert(CODE, sums, result)
    return result


def number_gradients(given: Given, grad_output: Any, grad_locations: Any, grad_weights: Any) -> None:
    """Eq. 3 and 4; None where one is not needed."""
    g = given.gathering.numbers
    places = places_of(given.gathering.samples, g.groups > g.location_groups)
    value, locations = given.arrays.value, given.arrays.locations
    wide = bytes_of_load(g, value, grad_output)
    owners, samples = (places, g.samples // places * g.groups) if places else (g.groups, g.samples)
    team = team_of(g, wide // value.dtype.itemsize, g.queries * owners, samples, device().processors)
    launch_items(
        f"number_gradients<{given.types(grad_output)}, {wide}{own_types(value, locations)}>",
        g.batch * g.queries * owners,
        team,
        (
            *(grad_output, value, locations, given.weights, given.table),
            *(grad_locations, grad_weights, given.numbers),
        ),
        np.int32(places),
    )


def fused_gradients(given: Given, grad_output: Any, grad_offsets: Any, grad_logits: Any, grad_reference: Any) -> None:
    """Eq. 6; None where one is not needed."""
    g, (value, offsets, logits, reference) = given.gathering.numbers, given.arrays
    wide, sums = bytes_of_load(g, value, grad_output), compute_dtype(value.dtype).itemsize
    team = team_of(g, wide // value.dtype.itemsize, g.queries * g.groups, g.samples, device().processors)
    rows = rows_of(g, team, sums if grad_reference is None else 3 * sums, sums)
    if rows.shared > device().shared:
        raise ValueError(
            f"ms_deform_attn_fused_backward: the points of a query and head must fit into this device's shared memory, "
            f"{device().shared} bytes, got {g.samples} points, which take {rows.shared}"
        )
    types = f"{given.types(grad_output)}, {wide}{own_types(value, offsets, reference)}"
    launch(
        kernel(CODE, f"fused_gradients<{types}>", rows.shared),
        (ceil_div(g.batch * g.queries, rows.queries),),
        rows.threads,
        (
            *(grad_output, value, offsets, logits, reference, given.table, grad_offsets, grad_logits, grad_reference),
            *(given.numbers, geometry(rows.team), np.int32(rows.queries)),
        ),
        rows.shared,
    )


# The same bits on every run -------------------------------------------------------------------------------------------


def _gather_cells(given: Given, grad_output: Any, sums: Any) -> None:
    g = given.gathering.numbers
    queries = g.batch * g.queries
    of_query = 4 * g.location_groups * g.samples  # bytes: numbers of samples, and what makes weights of logits
    if given.arrays.reference is not None:
        of_query += 2 * g.groups * sums.dtype.itemsize
    count = max(1, min(queries, WORKSPACE // of_query, _checks.MOST // (g.location_groups * g.samples)))
    for first in range(0, queries, count):
        _gather_chunk(
            given, grad_output, sums, Chunk(first, min(count, queries - first), cells_of(given.gathering.samples))
        )


def _gather_chunk(given: Given, grad_output: Any, sums: Any, chunk: Chunk) -> None:
    """Adds what the samples of some queries give back to their pixels."""
    g, (value, locations, _, reference) = given.gathering.numbers, given.arrays
    images = (chunk.first + chunk.queries - 1) // g.queries - chunk.first // g.queries + 1
    samples = g.location_groups * chunk.queries * g.samples
    bins = images * g.location_groups * chunk.cells
    index = index_type(samples, bins, *(a.size for a in (*given.arrays, grad_output) if a is not None))
    types, places = f"{C_TYPES[value.dtype.name]}, {index}", (given.numbers, geometry(chunk))
    own = own_types(value, reference, locations)
    counts = cupy.zeros((bins + 1,), np.int32)
    launch_threads(f"count_points<{types}{own}>", samples, (locations, reference, given.table, counts, *places))
    starts = cupy.cumsum(counts, dtype=np.int32 if index == "int" else np.int64)
    ids = cupy.empty((samples,), np.int32)
    launch_threads(
        f"fill_cells<{types}{own}>", samples, (locations, reference, given.table, counts, starts, ids, *places)
    )
    sort_bins(CODE, starts, ids, bins, index)
    softmax = None
    if reference is not None:
        softmax = cupy.empty((chunk.queries * g.groups, 2), compute_dtype(value.dtype))
        launch_threads(
            f"softmax_sums<{types}>", chunk.queries * g.groups, (given.weights, given.table, softmax, *places)
        )
    maps = len(maps_of(given.gathering.samples)[0])
    launch_threads(
        f"gather_cells<{types}{own_types(value, locations, reference)}>",
        32 * images * g.groups * g.pixels,
        (
            *(grad_output, locations, given.weights, reference, given.table, softmax, starts, ids, sums),
            *(*places, np.int32(images), np.int32(maps)),
        ),
    )

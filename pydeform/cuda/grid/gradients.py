"""The gradient of what is sampled (eq. 6): launches of grid/sorted.cuh, or of scatter_points."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from pydeform._grid_geometry import GridArrays, GridGeometry
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, integer, own_types
from pydeform.cuda.core.sums import convert, sort_bins
from pydeform.cuda.grid.launches import code_of, launch_points, launch_threads
from pydeform.cuda.grid.plan import GATHERED_CHANNELS, MOST_ROWS, queries_at_once, taps_of


def input_gradient(arrays: GridArrays, g: GridGeometry, grad_output: Any, *, deterministic: bool) -> Any:
    input = arrays.input
    sums = cupy.zeros(input.shape, compute_dtype(input.dtype))
    if grad_output.size and deterministic:
        count, queries = queries_at_once(g, sums.dtype.itemsize), g.batch * g.queries
        for first in range(0, queries, count):
            _gather_taps(arrays.grid, g, grad_output, sums, first, min(count, queries - first))
    elif grad_output.size:
        launch_points("scatter_points", arrays, g, grad_output, sums)
    if sums.dtype == input.dtype:
        return sums
    result = cupy.empty_like(input)
    convert(code_of(g), sums, result)
    return result


def _gather_taps(grid: Any, g: GridGeometry, grad_output: Any, sums: Any, first: int, count: int) -> None:
    """Adds what some queries give back to their pixels, the same bits on every run."""
    images = (first + count - 1) // g.queries - first // g.queries + 1
    taps, bins = count * taps_of(g), images * math.prod(g.in_size)
    index = index_type(taps, bins, grid.size, grad_output.size, sums.size)
    types = f"{C_TYPES[grad_output.dtype.name]}, {index}, {g.mode}"
    own, chunk = own_types(grad_output, grid), (integer(index, first), integer(index, count))
    counts = cupy.zeros((bins + 1,), np.int32)
    launch_threads(f"count_taps<{types}{own}>", (count, 1), (grid, counts), g, *chunk)
    starts = cupy.cumsum(counts, dtype=np.int32 if index == "int" else np.int64)
    ids, weights = cupy.empty((taps,), np.int32), cupy.empty((taps,), sums.dtype)
    launch_threads(f"fill_taps<{types}{own}>", (count, 1), (grid, counts, starts, ids, weights), g, *chunk)
    sort_bins(code_of(g), starts, ids, bins, index)
    launch_threads(
        f"gather_taps<{types}>",
        (bins, min(ceil_div(g.channels, GATHERED_CHANNELS), MOST_ROWS)),
        (grad_output, starts, ids, weights, sums),
        g,
        *(chunk[0], np.int32(images)),
    )

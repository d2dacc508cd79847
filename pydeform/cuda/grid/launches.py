"""Launches of grid/forward.cuh and backward.cuh, and what those of sorted.cuh share with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform._grid_geometry import GridArrays, GridGeometry
from pydeform.cuda.core.launch import device, geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, index_type, own_types
from pydeform.cuda.core.source import Code
from pydeform.cuda.grid.plan import THREADS, rows_of, slices_of


def code_of(g: GridGeometry) -> Code:
    return Code("grid", len(g.in_size))


def launch_points(name: str, arrays: GridArrays, g: GridGeometry, data: Any, results: Any) -> None:
    """`sample_points` from the input, or `scatter_points` from the output's gradient, whichever `data` is."""
    index = index_type(data.size, arrays.grid.size, results.size)
    launch_threads(
        f"{name}<{C_TYPES[data.dtype.name]}, {index}, {g.mode}{own_types(data, arrays.grid)}>",
        (g.batch * g.queries, rows_of(g, device().processors)),
        (data, arrays.grid, results),
        g,
    )


def point_gradients(arrays: GridArrays, g: GridGeometry, grad_output: Any, grad_grid: Any) -> None:
    """Eq. 7."""
    input, grid = arrays
    index = index_type(grad_output.size, input.size, grid.size)
    slices = slices_of(g, device().processors)
    launch_threads(
        f"point_gradients<{C_TYPES[input.dtype.name]}, {index}, {g.mode}{own_types(input, grid)}>",
        (ceil_div(g.batch * g.queries, THREADS // slices) * THREADS, 1),
        (grad_output, input, grid, grad_grid),
        g,
        np.int32(slices),
    )


def launch_threads(
    expression: str, threads: tuple[int, int], arrays: tuple[Any, ...], g: GridGeometry, *numbers: Any
) -> None:
    """So many threads, in so many rows of the launch grid."""
    count, rows = threads
    launch(kernel(code_of(g), expression), (ceil_div(count, THREADS), rows), THREADS, (*arrays, geometry(g), *numbers))

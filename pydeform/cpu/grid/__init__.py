"""Images sampled at the points of a grid.

Images are read as they lie, channel by channel: a tile of queries is located once for all channels, and a vector holds
one number for each of so many queries, whose pixels are gathered from here and there. Backward gives every gradient one
owner, so that results are always deterministic. Kernels cite docs/math/grid.md.

Which problem takes which way, and why:

- all forwards (`forward.sample`), and the grid's gradient (`backward.sample_backward`): a tile of queries
- the input's gradient (`backward._scatter_planes`): some channels of an image go through all queries in order, so that
  no two threads add to one number
- samples of two pixels along each axis, or of four (`places`): the same sums over 4, 8 or 16 corners
- samples of one pixel (`forward._copy_pixels`): its number is read once for some channels
- the grid's gradient where samples are one pixel: 0, without a kernel
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform._grid_geometry import NEAREST, GridGeometry
from pydeform.cpu.core import parallel
from pydeform.cpu.core.memory import compute_dtype, contiguous, empty, to_result
from pydeform.cpu.grid.backward import Gradients, sample_backward
from pydeform.cpu.grid.forward import sample
from pydeform.cpu.grid.plan import Given, Scratch, given_arrays, prepared, threads_for


def forward(arrays: Any, g: GridGeometry) -> Any:
    data = arrays.input.dtype
    dtype = compute_dtype(data)
    output = empty((g.batch, g.channels, g.queries), dtype)
    if output.size:
        threads = threads_for(g, 1, g.batch * g.queries)
        _run(sample, g, given_arrays(arrays, g, dtype), output, False, threads)
    return to_result(output, data, output.shape)


def backward(grad_output: Any, arrays: Any, g: GridGeometry, needs: Any, **_options: bool) -> dict[str, Any]:
    data = arrays.input.dtype
    dtype, pixels = compute_dtype(data), math.prod(g.in_size)
    given, scatters = given_arrays(arrays, g, dtype), "input" in needs
    needs_dots = "grid" in needs and g.mode != NEAREST
    output = contiguous(grad_output, dtype, (g.batch, g.channels, g.queries))
    make = empty if output.size else np.zeros
    grads = Gradients(
        output,
        np.zeros((g.batch, g.channels, pixels) if scatters else (0, 0, 0), dtype),
        make(given.grid.shape if needs_dots else (0, 0), dtype),
    )
    if output.size and (scatters or needs_dots):
        threads = threads_for(g, scatters + needs_dots, g.batch * (g.channels + g.queries))
        _run(sample_backward, g, given, grads, needs_dots, threads)
    grid = grads.grid if g.mode != NEAREST else _flat(given.grid, g)
    return {
        "input": to_result(grads.input, data, arrays.input.shape) if scatters else None,
        "grid": to_result(grid, arrays.grid.dtype, arrays.grid.shape) if "grid" in needs else None,
    }


def _flat(grid: Any, g: GridGeometry) -> Any:
    """The gradient of a grid that names pixels: NaN of points with a NaN, else 0."""
    axes = len(g.in_size)
    shape = (g.batch, axes, g.queries) if g.moves else (g.batch, g.queries, axes)
    gradient, is_nan = np.zeros(shape, grid.dtype), np.isnan(grid)
    if is_nan.any():
        of_points = is_nan.reshape(shape).any(axis=1 if g.moves else 2, keepdims=True)
        gradient[np.broadcast_to(of_points, shape)] = np.nan
    return gradient


def _run(kernel: Any, g: GridGeometry, given: Given, results: Any, needs_dots: bool, threads: int) -> None:
    how = prepared(g, compute_dtype(given.input.dtype), needs_dots, threads)
    own = how.workspace.take()
    parallel.run(kernel, how.key, how.threads, parallel.new_counters(1), given, results, Scratch(*own), g, how.plan)
    how.workspace.give_back(own)

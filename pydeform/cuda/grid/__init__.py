"""Images and volumes sampled at the points of a grid, on CuPy arrays: grid_sample and warp, by the same kernels, which
differ by the rules in their geometry.

Images are read as they lie, channels first, and nothing waits for the device. Kernels cite docs/math/grid.md.

Which problem takes which way, and why:

- all forwards (`launches.launch_points`, `sample_points`): a thread for each query, whose taps it finds once for all
  channels; neighbours have neighbouring queries, and so mostly read and always write neighbouring numbers
- fewer queries than the device has room for (`plan.rows_of`): several threads for each, with some channels
- the input's gradient (`gradients.input_gradient`): added by atomics in the same way, of half types in float32; for who
  asks for the same bits on every run, taps are sorted by pixel and gathered (`gather_taps`), some queries at a time
- the grid's gradient (`launches.point_gradients`): a query owns it; where an image has few (`plan.slices_of`), several
  threads of a block do, and their parts are added in order

`plan` decides and needs no device; `core` has what is not about samples: sources, launches, sums.
"""

from __future__ import annotations

from typing import Any

import cupy

from pydeform._grid_geometry import GridArrays, GridGeometry
from pydeform.cuda.core.copies import contiguous
from pydeform.cuda.grid.gradients import input_gradient
from pydeform.cuda.grid.launches import launch_points, point_gradients
from pydeform.cuda.grid.plan import check_size

OPERATORS = "sampling operators"  # whose errors these are


def forward(arrays: Any, g: GridGeometry) -> Any:
    check_size(OPERATORS, g)
    with arrays.input.device:
        given = GridArrays(*contiguous(*arrays))
        output = cupy.empty((g.batch, g.channels, g.queries), given.input.dtype)
        if output.size:
            launch_points("sample_points", given, g, given.input, output)
        return output


def backward(
    grad_output: Any, arrays: Any, g: GridGeometry, needs: Any, *, deterministic: bool = False, **_options: bool
) -> dict[str, Any]:
    check_size(OPERATORS, g)
    with arrays.input.device:
        grad_output, *rest = contiguous(grad_output, *arrays)
        given, grads = GridArrays(*rest), dict.fromkeys(GridArrays._fields)
        if "input" in needs:
            grads["input"] = input_gradient(given, g, grad_output, deterministic=deterministic)
        if "grid" in needs:
            grads["grid"] = cupy.empty_like(given.grid)
            if grad_output.size:
                point_gradients(given, g, grad_output, grads["grid"])
        return grads

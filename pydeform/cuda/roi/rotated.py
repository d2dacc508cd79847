"""Boxes that are turned: launches of roi/rotated.cuh."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from pydeform._roi_geometry import RoiGeometry
from pydeform.cuda.core.launch import geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, own_types
from pydeform.cuda.roi.launches import SPAN, THREADS, code_of, copies_of, launch_threads
from pydeform.cuda.roi.plan import is_direct, lanes_of, pitch_of

NUMBERS = 9  # of a box


def turned(input: Any, boxes: Any, g: RoiGeometry) -> Any:
    """Eq. 14: what other kernels read in place of boxes."""
    numbers = cupy.empty((g.boxes, NUMBERS), compute_dtype(input.dtype))
    launch_boxes(f"turn_boxes<{C_TYPES[input.dtype.name]}{own_types(input, boxes)}>", g, boxes, numbers)
    return numbers


def launch_boxes(expression: str, g: RoiGeometry, *arrays: Any) -> None:
    """A thread for each box."""
    launch(kernel(code_of(g), expression), (ceil_div(g.boxes, THREADS),), THREADS, (*arrays, geometry(g)))


def pool_turned(input: Any, boxes: Any, g: RoiGeometry, output: Any) -> None:
    """Eq. 5 and 6."""
    numbers = turned(input, boxes, g)
    if is_direct(g):
        launch_threads("pool_turned_direct", input, g, output.size, (input, numbers, output, geometry(g)))
        return
    pitch = pitch_of(g, input)
    lanes, bins = lanes_of(pitch, input), g.pooled_h * g.pooled_w
    span = min(bins, SPAN)
    blocks = g.boxes * ceil_div(pitch * input.dtype.itemsize // 16, lanes) * ceil_div(bins, span)
    for copy, images in copies_of(input, g, pitch):
        expression = f"pool_turned<{C_TYPES[input.dtype.name]}, {index_type(copy.size, output.size)}>"
        arguments = (copy, numbers, output, geometry(g), geometry(images))
        sizes = (np.int32(pitch), np.int32(lanes), np.int32(span))
        launch(kernel(code_of(g), expression), (blocks,), THREADS, (*arguments, *sizes), lanes * 16 * span)

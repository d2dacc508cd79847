"""Gradients of the RoI operators: launches of roi/backward.cuh."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from pydeform._roi_geometry import RoiGeometry
from pydeform.cuda.core.launch import geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, own_types, round_up
from pydeform.cuda.roi.launches import THREADS, code_of, copies_of, find_largest, launch_threads
from pydeform.cuda.roi.plan import is_direct, lanes_of, outputs, size_of
from pydeform.cuda.roi.rotated import launch_boxes, turned

TILE = (2, 8)  # pixels of a block of input_gradient
BOUNDS = 5  # numbers that box_bounds writes for a box
MEAN, LARGEST_PIXEL, LARGEST_POINT, TURNED_MEAN = 0, 1, 2, 3  # what a bin gives back, as in roi/backward.cuh


def input_gradient(
    grads: Any, input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, pitch: int, grad_input: Any
) -> None:
    """Eq. 7."""
    bounds = cupy.empty((BOUNDS, g.boxes), np.int32)
    reads, winners = MEAN, None
    if g.turn:
        reads, boxes = TURNED_MEAN, turned(input, boxes, g)
        launch_boxes(f"turned_bounds<{C_TYPES[input.dtype.name]}>", g, boxes, bounds)
    own = own_types(input, boxes, offset)
    if not g.turn:
        launch_threads("box_bounds", input, g, 32 * g.boxes, (boxes, offset, bounds, geometry(g)), offset, suffix=own)
    if g.is_max:
        reads = LARGEST_POINT if g.points else LARGEST_PIXEL
        dtype = compute_dtype(input.dtype) if g.points else np.int32
        winners = cupy.empty((outputs(g), 2), dtype)
        find_largest(input, boxes, offset, mask, g, None, winners)
    threads = min(THREADS, round_up(g.in_channels, 32))
    tiles = ceil_div(g.in_h, TILE[0]) * ceil_div(g.in_w, TILE[1])
    index = index_type(input.size, grads.size, size_of(offset), size_of(winners))
    launch(
        kernel(code_of(g), f"input_gradient<{C_TYPES[input.dtype.name]}, {index}, {reads}{own}>"),
        (g.batch * tiles * ceil_div(g.in_channels, threads),),
        threads,
        (grads, boxes, offset, mask, bounds, winners, grad_input, geometry(g), np.int32(pitch)),
    )


def bin_gradients(
    grads: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    g: RoiGeometry,
    pitch: int,
    grad_offset: Any,
    grad_mask: Any,
) -> None:
    """Eq. 8 and 9: for each bin and class, then summed."""
    count = g.boxes * g.pooled_h * g.pooled_w * g.classes
    dtype, own = compute_dtype(input.dtype), own_types(input, boxes, offset)
    offsets = None if grad_offset is None else cupy.empty((count, 2), dtype)
    masks = None if grad_mask is None else cupy.empty((count,), dtype)
    if is_direct(g):
        arrays = (grads, input, boxes, offset, mask, offsets, masks)
        arguments = (*arrays, geometry(g), np.int32(pitch))
        launch_threads("bin_gradients_direct", input, g, count, arguments, offset, grads, offsets, suffix=own)
    else:
        lanes = lanes_of(pitch, input)
        for copy, images in copies_of(input, g, pitch):
            launch_threads(
                "bin_gradients",
                input,
                g,
                32 * count,
                (
                    *(grads, copy, boxes, offset, mask, offsets, masks),
                    *(geometry(g), geometry(images), np.int32(pitch), np.int32(lanes)),
                ),
                *(offset, grads, offsets, copy),
                suffix=own,
            )
    if grad_offset is not None:
        launch_threads(
            "offset_gradient", grad_offset, g, grad_offset.size, (offsets, grad_offset, geometry(g)), offsets
        )
    if grad_mask is not None:
        launch_threads("mask_gradient", input, g, grad_mask.size, (masks, grad_mask, geometry(g)), masks)


def box_gradient(grads: Any, input: Any, boxes: Any, g: RoiGeometry, pitch: int, grad_boxes: Any) -> None:
    """Eq. 12 for each bin, then eq. 13."""
    bins = g.boxes * g.pooled_h * g.pooled_w
    own = own_types(input, boxes)
    edges = cupy.empty((bins, 4), compute_dtype(input.dtype))
    if g.is_max or is_direct(g):
        name, threads = ("edge_gradients_of_largest", 32 * bins) if g.is_max else ("edge_gradients_direct", bins)
        numbers = (geometry(g), np.int32(pitch))
        launch_threads(name, input, g, threads, (grads, input, boxes, edges, *numbers), grads, edges, suffix=own)
    else:
        lanes = np.int32(lanes_of(pitch, input))
        for copy, images in copies_of(input, g, pitch):
            arguments = (grads, copy, boxes, edges, geometry(g), geometry(images), np.int32(pitch), lanes)
            launch_threads("edge_gradients", input, g, 32 * bins, arguments, grads, edges, copy, suffix=own)
    launch_threads(
        "box_gradient", input, g, 5 * g.boxes, (boxes, edges, grad_boxes, geometry(g)), edges, grad_boxes, suffix=own
    )

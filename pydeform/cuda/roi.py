"""RoI pooling on CuPy arrays, every operator by the same kernels, which differ by the rules in their geometry.

A warp lists the rows and columns that a bin reads, once for all channels, of which a channels-last copy of the input
gives 16 bytes at a time; classes of few channels, and the images of few boxes, are read as they are. Backward gives
every gradient one owner, without atomics, so that results are always deterministic and `deterministic` changes nothing.
Nothing waits for the device. Kernels cite docs/math/roi.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform._roi_geometry import RoiGeometry
from pydeform.cuda import _conv_common
from pydeform.cuda._channels import to_channels_last
from pydeform.cuda._conv_common import (
    C_TYPES,
    COPIES,
    MOST_CELLS,
    ceil_div,
    compute_dtype,
    index_type,
    own_types,
    round_up,
)
from pydeform.cuda._conv_forward import contiguous
from pydeform.cuda._launch import geometry, kernel, launch
from pydeform.cuda._source import Code

CODE = Code("roi")
THREADS = 256
SPAN = 64  # bins whose results a block turns at a time
COPIED_FOR_EACH = 32  # values at most, in a copy of the input that is not small, for each of the output
TILE = (2, 8)  # pixels of a block of input_gradient
BOUNDS = 5  # numbers that box_bounds writes for a box
MEAN, LARGEST_PIXEL, LARGEST_POINT = 0, 1, 2  # what a bin gives back, as in roi_backward.cuh


class Images(NamedTuple):
    """`struct RoiImages` of roi_forward.cuh: those that a launch has a copy of."""

    first: int
    number: int


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    _check_size(g)
    with input.device:
        input, boxes, offset, mask = contiguous(input, boxes, offset, mask)
        output = cupy.empty((g.boxes, g.out_channels, g.pooled_h, g.pooled_w), input.dtype)
        if g.is_max:
            _largest(input, boxes, offset, mask, g, output, None)
        elif _is_direct(g):
            arguments = (input, boxes, offset, mask, output, geometry(g))
            suffix = own_types(input, boxes, offset)
            _launch("pool_direct", input, g, output.size, arguments, offset, suffix=suffix)
        else:
            _forward_by_warps(input, boxes, offset, mask, g, output)
        return output


def backward(
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    g: Any,
    needs: Any,
    *,
    deterministic: bool = False,
) -> dict[str, Any]:
    _check_size(g)
    with input.device:
        grad_output, input, boxes, offset, mask = contiguous(grad_output, input, boxes, offset, mask)
        grad_input, grad_offset, grad_mask = (
            cupy.empty(array.shape, array.dtype) if name in needs and array is not None else None
            for name, array in (("input", input), ("offset", offset), ("mask", mask))
        )
        pitch = g.out_channels // g.classes if _is_direct(g) else _pitch(g, input)
        # (R, bins, classes, pitch), and one row of zeros that nothing reads
        grads = to_channels_last(CODE, grad_output, g.out_channels // g.classes, pitch)
        if grad_input is not None:
            _input_gradient(grads, input, boxes, offset, mask, g, pitch, grad_input)
        if grad_offset is not None or grad_mask is not None:
            _bin_gradients(grads, input, boxes, offset, mask, g, pitch, grad_offset, grad_mask)
        return {"input": grad_input, "offset": grad_offset, "mask": grad_mask}


def _check_size(g: RoiGeometry) -> None:
    """Pixels of one image are counted in an int, those of all images in whatever they need."""
    if (g.in_h + 1) * (g.in_w + 1) > MOST_CELLS:
        raise ValueError(
            f"RoI operators: an image of the input must have (height + 1) * (width + 1) <= {MOST_CELLS} on CUDA, "
            f"got {g.in_h + 1} * {g.in_w + 1} = {(g.in_h + 1) * (g.in_w + 1)}"
        )
    _conv_common.check_fields("RoI operators", g)


def _is_direct(g: RoiGeometry) -> bool:
    """Whether 16-byte chunks of a class's channels would be mostly empty, or a copy of the input most of the work."""
    copy = g.batch * g.in_channels * g.in_h * g.in_w
    large = copy > max(_conv_common.SMALL_COPY, COPIED_FOR_EACH * _outputs(g))
    return large or g.out_channels // g.classes < _conv_common.DIRECT_CHANNELS


def _pitch(g: RoiGeometry, array: Any) -> int:
    """Channels of a class in memory: whole chunks of 16 bytes."""
    return round_up(g.out_channels // g.classes, 16 // array.dtype.itemsize)


def _lanes(pitch: int, array: Any) -> int:
    """Of a warp on the chunks of one pixel: a power of two, as all that are left read other pixels."""
    chunks = pitch * array.dtype.itemsize // 16
    return min(32, 1 << (chunks - 1).bit_length())


def _copies(input: Any, g: RoiGeometry, pitch: int) -> Iterator[tuple[Any, Images]]:
    """Channels-last copies of ranges of images, within bounds; one of no images for boxes that have none."""
    cells = g.group_h * g.group_w
    image = g.in_h * g.in_w * cells * g.classes * pitch * input.dtype.itemsize
    at_once = max(1, min(g.batch, COPIES // image))
    for first in range(0, max(g.batch, 1), at_once):
        part = input[first : first + at_once]
        unit = g.out_channels // g.classes
        yield to_channels_last(CODE, part, unit, pitch, cells), Images(first, int(part.shape[0]))


def _forward_by_warps(input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, output: Any) -> None:
    pitch = _pitch(g, input)
    lanes, bins = _lanes(pitch, input), g.pooled_h * g.pooled_w
    span = min(bins, SPAN)
    runs = ceil_div(pitch * input.dtype.itemsize // 16, lanes)
    blocks = g.boxes * g.classes * runs * ceil_div(bins, span)
    for copy, images in _copies(input, g, pitch):
        index = index_type(copy.size, output.size, _size(offset))
        launch(
            kernel(CODE, f"pool_bins<{C_TYPES[input.dtype.name]}, {index}{own_types(input, boxes, offset)}>"),
            (blocks,),
            THREADS,
            (
                *(copy, boxes, offset, mask, output, geometry(g), geometry(images)),
                *(np.int32(pitch), np.int32(lanes), np.int32(span)),
            ),
            lanes * 16 * span,
        )


def _largest(input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, output: Any, winners: Any) -> None:
    """Into `output` or `winners`, whichever is not None."""
    _launch(
        "pool_largest",
        input,
        g,
        _outputs(g),
        (input, boxes, offset, mask, output, winners, geometry(g)),
        offset,
        winners,
        suffix=(", true" if g.points else ", false") + own_types(input, boxes, offset),
    )


def _input_gradient(
    grads: Any, input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, pitch: int, grad_input: Any
) -> None:
    """Eq. 7."""
    bounds = cupy.empty((BOUNDS, g.boxes), np.int32)
    own = own_types(input, boxes, offset)
    _launch("box_bounds", input, g, 32 * g.boxes, (boxes, offset, bounds, geometry(g)), offset, suffix=own)
    reads, winners = MEAN, None
    if g.is_max:
        reads = LARGEST_POINT if g.points else LARGEST_PIXEL
        dtype = compute_dtype(input.dtype) if g.points else np.int32
        winners = cupy.empty((_outputs(g), 2), dtype)
        _largest(input, boxes, offset, mask, g, None, winners)
    threads = min(THREADS, round_up(g.in_channels, 32))
    tiles = ceil_div(g.in_h, TILE[0]) * ceil_div(g.in_w, TILE[1])
    index = index_type(input.size, grads.size, _size(offset), _size(winners))
    launch(
        kernel(CODE, f"input_gradient<{C_TYPES[input.dtype.name]}, {index}, {reads}{own}>"),
        (g.batch * tiles * ceil_div(g.in_channels, threads),),
        threads,
        (grads, boxes, offset, mask, bounds, winners, grad_input, geometry(g), np.int32(pitch)),
    )


def _bin_gradients(
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
    if _is_direct(g):
        arrays = (grads, input, boxes, offset, mask, offsets, masks)
        arguments = (*arrays, geometry(g), np.int32(pitch))
        _launch("bin_gradients_direct", input, g, count, arguments, offset, grads, offsets, suffix=own)
    else:
        lanes = _lanes(pitch, input)
        for copy, images in _copies(input, g, pitch):
            _launch(
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
        _launch("offset_gradient", grad_offset, g, grad_offset.size, (offsets, grad_offset, geometry(g)), offsets)
    if grad_mask is not None:
        _launch("mask_gradient", input, g, grad_mask.size, (masks, grad_mask, geometry(g)), masks)


def _launch(
    name: str, data: Any, g: RoiGeometry, threads: int, arguments: tuple[Any, ...], *arrays: Any, suffix: str = ""
) -> None:
    """So many threads, of a kernel for the type of `data`. `arrays`: in which it counts places, as in an output."""
    index = index_type(data.size, _outputs(g), *map(_size, arrays))
    expression = f"{name}<{C_TYPES[data.dtype.name]}, {index}{suffix}>"
    launch(kernel(CODE, expression), (ceil_div(threads, THREADS),), THREADS, arguments)


def _outputs(g: RoiGeometry) -> int:
    return g.boxes * g.out_channels * g.pooled_h * g.pooled_w


def _size(array: Any) -> int:
    return 0 if array is None else int(array.size)

"""Launches of roi/forward.cuh, and what those of backward share with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pydeform._roi_geometry import RoiGeometry
from pydeform.cuda.core.copies import to_channels_last
from pydeform.cuda.core.launch import geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, index_type, own_types
from pydeform.cuda.core.sizes import COPIES
from pydeform.cuda.core.source import Code
from pydeform.cuda.roi.plan import Images, lanes_of, outputs, pitch_of, size_of

THREADS = 256
SPAN = 64  # bins whose results a block turns at a time


def code_of(g: RoiGeometry) -> Code:
    return Code("roi", surface=bool(g.surface))


def copies_of(input: Any, g: RoiGeometry, pitch: int) -> Iterator[tuple[Any, Images]]:
    """Channels-last copies of ranges of images, within bounds; one of no images for boxes that have none."""
    cells = g.group_h * g.group_w
    image = g.in_h * g.in_w * cells * g.classes * pitch * input.dtype.itemsize
    at_once = max(1, min(g.batch, COPIES // image))
    for first in range(0, max(g.batch, 1), at_once):
        part = input[first : first + at_once]
        unit = g.out_channels // g.classes
        yield to_channels_last(code_of(g), part, unit, pitch, cells), Images(first, int(part.shape[0]))


def pool_by_warps(input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, output: Any) -> None:
    pitch = pitch_of(g, input)
    lanes, bins = lanes_of(pitch, input), g.pooled_h * g.pooled_w
    span = min(bins, SPAN)
    runs = ceil_div(pitch * input.dtype.itemsize // 16, lanes)
    blocks = g.boxes * g.classes * runs * ceil_div(bins, span)
    for copy, images in copies_of(input, g, pitch):
        index = index_type(copy.size, output.size, size_of(offset))
        launch(
            kernel(code_of(g), f"pool_bins<{C_TYPES[input.dtype.name]}, {index}{own_types(input, boxes, offset)}>"),
            (blocks,),
            THREADS,
            (
                *(copy, boxes, offset, mask, output, geometry(g), geometry(images)),
                *(np.int32(pitch), np.int32(lanes), np.int32(span)),
            ),
            lanes * 16 * span,
        )


def find_largest(input: Any, boxes: Any, offset: Any, mask: Any, g: RoiGeometry, output: Any, winners: Any) -> None:
    """Into `output` or `winners`, whichever is not None."""
    launch_threads(
        "pool_largest",
        input,
        g,
        outputs(g),
        (input, boxes, offset, mask, output, winners, geometry(g)),
        offset,
        winners,
        suffix=(", true" if g.points else ", false") + own_types(input, boxes, offset),
    )


def launch_threads(
    name: str, data: Any, g: RoiGeometry, threads: int, arguments: tuple[Any, ...], *arrays: Any, suffix: str = ""
) -> None:
    """So many threads, of a kernel for the type of `data`. `arrays`: in which it counts places, as in an output."""
    index = index_type(data.size, outputs(g), *map(size_of, arrays))
    expression = f"{name}<{C_TYPES[data.dtype.name]}, {index}{suffix}>"
    launch(kernel(code_of(g), expression), (ceil_div(threads, THREADS),), THREADS, arguments)

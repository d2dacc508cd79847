"""Columns of one tap of a tile, sampled from the image; and back, the gradients of the image and the dots that those of
offset and mask are made of. From a copy of the image with channels last, or from planes as they lie: the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.conv.backward_plan import COLUMN_ROW
from pydeform.cpu.conv.forward_plan import PAIRS_ROW, ROW
from pydeform.cpu.core.blend import blend, blend_dots, blend_dots_scatter, copy_vectors
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.pair_products import pick
from pydeform.cpu.core.planes import gather_corners
from pydeform.cpu.core.simd import advance, at, column, corner_numbers, put_column, times, vectors_of
from pydeform.cpu.core.sizes import volume
from pydeform.cpu.core.weighted import plane_scatter
from pydeform.cpu.sampling.corners import cell_of, gathered_cell, infinite_sample, samples_of


@inline_always
def copy_columns(columns: Any, row: int, source: Any, samples: Any, count: int, channels: int) -> None:
    vectors = vectors_of(source, channels)
    for i in range(count):
        copy_vectors(advance(columns, i * row), advance(source, np.int64(samples.corners[i]) * channels), vectors)


@inline_always
def blend_columns(columns: Any, row: int, source: Any, samples: Any, count: int, channels: int, axes: Any) -> None:
    vectors = vectors_of(source, channels)
    for i in range(count):
        blend(advance(columns, i * row), cell_of(samples, i, source, channels), axes, vectors)


@inline
def gather_columns(
    planes: Any, tile: Any, entry: Any, samples: Any, mask: Any, scratch: Any, columns: Any, axes: Any, g: Any
) -> None:
    """The columns of one tap of a tile from planes as they lie. Apart from the kernel, where its code would be in the
    way of the usual loop."""
    channels, row, pixels = entry.channels, pick(columns, ROW, PAIRS_ROW), at(scratch.pixels, (tile.thread, 0))
    vectors = vectors_of(pixels, channels)
    for i in range(tile.positions):
        out, corners = advance(columns, i * row), column(advance(samples.corners, i), samples.row, axes)
        gather_corners(planes, tile.image, entry.channel, channels, corners, g, pixels)
        blend(out, gathered_cell(samples, i, pixels, channels), axes, vectors)
        if mask[i] - mask[i] != 0:
            gathered = times(corner_numbers(axes), channels)
            infinite_sample(out, mask[i], pixels, gathered, i, channels, samples, axes)


@inline
def sample_backward(
    columns: Any,
    grad_columns: Any,
    image: Any,
    grad_image: Any,
    samples: Any,
    count: int,
    channels: int,
    axes: Any,
    p: Any,
) -> None:
    """One tap of a tile: its columns, eq. 5 into grad_image, and the dots for eq. 3 and 4."""
    vectors = vectors_of(image, channels)
    for i in range(count):
        cell, dots = cell_of(samples, i, image, channels), advance(samples.dots, i)
        out, grad = advance(columns, i * COLUMN_ROW), advance(grad_columns, i * COLUMN_ROW)
        if p.need_input:
            put_column(dots, samples.row, blend_dots_scatter(out, grad, grad_image, cell, axes, channels))
        elif p.need_dots:
            put_column(dots, samples.row, blend_dots(out, grad, grad_image, cell, axes, channels))
        else:
            blend(out, cell, axes, vectors)


@inline
def sample_planes(
    planes: Any,
    part: Any,
    row: Any,
    scratch: Any,
    grad_input: Any,
    mask: Any,
    axes: Any,
    g: Any,
    p: Any,
) -> None:
    """`sample_backward` on planes as they lie, in the same order: the same bits."""
    thread, channels, samples = part.thread, row.channels, samples_of(part.thread, scratch)
    columns, grad_columns = at(scratch.columns, (thread, 0, 0)), at(scratch.grad_columns, (thread, 0, 0))
    pixels = at(scratch.pixels, (thread, 0))
    for i in range(part.positions):
        out, grad = advance(columns, i * COLUMN_ROW), advance(grad_columns, i * COLUMN_ROW)
        corners = column(advance(samples.corners, i), samples.row, axes)
        weights = column(advance(samples.weights, i), samples.row, axes)
        gather_corners(planes, part.image, row.channel, channels, corners, g, pixels)
        cell = gathered_cell(samples, i, pixels, channels)
        if p.need_input | p.need_dots:
            put_column(advance(samples.dots, i), samples.row, blend_dots(out, grad, pixels, cell, axes, channels))
        else:
            blend(out, cell, axes, vectors_of(pixels, channels))
        if mask[i] - mask[i] != 0:
            gathered = times(corner_numbers(axes), channels)
            infinite_sample(out, mask[i], pixels, gathered, i, channels, samples, axes)
        if p.need_input:
            _scatter_to_planes(grad, grad_input, part, row, corners, weights, scratch, g)


@inline
def _scatter_to_planes(
    grad: Any, grad_input: Any, part: Any, row: Any, corners: Any, weights: Any, scratch: Any, g: Any
) -> None:
    """Eq. 5 of one sample."""
    places, products = at(scratch.places, (part.thread, 0)), at(scratch.products, (part.thread, 0))
    listed, one = 0, type(weights[0])(1)
    for k in range(len(corners)):
        if corners[k] != volume(g.in_size):
            places[listed], products[listed] = corners[k], weights[k]
            listed += 1
    for c in range(row.channels):
        target = at(grad_input, (part.image, row.channel + c, 0))
        plane_scatter(advance(grad, c), target, places, products, listed, 1, 1, one)

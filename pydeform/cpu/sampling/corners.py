"""Where a deformable tap samples: four corners, their weights, and the position within the cell (eq. 2).

The kernels keep an image channels-last and with one more pixel, of zeros, behind the last one. A corner that is
outside the image points at that pixel, so nothing that follows asks again what is inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform._geometry import BOUNDARIES
from pydeform.cpu.core.jit import inline
from pydeform.cpu.core.pair_products import put
from pydeform.cpu.core.simd import advance, at, sum_values

DCNV2, DCNV1 = BOUNDARIES.index("dcnv2"), BOUNDARIES.index("dcnv1")


@inline
def tile_origins(start: int, count: int, base: Any, g: Any) -> None:
    """base[0, i], base[1, i]: y and x of tap (0, 0) for output position start + i."""
    oy = start // g.out_size[1]
    ox = start - oy * g.out_size[1]
    for i in range(count):
        base[0, i] = oy * g.stride[0] - g.pad[0]
        base[1, i] = ox * g.stride[1] - g.pad[1]
        ox += 1
        if ox == g.out_size[1]:
            oy, ox = oy + 1, 0


@inline
def lowest_coordinate(boundary: int, values: Any) -> Any:
    """A sample with a coordinate below this one is outside; at and above it the corners decide."""
    real = values.dtype.type
    if boundary == DCNV2:
        return np.nextafter(real(-1), real(0))  # -1 itself is outside, with derivative 0
    if boundary == DCNV1:
        return real(0)  # nothing is read before the first row and column
    return real(-2)  # at -1 the corner at 0 has weight 0 and the derivative from the right


@inline
def locate(
    offset_y: Any,
    offset_x: Any,
    mask: Any,
    base: Any,
    shift_y: int,
    shift_x: int,
    count: int,
    low: Any,
    g: Any,
    corner: Any,
    weight: Any,
) -> None:
    """Corners (pixel indices), weights (times the mask) and, in rows 4 and 5 of weight, (y, x) within the cell.

    offset_y, offset_x and mask are pointers to the first of `count` samples. Corner order: (y0, x0), (y0, x1),
    (y1, x0), (y1, x1). A NaN coordinate makes weights and positions NaN and points at the zero pixel: no index is
    formed from a value that is not known to be in range.
    """
    real = weight.dtype.type  # a Python number would turn float32 into float64
    one, nan = real(1), real(np.nan)
    in_h, in_w = np.int32(g.in_size[0]), np.int32(g.in_size[1])
    high_y, high_x = real(g.in_size[0]), real(g.in_size[1])
    move_y, move_x = np.int32(shift_y), np.int32(shift_x)
    index = corner.dtype.type  # int32, or int64 for an image with too many pixels
    width = index(g.in_size[1])
    zero_pixel = index(index(g.in_size[0]) * width)
    # Rule dcnv1 repeats the last row and column instead of fading to zero: there both corners are one pixel.
    last_y = np.int32(in_h - 1) if g.boundary == DCNV1 else in_h
    last_x = np.int32(in_w - 1) if g.boundary == DCNV1 else in_w
    for i in range(count):
        y = real(np.int32(base[0, i] + move_y)) + offset_y[i]
        x = real(np.int32(base[1, i] + move_x)) + offset_x[i]
        inside = (y >= low) & (y < high_y) & (x >= low) & (x < high_x)  # False for NaN
        m = mask[i]
        ys = y if inside else low
        xs = x if inside else low
        fy = np.floor(ys)
        fx = np.floor(xs)
        y0 = np.int32(fy)
        x0 = np.int32(fx)
        y1 = np.int32(y0 + 1) if y0 < last_y else last_y  # Numba's int32 + int32 is int64: back to the narrow type
        x1 = np.int32(x0 + 1) if x0 < last_x else last_x
        ly = ys - fy
        lx = xs - fx
        broken = (y != y) | (x != x)
        ly = nan if broken else ly
        lx = nan if broken else lx
        hy = one - ly
        hx = one - lx
        row0 = inside & (y0 >= 0)
        row1 = inside & (y1 >= 0) & (y1 < in_h)
        col0 = x0 >= 0
        col1 = (x1 >= 0) & (x1 < in_w)
        pixel0 = index(index(y0) * width)
        pixel1 = index(index(y1) * width)
        corner[0, i] = index(pixel0 + x0) if row0 & col0 else zero_pixel
        corner[1, i] = index(pixel0 + x1) if row0 & col1 else zero_pixel
        corner[2, i] = index(pixel1 + x0) if row1 & col0 else zero_pixel
        corner[3, i] = index(pixel1 + x1) if row1 & col1 else zero_pixel
        weight[0, i] = hy * m * hx
        weight[1, i] = hy * m * lx
        weight[2, i] = ly * m * hx
        weight[3, i] = ly * m * lx
        weight[4, i] = ly
        weight[5, i] = lx


@inline
def locate_plain(base: Any, shift_y: int, shift_x: int, count: int, g: Any, corner: Any, weight: Any) -> None:
    """The same without offsets: one corner of weight 1, the others on the zero pixel."""
    zero_pixel = np.int64(g.in_size[0]) * g.in_size[1]
    for i in range(count):
        y = np.int64(base[0, i]) + shift_y
        x = np.int64(base[1, i]) + shift_x
        inside = (y >= 0) & (y < g.in_size[0]) & (x >= 0) & (x < g.in_size[1])
        corner[0, i] = y * g.in_size[1] + x if inside else zero_pixel
        for k in range(1, 4):
            corner[k, i] = zero_pixel
        weight[0, i] = 1
        for k in range(1, 4):
            weight[k, i] = 0


@inline
def locate_tap(
    offset: Any,
    masks: Any,
    b: int,
    og: int,
    tap: int,
    start: int,
    count: int,
    low: Any,
    base: Any,
    corner: Any,
    weights: Any,
    g: Any,
    has_mask: bool,
) -> bool:
    """Corners, weights (rows 0-3 of `weights`) and positions within the cell (rows 4, 5) of one tap of a tile.

    `masks` points to the tile's. True: some may be infinite; what is blended with such weights needs `blend_infinite`.
    """
    shift_y = tap // g.kernel[1] * g.dilation[0]
    shift_x = tap % g.kernel[1] * g.dilation[1]
    if offset is None:
        locate_plain(base, shift_y, shift_x, count, g, corner, weights)
    else:
        offset_y, offset_x = at(offset, (b, og, tap, 0, start)), at(offset, (b, og, tap, 1, start))
        locate(offset_y, offset_x, masks, base, shift_y, shift_x, count, low, g, corner, weights)
    total = sum_values(masks, count if has_mask else 0)
    return bool(total - total != 0)


@inline
def blend_infinite(
    columns: Any, row: int, image: Any, corner: Any, weights: Any, mask: Any, count: int, channels: int
) -> None:
    """columns[i, c] = mask[i] * S where the mask is infinite. As a part of the weights it would make NaN of an S that
    has a corner without weight or a pixel of 0."""
    for i in range(count):
        i0, i1 = corner[0, i] * channels, corner[1, i] * channels
        i2, i3 = corner[2, i] * channels, corner[3, i] * channels
        infinite_sample(
            advance(columns, i * row), mask[i], image, i0, i1, i2, i3, weights[4, i], weights[5, i], channels
        )


@inline
def infinite_sample(
    out: Any, m: Any, image: Any, i0: int, i1: int, i2: int, i3: int, ly: Any, lx: Any, channels: int
) -> None:
    """out[c] = m * S of one sample, if its mask m is infinite or NaN."""
    if m - m == 0:
        return
    one = type(m)(1)
    hy, hx = one - ly, one - lx
    for c in range(channels):
        above = hy * (hx * image[i0 + c] + lx * image[i1 + c])
        put(out, c, m * (above + ly * (hx * image[i2 + c] + lx * image[i3 + c])))

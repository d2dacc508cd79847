"""Where a deformable tap samples: the corners of a cell, their weights, and the position within the cell (eq. 2).

Along each axis a coordinate names two pixels and the share of each; a sample reads the product of all axes: 2, 4 or
8 corners, the last axis fastest, as pixels lie. The kernels keep an image channels-last and with one more pixel, of
zeros, behind the last one. A corner that is outside the image points at that pixel, so nothing that follows asks again
what is inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform._geometry import BOUNDARIES
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.pair_products import put
from pydeform.cpu.core.simd import advance, at, column, sum_values, times
from pydeform.cpu.core.sizes import volume

DCNV2, DCNV1 = BOUNDARIES.index("dcnv2"), BOUNDARIES.index("dcnv1")
OUTSIDE = -1  # in the place of a pixel's number


class Samples(NamedTuple):
    """Those of one tap in a tile, a thread's own: pointers to tables with a row for each corner or axis."""

    row: int  # numbers from one row to the next
    bases: Any  # of each axis: where tap 0 reads for an output position
    corners: Any  # pixels; behind them two rows for what one axis names
    weights: Any  # of the corners, times the mask
    cells: Any  # of each axis: the position within the cell
    dots: Any  # of the columns' gradient with the corners


def sample_tables(threads: int, axes: int, cell: int, positions: int, pixel_dtype: Any, dtype: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of the tables of `Samples`. `cell`: axes of a cell, none where taps do not move."""
    corners, base = 2**cell, np.dtype(np.int32)
    tables = ((axes, base), (corners + 2, pixel_dtype), (corners, dtype), (cell, dtype), (corners, dtype))
    return tuple(((threads, rows, positions), kind) for rows, kind in tables)


@inline_always
def samples_of(thread: int, scratch: Any) -> Samples:
    return Samples(
        scratch.bases.shape[2],
        at(scratch.bases, (thread, 0, 0)),
        at(scratch.corners, (thread, 0, 0)),
        at(scratch.weights, (thread, 0, 0)),
        at(scratch.cells, (thread, 0, 0)),
        at(scratch.dots, (thread, 0, 0)),
    )


@inline_always
def places(samples: Samples, i: int, channels: int, axes: Any) -> Any:
    """Where the corners of sample i begin in an image of so many channels."""
    return times(column(advance(samples.corners, i), samples.row, axes), channels)


@inline
def tile_origins(start: int, count: int, samples: Samples, g: Any) -> None:
    """bases[axis][i]: where tap 0 reads for output position start + i, without an offset."""
    bases, row, last = samples.bases, samples.row, len(g.out_size) - 1
    i = 0
    while i < count:  # one row of positions after the other
        rest, at_row = (start + i) // g.out_size[last], start + i
        first = at_row - rest * g.out_size[last]
        some = min(count - i, g.out_size[last] - first)
        for k in range(last):
            axis = last - 1 - k
            before = rest // g.out_size[axis]
            base = (rest - before * g.out_size[axis]) * g.stride[axis] - g.pad[axis]
            for j in range(i, i + some):
                bases[axis * row + j] = base
            rest = before
        for j in range(some):
            bases[last * row + i + j] = (first + j) * g.stride[last] - g.pad[last]
        i += some


@inline
def lowest_coordinate(boundary: int, like: Any) -> Any:
    """A sample with a coordinate below this one is outside; at and above it the corners decide."""
    real = type(like)
    if boundary == DCNV2:
        return np.nextafter(real(-1), real(0))  # -1 itself is outside, with derivative 0
    if boundary == DCNV1:
        return real(0)  # nothing is read before the first row and column
    return real(-2)  # at -1 the corner at 0 has weight 0 and the derivative from the right


@inline
def locate_tap(offset: Any, first: Any, mask: Any, tap: int, count: int, samples: Samples, g: Any) -> None:
    """Fills the tables of `samples`. Theirs are the numbers from offset[first] on and from where `mask` points; offset
    is None in a plain convolution.

    A NaN coordinate makes weights and positions NaN and points at the zero pixel: no index is formed from a value that
    is not known to be in range.
    """
    axes, row = len(g.in_size), samples.row
    if offset is None:
        _name_pixels(mask, tap, count, samples, g)
        return
    for i in range(count):
        samples.corners[i] = 0
        samples.weights[i] = mask[i]
    for axis in range(axes):
        _name_cells(at(offset, (first[0], first[1], first[2], axis, first[4])), axis, tap, count, samples, g)
        outside, apart = volume(g.in_size) if axis == axes - 1 else OUTSIDE, 1 << (axes - 1 - axis)
        for near in range(0, 1 << axes, 2 * apart):
            _extend(near * row, (near + apart) * row, axis, outside, count, samples, g)
    if axes > 1:
        _spread_nan(samples, axes, count)


@inline_always
def shift_of(tap: int, axis: int, g: Any) -> int:
    """From tap 0 to this one, in pixels along an axis."""
    for following in range(len(g.kernel) - 1, axis, -1):
        tap //= g.kernel[following]
    return tap % g.kernel[axis] * g.dilation[axis]


@inline
def _name_pixels(mask: Any, tap: int, count: int, samples: Samples, g: Any) -> None:
    """The one that each sample of a tap that does not move reads, with the mask as its weight."""
    corner, weight, outside = samples.corners, samples.weights, volume(g.in_size)
    for axis in range(len(g.in_size)):
        base, shift, size = (
            advance(samples.bases, axis * samples.row),
            shift_of(tap, axis, g),
            np.int64(g.in_size[axis]),
        )
        for i in range(count):
            pixel, before = np.int64(base[i]) + shift, np.int64(corner[i]) if axis else 0
            is_inside = (before >= 0) & (pixel >= 0) & (pixel < size)
            corner[i] = before * size + pixel if is_inside else OUTSIDE
    for i in range(count):
        corner[i] = corner[i] if corner[i] >= 0 else outside
        weight[i] = mask[i]


@inline
def _name_cells(offset: Any, axis: int, tap: int, count: int, samples: Samples, g: Any) -> None:
    """The two pixels that each coordinate names along an axis, and the share of the second in `cells`."""
    row, every = samples.row, 1 << len(g.in_size)
    base, cell = advance(samples.bases, axis * row), advance(samples.cells, axis * row)
    first, second = advance(samples.corners, every * row), advance(samples.corners, (every + 1) * row)
    real, index = type(cell[0]), type(first[0])  # a Python number would turn float32 into float64
    low, high, nan = lowest_coordinate(g.boundary, cell[0]), real(g.in_size[axis]), real(np.nan)
    size, move = np.int32(g.in_size[axis]), np.int32(shift_of(tap, axis, g))
    # Rule dcnv1 repeats the last row and column instead of fading to zero: there both pixels are one.
    last = np.int32(size - 1) if g.boundary == DCNV1 else size
    for i in range(count):
        p = real(np.int32(base[i] + move)) + offset[i]
        is_inside = (p >= low) & (p < high)  # False for NaN
        within = p if is_inside else low
        floor = np.floor(within)
        pixel = np.int32(floor)
        after = np.int32(pixel + 1) if pixel < last else last  # Numba's int32 + int32 is int64: back to the narrow type
        cell[i] = within - floor if p == p else nan
        first[i] = index(pixel) if is_inside & (pixel >= 0) else index(OUTSIDE)
        second[i] = index(after) if is_inside & (after >= 0) & (after < size) else index(OUTSIDE)


@inline
def _extend(near: int, far: int, axis: int, outside: int, count: int, samples: Samples, g: Any) -> None:
    """From a corner of the axes before this one to two: the one with this axis's first pixel, in its place, and the one
    with the second."""
    row, every = samples.row, 1 << len(g.in_size)
    first, second = advance(samples.corners, every * row), advance(samples.corners, (every + 1) * row)
    cell, corners, weights = advance(samples.cells, axis * row), samples.corners, samples.weights
    one, index = type(cell[0])(1), type(first[0])
    size, none = index(g.in_size[axis]), index(outside)
    for i in range(count):
        start, weight = corners[near + i], weights[near + i]
        has_start, start = start >= 0, index(start * size)
        corners[near + i] = index(start + first[i]) if has_start & (first[i] >= 0) else none
        corners[far + i] = index(start + second[i]) if has_start & (second[i] >= 0) else none
        weights[near + i] = (one - cell[i]) * weight
        weights[far + i] = cell[i] * weight


@inline
def _spread_nan(samples: Samples, axes: int, count: int) -> None:
    """A sample with one coordinate that is NaN has no position along any axis."""
    cells, row, total = samples.cells, samples.row, type(samples.cells[0])(0)
    for axis in range(axes):
        total += sum_values(advance(cells, axis * row), count)
    if total == total:
        return
    for i in range(count):
        total = cells[i]
        for axis in range(1, axes):
            total += cells[axis * row + i]
        if total != total:
            for axis in range(axes):
                cells[axis * row + i] = total


@inline
def blend_dots_of(samples: Samples, slope: int, count: int, axes: Any) -> None:
    """weights[0] = what the samples' derivative along axis `slope` has in the place of pixels, or, of no axis, the
    samples: the dots, differences along that axis and blends along all others."""
    row, corners, source = samples.row, 1 << len(axes), samples.dots
    if slope < len(axes):
        corners //= 2
        apart = 1 << (len(axes) - 1 - slope)
        for k in range(corners):
            near = k // apart * 2 * apart + k % apart
            share, target = advance(samples.cells, slope * row), advance(samples.weights, k * row)
            _subtract(advance(source, near * row), apart * row, share, target, count)
        source = samples.weights
    for axis in range(len(axes) - 1, -1, -1):
        if axis != slope:
            corners //= 2
            for k in range(corners):
                share, target = advance(samples.cells, axis * row), advance(samples.weights, k * row)
                _blend_rows(advance(source, 2 * k * row), row, share, target, count)
            source = samples.weights


@inline
def _subtract(values: Any, row: int, share: Any, target: Any, count: int) -> None:
    """NaN where the coordinate is."""
    for i in range(count):
        target[i] = values[row + i] - values[i] if share[i] == share[i] else share[i]


@inline
def _blend_rows(values: Any, row: int, share: Any, target: Any, count: int) -> None:
    one = type(share[0])(1)
    for i in range(count):
        target[i] = (one - share[i]) * values[i] + share[i] * values[row + i]


@inline
def is_any_infinite(mask: Any, count: int) -> bool:
    """Of `count` numbers, or NaN; what is blended with such weights needs `blend_infinite`."""
    total = sum_values(mask, count)
    return bool(total - total != 0)


@inline
def blend_infinite(
    columns: Any, row: int, image: Any, mask: Any, count: int, channels: int, samples: Samples, axes: Any
) -> None:
    """columns[i, c] = mask[i] * S where the mask is infinite. As a part of the weights it would make NaN of an S that
    has a corner without weight or a pixel of 0."""
    for i in range(count):
        if mask[i] - mask[i] != 0:
            infinite_sample(
                advance(columns, i * row),
                mask[i],
                image,
                places(samples, i, channels, axes),
                i,
                channels,
                samples,
                axes,
            )


@inline
def infinite_sample(
    out: Any, m: Any, image: Any, places: Any, i: int, channels: int, samples: Samples, axes: Any
) -> None:
    """out[c] = m * S of sample i, whose weights are of no more use."""
    weights, cells, row, one = advance(samples.weights, i), advance(samples.cells, i), samples.row, type(m)(1)
    for c in range(channels):
        for k in range(len(places)):
            weights[k * row] = image[places[k] + c]
        for axis in range(len(axes) - 1, -1, -1):
            share = cells[axis * row]
            for k in range(1 << axis):
                weights[k * row] = (one - share) * weights[2 * k * row] + share * weights[(2 * k + 1) * row]
        put(out, c, m * weights[0])

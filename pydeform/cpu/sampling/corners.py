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
from pydeform.cpu.core.blend import sum_values
from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.pair_products import put
from pydeform.cpu.core.simd import CACHE_LINE, VECTOR_BYTES, advance, at, column, fetch_ahead, times
from pydeform.cpu.core.sizes import round_up, volume
from pydeform.cpu.core.vector import convert, lanes_of, load, load_beside, load_first, select, store
from pydeform.cpu.sampling.axes import axis_corners

DCNV2, DCNV1 = BOUNDARIES.index("dcnv2"), BOUNDARIES.index("dcnv1")
OUTSIDE = -1  # in the place of a pixel's number


class Samples(NamedTuple):
    """Those of one tap in a tile, a thread's own: pointers to tables with a row for each corner or axis."""

    row: int  # numbers from one row to the next
    bases: Any  # of each axis: where tap 0 reads for an output position
    corners: Any  # pixels
    weights: Any  # of the corners, times the mask
    cells: Any  # of each axis: the position within the cell
    dots: Any  # of the columns' gradient with the corners


def sample_tables(
    axes: int, cell: int, positions: int, pixel_dtype: Any, dtype: Any, has_dots: bool
) -> tuple[Any, ...]:
    """Shapes and dtypes of a thread's tables of `Samples`. `cell`: axes of a cell, none where taps do not move."""
    corners, base, row = 2**cell, np.dtype(np.int32), round_up(positions, VECTOR_BYTES // dtype.itemsize)
    tables = ((axes, base), (corners, pixel_dtype), (corners, dtype), (cell, dtype), (corners * has_dots, dtype))
    return tuple(((rows, row), kind) for rows, kind in tables)


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
def cell_of(samples: Samples, i: int, image: Any, channels: int) -> Any:
    """Sample i in an image of so many channels: see `blend.Cell`."""
    return image, advance(samples.corners, i), advance(samples.weights, i), samples.row, channels


@inline_always
def gathered_cell(samples: Samples, i: int, pixels: Any, channels: int) -> Any:
    """Of sample i, where its corners lie side by side."""
    return pixels, np.int64(0), advance(samples.weights, i), samples.row, channels


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
    for axis in range(len(g.in_size)):
        if offset is None:
            _name_pixels(mask, axis, tap, count, samples, g)
        else:
            offset_of_axis = at(offset, (first[0], first[1], first[2], axis, first[4]))
            # The next tap's lie far away, on another page.
            following = at(offset, (first[0], first[1], first[2] + 1, axis, first[4]))
            fetch_ahead(following, count * offset.itemsize // CACHE_LINE + 1)
            _name_corners(offset_of_axis, mask, axis, tap, count, samples, g)


@inline_always
def shift_of(tap: int, axis: int, g: Any) -> int:
    """From tap 0 to this one, in pixels along an axis."""
    for following in range(len(g.kernel) - 1, axis, -1):
        tap //= g.kernel[following]
    return tap % g.kernel[axis] * g.dilation[axis]


@inline
def _name_pixels(mask: Any, axis: int, tap: int, count: int, samples: Samples, g: Any) -> None:
    """Of a tap that does not move, the pixel that a sample reads, as far as axes up to this one tell, and the mask."""
    base, shift, size = advance(samples.bases, axis * samples.row), np.int32(shift_of(tap, axis, g)), g.in_size[axis]
    outside = _outside(axis, g)
    for i in range(0, count, lanes_of(mask)):
        corner, weight = advance(samples.corners, i), load_first(advance(mask, i), count - i)
        pixel, is_inside = load_beside(advance(base, i), weight) + shift, weight == weight
        is_inside = (pixel >= 0) & (pixel < size)
        number = convert(pixel, corner)
        if axis:
            before = load_beside(corner, weight)
            number, is_inside = before * size + number, is_inside & (before >= 0)
        store(select(is_inside, number, outside), corner)
        store(weight, advance(samples.weights, i))


@inline_always
def _outside(axis: int, g: Any) -> int:
    """In the place of a pixel's number: the zero pixel, once all axes are known."""
    return volume(g.in_size) if axis == len(g.in_size) - 1 else OUTSIDE


@inline
def _name_corners(offset: Any, mask: Any, axis: int, tap: int, count: int, samples: Samples, g: Any) -> None:
    """The two pixels that a sample names along an axis, and the share of the second. Each corner that the axes before
    have named becomes two: one with the first pixel, in its place, and one with the second."""
    row, base, cell = (
        samples.row,
        advance(samples.bases, axis * samples.row),
        advance(samples.cells, axis * samples.row),
    )
    apart, outside = 1 << (len(g.in_size) - 1 - axis), _outside(axis, g)
    size, move = np.int32(g.in_size[axis]), np.int32(shift_of(tap, axis, g))
    # Rule dcnv1 repeats the last row and column instead of fading to zero: there both pixels are one.
    low, last = lowest_coordinate(g.boundary, cell[0]), size - 1 if g.boundary == DCNV1 else size
    for i in range(0, count, lanes_of(mask)):
        p = load_first(advance(offset, i), count - i)
        p = convert(load_beside(advance(base, i), p) + move, mask) + p
        first, second, has_first, has_second, share = axis_corners(p, low, size, size, last, base)
        store(share, advance(cell, i))
        corners, weights = advance(samples.corners, i), advance(samples.weights, i)
        if axis == 0:
            store(load_first(advance(mask, i), count - i), weights)
            store(convert(first - first, corners), corners)
        first_pixel, second_pixel = convert(first, corners), convert(second, corners)
        for k in range(0, 1 << len(g.in_size), 2 * apart):
            near, far, weight = k * row, (k + apart) * row, load(advance(weights, k * row))
            start = load_beside(advance(corners, near), p)
            has_start, start = start >= 0, start * size
            store(select(has_start & has_first, start + first_pixel, outside), advance(corners, near))
            store(select(has_start & has_second, start + second_pixel, outside), advance(corners, far))
            store((1 - share) * weight, advance(weights, near))
            store(share * weight, advance(weights, far))
        if axis == len(g.in_size) - 1 and axis > 0:
            _spread_nan(advance(samples.cells, i), row, axis)


@inline_always
def _spread_nan(cells: Any, row: int, last: int) -> None:
    """Samples with one coordinate that is NaN have no position along any axis."""
    total = load(cells)
    for axis in range(1, last + 1):
        total = total + load(advance(cells, axis * row))
    for axis in range(last + 1):
        place = advance(cells, axis * row)
        store(select(total == total, load(place), np.nan), place)


@inline
def blend_dots_of(samples: Samples, slope: int, count: int, axes: Any) -> None:
    """weights[0] = what the samples' derivative along axis `slope` has in the place of pixels, or, of no axis, the
    samples: the dots, differences along that axis and blends along all others."""
    row, corners = samples.row, 1 << len(axes)
    for i in range(0, count, lanes_of(samples.weights)):
        values, source = advance(samples.weights, i), advance(samples.dots, i)
        left = corners
        if slope < len(axes):
            left //= 2
            apart, share = 1 << (len(axes) - 1 - slope), load(advance(samples.cells, slope * row + i))
            for k in range(left):
                near = advance(source, (k // apart * 2 * apart + k % apart) * row)
                change = load(advance(near, apart * row)) - load(near)
                store(select(share == share, change, np.nan), advance(values, k * row))
            source = values
        for axis in range(len(axes) - 1, -1, -1):
            if axis != slope:
                left //= 2
                share = load(advance(samples.cells, axis * row + i))
                for k in range(left):
                    near = advance(source, 2 * k * row)
                    blended = (1 - share) * load(near) + share * load(advance(near, row))
                    store(blended, advance(values, k * row))
                source = values


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

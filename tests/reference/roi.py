"""The eight RoI operators as their equations say it, one bin at a time, in float64.

A box [b, x1, y1, x2, y2] is divided into bins. What a bin reads is a product: along y some points (or rows of pixels),
along x some points (or columns), and every pair of them is one reading of the image,

    value(point)      = sum over row, column of weight_y[row] * weight_x[column] * input[b, k, row, column]
    output[r,c,py,px] = mask[r, 0, py, px] * (sum over points of value(point)) / divisor       or the largest value

Where the points lie is all that the operators differ in: the functions called `axis` below, one per operator, say it
for one axis. (prroi_pool has one "point", with all pixels of the bin; in a rotated box a point is no product of rows
and columns of the bin, but still one of rows and columns of pixels.) Slow on purpose; nothing here is shared with the
library under test.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Pixel(NamedTuple):
    """What a point reads along one axis."""

    index: int
    weight: float
    slope: float = 0.0  # d weight / d position of the point
    of_low: float = 0.0  # d weight / d beginning of the scaled box
    of_high: float = 0.0  # d weight / d its end

    def moved(self, part):
        """In a point that lies so far into its box: 0 at the beginning, 1 at the end."""
        return self._replace(of_low=self.slope * (1 - part), of_high=self.slope * part)


class Axis(NamedTuple):
    """A bin along one axis."""

    points: list  # of each point the pixels it reads; [] reads 0
    count: int  # what the divisor is the product of, one factor from each axis
    size: float  # of the box
    bin: float  # length of a bin
    positions: list  # of the points, or where the bin begins and ends: all that is compared with something or rounded


class Bin(NamedTuple):
    rows: Axis
    columns: Axis
    divisor: int

    def points(self):
        """The pixels of each point, see `_products`, x fastest."""
        columns = _shortened(self.columns.points)
        return [_products(rows, columns_of) for rows in _shortened(self.rows.points) for columns_of in columns]


def _products(rows, columns):
    """(row, column, weight, d weight / dy, d weight / dx, derivatives by x1, y1, x2, y2) of pairs of pixels."""
    return [
        (
            row.index,
            column.index,
            row.weight * column.weight,
            row.slope * column.weight,
            row.weight * column.slope,
            (
                row.weight * column.of_low,
                row.of_low * column.weight,
                row.weight * column.of_high,
                row.of_high * column.weight,
            ),
        )
        for row in rows
        for column in columns
    ]


def _shortened(points):
    """Of neighbours that do not count one is enough, as all read 0: boxes far beyond the image stay affordable."""
    return [point for i, point in enumerate(points) if point or i == 0 or points[i - 1]]


NOTHING = Axis([], 0, 0.0, 0.0, [])
OUTSIDE = Bin(NOTHING, NOTHING, 1)  # reads nothing: value 0, gradients 0
UNDEFINED = None  # in place of a Bin: a NaN coordinate, or no such image. NaN, and no pixel gets a gradient


class Operator(NamedTuple):
    """One call: its arrays, and how a bin comes about."""

    input: np.ndarray
    boxes: np.ndarray
    pooled: tuple  # bins along y and x
    spatial_scale: float
    axis: Callable  # (low, high, p, pooled, length, offset) -> Axis, or None: infinitely far away
    out_channels: int
    group: tuple = (1, 1)  # bins along y and x that read different channels
    largest: bool = False  # the largest value instead of the mean
    least_divisor: int = 1  # a mean over no points is 0/1; torchvision's ps_roi_align has 0/0
    offset_name: str = ""  # "" : the operator has neither offset nor mask
    offset: np.ndarray | None = None
    offset_scale: float = 0.0
    part: tuple = (1, 1)  # cells of the offset along y and x
    mask: np.ndarray | None = None
    moves_boxes: bool = False  # whether the gradient of the boxes is asked for
    coordinate: type = float  # np.float32: what that makes of a box as long as its numbers are apart is wanted

    @property
    def classes(self):
        return 1 if self.offset is None else self.offset.shape[1] // 2

    def channel(self, c, py, px):
        """The input channel that output channel c of bin (py, px) reads."""
        gy, gx = py * self.group[0] // self.pooled[0], px * self.group[1] // self.pooled[1]
        return (c * self.group[0] + gy) * self.group[1] + gx

    def cell(self, py, px):
        return py * self.part[0] // self.pooled[0], px * self.part[1] // self.pooled[1]

    def bin(self, r, py, px, label):
        """What bin (py, px) of box r reads in the channels of class `label`."""
        batch, _, height, width = self.input.shape
        image, *corners = map(self.coordinate, self.boxes[r].tolist())
        offset_y, offset_x = 0.0, 0.0
        if self.offset is not None:
            ty, tx = self.cell(py, px)
            offset_x, offset_y = map(self.coordinate, self.offset[r, 2 * label : 2 * label + 2, ty, tx].tolist())
        if image not in range(batch) or any(map(math.isnan, (*corners, offset_y, offset_x))):
            return UNDEFINED
        if not all(math.isfinite(corner * self.spatial_scale) for corner in corners):
            return OUTSIDE
        x1, y1, x2, y2 = corners
        rows = self.axis(y1, y2, py, self.pooled[0], height, offset_y)
        columns = self.axis(x1, x2, px, self.pooled[1], width, offset_x)
        if rows is None or columns is None:
            return OUTSIDE
        return Bin(rows, columns, max(float(rows.count) * float(columns.count), self.least_divisor))

    def bins(self):
        """Every bin with its class and the channels of that class."""
        of_a_class = self.out_channels // self.classes
        for r in range(len(self.boxes)):
            for py in range(self.pooled[0]):
                for px in range(self.pooled[1]):
                    for label in range(self.classes):
                        channels = range(label * of_a_class, (label + 1) * of_a_class)
                        yield r, py, px, label, channels, self.bin(r, py, px, label)


def forward(op):
    output = np.zeros((len(op.boxes), op.out_channels, *op.pooled))
    for r, py, px, _, channels, bin in op.bins():
        if bin is UNDEFINED:
            output[r, channels, py, px] = math.nan
            continue
        points = bin.points()
        factor = 1.0 if op.mask is None else op.mask[r, 0, py, px]
        for c in channels:
            plane = op.input[int(op.boxes[r, 0]), op.channel(c, py, px)]
            output[r, c, py, px] = factor * _pooled(op, points, bin.divisor, plane)
    return output


def backward(grad_output, op):
    """Gradients of sum(grad_output * forward(op)), as a dict under the arguments' names."""
    (grad_output,) = _float64(grad_output)
    grad_input = np.zeros_like(op.input)
    grad_offset = None if op.offset is None else np.zeros_like(op.offset)
    grad_mask = None if op.mask is None else np.zeros_like(op.mask)
    grad_boxes = np.zeros_like(op.boxes) if op.moves_boxes else None
    for r, py, px, label, channels, bin in op.bins():
        ty, tx = op.cell(py, px)
        if bin is UNDEFINED:
            if grad_offset is not None:
                grad_offset[r, 2 * label : 2 * label + 2, ty, tx] = math.nan
            if grad_mask is not None:
                grad_mask[r, 0, py, px] = math.nan
            if grad_boxes is not None:
                grad_boxes[r, 1:] = math.nan
            continue
        points = bin.points()
        factor = 1.0 if op.mask is None else op.mask[r, 0, py, px]
        for c in channels:
            image, k = int(op.boxes[r, 0]), op.channel(c, py, px)
            plane, g = op.input[image, k], grad_output[r, c, py, px]
            if grad_mask is not None and any(points):  # a sum over nothing is 0, whatever g
                grad_mask[r, 0, py, px] += g * _pooled(op, points, bin.divisor, plane)
            in_result, divisor = ([_largest(points, plane)[1]], 1) if op.largest else (points, bin.divisor)
            for pixels in in_result:
                share = g * factor / divisor
                for row, column, weight, slope_y, slope_x, of_corners in pixels:
                    grad_input[image, k, row, column] += share * weight
                    if grad_boxes is not None:
                        for corner, slope in enumerate(of_corners, 1):
                            grad_boxes[r, corner] += share * op.spatial_scale * slope * plane[row, column]
                    if grad_offset is not None:  # an offset of 1 moves the points by offset_scale times the box
                        through_x = slope_x * plane[row, column] * op.offset_scale * bin.columns.size
                        through_y = slope_y * plane[row, column] * op.offset_scale * bin.rows.size
                        grad_offset[r, 2 * label, ty, tx] += share * through_x
                        grad_offset[r, 2 * label + 1, ty, tx] += share * through_y
    grads = {"input": grad_input, "boxes": grad_boxes}
    if op.offset_name:
        grads |= {op.offset_name: grad_offset, "mask": grad_mask}
    return grads


def _pooled(op, points, divisor, plane):
    if op.largest:
        return _largest(points, plane)[0]
    total = sum(_value(pixels, plane) for pixels in points)
    return total / divisor if divisor else math.nan


def _value(pixels, plane):
    return sum(weight * plane[row, column] for row, column, weight, *_ in pixels)


def _largest(points, plane):
    """The largest value and the pixels it was made of, or 0 and none. NaN is the largest; of equal values the first."""
    found = None
    for pixels in points:
        value = _value(pixels, plane)
        if found is None or value > found[0] or (math.isnan(value) and not math.isnan(found[0])):
            found = value, pixels
    return found or (0.0, [])


def _round(value):
    """C's round(): halves away from zero. (Python's and NumPy's go to the even number.)"""
    magnitude = abs(float(value))
    if not math.isfinite(magnitude):
        return value
    whole = math.floor(magnitude)
    return type(value)(math.copysign(whole + (magnitude - whole >= 0.5), value))


def _pixels(first, last, end, size, bin, edges):
    """Whole pixels from first to last, without the latter, where they lie between 0 and end."""
    inside = range(min(max(first, 0), end), min(max(last, 0), end))
    return Axis([[Pixel(index, 1.0)] for index in inside], len(inside), size, bin, edges)


def _count(bin, sampling_ratio):
    """Points of a bin: as asked, or as many as it is long, 0 or less for a box of no or negative size."""
    return sampling_ratio if sampling_ratio > 0 else math.ceil(bin)


def _centred_points(begin, size, p, pooled, length, sampling_ratio, move=0.0, grows=1.0):
    """RoIAlign's: n points in the middles of n parts of the bin, all of which the mean is over.

    `grows` is 0 where a least size keeps the box as it is when its end moves.
    """
    bin = size / pooled
    n = _count(bin, sampling_ratio)
    start = begin + p * bin + move
    if n > MANY_POINTS or not math.isfinite(n * float(bin)):
        points, positions, chosen = _many_points(start, bin, n, 0.5, length, 1.0)
    else:
        positions = [float(start) + (i + 0.5) * float(bin) / n for i in range(n)]
        points, chosen = [_read(position, length, 1.0) for position in positions], range(n)
    parts = [grows * (p + (i + 0.5) / n) / pooled for i in chosen]
    points = [[pixel.moved(part) for pixel in pixels] for pixels, part in zip(points, parts, strict=True)]
    return Axis(points, n, size, bin, positions)


MANY_POINTS = 4096  # of more, or where their places overflow, only those that count are listed


def _many_points(start, bin, n, first_point, length, reach, flat_at_pixels=False):
    """Points i of n, at start + (i + first_point) * bin / n without any rounding: all that count and their neighbours.

    Returned are what they read, where those lie that count, and the i.
    """
    if not math.isfinite(start):
        return [[]], [], [0]
    start, step, first_point = Fraction(float(start)), Fraction(float(bin)) / n, Fraction(first_point)
    assert step, "all points in one place, more than a plain loop can take"
    ends = sorted((Fraction(end) - start) / step - first_point for end in (-reach, length - 1 + reach))
    first, last = max(math.ceil(ends[0]), 0), min(math.floor(ends[1]), n - 1)
    if first > last:
        return [[]], [], [0]
    assert last - first < 4 * MANY_POINTS, "more points in the image than a plain loop can take"
    positions = [float(start + (i + first_point) * step) for i in range(first, last + 1)]
    points = [_read(position, length, reach, flat_at_pixels) for position in positions]
    before, after = [first - 1] * (first > 0), [last + 1] * (last < n - 1)
    chosen = [*before, *range(first, last + 1), *after]
    return [[] for _ in before] + points + [[] for _ in after], positions, chosen


def _read(position, length, reach, flat_at_pixels=False):
    """Linearly between two pixels; from -reach to 0, and from length - 1 to length - 1 + reach, the nearest pixel.

    There the slope is 0, also at exactly 0, as in mmcv's forward, whose clamp is taken where y <= 0.
    """
    if not -reach <= position <= length - 1 + reach:
        return []
    nearest = min(max(position, 0.0), length - 1.0)
    low = math.floor(nearest)
    high = min(low + 1, length - 1)
    flat = position <= 0 or position >= length - 1 or (flat_at_pixels and position == low)
    slope = 0.0 if flat else 1.0
    if flat_at_pixels and nearest == low:  # between floor and ceil of a whole number lies only that pixel
        return [Pixel(low, 1.0)]
    return [Pixel(low, 1 - (nearest - low), -slope), Pixel(high, nearest - low, slope)]


def _finite(*numbers):
    return all(map(math.isfinite, numbers))


def _float64(*arrays):
    return [None if array is None else np.asarray(array).astype(np.float64) for array in arrays]


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------------------------------------------------
# roi_pool: both ends of a box rounded after scaling and both among its pixels, so that it is end - begin + 1 long.


def operator_of_roi_pool(input, boxes, output_size, spatial_scale=1.0):
    input, boxes = _float64(input, boxes)

    def axis(low, high, p, pooled, length, _):
        begin, end = _round(low * spatial_scale), _round(high * spatial_scale) + 1
        size = max(end - begin, 1.0)
        if not _finite(size):
            return None
        bin = size / pooled
        first, last = math.floor(p * bin) + int(begin), math.ceil((p + 1) * bin) + int(begin)
        return _pixels(first, last, length, size, bin, [p * bin, (p + 1) * bin])

    return Operator(input, boxes, _pair(output_size), spatial_scale, axis, input.shape[1], largest=True)


def roi_pool(input, boxes, output_size, spatial_scale=1.0):
    return forward(operator_of_roi_pool(input, boxes, output_size, spatial_scale))


def roi_pool_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_roi_pool(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# roi_align: nothing is rounded. aligned: half a pixel less, as pixel centres lie at integers, and no least size.
# The gradient of a box is that of where its points lie; how many there are has none.


def operator_of_roi_align(
    input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False, *, mode="avg"
):
    input, boxes = _float64(input, boxes)

    def axis(low, high, p, pooled, length, _):
        begin, end = low * spatial_scale, high * spatial_scale
        if aligned:
            begin, end = begin - 0.5, end - 0.5
        size = end - begin if aligned else max(end - begin, 1.0)
        if not _finite(size):
            return None
        grows = float(end - begin >= size)
        return _centred_points(begin, size, p, pooled, length, sampling_ratio, grows=grows)

    largest = {"avg": False, "max": True}[mode]
    return Operator(input, boxes, _pair(output_size), spatial_scale, axis, input.shape[1], largest=largest)


def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False, *, mode="avg"):
    return forward(operator_of_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, mode=mode))


def roi_align_backward(grad_output, *arguments, needs=(), **options):
    """`needs` as in the operator: boxes have a gradient if they are named."""
    return backward(grad_output, operator_of_roi_align(*arguments, **options)._replace(moves_boxes="boxes" in needs))


# ---------------------------------------------------------------------------------------------------------------------
# ps_roi_pool: the mean of whole pixels, of a channel that belongs to the bin.


def operator_of_ps_roi_pool(input, boxes, output_size, spatial_scale=1.0, *, convention="torchvision"):
    input, boxes = _float64(input, boxes)
    pooled_h, pooled_w = _pair(output_size)

    def torchvision_axis(low, high, p, pooled, length, _):
        """Rounded after scaling, and whole pixels counted from there. The last row and column are never read."""
        begin, end = _round(low * spatial_scale), _round(high * spatial_scale)
        size = max(end - begin, 1.0)
        if not _finite(size):
            return None
        bin = size / pooled
        first, last = math.floor(p * bin) + int(begin), math.ceil((p + 1) * bin) + int(begin)
        return _pixels(first, last, length - 1, size, bin, [p * bin, (p + 1) * bin])

    def rfcn_axis(low, high, p, pooled, length, _):
        """Rounded before scaling; the end is the far side of its pixel."""
        begin, end = _round(low) * spatial_scale, (_round(high) + 1) * spatial_scale
        size = max(end - begin, 0.1)
        if not _finite(size):
            return None
        bin = size / pooled
        edges = [begin + p * bin, begin + (p + 1) * bin]
        return _pixels(math.floor(edges[0]), math.ceil(edges[1]), length, size, bin, edges)

    axis = {"torchvision": torchvision_axis, "rfcn": rfcn_axis}[convention]
    out_channels = input.shape[1] // (pooled_h * pooled_w)
    pooled = pooled_h, pooled_w
    return Operator(input, boxes, pooled, spatial_scale, axis, out_channels, group=pooled)


def ps_roi_pool(input, boxes, output_size, spatial_scale=1.0, *, convention="torchvision"):
    return forward(operator_of_ps_roi_pool(input, boxes, output_size, spatial_scale, convention=convention))


def ps_roi_pool_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_ps_roi_pool(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# ps_roi_align: as roi_align with aligned, of a channel that belongs to the bin. No points: 0/0.


def operator_of_ps_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
    op = operator_of_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned=True)
    out_channels = op.out_channels // math.prod(op.pooled)
    # A box upside down has a negative number of points: the divisor is not 0, and may be negative, of a sum of none.
    return op._replace(out_channels=out_channels, group=op.pooled, least_divisor=-math.inf)


def ps_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
    return forward(operator_of_ps_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio))


def ps_roi_align_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_ps_roi_align(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# deform_roi_pool (mmcv): as roi_align with aligned, every bin moved by gamma * size of the box * offset.


def operator_of_deform_roi_pool(
    input, boxes, offset=None, output_size=7, spatial_scale=1.0, sampling_ratio=0, gamma=0.1, mask=None
):
    input, boxes, offset, mask = _float64(input, boxes, offset, mask)

    def axis(low, high, p, pooled, length, offset):
        begin, end = low * spatial_scale - 0.5, high * spatial_scale - 0.5
        size = end - begin
        move = offset * gamma * size
        if not _finite(size, move):
            return None
        return _centred_points(begin, size, p, pooled, length, sampling_ratio, move)

    pooled = _pair(output_size)
    return Operator(
        input,
        boxes,
        pooled,
        spatial_scale,
        axis,
        input.shape[1],
        offset_name="offset",
        offset=offset,
        offset_scale=gamma,
        part=pooled,
        mask=mask,
    )


def deform_roi_pool(
    input, boxes, offset=None, output_size=7, spatial_scale=1.0, sampling_ratio=0, gamma=0.1, mask=None
):
    sizes = output_size, spatial_scale, sampling_ratio, gamma
    return forward(operator_of_deform_roi_pool(input, boxes, offset, *sizes, mask))


def deform_roi_pool_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_deform_roi_pool(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# deform_psroi_pool (MXNet, the first paper): a box as rfcn's, half a pixel less. Points begin at the edge of the bin,
# reach only half a pixel beyond the image, and the mean is over those that count. Interpolation is between floor and
# ceiling, which at an integer are one pixel: no slope there.


def operator_of_deform_psroi_pool(
    input,
    boxes,
    trans=None,
    *,
    output_dim,
    pooled_size,
    group_size=1,
    part_size=None,
    sample_per_part=1,
    trans_std=0.0,
    spatial_scale=1.0,
    mask=None,
):
    input, boxes, trans, mask = _float64(input, boxes, trans, mask)

    def axis(low, high, p, pooled, length, trans):
        begin, end = _round(low) * spatial_scale - 0.5, (_round(high) + 1) * spatial_scale - 0.5
        size = max(end - begin, 0.1)
        move = trans * trans_std * size
        if not _finite(size, move):
            return None
        bin = size / pooled
        start = p * bin + begin + move
        if sample_per_part > MANY_POINTS:
            points, positions, _ = _many_points(start, bin, sample_per_part, 0.0, length, 0.5, flat_at_pixels=True)
        else:
            positions = [start + i * bin / sample_per_part for i in range(sample_per_part)]
            points = [_read(position, length, 0.5, flat_at_pixels=True) for position in positions]
        return Axis(points, sum(map(bool, points)), size, bin, positions)

    return Operator(
        input,
        boxes,
        _pair(pooled_size),
        spatial_scale,
        axis,
        output_dim,
        group=_pair(group_size),
        offset_name="trans",
        offset=trans,
        offset_scale=trans_std,
        part=_pair(pooled_size if part_size is None else part_size),
        mask=mask,
    )


def deform_psroi_pool(
    input,
    boxes,
    trans=None,
    *,
    output_dim,
    pooled_size,
    group_size=1,
    part_size=None,
    sample_per_part=1,
    trans_std=0.0,
    spatial_scale=1.0,
    mask=None,
):
    return forward(
        operator_of_deform_psroi_pool(
            input,
            boxes,
            trans,
            output_dim=output_dim,
            pooled_size=pooled_size,
            group_size=group_size,
            part_size=part_size,
            sample_per_part=sample_per_part,
            trans_std=trans_std,
            spatial_scale=spatial_scale,
            mask=mask,
        )
    )


def deform_psroi_pool_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_deform_psroi_pool(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# prroi_pool (Precise RoI pooling): the exact mean over the bin of the surface that is linear between pixels and fades
# to 0 one pixel beyond the first and the last. Rational numbers, since differences of nearly equal ones are divided by
# the size of the bin.


def operator_of_prroi_pool(input, boxes, output_size, spatial_scale=1.0):
    input, boxes = _float64(input, boxes)

    def axis(low, high, p, pooled, length, _):
        begin, end = low * spatial_scale, high * spatial_scale
        size = end - begin
        if not (_finite(size) and size > 0):
            return None
        parts = Fraction(p, pooled), Fraction(p + 1, pooled)
        first, last = (Fraction(float(begin)) + part * Fraction(float(size)) for part in parts)
        pixels = _means_of_hats(first, last, parts, length)
        return Axis([pixels], 1, size, size / pooled, [float(first), float(last)])

    op = Operator(input, boxes, _pair(output_size), spatial_scale, axis, input.shape[1])
    return op._replace(moves_boxes=True)


def _means_of_hats(first, last, parts, length):
    """Mean over [first, last] of each pixel's hat, max(0, 1 - distance), and its derivatives.

    Moving an end of the bin by d adds to the integral d times the hat there, and changes what it is divided by. The
    ends lie `parts` of the way from the beginning of the box to its end.
    """
    pixels = []
    for index in range(max(math.floor(first), 0), min(math.ceil(last), length - 1) + 1):
        at_first, at_last = (max(1 - abs(end - index), 0) for end in (first, last))
        mean = (_integral_of_hat(last - index) - _integral_of_hat(first - index)) / (last - first)
        of_first, of_last = (mean - at_first) / (last - first), (at_last - mean) / (last - first)
        of_low = (1 - parts[0]) * of_first + (1 - parts[1]) * of_last
        of_high = parts[0] * of_first + parts[1] * of_last
        pixels.append(Pixel(index, float(mean), 0.0, float(of_low), float(of_high)))
    return pixels


def _integral_of_hat(end):
    """Of max(0, 1 - |t|) up to `end`."""
    end = min(max(end, -1), 1)
    return (1 + end) ** 2 / 2 if end < 0 else Fraction(1, 2) + end - end**2 / 2


def prroi_pool(input, boxes, output_size, spatial_scale=1.0):
    return forward(operator_of_prroi_pool(input, boxes, output_size, spatial_scale))


def prroi_pool_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_prroi_pool(*arguments, **options))


# ---------------------------------------------------------------------------------------------------------------------
# roi_align_rotated (mmcv): boxes [b, cx, cy, w, h, theta]. The points of a box around (0, 0), as roi_align has them,
# are turned by theta, counterclockwise as the image is seen (y down), and moved to its centre.


class Rotated(NamedTuple):
    """A bin of a box that is turned; has what Bin has."""

    positions: list  # (y, x) of every point
    divisor: int
    height: int
    width: int

    def points(self):
        return [_products(_read(y, self.height, 1.0), _read(x, self.width, 1.0)) for y, x in self.positions]


class RotatedOperator(Operator):
    """`axis` gives the (y, x) of every point of a scaled box, and what the divisor is."""

    def bin(self, r, py, px, _):
        batch, _, height, width = self.input.shape
        image, *box, theta = self.boxes[r].tolist()
        if image not in range(batch) or any(map(math.isnan, (*box, theta))):
            return UNDEFINED
        box = [number * self.spatial_scale for number in box]
        if not _finite(*box, theta):
            return OUTSIDE
        return Rotated(*self.axis(*box, theta, py, px), height, width)


def operator_of_roi_align_rotated(
    input, boxes, output_size, spatial_scale=1.0, sampling_ratio=0, aligned=True, clockwise=False
):
    input, boxes = _float64(input, boxes)
    pooled = _pair(output_size)

    def along(size, p, pooled):
        """Of a box around 0, and how many."""
        size = size if aligned else max(size, 1.0)
        n = _count(size / pooled, sampling_ratio)
        return [((p + (i + 0.5) / n) / pooled - 0.5) * size for i in range(n)], n

    def points(x, y, w, h, theta, py, px):
        (ys, ny), (xs, nx) = along(h, py, pooled[0]), along(w, px, pooled[1])
        cos, sin = math.cos(theta), math.sin(-theta if clockwise else theta)
        if aligned:
            y, x = y - 0.5, x - 0.5
        return [(dy * cos - dx * sin + y, dy * sin + dx * cos + x) for dy in ys for dx in xs], max(ny * nx, 1)

    return RotatedOperator(input, boxes, pooled, spatial_scale, points, input.shape[1])


def roi_align_rotated(*arguments, **options):
    return forward(operator_of_roi_align_rotated(*arguments, **options))


def roi_align_rotated_backward(grad_output, *arguments, **options):
    return backward(grad_output, operator_of_roi_align_rotated(*arguments, **options))

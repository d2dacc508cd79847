"""How queries gather samples: the sizes of one call, and where each sample of a query reads.

A query sums, for each group of channels (a head), weighted samples of the maps of one image. All operators of the
family are that: they differ in where the numbers of a sample lie, and in how these become pixels. Both are here:

    pixel = start + stride * query - back + (shift + number) * scale          along each axis of the queries' grid

where `start` to `back` are of the geometry, and `shift` and `scale` of the sample (`SampleTable`). Both backends
compute it in this order, `start + stride * query` in integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pydeform import _checks
from pydeform._geometry import FARTHEST

# What a location means: between four pixels, zeros outside; the same, but only where 0 < number < 1 along both axes;
# the pixel that it lies in or is nearest to.
BILINEAR, BILINEAR_INSIDE, DISCRETE = range(3)
METHODS = {"bilinear": BILINEAR, "discrete": DISCRETE}


class SampleTable:
    """Each sample of a query and group, the same for all of them. Arrays with one number each, axes in the order y, x.

    Two are never equal: plans are kept by them, and they are made once for each geometry.
    """

    def __init__(self, levels: Sequence[tuple[int, int]], level: Any, **numbers: Any) -> None:
        sizes = np.array(levels, np.int64).reshape(-1, 2)
        starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        self.level = np.asarray(level, np.int64)  # which map it reads,
        self.size = sizes[self.level].T  # its size
        self.first_pixel = starts[self.level]  # and its place among an image's pixels
        samples = len(self.level)
        self.shift = np.zeros((2, samples))
        self.scale = self.size.astype(np.float64)
        self.number = 2 * np.arange(samples)  # where its x lies among those of the query and group; y is the next
        self.weight = np.arange(samples)  # likewise its weight
        self.divisor = self.size.astype(np.float64)  # of raw offsets, beside a point or a box (`fused`)
        self.__dict__.update(numbers)


class GatherGeometry(NamedTuple):
    """Every number that a gather kernel needs beside those of each sample. Tuples of two are of y and x."""

    batch: int
    queries: int
    groups: int
    channels: int  # of each group
    pixels: int  # of all maps of an image
    samples: int  # of each query and group
    rule: int
    location_groups: int  # `groups`, or 1: all groups read the same places
    number_steps: tuple[int, int, int]  # numbers of the locations from one image, query, group to the next
    weight_steps: tuple[int, int, int]  # the same of the weights
    first_weight: int  # where they begin, if they are packed with the locations
    out_w: int  # query = (y, x) of a grid so wide; 1: they have no grid
    start: tuple[int, int]
    stride: tuple[int, int]
    back: tuple[float, float]
    # Locations and weights that are made in the kernel; 0 and 0: they are given.
    reference_levels: int  # levels of the reference points: 1, or as many as there are
    reference_numbers: int  # 2: x, y; 4: x, y, w, h
    offset_scale: float  # of raw offsets beside boxes


class Gather(NamedTuple):
    """One call: what kernels get, and what depends on the sample alone."""

    numbers: GatherGeometry
    samples: SampleTable


class GatherArrays(NamedTuple):
    """What is gathered, from where, with which weights (None: packed with the locations), and the points or boxes that
    raw offsets start from (None: locations are given)."""

    value: Any
    locations: Any
    weights: Any
    reference: Any


# Attention ------------------------------------------------------------------------------------------------------------


def levels_of(op: str, spatial_shapes: Any) -> tuple[tuple[int, int], ...]:
    """The sizes of the levels, from an array or nested sequence. Of an array on a device they are copied from there."""
    if _checks.is_plain(spatial_shapes):
        return _levels(op, spatial_shapes)
    return _levels_of(op, spatial_shapes)


def _levels_of(op: str, spatial_shapes: Any) -> tuple[tuple[int, int], ...]:
    formula = "(L, 2), rows (h, w)"
    rows = _rows(op, spatial_shapes, formula)
    return tuple(_size(op, row, formula, rows) for row in rows)


_levels = functools.lru_cache(maxsize=256)(_levels_of)


def _rows(op: str, spatial_shapes: Any, formula: str) -> list[Any]:
    shape = getattr(spatial_shapes, "shape", None)
    given = spatial_shapes.tolist() if hasattr(spatial_shapes, "tolist") else spatial_shapes
    if not isinstance(given, list | tuple) or not given or any(_checks.items_of(row, 1) is None for row in given):
        came = f"shape {tuple(shape)}" if shape is not None else _checks.shown(spatial_shapes)
        raise ValueError(f"{op}: spatial_shapes must have shape {formula}, got {came}")
    return list(given)


def _size(op: str, row: Any, formula: str, spatial_shapes: list[Any]) -> tuple[int, int]:
    """A row of all."""
    sides = _checks.items_of(row, 2)
    if sides is None or len(sides) != 2:
        raise ValueError(f"{op}: spatial_shapes must have shape {formula}, got {_checks.shown(spatial_shapes)}")
    expected = f"ints >= 1 of shape {formula}"
    h, w = (_checks.as_int(op, "spatial_shapes", side, 1, expected, spatial_shapes) for side in sides)
    return h, w


def attention_geometry(
    op: str,
    arrays: dict[str, Any],
    spatial_shapes: Any,
    names: tuple[str, str],
    points: Any,
    method: str,
    offset_scale: float = 0.0,
) -> Gather:
    """Of ms_deform_attn, and from raw offsets, where `arrays` has reference_points. `names`: locations, weights."""
    levels = levels_of(op, spatial_shapes)
    _checks.check_choice(op, "method", method, tuple(METHODS))
    if points is not None:
        points = _checks.per_axis(op, "points", points, len(levels), 1)
    value, locations, weights, reference = (
        None if arrays.get(name) is None else tuple(map(int, arrays[name].shape))
        for name in ("value", *names, "reference_points")
    )
    itemsize = arrays["value"].dtype.itemsize
    return _attention(op, itemsize, levels, value, locations, weights, names, points, method, reference, offset_scale)


@functools.lru_cache(maxsize=256)
def _attention(
    op: str,
    itemsize: int,
    levels: tuple[tuple[int, int], ...],
    value: Any,
    locations: Any,
    weights: Any,
    names: tuple[str, str],
    points: tuple[int, ...] | None,
    method: str,
    reference: Any,
    offset_scale: float,
) -> Gather:
    """Of shapes."""
    batch, heads, channels = _check_value(op, "value", value, "(N, S, heads, channels)", levels, itemsize)
    middle = "L, P" if points is None else "sum(points)"
    formulas = f"(N, Lq, heads, {middle}, 2)", f"(N, Lq, heads, {middle})"
    _checks.check_ndim(op, names[0], locations, formulas[0], 5 + (points is None))
    queries = locations[1]
    if points is None:
        points = (locations[4],) * len(levels)
        shape: tuple[int, ...] = (batch, queries, heads, len(levels), locations[4])
        if locations[4] < 1:
            raise ValueError(f"{op}: {names[0]} must have at least one point for each level, got shape {locations}")
    else:
        shape = batch, queries, heads, sum(points)
    _checks.check_shape(op, names[0], locations, formulas[0], (*shape, 2))
    _checks.check_shape(op, names[1], weights, formulas[1], shape)
    _checks.check_result(op, "(N, Lq, heads*channels)", (batch, queries, heads * channels), itemsize)
    of_reference = 0, 0
    if reference is not None:
        of_reference = _check_reference(op, reference, batch, queries, len(levels))
    samples, level = sum(points), np.repeat(np.arange(len(levels)), points)
    table = SampleTable(levels, level)
    if of_reference[1] == 4:
        table.divisor = np.repeat(np.array(points, np.float64), points) * np.ones((2, 1))
    middle_of_pixel = -0.5 if METHODS[method] == DISCRETE else 0.5
    numbers = GatherGeometry(
        batch=batch,
        queries=queries,
        groups=heads,
        channels=channels,
        pixels=value[1],
        samples=samples,
        rule=METHODS[method],
        location_groups=heads,
        number_steps=(queries * heads * samples * 2, heads * samples * 2, samples * 2),
        weight_steps=(queries * heads * samples, heads * samples, samples),
        first_weight=0,
        out_w=1,
        start=(0, 0),
        stride=(0, 0),
        back=(middle_of_pixel, middle_of_pixel),
        reference_levels=of_reference[0],
        reference_numbers=of_reference[1],
        offset_scale=offset_scale,
    )
    return Gather(numbers, table)


def _check_value(
    op: str, name: str, shape: Any, formula: str, levels: Sequence[tuple[int, int]], itemsize: int
) -> tuple[int, int, int]:
    """Images, groups and channels of each; the groups are the third axis, if there are four."""
    _checks.check_ndim(op, name, shape, formula, formula.count(",") + 1)
    pixels = sum(h * w for h, w in levels)
    expected = (shape[0], pixels, *shape[2:])
    _checks.check_shape(op, name, shape, formula.replace("S", "S = sum of h*w", 1), expected)
    if min(shape[2:]) < 1:
        raise ValueError(f"{op}: {name} must have no axis of length 0 after the second, got shape {tuple(shape)}")
    _check_counts(op, name, pixels, math.prod(shape[2:]))
    farthest = FARTHEST["float64" if itemsize == 8 else "float32"]
    longest = max(max(level) for level in levels)
    if longest > farthest:
        raise ValueError(f"{op}: a map must have at most {farthest} rows and columns, got {longest}")
    batch, _, *rest = shape
    return (batch, *rest) if len(rest) == 2 else (batch, 1, rest[0])


def _check_counts(op: str, name: str, pixels: int, channels: int) -> None:
    """Kernels count both in 32 bits."""
    for count, what in ((pixels, "pixels in an image"), (channels, "channels in all")):
        if count > _checks.MOST:
            raise ValueError(f"{op}: {name} must have at most {_checks.MOST} {what}, got {count}")


def _check_reference(op: str, shape: Any, batch: int, queries: int, levels: int) -> tuple[int, int]:
    """Its levels and numbers."""
    formula = "(N, Lq, 1 or L, 2 or 4)"
    _checks.check_ndim(op, "reference_points", shape, formula, 4)
    if shape[:2] != (batch, queries) or shape[2] not in (1, levels) or shape[3] not in (2, 4):
        expected = f"({batch}, {queries}, {'1' if levels == 1 else f'1 or {levels}'}, 2 or 4)"
        raise ValueError(f"{op}: reference_points must have shape {formula} = {expected}, got {tuple(shape)}")
    return shape[2], shape[3]


# Aggregation ----------------------------------------------------------------------------------------------------------


def aggregation_geometry(op: str, arrays: dict[str, Any], spatial_shapes: Any) -> Gather:
    formula = "(cameras, scales, 2)"
    rows = [_rows(op, list(row), formula) for row in _rows(op, spatial_shapes, formula)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{op}: spatial_shapes must have shape {formula}, got {_checks.shown(spatial_shapes)}")
    levels = tuple(_size(op, size, formula, rows) for row in rows for size in row)
    shapes = (tuple(map(int, arrays[name].shape)) for name in ("features", "sampling_locations", "weights"))
    return _aggregation(op, arrays["features"].dtype.itemsize, levels, len(rows), *shapes)


@functools.lru_cache(maxsize=256)
def _aggregation(
    op: str,
    itemsize: int,
    levels: tuple[tuple[int, int], ...],
    cameras: int,
    features: Any,
    locations: Any,
    weights: Any,
) -> Gather:
    """Of shapes."""
    scales = len(levels) // cameras
    batch, _, channels = _check_value(op, "features", features, "(B, S, C)", levels, itemsize)
    formulas = "(B, anchors, points, cameras, 2)", "(B, anchors, points, cameras, scales, groups)"
    _checks.check_ndim(op, "sampling_locations", locations, formulas[0], 5)
    _checks.check_ndim(op, "weights", weights, formulas[1], 6)
    _, anchors, points, *_ = locations
    groups = weights[5]
    _checks.check_shape(op, "sampling_locations", locations, formulas[0], (batch, anchors, points, cameras, 2))
    _checks.check_shape(op, "weights", weights, formulas[1], (batch, anchors, points, cameras, scales, groups))
    if points < 1 or groups < 1 or channels % groups:
        raise ValueError(
            f"{op}: weights must have shape {formulas[1]} with at least one point, and groups a divisor of "
            f"C = {channels}, got {tuple(weights)}"
        )
    _checks.check_result(op, "(B, anchors, C)", (batch, anchors, channels), itemsize)
    places = points * cameras
    samples = places * scales
    place, scale = np.divmod(np.arange(samples), scales)
    table = SampleTable(
        levels,
        place % cameras * scales + scale,
        number=2 * place,
        weight=np.arange(samples) * groups,
    )
    numbers = GatherGeometry(
        batch=batch,
        queries=anchors,
        groups=groups,
        channels=channels // groups,
        pixels=features[1],
        samples=samples,
        rule=BILINEAR_INSIDE,
        location_groups=1,
        number_steps=(anchors * places * 2, places * 2, 0),
        weight_steps=(anchors * samples * groups, samples * groups, 1),
        first_weight=0,
        out_w=1,
        start=(0, 0),
        stride=(0, 0),
        back=(0.5, 0.5),
        reference_levels=0,
        reference_numbers=0,
        offset_scale=0.0,
    )
    return Gather(numbers, table)


# DCNv3 and DCNv4 ------------------------------------------------------------------------------------------------------


def dcn_geometry(
    op: str,
    arrays: dict[str, Any],
    check: Callable[..., None],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    offset_scale: Any,
    remove_center: Any,
    packed: bool,
) -> Gather:
    """`check(op, arrays, positions, groups, points)` sees the shapes of what is beside the input; `positions` are
    (N, out_h, out_w)."""
    input = arrays["input"]
    _checks.check_ndim(op, "input", input.shape, "(N, H, W, C)", 4)
    kernel = _checks.per_axis(op, "kernel_size", kernel_size, 2, 1)
    strides = _checks.per_axis(op, "stride", stride, 2, 1)
    dilations = _checks.per_axis(op, "dilation", dilation, 2, 1)
    (count,) = _checks.per_axis(op, "groups", groups, 1, 1)
    scale = _checks.number(op, "offset_scale", offset_scale, dtype=input.dtype)
    batch, height, width, channels = map(int, input.shape)
    pads = _checks.padding_pairs(op, padding, (height, width), kernel, strides, dilations)
    g = _dcn(
        op,
        input.dtype.itemsize,
        (batch, height, width, channels),
        kernel,
        strides,
        pads,
        dilations,
        count,
        scale,
        _checks.flag(op, "remove_center", remove_center),
        packed,
    )
    out_h = g.numbers.queries // g.numbers.out_w
    check(op, arrays, (batch, out_h, g.numbers.out_w), count, g.numbers.samples)
    return g


@functools.lru_cache(maxsize=256)
def _dcn(
    op: str,
    itemsize: int,
    input: tuple[int, int, int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    packed: bool,
) -> Gather:
    """Of shapes and checked options."""
    batch, *size, channels = input
    if min(*size, channels) < 1:
        raise ValueError(f"{op}: input must have at least one channel and one pixel, got shape {input}")
    if channels % groups:
        raise ValueError(f"{op}: groups must divide the {channels} channels of input, got {groups}")
    if remove_center and not (kernel[0] == kernel[1] and kernel[0] % 2):
        raise ValueError(f"{op}: remove_center needs a square kernel of odd size, got kernel_size {kernel}")
    points = math.prod(kernel) - remove_center
    if points < 1:
        raise ValueError(f"{op}: remove_center must leave a point, got kernel_size {kernel}")
    padded = tuple(n + before + after for n, (before, after) in zip(size, pads, strict=True))
    reach = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    out = tuple((n - r - 1) // s + 1 for n, r, s in zip(padded, reach, stride, strict=True))
    if min(out) < 1:
        dilated = tuple(r + 1 for r in reach)
        raise ValueError(
            f"{op}: input must be at least as large as the dilated kernel, {dilated}, got {padded} with padding"
        )
    _check_counts(op, "input", math.prod(size), channels)
    _check_padded(op, padded, itemsize)
    _checks.check_result(op, "(N, out_h, out_w, C)", (batch, *out, channels), itemsize)
    # Column by column, as the authors count.
    taps = [(y, x) for x in range(kernel[1]) for y in range(kernel[0])]
    if remove_center:
        taps.remove((kernel[0] // 2, kernel[1] // 2))
    table = SampleTable(
        [(size[0], size[1])],
        np.zeros(points),
        shift=np.array(taps, np.float64).T * np.array(dilation).reshape(2, 1),
        scale=np.full((2, points), offset_scale),
    )
    half = tuple(r // 2 for r in reach)
    numbers_of_group = points * (3 if packed else 2)
    of_query = packed_row(groups, points) if packed else groups * points * 2
    queries = math.prod(out)
    numbers = GatherGeometry(
        batch=batch,
        queries=queries,
        groups=groups,
        channels=channels // groups,
        pixels=math.prod(size),
        samples=points,
        rule=BILINEAR,
        location_groups=groups,
        number_steps=(queries * of_query, of_query, numbers_of_group),
        weight_steps=(
            (queries * of_query, of_query, numbers_of_group)
            if packed
            else (queries * groups * points, groups * points, points)
        ),
        first_weight=2 * points if packed else 0,
        out_w=out[1],
        start=(half[0] - pads[0][0], half[1] - pads[1][0]),
        stride=(stride[0], stride[1]),
        back=(half[0] * offset_scale, half[1] * offset_scale),
        reference_levels=0,
        reference_numbers=0,
        offset_scale=0.0,
    )
    return Gather(numbers, table)


def _check_padded(op: str, padded: Sequence[int], itemsize: int) -> None:
    farthest = FARTHEST["float64" if itemsize == 8 else "float32"]
    if max(padded) > farthest:
        raise ValueError(
            f"{op}: input must have at most {farthest} rows and columns with padding, got {tuple(padded)} of them"
        )


def packed_row(groups: int, points: int) -> int:
    """Numbers of a query in DCNv4's packed tensor: offsets and masks of all groups, and what fills the last eight."""
    return -(-groups * points * 3 // 8) * 8

"""Sizes of one convolution, computed once and handed to every kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydeform import _checks

BOUNDARIES = ("torchvision", "dcnv2", "dcnv1")
# How far from pixel 0 a deformable tap may be before its offset moves it: what is added to must be exact.
FARTHEST = {"float32": 2**24, "float64": _checks.MOST}
# What errors call the sizes of an input and its axes, and what follows the name of each axis's number, by their count.
SIZES = {1: "L", 2: "H, W", 3: "D, H, W"}
COORDINATES = {1: "x", 2: "yx", 3: "dyx"}
ENDINGS = {1: ("",), 2: ("_h", "_w"), 3: ("_d", "_h", "_w")}


class ConvGeometry(NamedTuple):
    """Every integer a convolution kernel needs, in tuples one for each axis. `boundary`: an index into BOUNDARIES."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    offset_groups: int
    boundary: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]  # before the image; what follows it shows only in out_size
    dilation: tuple[int, ...]


class ConvArrays(NamedTuple):
    """What a convolution is of. No offset: taps do not move; one of one axis is that of all images and positions."""

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def conv_geometry(
    op: str,
    axes: int,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    *,
    groups: int | None = None,
    offset: Any = None,
    positions: Any = None,
    mask: Any = None,
    boundary: str = "torchvision",
) -> ConvGeometry:
    """Check every shape and option of a convolution over `axes` axes. `groups` None: inferred from the weight."""
    shapes = [None if array is None else array.shape for array in (input, weight, bias, offset, positions, mask)]
    options = (stride, padding, dilation, groups, boundary)
    # A call like one before, as nearly all are, need not be checked again.
    checked = _conv_geometry if _checks.is_plain(options) else _conv_geometry.__wrapped__
    return checked(op, axes, input.dtype.itemsize, *shapes, *options)


@functools.lru_cache(maxsize=256)
def _conv_geometry(
    op: str,
    axes: int,
    itemsize: int,
    input: Any,
    weight: Any,
    bias: Any,
    offset: Any,
    positions: Any,
    mask: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int | None,
    boundary: str,
) -> ConvGeometry:
    """Of shapes."""
    weight_formula = f"(O, C/groups, {named('kernel', axes)})"
    _checks.check_ndim(op, "input", input, f"(N, C, {SIZES[axes]})", 2 + axes)
    _checks.check_ndim(op, "weight", weight, weight_formula, 2 + axes)
    batch, in_channels, *in_size = map(int, input)
    out_channels, _, *kernel = map(int, weight)
    if min(in_channels, *in_size) < 1:
        raise ValueError(f"{op}: input must have at least one channel and one pixel, got shape {tuple(input)}")
    if min(weight) < 1:
        raise ValueError(f"{op}: weight must have no axis of length 0, got shape {tuple(weight)}")
    _checks.check_choice(op, "boundary", boundary, BOUNDARIES)
    groups = _groups(op, groups, in_channels, weight, weight_formula)
    if bias is not None:
        _checks.check_shape(op, "bias", bias, "(O,)", (out_channels,))

    strides = _checks.per_axis(op, "stride", stride, axes, 1)
    dilations = _checks.per_axis(op, "dilation", dilation, axes, 1)
    padding = _checks.padding_pairs(op, padding, in_size, kernel, strides, dilations)
    padded = tuple(size + before + after for size, (before, after) in zip(in_size, padding, strict=True))
    dilated = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    out_size = tuple((size - d) // s + 1 for size, d, s in zip(padded, dilated, strides, strict=True))
    if min(out_size) < 1:
        raise ValueError(
            f"{op}: input must be at least as large as the dilated kernel, {dilated}, got {padded} with padding"
        )
    if max(padded) > _checks.MOST:
        raise ValueError(
            f"{op}: input must have at most {_checks.MOST} pixels along an axis with padding, got {padded} of them"
        )
    _checks.check_result(op, f"(N, O, {named('out', axes)})", (batch, out_channels, *out_size), itemsize)
    g = ConvGeometry(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        offset_groups=1,
        boundary=BOUNDARIES.index(boundary),
        in_size=tuple(in_size),
        out_size=out_size,
        kernel=tuple(kernel),
        stride=strides,
        pad=tuple(before for before, _ in padding),
        dilation=dilations,
    )
    if offset is None and positions is None:
        return g
    _check_taps(op, g, itemsize)
    return _with_positions(op, g, positions) if offset is None else _with_offset(op, g, offset, mask)


def _groups(op: str, groups: int | None, in_channels: int, weight: Any, formula: str) -> int:
    out_channels, group_channels, *kernel = map(int, weight)
    if groups is None:
        if in_channels % group_channels:
            raise ValueError(
                f"{op}: weight must have shape {formula} with C = {in_channels} "
                f"a multiple of its second axis, got {tuple(weight)}"
            )
        groups = in_channels // group_channels
    else:
        if in_channels % groups:
            raise ValueError(f"{op}: groups must divide the {in_channels} channels of input, got {groups}")
        _checks.check_shape(op, "weight", weight, formula, (out_channels, in_channels // groups, *kernel))
    if out_channels % groups:
        raise ValueError(
            f"{op}: weight must have shape {formula} with O a multiple of groups = {groups}, got {tuple(weight)}"
        )
    return groups


def _with_offset(op: str, g: ConvGeometry, offset: Any, mask: Any) -> ConvGeometry:
    """Its offset groups, once the shapes of offset and mask are checked."""
    axes, taps = len(g.kernel), math.prod(g.kernel)
    kernel = named("kernel", axes).replace(", ", "*")
    mask_formula = f"(N, offset_groups*{kernel}, {named('out', axes)})"
    formula = mask_formula if axes == 1 else mask_formula.replace("N, ", f"N, {axes}*")
    _checks.check_ndim(op, "offset", offset, formula, 2 + axes)
    offset_groups = max(int(offset[1]) // (axes * taps), 1)
    _checks.check_shape(op, "offset", offset, formula, (g.batch, axes * offset_groups * taps, *g.out_size))
    _check_offset_groups(op, "offset", "offset_groups", g, formula, offset, offset_groups)
    if mask is not None:
        _checks.check_shape(op, "mask", mask, mask_formula, (g.batch, offset_groups * taps, *g.out_size))
    return g._replace(offset_groups=offset_groups)


def _with_positions(op: str, g: ConvGeometry, positions: Any) -> ConvGeometry:
    """The same of an offset that all output positions share."""
    axes, taps = len(g.kernel), math.prod(g.kernel)
    formula = f"({axes}*groups_of_positions*{named('kernel', axes).replace(', ', '*')},)"
    _checks.check_ndim(op, "positions", positions, formula, 1)
    groups = max(int(positions[0]) // (axes * taps), 1)
    _checks.check_shape(op, "positions", positions, formula, (axes * groups * taps,))
    _check_offset_groups(op, "positions", "groups_of_positions", g, formula, positions, groups)
    return g._replace(offset_groups=groups)


def _check_offset_groups(
    op: str, name: str, groups_name: str, g: ConvGeometry, formula: str, shape: Any, groups: int
) -> None:
    if g.in_channels % groups:
        raise ValueError(
            f"{op}: {name} must have shape {formula} with {groups_name} a divisor of C = {g.in_channels}, "
            f"got {tuple(shape)}, which has {groups_name} = {groups}"
        )


def named(what: str, axes: int) -> str:
    return ", ".join(what + ending for ending in ENDINGS[axes])


def _check_taps(op: str, g: ConvGeometry, itemsize: int) -> None:
    ends = [
        (out - 1) * s + (k - 1) * d for out, s, k, d in zip(g.out_size, g.stride, g.kernel, g.dilation, strict=True)
    ]
    check_taps(op, g.pad, ends, itemsize)


def check_taps(op: str, before: Sequence[int], ends: Sequence[int], itemsize: int) -> None:
    """Coordinates can tell where all taps are. `before`: padding; `ends`: from the first tap to the last, each axis."""
    coordinate = "float64" if itemsize == 8 else "float32"
    farthest = FARTHEST[coordinate]
    for axis, pad, end in zip(COORDINATES[len(ends)], before, ends, strict=True):
        if pad > farthest or end - pad > farthest:
            raise ValueError(
                f"{op}: taps must be within {farthest} pixels of the first one, as far as {coordinate} coordinates are "
                f"exact, got {axis} from {-pad} to {end - pad}"
            )


def check_grad_output(op: str, grad_output: Any, g: ConvGeometry) -> None:
    expected = (g.batch, g.out_channels, *g.out_size)
    _checks.check_shape(op, "grad_output", grad_output.shape, f"(N, O, {named('out', len(g.out_size))})", expected)

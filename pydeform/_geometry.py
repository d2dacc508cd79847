"""Sizes of one convolution, computed once and handed to every kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydeform import _checks

BOUNDARIES = ("torchvision", "dcnv2", "dcnv1")
# How far from pixel 0 a deformable tap may be before its offset moves it: what is added to must be exact.
FARTHEST = {"float32": 2**24, "float64": _checks.MOST}


class Conv2dGeometry(NamedTuple):
    """Every integer a convolution kernel needs. `boundary` is an index into BOUNDARIES."""

    batch: int
    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int  # before the image; what follows it shows only in out_h and out_w
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    offset_groups: int
    boundary: int


def conv2d_geometry(
    op: str,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    *,
    groups: int | None = None,
    offset: Any = None,
    mask: Any = None,
    boundary: str = "torchvision",
) -> Conv2dGeometry:
    """Check every shape and option of a 2-D convolution. `groups` None: inferred from the weight."""
    shapes = [None if array is None else array.shape for array in (input, weight, bias, offset, mask)]
    options = (stride, padding, dilation, groups, boundary)
    # A call like one before, as nearly all are, need not be checked again.
    checked = _conv2d_geometry if _checks.is_plain(options) else _conv2d_geometry.__wrapped__
    return checked(op, input.dtype.itemsize, *shapes, *options)


@functools.lru_cache(maxsize=256)
def _conv2d_geometry(
    op: str,
    itemsize: int,
    input: Any,
    weight: Any,
    bias: Any,
    offset: Any,
    mask: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int | None,
    boundary: str,
) -> Conv2dGeometry:
    """Of shapes."""
    _checks.check_ndim(op, "input", input, "(N, C, H, W)", 4)
    _checks.check_ndim(op, "weight", weight, "(O, C/groups, kernel_h, kernel_w)", 4)
    batch, in_channels, in_h, in_w = map(int, input)
    out_channels, group_channels, kernel_h, kernel_w = map(int, weight)
    if min(in_channels, in_h, in_w) < 1:
        raise ValueError(f"{op}: input must have at least one channel and one pixel, got shape {tuple(input)}")
    if min(weight) < 1:
        raise ValueError(f"{op}: weight must have no axis of length 0, got shape {tuple(weight)}")
    _checks.check_choice(op, "boundary", boundary, BOUNDARIES)

    if groups is None:
        if in_channels % group_channels:
            raise ValueError(
                f"{op}: weight must have shape (O, C/groups, kernel_h, kernel_w) with C = {in_channels} "
                f"a multiple of its second axis, got {tuple(weight)}"
            )
        groups = in_channels // group_channels
    else:
        if in_channels % groups:
            raise ValueError(f"{op}: groups must divide the {in_channels} channels of input, got {groups}")
        _checks.check_shape(
            op,
            "weight",
            weight,
            "(O, C/groups, kernel_h, kernel_w)",
            (out_channels, in_channels // groups, kernel_h, kernel_w),
        )
    if out_channels % groups:
        raise ValueError(
            f"{op}: weight must have shape (O, C/groups, kernel_h, kernel_w) with O a multiple of "
            f"groups = {groups}, got {tuple(weight)}"
        )
    if bias is not None:
        _checks.check_shape(op, "bias", bias, "(O,)", (out_channels,))

    stride_h, stride_w = _checks.per_axis(op, "stride", stride, 2, 1)
    dilation_h, dilation_w = _checks.per_axis(op, "dilation", dilation, 2, 1)
    (pad_h, after_h), (pad_w, after_w) = _checks.padding_pairs(
        op, padding, (in_h, in_w), (kernel_h, kernel_w), (stride_h, stride_w), (dilation_h, dilation_w)
    )
    out_h = (in_h + pad_h + after_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    out_w = (in_w + pad_w + after_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    if min(out_h, out_w) < 1:
        raise ValueError(
            f"{op}: input must be at least as large as the dilated kernel, "
            f"({dilation_h * (kernel_h - 1) + 1}, {dilation_w * (kernel_w - 1) + 1}), "
            f"got ({in_h + pad_h + after_h}, {in_w + pad_w + after_w}) with padding"
        )

    padded = (in_h + pad_h + after_h, in_w + pad_w + after_w)
    if max(padded) > _checks.MOST:
        raise ValueError(
            f"{op}: input must have at most {_checks.MOST} rows and columns with padding, got {padded} of them"
        )
    _checks.check_result(op, "(N, O, out_h, out_w)", (batch, out_channels, out_h, out_w), itemsize)

    offset_groups = 1
    if offset is not None:
        ends = [
            (out_h - 1) * stride_h + (kernel_h - 1) * dilation_h,
            (out_w - 1) * stride_w + (kernel_w - 1) * dilation_w,
        ]
        check_taps(op, (pad_h, pad_w), ends, itemsize)
        taps = kernel_h * kernel_w
        formula = "(N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w)"
        mask_formula = "(N, offset_groups*kernel_h*kernel_w, out_h, out_w)"
        _checks.check_ndim(op, "offset", offset, formula, 4)
        offset_groups = max(int(offset[1]) // (2 * taps), 1)
        _checks.check_shape(op, "offset", offset, formula, (batch, 2 * offset_groups * taps, out_h, out_w))
        if in_channels % offset_groups:
            raise ValueError(
                f"{op}: offset must have shape {formula} with offset_groups a divisor of C = {in_channels}, "
                f"got {tuple(offset)}, which has offset_groups = {offset_groups}"
            )
        if mask is not None:
            _checks.check_shape(op, "mask", mask, mask_formula, (batch, offset_groups * taps, out_h, out_w))
    return Conv2dGeometry(
        batch=batch,
        in_channels=in_channels,
        in_h=in_h,
        in_w=in_w,
        out_channels=out_channels,
        out_h=out_h,
        out_w=out_w,
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        stride_h=stride_h,
        stride_w=stride_w,
        pad_h=pad_h,
        pad_w=pad_w,
        dilation_h=dilation_h,
        dilation_w=dilation_w,
        groups=groups,
        offset_groups=offset_groups,
        boundary=BOUNDARIES.index(boundary),
    )


def check_taps(op: str, before: Sequence[int], ends: Sequence[int], itemsize: int) -> None:
    """Coordinates can tell where all taps are. `before`: padding; `ends`: from the first tap to the last, each axis."""
    coordinate = "float64" if itemsize == 8 else "float32"
    farthest = FARTHEST[coordinate]
    for axis, pad, end in zip("yx", before, ends, strict=True):
        if pad > farthest or end - pad > farthest:
            raise ValueError(
                f"{op}: taps must be within {farthest} pixels of the first one, as far as {coordinate} coordinates are "
                f"exact, got {axis} from {-pad} to {end - pad}"
            )


def check_grad_output(op: str, grad_output: Any, g: Conv2dGeometry) -> None:
    _checks.check_shape(
        op, "grad_output", grad_output.shape, "(N, O, out_h, out_w)", (g.batch, g.out_channels, g.out_h, g.out_w)
    )

"""How boxes become bins and samples: the sizes of one call, and the rules in which the systems differ.

Everything is the same on both axes and, unless boxes are turned, separable: a bin reads the product of the rows that
its y axis names and the columns that its x axis names. The twins turn (box, bin) into those in one place each,
`cpu/roi/bins.py` and `cuda/roi/bins.cuh`, where every rule below is one line of the same name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pydeform import _checks

EXACT, AFTER_SCALE, BEFORE_SCALE = 0, 1, 2  # when the corners of a box are rounded, half away from zero
NO_LEAST_SIZE = -math.inf


class Rules(NamedTuple):
    """What one system does. A bool is an int here and a number always a float, as compiled kernels take them."""

    rounding: int  # EXACT: x * scale; AFTER_SCALE: round(x * scale); BEFORE_SCALE: round(x) * scale
    last_pixel: int  # 1: x2 and y2 name the last pixel of a box, which ends one further; added right after rounding
    half_pixel: int  # 1: the pixel grid starts at -1/2, so half a pixel is subtracted from both corners
    least_size: float  # of a scaled box, each axis
    points: int  # 1: a bin reads points between pixels; 0: whole pixels
    is_max: int  # 1: largest of what a bin reads; 0: mean
    # Of points. A bin has n on each axis; point i lies at (i + first_point) / n of the bin.
    first_point: float
    reach: float  # a point counts from -reach to size - 1 + reach, both included, and reads the nearest pixel there
    count_inside: int  # 1: the mean is over the points that count; 0: over all
    flat_at_pixels: int  # 1: the derivative at an integer is 0; 0: the one from the right, but 0 at the first and last
    least_count: int  # 1: a mean is over one point at least, so a bin without points is 0; 0: that is 0/0, NaN
    # Of whole pixels: from floor(start of the bin) to ceil(its end), without that one, within the image.
    unread_pixels: int  # rows and columns at the end of the image that no bin reads
    bins_from_box: int  # 1: floor and ceil are taken before the start of the box is added
    # Of neither (`points` is 0).
    surface: int = 0  # 1: a bin reads all of the bilinear surface in it, and the mean is exact
    # 0: a box is two of its corners. Else its centre, size and angle, and points are not separable: the box is turned,
    # as seen in the image, counterclockwise (1) or clockwise (-1) by a positive angle.
    turn: int = 0


# torchvision's csrc/ops/{cpu,cuda}/roi_pool_kernel; the same in MXNet's ROIPooling and mmcv's roi_pool.
ROI_POOL = Rules(
    rounding=AFTER_SCALE,
    last_pixel=1,
    half_pixel=0,
    least_size=1.0,
    points=0,
    is_max=1,
    first_point=0.0,
    reach=0.0,
    count_inside=0,
    flat_at_pixels=0,
    least_count=1,
    unread_pixels=0,
    bins_from_box=1,
)
PS_ROI_POOL = {
    # torchvision's csrc/ops/{cpu,cuda}/ps_roi_pool_kernel, its forward: bins end at H - 1 and W - 1.
    "torchvision": ROI_POOL._replace(last_pixel=0, is_max=0, unread_pixels=1),
    # R-FCN's and MXNet's PSROIPooling; the same in Paddle and OpenVINO.
    "rfcn": ROI_POOL._replace(rounding=BEFORE_SCALE, least_size=0.1, is_max=0, bins_from_box=0),
}
# torchvision's csrc/ops/{cpu,cuda}/roi_align_kernel; the same in mmcv (which has the maximum too) and MXNet.
ROI_ALIGN = Rules(
    rounding=EXACT,
    last_pixel=0,
    half_pixel=0,
    least_size=1.0,
    points=1,
    is_max=0,
    first_point=0.5,
    reach=1.0,
    count_inside=0,
    flat_at_pixels=0,
    least_count=1,
    unread_pixels=0,
    bins_from_box=0,
)
ROI_ALIGN_ALIGNED = ROI_ALIGN._replace(half_pixel=1, least_size=NO_LEAST_SIZE)
# mmcv's ops/csrc/common/cuda/roi_align_rotated_cuda_kernel.cuh, by `aligned` and `clockwise`.
ROI_ALIGN_ROTATED = {
    (aligned, clockwise): rules._replace(turn=-1 if clockwise else 1)
    for aligned, rules in ((False, ROI_ALIGN), (True, ROI_ALIGN_ALIGNED))
    for clockwise in (False, True)
}
PS_ROI_ALIGN = ROI_ALIGN_ALIGNED._replace(least_count=0)  # torchvision's csrc/ops/{cpu,cuda}/ps_roi_align_kernel
# Precise RoI pooling, arXiv:1807.11590; mmcv's ops/csrc/common/cuda/prroi_pool_cuda_kernel.cuh.
PRROI_POOL = ROI_ALIGN._replace(least_size=NO_LEAST_SIZE, points=0, surface=1)
DEFORM_ROI_POOL = ROI_ALIGN_ALIGNED  # mmcv's ops/csrc/common/cuda/deform_roi_pool_cuda_kernel.cuh
# MXNet's contrib/deformable_psroi_pooling, the first paper's own; the same in DCNv2Pooling and OpenVINO.
DEFORM_PSROI_POOL = Rules(
    rounding=BEFORE_SCALE,
    last_pixel=1,
    half_pixel=1,
    least_size=0.1,
    points=1,
    is_max=0,
    first_point=0.0,
    reach=0.5,
    count_inside=1,
    flat_at_pixels=1,
    least_count=1,
    unread_pixels=0,
    bins_from_box=0,
)


class RoiArrays(NamedTuple):
    """What is pooled, in which boxes, and what moves and scales bins, which may be absent."""

    input: Any
    boxes: Any
    offset: Any
    mask: Any


class RoiGeometry(NamedTuple):
    """Every number an RoI kernel needs, integers and floats. The last fields are those of `Rules`."""

    batch: int
    in_channels: int
    in_h: int
    in_w: int
    boxes: int
    out_channels: int
    pooled_h: int
    pooled_w: int
    group_h: int  # bin (py, px) of output channel c reads input channel (c*group_h + gy)*group_w + gx,
    group_w: int  # gy = py*group_h // pooled_h, gx likewise
    samples: int  # points of a bin on each axis; 0: as many as the bin is long, rounded up
    part_h: int  # cells of the offset: bin (py, px) is moved by cell (py*part_h // pooled_h, px*part_w // pooled_w)
    part_w: int
    classes: int  # consecutive output channels share an offset: class = c // (out_channels // classes)
    spatial_scale: float
    offset_scale: float  # an offset of 1 moves a bin by so many times the size of its box
    rounding: int
    last_pixel: int
    half_pixel: int
    least_size: float
    points: int
    is_max: int
    first_point: float
    reach: float
    count_inside: int
    flat_at_pixels: int
    least_count: int
    unread_pixels: int
    bins_from_box: int
    surface: int
    turn: int


def roi_geometry(
    op: str,
    input: Any,
    boxes: Any,
    rules: Rules,
    pooled: tuple[int, int],
    spatial_scale: Any,
    *,
    samples: int = 0,
    group: tuple[int, int] = (1, 1),
    output_dim: int | None = None,
    offset_name: str = "offset",
    offset: Any = None,
    part: tuple[int, int] | None = None,
    offset_scale: float = 0.0,
    classes: int | None = 1,
    mask: Any = None,
) -> RoiGeometry:
    """Check every shape and number of an RoI operator.

    `output_dim` None: as many outputs as there are groups of group_h*group_w channels. `classes` None: inferred from
    the offset.
    """
    _checks.check_ndim(op, "input", input.shape, "(N, C, H, W)", 4)
    batch, in_channels, in_h, in_w = map(int, input.shape)
    if min(in_channels, in_h, in_w) < 1:
        raise ValueError(f"{op}: input must have at least one channel and one pixel, got shape {tuple(input.shape)}")
    columns = ("batch index", "cx", "cy", "w", "h", "theta") if rules.turn else ("batch index", "x1", "y1", "x2", "y2")
    if boxes.ndim != 2 or boxes.shape[1] != len(columns):
        raise ValueError(
            f"{op}: boxes must have shape (R, {len(columns)}), rows [{', '.join(columns)}], got {tuple(boxes.shape)}"
        )
    count = int(boxes.shape[0])
    cells = group[0] * group[1]
    if output_dim is not None:
        formula = "(N, output_dim*group_size**2, H, W)"
        _checks.check_shape(op, "input", input.shape, formula, (batch, output_dim * cells, in_h, in_w))
    elif in_channels % cells:
        raise ValueError(
            f"{op}: input must have shape (N, C, H, W) with C a multiple of output_h*output_w = {cells}, "
            f"got {tuple(input.shape)}"
        )
    out_channels = in_channels // cells
    if pooled[0] * pooled[1] > _checks.MOST:
        raise ValueError(f"{op}: a box must have at most {_checks.MOST} bins, got {pooled[0]} * {pooled[1]}")
    _checks.check_result(op, "(R, C, pooled_h, pooled_w)", (count, out_channels, *pooled), input.dtype.itemsize)
    part = pooled if part is None else part
    if offset is not None:
        classes = _check_offset(op, offset_name, offset, count, part, classes, out_channels)
    if mask is not None:
        _checks.check_shape(op, "mask", mask.shape, "(R, 1, pooled_h, pooled_w)", (count, 1, *pooled))
    return RoiGeometry(
        batch=batch,
        in_channels=in_channels,
        in_h=in_h,
        in_w=in_w,
        boxes=count,
        out_channels=out_channels,
        pooled_h=pooled[0],
        pooled_w=pooled[1],
        group_h=group[0],
        group_w=group[1],
        samples=max(samples, 0),
        part_h=part[0],
        part_w=part[1],
        classes=classes or 1,
        spatial_scale=_checks.number(op, "spatial_scale", spatial_scale, positive=True, dtype=input.dtype),
        offset_scale=offset_scale,
        **rules._asdict(),
    )


def _check_offset(
    op: str, name: str, offset: Any, count: int, part: tuple[int, int], classes: int | None, out_channels: int
) -> int:
    """The number of classes."""
    if classes is not None:
        _checks.check_shape(op, name, offset.shape, "(R, 2, pooled_h, pooled_w)", (count, 2 * classes, *part))
        return classes
    formula = "(R, 2*classes, part_size, part_size)"
    _checks.check_ndim(op, name, offset.shape, formula, 4)
    classes = max(int(offset.shape[1]) // 2, 1)
    _checks.check_shape(op, name, offset.shape, formula, (count, 2 * classes, *part))
    if out_channels % classes:
        raise ValueError(
            f"{op}: {name} must have shape {formula} with classes a divisor of output_dim = {out_channels}, "
            f"got {tuple(offset.shape)}, which has classes = {classes}"
        )
    return classes


def check_grad_output(op: str, grad_output: Any, g: RoiGeometry) -> None:
    _checks.check_shape(
        op,
        "grad_output",
        grad_output.shape,
        "(R, C, pooled_h, pooled_w)",
        (g.boxes, g.out_channels, g.pooled_h, g.pooled_w),
    )

"""Problems of the RoI operators on which the tests agree, named. No two sizes alike where the case allows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.reference import roi as reference

# Kinds of boxes. Each stands for the one or two boxes that `_boxes` makes of it.
INSIDE = ("inside", "inside", "small", "whole")
AWKWARD = ("across", "outside", "inverted", "empty", "last")
ALL_KINDS = (*INSIDE, *AWKWARD, "halves")


class Case(NamedTuple):
    operator: str
    options: dict[str, Any]  # every argument that is not an array
    channels: int = 3  # of the output
    in_h: int = 7
    in_w: int = 9
    batch: int = 3
    boxes: tuple[str, ...] = ALL_KINDS
    classes: int = 0  # of the offset; 0: there is no offset
    mask: bool = False
    reach: int = 2  # offsets go this far each way
    draw: int = 0  # chooses the numbers, so that no coordinate comes near to where something changes

    @property
    def pooled(self) -> tuple[int, int]:
        return _pair(self.options["pooled_size" if self.operator == "deform_psroi_pool" else "output_size"])

    @property
    def in_channels(self) -> int:
        if self.operator.startswith("ps_"):
            return self.channels * math.prod(self.pooled)
        return self.channels * self.options.get("group_size", 1) ** 2

    @property
    def offset_size(self) -> tuple[int, int]:
        return _pair(self.options.get("part_size") or self.pooled)

    @property
    def spatial_scale(self) -> float:
        return self.options.get("spatial_scale", 1.0)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _psroi(pooled_size: int, channels: int = 3, *, classes: int = 0, mask: bool = False, **rest: Any) -> Case:
    """output_dim is the number of channels; sizes of the case go by its fields' names, all else are options."""
    fields = {name: rest.pop(name) for name in Case._fields if name in rest}
    options = {"output_dim": channels, "pooled_size": pooled_size, **rest}
    return Case("deform_psroi_pool", options, channels, classes=classes, mask=mask, **fields)


CASES = {
    "roi_pool": Case("roi_pool", {"output_size": (4, 2), "spatial_scale": 0.5}, 5),
    "roi_pool_7": Case("roi_pool", {"output_size": 7, "spatial_scale": 0.25}, 2, 11, 13),
    "roi_pool_thirds": Case("roi_pool", {"output_size": (3, 5), "spatial_scale": 0.3}),
    "roi_pool_channels": Case("roi_pool", {"output_size": (2, 1)}, 70, boxes=(*INSIDE, "across", "outside")),
    "roi_pool_one_pixel": Case("roi_pool", {"output_size": (2, 3)}, 2, 1, 1, 2),
    "roi_pool_0_boxes": Case("roi_pool", {"output_size": (2, 3)}, boxes=()),
    "roi_pool_batch_0": Case("roi_pool", {"output_size": (2, 3)}, batch=0, boxes=()),
    "roi_align": Case("roi_align", {"output_size": (2, 4), "spatial_scale": 0.5, "sampling_ratio": 2}, 5),
    "roi_align_aligned": Case(
        "roi_align", {"output_size": (3, 5), "spatial_scale": 0.3, "sampling_ratio": 3, "aligned": True}, 4
    ),
    "roi_align_adaptive": Case("roi_align", {"output_size": (2, 1), "spatial_scale": 0.5}),
    "roi_align_adaptive_aligned": Case(
        "roi_align", {"output_size": (3, 2), "spatial_scale": 0.75, "sampling_ratio": 0, "aligned": True}, 2, 9, 12
    ),
    "roi_align_one_point": Case("roi_align", {"output_size": (5, 4), "sampling_ratio": 1, "spatial_scale": 0.25}),
    "roi_align_max": Case(
        "roi_align", {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "mode": "max"}, 4, draw=2
    ),
    "roi_align_max_adaptive": Case(
        "roi_align", {"output_size": (3, 2), "spatial_scale": 0.5, "aligned": True, "mode": "max"}, 4, 8, 11, draw=1
    ),
    "roi_align_channels": Case("roi_align", {"output_size": 2, "sampling_ratio": 2}, 70, boxes=(*INSIDE, "across")),
    "roi_align_max_channels": Case(
        "roi_align", {"output_size": 2, "sampling_ratio": 2, "mode": "max"}, 21, boxes=(*INSIDE, "across")
    ),
    "roi_align_one_pixel": Case("roi_align", {"output_size": (1, 2), "sampling_ratio": 2}, 2, 1, 1, 2),
    "roi_align_0_boxes": Case("roi_align", {"output_size": (2, 3)}, boxes=()),
    "roi_align_batch_0": Case("roi_align", {"output_size": (2, 3), "mode": "max"}, batch=0, boxes=()),
    "ps_roi_pool": Case("ps_roi_pool", {"output_size": (4, 2), "spatial_scale": 0.5}, 2),
    "ps_roi_pool_thirds": Case("ps_roi_pool", {"output_size": (3, 5), "spatial_scale": 0.3}, 2),
    "ps_roi_pool_rfcn": Case("ps_roi_pool", {"output_size": (2, 4), "spatial_scale": 0.25, "convention": "rfcn"}, 2),
    "ps_roi_pool_rfcn_7": Case(
        "ps_roi_pool", {"output_size": 7, "spatial_scale": 0.3, "convention": "rfcn"}, 1, 13, 11
    ),
    "ps_roi_pool_channels": Case("ps_roi_pool", {"output_size": (2, 1)}, 21, boxes=(*INSIDE, "across")),
    "ps_roi_pool_rfcn_channels": Case(
        "ps_roi_pool", {"output_size": 1, "convention": "rfcn"}, 70, boxes=(*INSIDE, "across")
    ),
    "ps_roi_pool_one_pixel": Case("ps_roi_pool", {"output_size": (2, 3)}, 2, 1, 1, 2),
    "ps_roi_pool_rfcn_one_pixel": Case("ps_roi_pool", {"output_size": (2, 3), "convention": "rfcn"}, 2, 1, 1, 2),
    "ps_roi_pool_0_boxes": Case("ps_roi_pool", {"output_size": (2, 3), "convention": "rfcn"}, boxes=()),
    "ps_roi_pool_batch_0": Case("ps_roi_pool", {"output_size": (2, 3)}, batch=0, boxes=()),
    "ps_roi_align": Case("ps_roi_align", {"output_size": (4, 2), "spatial_scale": 0.5, "sampling_ratio": 2}, 2),
    "ps_roi_align_thirds": Case(
        "ps_roi_align", {"output_size": (3, 5), "spatial_scale": 0.3, "sampling_ratio": 3}, 2, draw=2
    ),
    "ps_roi_align_adaptive": Case("ps_roi_align", {"output_size": (2, 3), "spatial_scale": 0.75}, 2, 9, 12),
    "ps_roi_align_channels": Case(
        "ps_roi_align", {"output_size": (1, 2), "sampling_ratio": 2}, 35, boxes=(*INSIDE, "across")
    ),
    "ps_roi_align_one_pixel": Case("ps_roi_align", {"output_size": (2, 3), "sampling_ratio": 2}, 2, 1, 1, 2),
    "ps_roi_align_0_boxes": Case("ps_roi_align", {"output_size": (2, 3)}, boxes=()),
    "ps_roi_align_batch_0": Case("ps_roi_align", {"output_size": (2, 3)}, batch=0, boxes=()),
    "deform_roi_pool": Case(
        "deform_roi_pool", {"output_size": (3, 2), "spatial_scale": 0.5, "sampling_ratio": 2}, 4, classes=1
    ),
    "deform_roi_pool_modulated": Case(
        "deform_roi_pool",
        {"output_size": (2, 5), "spatial_scale": 0.3, "sampling_ratio": 3, "gamma": 0.25},
        classes=1,
        mask=True,
        draw=30,
    ),
    "deform_roi_pool_adaptive": Case(
        "deform_roi_pool", {"output_size": (2, 3), "spatial_scale": 0.75}, 2, 9, 12, classes=1, mask=True
    ),
    "deform_roi_pool_plain": Case("deform_roi_pool", {"output_size": (2, 3), "spatial_scale": 0.5}),
    "deform_roi_pool_mask_alone": Case(
        "deform_roi_pool", {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2}, mask=True
    ),
    "deform_roi_pool_far": Case(
        "deform_roi_pool", {"output_size": 3, "sampling_ratio": 1, "gamma": 1.0}, classes=1, mask=True, reach=4, draw=6
    ),
    "deform_roi_pool_channels": Case(
        "deform_roi_pool", {"output_size": 2, "sampling_ratio": 2}, 70, boxes=(*INSIDE, "across"), classes=1, mask=True
    ),
    "deform_roi_pool_one_pixel": Case(
        "deform_roi_pool", {"output_size": (2, 3), "sampling_ratio": 2}, 2, 1, 1, 2, classes=1, mask=True
    ),
    "deform_roi_pool_0_boxes": Case("deform_roi_pool", {"output_size": (2, 3)}, boxes=(), classes=1, mask=True),
    "deform_roi_pool_batch_0": Case("deform_roi_pool", {"output_size": 2}, batch=0, boxes=(), classes=1),
    "deform_psroi_pool": _psroi(
        3, 2, classes=1, group_size=3, sample_per_part=2, trans_std=0.1, spatial_scale=0.5, draw=12
    ),
    "deform_psroi_pool_1_group": _psroi(4, 5, classes=1, mask=True, sample_per_part=4, trans_std=0.1, draw=1),
    "deform_psroi_pool_classes": _psroi(
        3,
        6,
        classes=3,
        mask=True,
        group_size=2,
        part_size=2,
        sample_per_part=3,
        trans_std=0.25,
        spatial_scale=0.5,
        draw=2,
    ),
    "deform_psroi_pool_class_each": _psroi(
        2, 4, classes=4, group_size=3, part_size=5, sample_per_part=2, trans_std=0.1, spatial_scale=0.3, draw=9
    ),
    "deform_psroi_pool_no_trans": _psroi(2, 3, group_size=2, sample_per_part=2, spatial_scale=0.25),
    "deform_psroi_pool_mask_alone": _psroi(
        3, 2, mask=True, group_size=2, spatial_scale=0.5, boxes=("inside", *AWKWARD), draw=1
    ),
    "deform_psroi_pool_far": _psroi(2, 3, classes=1, mask=True, sample_per_part=3, trans_std=0.7, reach=3, draw=4),
    "deform_psroi_pool_channels": _psroi(
        2, 70, classes=2, mask=True, sample_per_part=2, trans_std=0.1, boxes=(*INSIDE, "across")
    ),
    "deform_psroi_pool_channels_class_each": _psroi(
        2, 21, classes=21, group_size=2, sample_per_part=2, trans_std=0.1, boxes=(*INSIDE, "across"), draw=18
    ),
    "deform_psroi_pool_one_pixel": _psroi(
        2, 2, classes=1, mask=True, sample_per_part=2, trans_std=0.1, in_h=1, in_w=1, batch=2
    ),
    "deform_psroi_pool_0_boxes": _psroi(2, 2, classes=1, mask=True, boxes=()),
    "deform_psroi_pool_batch_0": _psroi(2, 2, classes=2, batch=0, boxes=()),
    "roi_align_rotated": Case(
        "roi_align_rotated", {"output_size": (2, 4), "spatial_scale": 0.5, "sampling_ratio": 2}, 5
    ),
    "roi_align_rotated_clockwise": Case(
        "roi_align_rotated",
        {"output_size": (3, 5), "spatial_scale": 0.3, "sampling_ratio": 3, "aligned": False, "clockwise": True},
        4,
    ),
    "roi_align_rotated_adaptive": Case("roi_align_rotated", {"output_size": (3, 2), "spatial_scale": 0.75}, 2, 9, 12),
    "roi_align_rotated_channels": Case(
        "roi_align_rotated", {"output_size": 2, "sampling_ratio": 2}, 70, boxes=(*INSIDE, "across")
    ),
    "roi_align_rotated_one_pixel": Case("roi_align_rotated", {"output_size": (1, 2), "sampling_ratio": 2}, 2, 1, 1, 2),
    "roi_align_rotated_0_boxes": Case("roi_align_rotated", {"output_size": (2, 3)}, boxes=()),
    "roi_align_rotated_batch_0": Case("roi_align_rotated", {"output_size": (2, 3)}, batch=0, boxes=()),
    "prroi_pool": Case("prroi_pool", {"output_size": (4, 2), "spatial_scale": 0.5}, 5),
    "prroi_pool_thirds": Case("prroi_pool", {"output_size": (3, 5), "spatial_scale": 0.3}, 4),
    "prroi_pool_one_bin": Case("prroi_pool", {"output_size": 1}, 2, 9, 12),
    "prroi_pool_channels": Case("prroi_pool", {"output_size": 2}, 70, boxes=(*INSIDE, "across")),
    "prroi_pool_one_pixel": Case("prroi_pool", {"output_size": (2, 3)}, 2, 1, 1, 2),
    "prroi_pool_0_boxes": Case("prroi_pool", {"output_size": (2, 3)}, boxes=()),
    "prroi_pool_batch_0": Case("prroi_pool", {"output_size": (2, 3)}, batch=0, boxes=()),
}

# No coordinate of these lies so near to where something changes that float32's rounding could reach it: see `margin`.
DTYPE_CASES = (
    "roi_pool",
    "roi_pool_channels",
    "roi_align",
    "roi_align_aligned",
    "roi_align_adaptive",
    "roi_align_max",
    "ps_roi_pool",
    "ps_roi_pool_rfcn",
    "ps_roi_align",
    "ps_roi_align_thirds",
    "deform_roi_pool",
    "deform_roi_pool_modulated",
    "deform_roi_pool_channels",
    "deform_psroi_pool",
    "deform_psroi_pool_classes",
    "deform_psroi_pool_class_each",
    "deform_psroi_pool_no_trans",
    "roi_align_rotated",
    "roi_align_rotated_clockwise",
    "prroi_pool",
    "prroi_pool_channels",
)


def make(case: Case, dtype: str = "float64", seed: int = 0) -> dict[str, Any]:
    """Arrays in the order of the operator's arguments, None where the case has none; all exact in each dtype."""
    rng = np.random.default_rng([seed, case.draw, case.channels, case.in_h, case.in_w, *case.pooled])

    def values(*shape: int) -> np.ndarray:
        return rng.integers(-128, 129, shape) / 64

    boxes = np.array([box for kind in case.boxes for box in _boxes(kind, case, rng)]).reshape(-1, 5)
    rng.shuffle(boxes)  # those of an image are not neighbours
    if case.operator == "roi_align_rotated":
        boxes = turned(boxes, rng.integers(-25, 26, (len(boxes), 1)) / 8)
    arrays = {"input": values(case.batch, case.in_channels, case.in_h, case.in_w), "boxes": boxes}
    if case.operator.startswith("deform_"):
        offset = None
        if case.classes:
            shape = (len(boxes), 2 * case.classes, *case.offset_size)
            offset = rng.integers(1, 8 * case.reach + 1, shape) / 8 * rng.choice([-1, 1], shape)
        arrays["trans" if case.operator == "deform_psroi_pool" else "offset"] = offset
        arrays["mask"] = values(len(boxes), 1, *case.pooled) if case.mask else None
    return {name: None if array is None else array.astype(dtype_of(dtype)) for name, array in arrays.items()}


def turned(boxes: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """[batch index, cx, cy, w, h, theta] of boxes with corners, to eight binary digits."""
    first, last = boxes[:, 1:3], boxes[:, 3:]
    rows = np.concatenate([boxes[:, :1], (first + last) / 2, last - first, angles], axis=1)
    return rows.astype(dtype_of("bfloat16")).astype(np.float64)


def _boxes(kind: str, case: Case, rng: np.random.Generator) -> Iterator[tuple[float, ...]]:
    """Rows of `boxes`, whose coordinates are quarters between -64 and 64 and so have at most eight binary digits."""
    width, height = case.in_w / case.spatial_scale, case.in_h / case.spatial_scale
    middle_x, middle_y = width / 2, height / 2

    def box(*corners: float) -> tuple[float, ...]:
        quarters = [math.floor(min(max(corner, -63), 63) * 4) / 4 for corner in corners]
        return float(rng.integers(case.batch)), *quarters

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    inside = between(0, middle_x), between(0, middle_y), between(middle_x, width), between(middle_y, height)
    x1, y1, x2, y2 = inside
    if kind == "inside":
        yield box(*inside)
    elif kind == "small":
        yield box(x1, y1, x1 + 1.25, y1 + 0.75)
    elif kind == "whole":
        yield box(0, 0, width, height)
    elif kind == "across":
        yield box(-between(1, 1 + middle_x), y1, x2, y2 + middle_y)
        yield box(x1, -between(1, 1 + middle_y), x2 + middle_x, y2)
    elif kind == "outside":
        yield box(width + 4, y1, 1.5 * width + 4, y2)
        yield box(x1, -height - 3, x2, -3)
    elif kind == "inverted":
        yield box(x2, y2, x1, y1)
        yield box(x1, y2, x2, y1)
    elif kind == "empty":
        yield box(x2, y2, x2, y2)
        yield box(x1, y1, x1, y2)
    elif kind == "last":  # to the last row and column, and to their far side
        yield box(x1, y1, (case.in_w - 1) / case.spatial_scale, (case.in_h - 1) / case.spatial_scale)
        yield box(x1, y1, width, (case.in_h - 1) / case.spatial_scale)
    elif kind == "halves":  # on which C and NumPy round differently
        yield box(0.5, -2.5, math.floor(x2) + 0.5, 2 * math.floor(y2 / 2) + 0.5)
        odd_x, odd_y = 2 * math.floor(x1 / 2) + 1, 2 * math.floor(y2 / 2) + 1  # of which halves are taken where scaled
        yield box(odd_x, -1, odd_x + 4, odd_y)
    else:
        raise ValueError(kind)


def make_grad_output(case: Case, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(99)
    boxes = len(make(case)["boxes"])
    return (rng.integers(-64, 65, (boxes, case.channels, *case.pooled)) / 32).astype(dtype_of(dtype))


@functools.cache
def expected(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The oracle's output and gradients of a named case (the same for every dtype, whose values are exact)."""
    case = CASES[name]
    arrays = make(case)
    output = getattr(reference, case.operator)(**arrays, **case.options)
    backward = getattr(reference, f"{case.operator}_backward")
    return output, backward(make_grad_output(case), **arrays, **case.options)


def margin(case: Case) -> float:
    """How near a coordinate comes to where an integer is made of it, or a point begins to count or has another slope,
    or how near, of a maximum over points, the second largest value is. Inf: all coordinates are exact in float32.

    Numbers of few binary digits are exact, and on the same side in every dtype however they are computed.
    """
    arrays = make(case)
    op = getattr(reference, f"operator_of_{case.operator}")(**arrays, **case.options)
    least = math.inf
    if case.operator == "prroi_pool":  # nothing changes anywhere
        return least
    if case.operator == "roi_align_rotated":
        return _margin_of_turned(case, op)
    if case.operator == "roi_pool" or case.options.get("convention") == "torchvision":
        scaled = arrays["boxes"][:, 1:] * case.spatial_scale
        least = min([least, *(abs(x % 1 - 0.5) for x in scaled.flat if not _exact(case.spatial_scale))])
    for r, py, px, _, channels, bin in op.bins():
        exact = True
        for axis, p, length in ((bin.rows, py, case.in_h), (bin.columns, px, case.in_w)):
            if not _axis_is_exact(case, axis):
                exact = False
                least = min([least, *_distances(case, axis, p, length)])
        if op.largest and case.operator != "roi_pool" and not exact:
            for c in channels:
                least = min(least, _gap(bin.points(), op.input[int(op.boxes[r, 0]), op.channel(c, py, px)]))
    return least


def _margin_of_turned(case: Case, op: reference.Operator) -> float:
    """From where points begin to count, and of adaptive bins from where there is one more."""
    distances = [math.inf]
    for r, _, _, _, _, bin in op.bins():
        for place in bin.positions:
            ends = [(p + 1, p - size) for p, size in zip(place, (case.in_h, case.in_w), strict=True)]
            distances += [abs(end) for both in ends for end in both if op.boxes[r, 5] or not _exact(*both)]
    if case.options.get("sampling_ratio", 0) < 1:
        bins = op.boxes[:, [4, 3]] * case.spatial_scale / case.pooled
        distances += [abs(bin - round(bin)) for bin in bins.ravel() if not _exact(bin)]
    return min(distances)


def _exact(*numbers: float) -> bool:
    return all(abs(x) < 2**10 and (x * 2**10).is_integer() for x in numbers)


def _axis_is_exact(case: Case, axis: reference.Axis) -> bool:
    count = 1 if case.operator in ("roi_pool", "ps_roi_pool") else max(len(axis.positions), 1)
    return count & (count - 1) == 0 and _exact(axis.bin, *axis.positions)


def _distances(case: Case, axis: reference.Axis, p: int, length: int) -> Iterator[float]:
    if case.operator in ("roi_pool", "ps_roi_pool"):
        for edge in axis.positions[p == 0 :]:  # the first edge of the first bin is that of the box, and exact
            yield abs(edge - round(edge))
        return
    if case.operator != "deform_psroi_pool" and case.options.get("sampling_ratio", 0) < 1 and not _exact(axis.bin):
        yield abs(axis.bin - round(axis.bin))  # rounded up to the number of points
    reach = 0.5 if case.operator == "deform_psroi_pool" else 1
    for position in axis.positions:
        yield abs(position + reach)
        yield abs(position - (length - 1 + reach))
        if case.classes:
            yield abs(position - min(max(round(position), 0), length - 1))


def _gap(points: list, plane: np.ndarray) -> float:
    """Between the largest and the second largest value, of points that do not read the same."""
    read = {tuple((row, col, w) for row, col, w, *_ in pixels if w) for pixels in points}
    values = sorted(sum(w * plane[row, col] for row, col, w in pixels) for pixels in read)
    return values[-1] - values[-2] if len(values) > 1 else math.inf


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)

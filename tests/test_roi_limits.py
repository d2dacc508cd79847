"""RoI pooling past the limits inside the CPU kernels: long lists of pixels, many bins, many points, several threads.

tests/test_cuda_roi.py has the like for the CUDA kernels. Far boxes and very many points are here for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.cpu.core.bands import BAND
from pydeform.cpu.roi import bins as roi_bins
from pydeform.cpu.roi import plan as roi_plan
from tests.cases.deform_conv2d import dtype_of
from tests.conftest import Backend, assert_same_bits
from tests.reference import roi as reference
from tests.test_roi import (
    CORNERS,
    IN_SIZE,
    Variant,
    assert_equals_oracle,
    assert_same_grads,
    each_dtype,
    problem,
    run,
    run_backward,
    solve,
)
from tests.test_simd_roi import last_of_a_page

CPU = Backend("cpu")
# All of a large image, more than that, and upside down.
WHOLE = ((0.5, 0.25, 29.5, 27.25), (-3.0, -2.5, 33.0, 31.5), (29.5, 27.25, 0.5, 0.25))
WIDE = ((-1, -1, 159, 3), (159, 3, -1, -1), (-1, -1, 38, 3))


def _one_bin(operator: str, channels: int, **options: Any) -> Variant:
    return Variant(operator, {"output_size": 1, **options}, channels)


def _psroi(channels: int, sample_per_part: int) -> Variant:
    options = {"output_dim": channels, "pooled_size": 1, "sample_per_part": sample_per_part, "trans_std": 0.125}
    return Variant("deform_psroi_pool", options, channels)


LONG_LISTS = {
    "mean": _one_bin("roi_align", 6, sampling_ratio=0, aligned=True),
    "mean of few channels": _one_bin("roi_align", 2, sampling_ratio=0, aligned=True),
    "maximum of pixels": _one_bin("roi_pool", 5),
    "maximum of points": _one_bin("roi_align", 5, sampling_ratio=30, mode="max"),
    "mean of pixels": _one_bin("ps_roi_pool", 5),
    "offset": _one_bin("deform_roi_pool", 5, sampling_ratio=0, gamma=0.125),
    "offset of few channels": _one_bin("deform_roi_pool", 2, sampling_ratio=40, gamma=0.125),
    "points": _psroi(5, 32),
}
MANY_BINS = {
    "mean": Variant("roi_align", {"output_size": (49, 48), "sampling_ratio": 1}, 5),
    "maximum": Variant("roi_pool", {"output_size": (49, 48)}, 5),
    "offset": Variant("deform_roi_pool", {"output_size": (12, 13), "sampling_ratio": 1, "gamma": 0.125}, 5),
}


def check(variant: Variant, dtype: str = "float64", **how: Any) -> None:
    assert_equals_oracle(CPU, variant, *problem(variant, dtype, **how), dtype)


@pytest.mark.parametrize("name", LONG_LISTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_more_pixels_than_are_listed_at_once(name, dtype):
    assert 28 * 28 > roi_plan.LISTED
    check(LONG_LISTS[name], dtype, corners=WHOLE, size=(30, 31))


@pytest.mark.parametrize("sampling_ratio", [30, 50, 70])
@pytest.mark.parametrize("channels", [1, 5])
def test_points_far_apart_on_a_wide_image(channels, sampling_ratio):
    check(_one_bin("roi_align", channels, sampling_ratio=sampling_ratio), corners=WIDE, size=(4, 160))


def test_more_columns_than_a_band():
    corners = (0, 0, 14, 15), (-6, -5, 8, 9)
    assert corners[0][2] > BAND
    for dtype in ("float64", "float32"):
        check(_psroi(1, 16), dtype, corners=corners, size=(16, 17))


@pytest.mark.parametrize("name", MANY_BINS)
def test_many_bins(name):
    """More than a tile takes, or than are turned to channels last at once."""
    check(MANY_BINS[name], corners=CORNERS[:2])


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_more_points_than_are_all_looked_at(mode):
    """Of a constant image a mean is the share of points that count, a maximum 0 as soon as one does not."""
    points = 4100
    assert points > roi_bins.MANY_POINTS
    image = np.full((1, 1, *IN_SIZE), -3.0)
    # x from and to, y from and to: no width, upside down, no size, far out, and beginning between -1 and 0.
    spans = [
        (4.5, 4.5, 1.5, 3.5),
        (5.25, 1.25, 4.5, 0.75),
        (2.5, 2.5, 2.5, 2.5),
        (5.25, -7000, 3.5, 0.75),
        (-1.2, 0.8, 1.5, 3.5),
    ]
    boxes = np.array([[0, x1, y1, x2, y2] for x1, x2, y1, y2 in spans])
    options = {"output_size": 1, "sampling_ratio": points, "aligned": True, "mode": mode}
    shares = []
    for _, x1, y1, x2, y2 in boxes:
        share = 1.0
        for start, end, length in ((x1, x2, IN_SIZE[1]), (y1, y2, IN_SIZE[0])):
            p = start - 0.5 + (np.arange(points) + 0.5) * (end - start) / points
            share *= ((p >= -1) & (p <= length)).mean()
        shares.append(share)
    assert shares[3] < 0.01 and shares[:3] == [1, 1, 1] and 0.5 < shares[4] < 1
    want = -3 * np.array(shares if mode == "avg" else [float(share == 1) for share in shares])
    if mode == "max":
        boxes, want = boxes[:1], want[:1]  # all pairs of points are looked at
    output = pydeform.roi_align(image, boxes, **options).ravel()
    np.testing.assert_allclose(output, want, rtol=1e-12)
    grads = pydeform.roi_align_backward(np.ones((len(boxes), 1, 1, 1)), image, boxes, **options)
    np.testing.assert_allclose(grads.input.sum(), (want / -3).sum(), rtol=1e-9)


def test_the_last_point_that_counts_for_a_maximum():
    """At -1, one pixel outside: it counts, and reads the border."""
    variant = _one_bin("roi_align", 1, sampling_ratio=1, mode="max")
    arrays, grad_output = problem(variant, corners=((-2, -2, 0, 0), (-2, 1, 0, 3), (1, -2, 3, 0)))
    arrays["input"] -= 40
    output, _ = assert_equals_oracle(CPU, variant, arrays, grad_output, "float64")
    assert (output < 0).all()


@pytest.mark.parametrize("channels", [1, 9])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nothing_is_read_behind_the_input(channels, dtype):
    """It lies at the end of memory that may be read. Boxes end in its last row and column."""
    variant = Variant("deform_roi_pool", {"output_size": 2, "sampling_ratio": 2, "gamma": 0.125}, channels)
    corners = (12, 1, 18.5, 5.5), (15.5, 3.5, 20, 8), (17, 4, 18, 5)
    arrays, grad_output = problem(variant, dtype, corners=corners, batch=1, size=(6, 19))
    output, grads = assert_equals_oracle(CPU, variant, arrays, grad_output, dtype)
    arrays["input"] = last_of_a_page(arrays["input"].ravel()).reshape(arrays["input"].shape)
    again, grads_again = solve(CPU, variant, arrays, grad_output)
    assert_same_bits(again, output)
    assert_same_grads(grads_again, grads)


@pytest.mark.parametrize("operator", ["roi_align", "ps_roi_pool"])
def test_more_columns_than_float32_can_count(operator):
    """The last of 2**24 + 4 has no number of its own; the one that it is rounded to is not in the image."""
    width = 2**24 + 4
    image = np.zeros((1, 1, 2, width), np.float32)
    image = last_of_a_page(image.ravel()).reshape(image.shape)
    boxes = np.array([[0, width - 8, 0, width + 8, 1], [0, width - 4, 0, width, 1]], np.float32)
    assert boxes[1, 3] == width and np.float32(width - 1) == width
    output = getattr(pydeform, operator)(image, boxes, 1)
    assert (output == 0).all()
    grads = getattr(pydeform, f"{operator}_backward")(np.ones_like(output), image, boxes, 1)
    assert grads.input[..., -6:].any() and not grads.input[..., :-30].any()


def test_between_points_on_pixels_nothing_is_read():
    """Points at 0 and 4 of each axis, which are flat there: of pixels 1 to 3 not even NaN arrives."""
    image = np.arange(81.0).reshape(1, 1, 9, 9)
    want = image[..., [0, 0, 4, 4], [0, 4, 0, 4]].mean()
    image[..., 1:4, :] = np.nan
    image[..., 1:4] = np.nan
    box = np.array([[0, 1.0, 1.0, 16.0, 16.0]])
    options = {"output_dim": 1, "pooled_size": 1, "sample_per_part": 2, "spatial_scale": 0.5}
    assert pydeform.deform_psroi_pool(image, box, **options).item() == want


# Far boxes and very many points ---------------------------------------------------------------------------------------

FAR = {
    "float64": (5000.25, 2.0**20 + 0.375, 1e8, 2.0**31, 2.0**52, 2.0**53, 1e15 / 3, 1e30, 1e100, 1.5e308),
    "float32": (5000.25, 2.0**20 + 0.375, 2.0**22 + 0.5, 2.0**23, 1e8, 2.0**31, 1e15, 1e18, 2.9e38),
}
FAR_VARIANTS = {
    "roi_align": Variant("roi_align", {"output_size": 1}, 5),
    "roi_align of few channels": Variant("roi_align", {"output_size": (1, 2), "aligned": True}, 1),
    "roi_align of 2 points": Variant("roi_align", {"output_size": 1, "sampling_ratio": 2}, 5),
    "roi_align of 3 points": Variant("roi_align", {"output_size": 1, "sampling_ratio": 3}, 1),
    "roi_align of many points": Variant("roi_align", {"output_size": 1, "sampling_ratio": 5001}, 1),
    "largest": Variant("roi_align", {"output_size": 1, "mode": "max"}, 5),
    "largest of many points": Variant("roi_align", {"output_size": 1, "sampling_ratio": 5001, "mode": "max"}, 2),
    "ps_roi_align": Variant("ps_roi_align", {"output_size": (1, 2)}, 5),
    "deform_roi_pool": Variant("deform_roi_pool", {"output_size": 1, "gamma": 0.125}, 5),
    "deform_roi_pool of few channels": Variant("deform_roi_pool", {"output_size": 1}, 1, offset=False),
    "deform_psroi_pool": _psroi(1, 5001),
    "roi_pool": Variant("roi_pool", {"output_size": 1}, 5),
    "ps_roi_pool": Variant("ps_roi_pool", {"output_size": 1}, 5),
    "ps_roi_pool_rfcn": Variant("ps_roi_pool", {"output_size": 1, "convention": "rfcn"}, 1),
    "prroi_pool": Variant("prroi_pool", {"output_size": (1, 2)}, 5),
    "prroi_pool of few channels": Variant("prroi_pool", {"output_size": 1}, 1),
}


def assert_equals_rounded_oracle(backend: Any, variant: Variant, arrays: Any, grad_output: Any, dtype: str) -> None:
    """The oracle with begin, end and size of boxes as the dtype rounds them."""
    op = getattr(reference, f"operator_of_{variant.operator}")(**arrays, **variant.options)
    if dtype != "float64":
        op = op._replace(coordinate=np.float32)
    with np.errstate(over="ignore"):
        want, want_grads = reference.forward(op), reference.backward(grad_output, op)
    output, grads = solve(backend, variant, arrays, grad_output)
    # A point of few is rounded as its numbers are; nothing cancels in what is looked at.
    tolerance = {"rtol": 1e-9, "atol": 1e-300} if dtype == "float64" else {"rtol": 2e-3, "atol": 1e-36}
    np.testing.assert_allclose(output, want, **tolerance)
    for name in {"input", "mask"} & {name for name, grad in grads.items() if grad is not None}:
        np.testing.assert_allclose(grads[name].sum(), want_grads[name].sum(), **tolerance)


@pytest.mark.parametrize("name", FAR_VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_far_boxes(backend, name, dtype):
    """From far away to far away, to the image, from the image, over it upside down, and far past it."""
    variant, size = FAR_VARIANTS[name], (4, 5)
    few_or_adaptive = "5001" not in str(variant.options)
    for far in FAR[dtype]:
        if far > 2**23 and not few_or_adaptive:
            continue  # no two of the points come near the image, and it is a matter of rounding whether one does
        half = far / 2
        for corners in (
            (-half, -half, half, half),
            (-far, -far, 3, 2),
            (1, 2, far, far),
            (-half, 0, half, 3),
            (half, half, -half, -half),
            (half, half, far, far),
        ):
            arrays, grad_output = problem(variant, dtype, corners=[corners], batch=1, size=size)
            arrays["input"], grad_output = abs(arrays["input"]) + 1, abs(grad_output) + 1
            if variant.offset_name and variant.offset:
                arrays[variant.offset_name][...] = 0
            if arrays.get("mask") is not None:
                arrays["mask"][...] = 0.5
            assert_equals_rounded_oracle(backend, variant, arrays, grad_output, dtype)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("operator", ["roi_align", "ps_roi_align", "deform_roi_pool"])
def test_points_that_float32_cannot_tell_apart(backend, operator, channels):
    """2e8 points on each axis, a pixel apart: those from -0.5 to 39.5 count, of which 41 read 40 pixels."""
    image = np.ones((1, channels, 40, 40), np.float32)
    boxes = np.array([[0, -1e8, -1e8, 1e8, 1e8]], np.float32)
    arrays, want = {"input": image, "boxes": boxes}, (41 / 2e8) ** 2
    output = run(backend, operator, arrays, {"output_size": 1})
    np.testing.assert_allclose(output, want, rtol=1e-5)
    grads = run_backward(backend, operator, np.ones_like(output), arrays, {"output_size": 1})
    np.testing.assert_allclose(grads["input"].sum(axis=(2, 3)), want, rtol=1e-5)
    assert grads["input"].all()


MANY = (4097, 20_001, 2**24 + 1, 2**31 - 1)


@pytest.mark.parametrize("points", MANY)
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_many_points_on_a_plane(backend, channels, dtype, points):
    """The mean of an image that rises evenly is its value in the middle of the points; the largest is a corner's."""
    y, x = np.mgrid[:9, :8].astype(float)
    image = np.broadcast_to(2 * y + 0.5 * x + 1, (1, channels, 9, 8)).astype(dtype)
    spans = np.array([(1.5, 2.25, 6, 7.75), (6, 7.75, 1.5, 2.25), (3, 4, 3, 4), (2, 1, 5, 1 + 2.0**-30)])
    boxes = np.concatenate([np.zeros((4, 1)), spans], axis=1).astype(dtype)
    arrays = {"input": image, "boxes": boxes}
    options = {"output_size": 1, "sampling_ratio": points, "aligned": True}
    first, last = spans[:, :2] - 0.5, spans[:, 2:] - 0.5
    tolerance = {"rtol": 1e-12 if dtype == "float64" else 3e-6}

    def value(place: Any) -> Any:
        return 2 * place[:, 1] + 0.5 * place[:, 0] + 1

    output = run(backend, "roi_align", arrays, options)
    np.testing.assert_allclose(output[:, 0, 0, 0], value((first + last) / 2), **tolerance)
    largest = run(backend, "roi_align", arrays, {**options, "mode": "max"})[:, 0, 0, 0]
    corner = np.maximum(first, last) - abs(last - first) / 2 / points
    np.testing.assert_allclose(largest, value(corner), **tolerance)
    grads = run_backward(backend, "roi_align", np.ones_like(output), arrays, options)["input"][0, 0]
    np.testing.assert_allclose([grads.sum(), (grads * y).sum()], [4, (first + last)[:, 1].sum() / 2], **tolerance)
    offset = np.zeros((4, 2, 1, 1), dtype)
    del options["aligned"]
    moves = run_backward(
        backend, "deform_roi_pool", np.ones_like(output), {**arrays, "offset": offset}, {**options, "gamma": 0.5}
    )["offset"]
    want = channels * 0.5 * (last - first) * (0.5, 2)
    np.testing.assert_allclose(moves[:, :, 0, 0], want, atol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("channels", [1, 5])
def test_a_million_points_lose_no_digits(backend, channels):
    """1,000 on each axis, which no kernel takes together: one float32 sum of all would be wrong by 0.5 %."""
    y, x = np.mgrid[:9, :8].astype(np.float32)
    arrays = {
        "input": np.broadcast_to(2 * y + 0.7 * x + 0.1, (1, channels, 9, 8)),
        "boxes": np.array([[0, 3, 4, 3, 4], [0, 1, 2, 5, 7]], np.float32),
        "offset": np.zeros((2, 2, 1, 1), np.float32),
    }
    options = {"output_size": 1, "sampling_ratio": 1000, "gamma": 1.0}
    output = run(backend, "deform_roi_pool", arrays, options)
    np.testing.assert_allclose(output[:, 0, 0, 0], [8.85, 9.85], rtol=5e-5)
    offset = run_backward(backend, "deform_roi_pool", np.ones_like(output), arrays, options)["offset"]
    np.testing.assert_allclose(offset[:, :, 0, 0], channels * np.array([[0, 0], [0.7 * 4, 2 * 5]]), rtol=5e-5)


@pytest.mark.parametrize("points", MANY[:2])
def test_many_points_one_by_one(backend, points):
    """Across the image's borders, on any image, against all points looked at."""
    rng = np.random.default_rng(3)
    image = rng.normal(size=(1, 2, 7, 6))
    spans = rng.uniform(-6, 12, (6, 2, 2))
    boxes = np.concatenate([np.zeros((6, 1)), spans.reshape(6, 4)], axis=1)
    options = {"output_size": 1, "sampling_ratio": points, "aligned": True}
    arrays = {"input": image, "boxes": boxes}
    output = run(backend, "roi_align", arrays, options)
    largest = run(backend, "roi_align", arrays, {**options, "mode": "max"})
    for r, (first, last) in enumerate(spans):
        axes = []
        for axis, length in ((1, 7), (0, 6)):
            place = first[axis] - 0.5 + (np.arange(points) + 0.5) * (last[axis] - first[axis]) / points
            counts = (place >= -1) & (place <= length)
            inside = place[counts].clip(0, length - 1)
            low = np.minimum(inside.astype(int), length - 2)
            weights = np.zeros((len(inside), length))
            weights[np.arange(len(inside)), low] = 1 - (inside - low)
            weights[np.arange(len(inside)), low + 1] = inside - low
            # Between the same pixels a surface that is linear along each axis is largest at the first or last point.
            new = np.diff(low) != 0
            ends = weights[np.append(True, new) | np.append(new, True)] if len(low) else weights
            axes.append((weights, ends, counts.all()))
        (rows, some_rows, all_rows), (columns, some_columns, all_columns) = axes
        want = rows.sum(axis=0) @ image[0] @ columns.sum(axis=0) / points**2
        np.testing.assert_allclose(output[r, :, 0, 0], want, rtol=1e-9, atol=1e-12)
        values = some_rows @ image[0] @ some_columns.T
        most = values.max(axis=(1, 2)) if values.size else np.full(2, -np.inf)
        most = most if all_rows and all_columns else np.maximum(most, 0)
        np.testing.assert_allclose(largest[r, :, 0, 0], most, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
@pytest.mark.parametrize("channels", [1, 5])
@each_dtype
def test_offsets_change_nothing_on_a_constant_image(backend, operator, channels, dtype):
    """What a point's lower pixel loses the upper one gains, also within a rounding of a pixel."""
    rng = np.random.default_rng(9)
    real = np.float64 if dtype == "float64" else np.float32
    corners = rng.integers(0, 9, (60, 4)) + rng.choice([0, 0.5, 1 / 3, 0.25], (60, 4))
    beside = np.nextafter(corners.astype(real), rng.choice([-9, 9, 99], (60, 4)).astype(real))
    boxes = np.concatenate([np.zeros((120, 1)), np.concatenate([corners, beside])], axis=1)
    boxes[0, 1:] = 1, 1, 2, 2  # a point of the middle bins lies half a unit in the last place before pixel 1
    for bins, points in ((3, 3), (2, 5), (1, 7)):
        if operator == "deform_roi_pool":
            options: dict[str, Any] = {"output_size": bins, "sampling_ratio": points, "gamma": 1.0}
        else:
            options = {"output_dim": channels, "pooled_size": bins, "sample_per_part": points, "trans_std": 1.0}
            options["spatial_scale"] = 1 / 3
        variant = Variant(operator, options, channels)
        arrays, _ = problem(variant, dtype, corners=boxes[:, 1:], batch=1, size=(9, 9))
        arrays["boxes"] = boxes.astype(arrays["boxes"].dtype)
        arrays["input"][...] = 1
        arrays["mask"][...] = 1
        arrays[variant.offset_name][...] = 0
        ones = np.ones((len(boxes), channels, bins, bins)).astype(arrays["input"].dtype)
        grad = run_backward(backend, operator, ones, arrays, options)[variant.offset_name]
        assert np.abs(grad.astype(float)).max() <= (1e-13 if dtype == "float64" else 1e-4) * 9 * channels


def test_columns_whose_numbers_float32_rounds():
    """A box inside of a constant image pools to the constant, whatever its points are rounded to."""
    width = 2**24 + 64
    image = np.zeros((1, 1, 2, width), np.float32)
    image[..., -128:] = 1
    boxes = np.array([[0, width - n, 0, width - n + 32, 1] for n in (64, 60, 40)], np.float32)
    for options in ({"sampling_ratio": 8}, {"sampling_ratio": 0}, {"sampling_ratio": 33}):
        output = pydeform.roi_align(image, boxes, (1, 6), **options)
        np.testing.assert_allclose(output, 1, rtol=1e-6)
    # More points than pixels are a pixel apart, and each pixel is listed once.
    whole = np.array([[0, 0, 0, width, 1]], np.float32)
    output = pydeform.roi_align(image, whole, 1)
    np.testing.assert_allclose(output, 128 / width, rtol=0.02)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_huge_boxes_that_read_nothing_have_no_gradient(backend, channels, dtype):
    """Upside down, so that there are no points, and so large that a bit more would be infinite."""
    largest = float(np.finfo(dtype).max)
    arrays = {
        "input": np.ones((1, channels, 4, 5), dtype),
        "boxes": np.array([[0, 3, 2, -0.9 * largest, -0.9 * largest]], dtype),
        "offset": np.zeros((1, 2, 1, 1), dtype),
        "mask": np.full((1, 1, 1, 1), 1.5, dtype),
    }
    grad_output = np.ones((1, channels, 1, 1), dtype)
    grads = run_backward(backend, "deform_roi_pool", grad_output, arrays, {"output_size": 1, "gamma": 1.0})
    assert not any(grad.any() for grad in grads.values() if grad is not None)


# Boxes that are turned, and exact means -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1e5, 1e9, 1e30])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_turned_boxes_of_any_size(backend, dtype, length):
    """Adaptive: a point for about each square pixel of any turn, so that those that count are as many as lie within a
    pixel of the image, its area of (H + 1) * (W + 1), but for those along its border."""
    height, width = 9, 12
    angles = np.array([0.0, 0.4, -1.1, 2.0, 40.0])
    boxes = np.zeros((len(angles), 6))
    boxes[:, 1:5], boxes[:, 5] = (6, 5, length, length), angles
    arrays = {"input": np.full((1, 2, height, width), 2.0, dtype), "boxes": boxes.astype(dtype)}
    output = run(backend, "roi_align_rotated", arrays, {"output_size": 1})
    n = np.ceil(float(arrays["boxes"][0, 3]))
    if dtype == "float32" and length > 1e15:  # 1e-60 is none
        assert not output.any()
        return
    counted = output.astype(np.float64) / 2 * n * n
    border = 2 * (height + width + 2)
    if length < 1e15:  # beyond, no two of the points have different coordinates
        assert (abs(counted - (height + 1) * (width + 1)) < border).all()
    assert np.isfinite(counted).all() and (counted >= 0).all()
    grad = run_backward(backend, "roi_align_rotated", np.ones_like(output), arrays, {"output_size": 1})["input"]
    np.testing.assert_allclose(grad.astype(float).sum(), output.astype(float).sum() / 2, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 2}, {"sampling_ratio": 2, "aligned": False}], ids=str)
@each_dtype
def test_turned_boxes_far_away(backend, dtype, options):
    """A centre, a size or an angle of any magnitude: zero where nothing is near, and never more than the image has."""
    largest = 6e4 if dtype == "float16" else 3e38
    far = [1e3, 1e4, largest] + ([1e9, 1e30] if largest > 1e5 else [])
    rows = [(0, 4, 3, 5, 4, 0.7)]
    for f in far:
        rows += [(0, f, 3, 5, 4, 0.7), (0, 4, -f, 5, 4, 0.7), (0, f, f, f, f, -2.0), (0, 4, 3, f, 1e-3, 0.7)]
        rows += [(0, 4, 3, 4, f, -1.5), (0, 4, 3, -f, -f, 3.0), (0, 4, 3, 5, 4, f), (0, -f, f, 2, 2, -f)]
    arrays = {"input": np.full((1, 3, 6, 7), 1.5), "boxes": np.array(rows)}
    arrays = {name: array.astype(dtype_of(dtype)) for name, array in arrays.items()}
    options = {"output_size": 2, **options}
    output = run(backend, "roi_align_rotated", arrays, options).astype(float)
    assert np.isfinite(output).all() and (output >= 0).all() and (output <= 1.501).all()
    beside = np.isin(np.arange(len(rows)) % 8, (1, 2, 0)) & (np.arange(len(rows)) > 0)  # a box of 5 x 4, or 2 x 2
    assert not output[beside].any()
    assert (output[[0]] > 1.49).all()
    grads = run_backward(backend, "roi_align_rotated", np.ones(output.shape).astype(dtype_of(dtype)), arrays, options)[
        "input"
    ]
    assert np.isfinite(grads.astype(float)).all()


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("place", [2.25, 3.0, -0.5], ids=["between pixels", "on a pixel", "outside"])
def test_tiny_exact_means(backend, size, place):
    """The value of the surface where the box is, and slopes of it: by its beginning as much as by its end."""
    rng = np.random.default_rng(4)
    image = rng.uniform(-1, 1, (1, 2, 6, 7))
    boxes = np.array([[0, place, 1.375, place + size, 1.375 + size]])
    arrays = {"input": image, "boxes": boxes}
    want = reference.prroi_pool(**arrays, output_size=2)
    output = run(backend, "prroi_pool", arrays, {"output_size": 2})
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-14 + 1e-15 / size)
    grads = run_backward(backend, "prroi_pool", np.ones_like(output), arrays, {"output_size": 2})
    wanted = reference.prroi_pool_backward(np.ones_like(output), **arrays, output_size=2)
    for name in ("input", "boxes"):
        np.testing.assert_allclose(grads[name], wanted[name], rtol=0, atol=1e-13 + 1e-14 / size)


@pytest.mark.parametrize("operator", ["prroi_pool", "roi_align", "roi_align aligned", "roi_align max"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_of_far_boxes(backend, operator, dtype):
    """Are finite, and zero where the image is constant around all that is read."""
    operator, _, how = operator.partition(" ")
    options = {"output_size": (1, 2)} | {"aligned": {"aligned": True}, "max": {"mode": "max"}}.get(how, {})
    needs = {"needs": ("input", "boxes")} if operator == "roi_align" else {}
    rows = [(0, 1.25, 1.5, 3.75, 4.0)]
    for far in (1e5, 1e9, 1e30, 1e38):
        rows += [(0, -far, -far, far, far), (0, 1, 2, far, far), (0, -far, 1, 3, 4), (0, far, far, -far, -far)]
        rows += [(0, far, far, 1.5 * far, 1.5 * far)]
    arrays = {"input": np.full((1, 2, 6, 7), 3.0, dtype), "boxes": np.array(rows, dtype)}
    grad_output = np.ones((len(rows), 2, 1, 2), dtype)
    grads = run_backward(backend, operator, grad_output, arrays, {**options, **needs})
    assert np.isfinite(grads["boxes"]).all()
    assert np.abs(grads["boxes"][0]).max() < 1e-5
    assert not grads["boxes"][:, 0].any()

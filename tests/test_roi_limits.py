"""RoI pooling past the limits inside the CPU kernels: long lists of pixels, many bins, many points, several threads.

tests/test_cuda_roi.py has the like for the CUDA kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.cpu import _roi_bins, _roi_common
from pydeform.cpu._simd_bands import BAND
from tests.conftest import Backend, assert_same_bits
from tests.test_roi import CORNERS, IN_SIZE, Variant, assert_equals_oracle, assert_same_grads, problem, solve
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
    assert 28 * 28 > _roi_common.LISTED
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
    assert points > _roi_bins.MANY_POINTS
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

"""What must hold for rotated boxes, for exact means and for gradients of boxes, beside what test_properties_roi.py has.

In float64, with boxes of any numbers, so that nothing lies exactly where something changes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_properties_roi import Problem
from tests.test_roi import Variant, problem

WITH_GRADIENT = {"prroi_pool": {}, "roi_align": {"sampling_ratio": 2}, "roi_align aligned": {"aligned": True}}
with_gradient = pytest.mark.parametrize("kind", WITH_GRADIENT)
of_boxes = pytest.mark.parametrize("kind", ["roi_align_rotated", *WITH_GRADIENT, "roi_align max"])
SEEDS = st.integers(0, 999)


def drawn(data: st.DataObject, kind: str, inside: bool = False, **options: Any) -> Problem:
    """Boxes in any place, or at least a pixel long and read from within the image, however they are turned."""
    operator = kind.partition(" ")[0]
    options = {"output_size": data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), **options}
    options |= {"spatial_scale": data.draw(st.sampled_from([0.5, 1.0, 2.0])), **WITH_GRADIENT.get(kind, {})}
    if kind == "roi_align max":
        options |= {"sampling_ratio": 2, "mode": "max"}
    if operator == "roi_align_rotated":
        options = {"sampling_ratio": data.draw(st.integers(0, 3)), "clockwise": data.draw(st.booleans()), **options}
    seed, size = data.draw(SEEDS), (data.draw(st.integers(8, 10)), data.draw(st.integers(8, 10)))
    rng = np.random.default_rng(seed)
    if inside:
        begin = rng.uniform(2.5, 3.5, (2, 2))
        corners = np.concatenate([begin, begin + rng.uniform(1.2, 2.5, (2, 2))], axis=1)
    else:
        corners = rng.uniform(-3, 11, (data.draw(st.integers(1, 3)), 4))
    variant = Variant(operator, options, data.draw(st.sampled_from([1, 2, 5])), needs_boxes=operator == "roi_align")
    arrays, grad_output = problem(variant, "float64", corners, 2, size, seed)
    if operator == "roi_align_rotated":
        arrays["boxes"][:, 5] = rng.uniform(-4, 4, len(corners))
    return Problem(variant, arrays, grad_output)


def assert_near(got: Any, want: Any, *others: Any) -> None:
    """To the rounding of sums whose terms are as large as `others`."""
    largest = max([1.0, *(float(np.abs(a).max(initial=0)) for a in (want, *others))])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * largest)


def assert_results_near(got: Any, output: Any, grad_input: Any) -> None:
    assert_near(got[0], output)
    assert_near(got[1]["input"], grad_input)


def scaled(p: Problem, factor: float) -> Problem:
    """Coordinates times a factor, which spatial_scale takes away again."""
    boxes = p.arrays["boxes"].copy()
    boxes[:, 1:5] *= factor
    return p.changed(boxes=boxes).with_options(spatial_scale=p.variant.options["spatial_scale"] / factor)


@of_boxes
@given(st.data(), st.sampled_from([0.5, 4.0]))
@settings(max_examples=8)
def test_coordinates_and_their_scale(backend, kind, data, factor):
    """Twice the coordinates and half of spatial_scale: the same bits, and half the gradient of boxes."""
    p = drawn(data, kind)
    (output, grads), (got, got_grads) = p.solve(backend), scaled(p, factor).solve(backend)
    np.testing.assert_array_equal(got, output)
    np.testing.assert_array_equal(got_grads["input"], grads["input"])
    if p.variant.moves_boxes:
        np.testing.assert_array_equal(got_grads["boxes"] * factor, grads["boxes"])


@of_boxes
@given(st.data())
@settings(max_examples=8)
def test_the_batch_index_has_no_gradient(backend, kind, data):
    p = drawn(data, kind)
    grad = p.solve(backend)[1]["boxes"]
    assert grad is None if kind == "roi_align_rotated" else (not grad[:, 0].any() and grad.shape == (len(grad), 5))


# Of images that are turned with their boxes ---------------------------------------------------------------------------


def mirrored(p: Problem) -> Problem:
    """Left for right; pixel centres lie at integers, or half a pixel further where boxes are aligned."""
    boxes, scale = p.arrays["boxes"].copy(), p.variant.options["spatial_scale"]
    width = p.arrays["input"].shape[3]
    if p.variant.operator == "roi_align_rotated":
        boxes[:, 1] = (width if p.variant.options.get("aligned", True) else width - 1) / scale - boxes[:, 1]
        boxes[:, 5] *= -1
    else:
        boxes[:, [1, 3]] = (width if p.variant.options.get("aligned") else width - 1) / scale - boxes[:, [3, 1]]
    return p.changed(boxes=boxes, input=p.arrays["input"][..., ::-1])._replace(grad_output=p.grad_output[..., ::-1])


@pytest.mark.parametrize("kind", ["roi_align_rotated", *WITH_GRADIENT])
@given(st.data(), st.booleans())
@settings(max_examples=10)
def test_in_a_mirror(backend, kind, data, aligned):
    """An unaligned box that is thinner than a pixel grows to the right alone: those are inside, and larger."""
    options = {"aligned": aligned} if kind == "roi_align_rotated" else {}
    p = drawn(data, kind, inside=kind == "roi_align", **options)
    (output, grads), got = p.solve(backend), mirrored(p).solve(backend)
    assert_results_near(got, output[..., ::-1], grads["input"][..., ::-1])
    if p.variant.moves_boxes:
        assert_near(got[1]["boxes"][:, [3, 2, 1, 4]] * [-1, 1, -1, 1], grads["boxes"][:, 1:])


@of_boxes
@given(st.data())
@settings(max_examples=10)
def test_rows_for_columns(backend, kind, data):
    p = drawn(data, kind)
    boxes = p.arrays["boxes"][:, [0, 2, 1, 4, 3, 5][: p.arrays["boxes"].shape[1]]]
    boxes[:, 5:] *= -1
    other = p.changed(boxes=boxes, input=p.arrays["input"].swapaxes(2, 3))
    other = other.with_options(output_size=p.variant.pooled[::-1])._replace(grad_output=p.grad_output.swapaxes(2, 3))
    (output, grads), got = p.solve(backend), other.solve(backend)
    assert_near(got[0], output.swapaxes(2, 3))
    if kind != "roi_align max":  # of equal points the first, row by row: of another one's turn
        assert_near(got[1]["input"], grads["input"].swapaxes(2, 3))
    if p.variant.moves_boxes and kind != "roi_align max":
        assert_near(got[1]["boxes"][:, [0, 2, 1, 4, 3]], grads["boxes"])


@given(st.data())
@settings(max_examples=10)
def test_a_quarter_turn_of_image_and_box(backend, data):
    """np.rot90 turns as positive angles do: counterclockwise, as the image is seen."""
    p = drawn(data, "roi_align_rotated", clockwise=False)
    boxes, (*_, width) = p.arrays["boxes"].copy(), p.arrays["input"].shape
    boxes[:, 1], boxes[:, 2] = boxes[:, 2].copy(), width / p.variant.options["spatial_scale"] - boxes[:, 1]
    boxes[:, 5] += math.pi / 2
    other = p.changed(boxes=boxes, input=np.rot90(p.arrays["input"], axes=(2, 3)))
    (output, grads), got = p.solve(backend), other.solve(backend)
    assert_results_near(got, output, np.rot90(grads["input"], axes=(2, 3)))


# Of rotated boxes -----------------------------------------------------------------------------------------------------


def with_angles(p: Problem, change: Any) -> Problem:
    boxes = p.arrays["boxes"].copy()
    boxes[:, 5] = change(boxes[:, 5])
    return p.changed(boxes=boxes)


@given(st.data(), st.booleans())
@settings(max_examples=12)
def test_no_angle_is_roi_align(backend, data, aligned):
    """Boxes that roi_align makes larger stay where they begin there, but in their middle here: none of these is."""
    p = with_angles(drawn(data, "roi_align_rotated", inside=not aligned, aligned=aligned), np.zeros_like)
    _, x, y, w, h, _ = p.arrays["boxes"].T
    upright = np.stack([p.arrays["boxes"][:, 0], x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    options = {name: value for name, value in p.variant.options.items() if name != "clockwise"}
    plain = Problem(p.variant._replace(operator="roi_align", options=options), dict(p.arrays), p.grad_output)
    output, grads = p.solve(backend)
    assert_results_near(plain.changed(boxes=upright).solve(backend), output, grads["input"])


@given(st.data())
@settings(max_examples=8)
def test_clockwise_negates_angles(backend, data):
    """To the last bit."""
    p = drawn(data, "roi_align_rotated", clockwise=False)
    (output, grads), other = p.solve(backend), with_angles(p, np.negative).with_options(clockwise=True)
    got, got_grads = other.solve(backend)
    np.testing.assert_array_equal(got, output)
    np.testing.assert_array_equal(got_grads["input"], grads["input"])


@given(st.data(), st.sampled_from([-1, 1, 3]))
@settings(max_examples=8)
def test_whole_turns_change_nothing(backend, data, turns):
    p = drawn(data, "roi_align_rotated")
    output, grads = p.solve(backend)
    turned = with_angles(p, lambda angles: angles + turns * 2 * math.pi)
    assert_results_near(turned.solve(backend), output, grads["input"])


@given(st.data(), st.booleans())
@settings(max_examples=10)
def test_half_a_turn_reverses_the_bins(backend, data, by_sizes):
    """So do negative sizes, of as many points as are asked for."""
    p = drawn(data, "roi_align_rotated", sampling_ratio=2)
    if by_sizes:
        boxes = p.arrays["boxes"].copy()
        boxes[:, 3:5] *= -1
        other = p.changed(boxes=boxes)
    else:
        other = with_angles(p, lambda angles: angles + math.pi)
    other = other._replace(grad_output=p.grad_output[..., ::-1, ::-1])
    output, grads = p.solve(backend)
    assert_results_near(other.solve(backend), output[..., ::-1, ::-1], grads["input"])


@given(st.data(), st.integers(1, 3))
@settings(max_examples=8)
def test_a_bin_is_the_mean_of_its_parts(backend, data, points):
    """Each point of a bin as a bin with a point."""
    p = drawn(data, "roi_align_rotated", sampling_ratio=points)
    rows, columns = p.variant.pooled
    parts = p.with_options(output_size=(rows * points, columns * points), sampling_ratio=1)
    of_parts = parts.output(backend).reshape(*p.grad_output.shape[:2], rows, points, columns, points)
    assert_near(p.output(backend), of_parts.mean(axis=(3, 5)))


@given(st.data())
@settings(max_examples=8)
def test_a_rotated_box_of_no_size(backend, data):
    """Every bin is the value at its centre, where a single point of a box of any size lies."""
    p = drawn(data, "roi_align_rotated", sampling_ratio=2)
    boxes = p.arrays["boxes"].copy()
    boxes[:, 3:5] = 0
    want = p.with_options(output_size=1, sampling_ratio=1).output(backend)
    assert_near(p.changed(boxes=boxes).output(backend), np.broadcast_to(want, p.grad_output.shape))
    assert not p.changed(boxes=boxes).with_options(sampling_ratio=0).output(backend).any()


# Of exact means -------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=10)
def test_bins_add_up(backend, data):
    """The mean over a box is that over its bins, and the gradient of the box that of as many equal shares."""
    p = drawn(data, "prroi_pool")
    count = math.prod(p.variant.pooled)
    g = p.grad_output[:, :, :1, :1]
    shares = p._replace(grad_output=np.broadcast_to(g / count, p.grad_output.shape))
    whole = p.with_options(output_size=1)._replace(grad_output=g)
    (output, grads), (got, got_grads) = shares.solve(backend), whole.solve(backend)
    assert_near(got, output.mean(axis=(2, 3), keepdims=True))
    assert_near(got_grads["input"], grads["input"])
    assert_near(got_grads["boxes"], grads["boxes"])


@given(st.data())
@settings(max_examples=10)
def test_a_bin_is_a_box_of_its_own(backend, data):
    p = drawn(data, "prroi_pool", inside=True)
    rows, columns = p.variant.pooled
    index, x1, y1, x2, y2 = p.arrays["boxes"].T
    for py, px in np.ndindex(rows, columns):
        left, right = (x1 + (x2 - x1) * i / columns for i in (px, px + 1))
        top, bottom = (y1 + (y2 - y1) * i / rows for i in (py, py + 1))
        own = np.stack([index, left, top, right, bottom], axis=1)
        alone = p.changed(boxes=own).with_options(output_size=1).output(backend)
        assert_near(alone[:, :, 0, 0], p.output(backend)[:, :, py, px])


@given(st.data(), st.integers(1, 3))
@settings(max_examples=10)
def test_zeros_around_the_image(backend, data, more):
    """The surface fades to zero within a pixel, where there are zeros or nothing at all."""
    p = drawn(data, "prroi_pool")
    boxes = p.arrays["boxes"].copy()
    boxes[:, 1:] += more / p.variant.options["spatial_scale"]
    image = np.pad(p.arrays["input"], ((0, 0), (0, 0), (more, more), (more, more)))
    (output, grads), got = p.solve(backend), p.changed(boxes=boxes, input=image).solve(backend)
    around = slice(more, -more)
    assert_near(got[0], output)
    assert_near(got[1]["input"][:, :, around, around], grads["input"])
    assert_near(got[1]["boxes"], grads["boxes"])


@given(st.data(), st.sampled_from([(1, 3), (2, 4)]), st.sampled_from([0.0, -1.5]))
@settings(max_examples=8)
def test_no_area_reads_nothing(backend, data, axis, size):
    """Boxes without size or upside down have the mean 0 and no gradient."""
    p = drawn(data, "prroi_pool")
    boxes = p.arrays["boxes"].copy()
    boxes[:, axis[1]] = boxes[:, axis[0]] + size
    output, grads = p.changed(boxes=boxes).solve(backend)
    assert not output.any() and not grads["input"].any() and not grads["boxes"].any()


@given(st.data())
@settings(max_examples=6)
def test_many_points_come_near_the_exact_mean(backend, data):
    """Of roi_align, whose points are the midpoint rule: four times as near with twice as many."""
    p = drawn(data, "prroi_pool", inside=True)
    output = p.output(backend)
    errors = []
    for points in (16, 64):
        plain = p._replace(variant=p.variant._replace(operator="roi_align")).with_options(sampling_ratio=points)
        errors.append(np.abs(plain.output(backend) - output).max())
    slopes = np.abs(np.diff(p.arrays["input"])).max()
    assert errors[0] < 3 * slopes / 16**2 and errors[1] < 3 * slopes / 64**2


# Of gradients of boxes ------------------------------------------------------------------------------------------------


@with_gradient
@given(st.data(), st.integers(-3, 3), st.integers(-3, 3))
@settings(max_examples=10)
def test_on_a_ramp_each_corner_has_its_share(backend, kind, data, slope_x, slope_y):
    """Its value in the middle of a bin, whose place is (1 - part) of one corner and part of the other."""
    p = drawn(data, kind, inside=True)
    (*_, height, width), scale = p.arrays["input"].shape, p.variant.options["spatial_scale"]
    ramp = slope_y * np.arange(float(height))[:, None] + slope_x * np.arange(width)
    output, grads = p.changed(input=np.broadcast_to(ramp, p.arrays["input"].shape).copy()).solve(backend)
    parts_y, parts_x = ((np.arange(n) + 0.5) / n for n in p.variant.pooled)
    _, x1, y1, x2, y2 = p.arrays["boxes"].T[..., None] * scale - (0.5 if p.variant.options.get("aligned") else 0)
    xs, ys = x1 + (x2 - x1) * parts_x, y1 + (y2 - y1) * parts_y
    assert_near(output, np.broadcast_to((slope_y * ys[:, :, None] + slope_x * xs[:, None])[:, None], output.shape))
    g = p.grad_output.sum(axis=1)
    of_x, of_y = slope_x * scale * g.sum(axis=1), slope_y * scale * g.sum(axis=2)
    want = [of_x @ (1 - parts_x), of_y @ (1 - parts_y), of_x @ parts_x, of_y @ parts_y]
    assert_near(grads["boxes"][:, 1:], np.stack(want, axis=1), p.grad_output)


@with_gradient
@given(st.data())
@settings(max_examples=10)
def test_a_bilinear_image_has_the_gradient_of_its_formula(backend, kind, data):
    """x * y, which is linear between pixels on each axis: moving a box as a whole adds the other coordinate's mean."""
    p = drawn(data, kind, inside=True)
    (*_, height, width), scale = p.arrays["input"].shape, p.variant.options["spatial_scale"]
    image = np.broadcast_to(np.outer(np.arange(height), np.arange(width)).astype(float), p.arrays["input"].shape)
    ones = p._replace(grad_output=np.ones_like(p.grad_output)).changed(input=image.copy())
    grads = ones.solve(backend)[1]["boxes"]
    _, x1, y1, x2, y2 = p.arrays["boxes"].T * scale - (0.5 if p.variant.options.get("aligned") else 0)
    count = math.prod(p.grad_output.shape[1:]) * scale
    assert_near(grads[:, 1] + grads[:, 3], count * (y1 + y2) / 2)
    assert_near(grads[:, 2] + grads[:, 4], count * (x1 + x2) / 2)


@with_gradient
@given(st.data())
@settings(max_examples=8)
def test_gradients_of_boxes_are_linear(backend, kind, data):
    """In what comes back and in the image."""
    p = drawn(data, kind)
    rng = np.random.default_rng(1)
    u, v = p.grad_output, rng.integers(-16, 17, p.grad_output.shape) / 8
    a, b = p.arrays["input"], rng.integers(-16, 17, p.arrays["input"].shape) / 8

    def grad(g: Any, image: Any) -> np.ndarray:
        return p.changed(input=image)._replace(grad_output=g).solve(backend)[1]["boxes"]

    assert_near(grad(2 * u - 3 * v, a), 2 * grad(u, a) - 3 * grad(v, a))
    assert_near(grad(u, 2 * a - 3 * b), 2 * grad(u, a) - 3 * grad(u, b))


@of_boxes
@given(st.data())
@settings(max_examples=8)
def test_a_constant_image_moves_no_box(backend, kind, data):
    """Wherever nothing but the image is read."""
    p = drawn(data, kind, inside=True)
    output, grads = p.changed(input=np.full_like(p.arrays["input"], 2.5)).solve(backend)
    assert_near(output, np.full_like(output, 2.5))
    if p.variant.moves_boxes:
        assert_near(grads["boxes"], np.zeros_like(grads["boxes"]))


@given(st.data())
@settings(max_examples=8)
def test_half_a_pixel_is_all_that_alignment_changes(backend, data):
    """Of boxes of a least size of 1."""
    p = drawn(data, "roi_align", inside=True)
    boxes = p.arrays["boxes"].copy()
    boxes[:, 1:] += 0.5 / p.variant.options["spatial_scale"]
    (output, grads), got = p.solve(backend), p.changed(boxes=boxes).with_options(aligned=True).solve(backend)
    assert_results_near(got, output, grads["input"])
    assert_near(got[1]["boxes"], grads["boxes"])


@given(st.data())
@settings(max_examples=8)
def test_a_maximum_of_one_point_is_its_value(backend, data):
    p = drawn(data, "roi_align").with_options(sampling_ratio=1)
    (output, grads), got = p.solve(backend), p.with_options(mode="max").solve(backend)
    assert_results_near(got, output, grads["input"])
    assert_near(got[1]["boxes"], grads["boxes"])


@given(st.data())
@settings(max_examples=8)
def test_a_box_below_its_least_size_moves_with_its_beginning(backend, data):
    """Not aligned and shorter than a pixel: its end moves nothing."""
    p = drawn(data, "roi_align")
    pixel, begins = 1 / p.variant.options["spatial_scale"], p.arrays["boxes"][:, :3]
    sizes = np.random.default_rng(2).uniform(-3, 0.9, (len(begins), 2)) * pixel
    short, one = (
        p.changed(boxes=np.concatenate([begins, begins[:, 1:] + size], axis=1)).solve(backend)[1]["boxes"]
        for size in (sizes, pixel + 1e-9)
    )
    assert not short[:, 3:].any()
    of_both = one[:, 1:3] + one[:, 3:]
    np.testing.assert_allclose(short[:, 1:3], of_both, rtol=0, atol=1e-6 * max(1, np.abs(of_both).max()))

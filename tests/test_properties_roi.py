"""What must hold for any RoI problem: hypothesis draws the boxes, every draw is the same in each run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.deform_conv2d import dtype_of
from tests.conftest import assert_close, assert_same_bits
from tests.test_roi import DTYPES, OPERATORS, Variant, assert_equals_oracle, boxes_of, problem, reached, run, solve

ALL = tuple(OPERATORS)
DEFORMABLE = ("deform_roi_pool", "deform_psroi_pool")


class Problem(NamedTuple):
    variant: Variant
    arrays: dict[str, Any]
    grad_output: Any

    @property
    def dtype(self) -> str:
        return self.grad_output.dtype.name

    def changed(self, **arrays: Any) -> Problem:
        return self._replace(arrays={**self.arrays, **arrays})

    def with_options(self, **options: Any) -> Problem:
        return self._replace(variant=self.variant._replace(options={**self.variant.options, **options}))

    def output(self, backend: Any) -> np.ndarray:
        return run(backend, self.variant.operator, self.arrays, self.variant.options)

    def solve(self, backend: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return solve(backend, self.variant, self.arrays, self.grad_output)

    @property
    def offset_name(self) -> str:
        return self.variant.offset_name or ""


def corner(size: int) -> st.SearchStrategy[float]:
    """Multiples of 1/8 before, in and past the image, those at its border more often."""
    border = st.sampled_from([-1.0, -0.5, 0.0, size - 1.0, size - 0.5, float(size)])
    return st.one_of(border, st.integers(-8 * 4, 8 * (size + 4)).map(lambda eighths: eighths / 8))


def inner(draw: Any, size: int) -> tuple[float, float]:
    """Both ends of a box that is inside, whatever an operator rounds, and at least a pixel long."""
    begin = draw(st.integers(8, 8 * (size - 4)))
    return begin / 8, draw(st.integers(begin + 8, 8 * (size - 3))) / 8


@st.composite
def variants(draw, operators=ALL, modes=("avg", "max"), offset=None, mask=None):
    """Numbers of bins and points are powers of two, so that with corners in eighths every coordinate is exact."""
    operator = draw(st.sampled_from(operators))
    few = st.sampled_from([1, 2, 4])
    options: dict[str, Any] = {"spatial_scale": draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))}
    classes = 1
    channels = draw(st.sampled_from([1, 2, 5]))
    if operator == "deform_psroi_pool":
        classes = draw(st.integers(1, 3))
        channels = classes * draw(st.sampled_from([1, 2, 5]))
        options |= {"output_dim": channels, "pooled_size": draw(few), "group_size": draw(st.integers(1, 3))}
        options |= {"sample_per_part": draw(few), "trans_std": draw(st.sampled_from([0.125, 1.0]))}
        options["part_size"] = draw(st.sampled_from([None, 1, 3]))
    else:
        options["output_size"] = (draw(few), draw(few))
    if operator in ("roi_align", "ps_roi_align", "deform_roi_pool", "roi_align_rotated"):
        options["sampling_ratio"] = draw(few)
    if operator == "roi_align":
        options |= {"aligned": draw(st.booleans()), "mode": draw(st.sampled_from(modes))}
    if operator == "roi_align_rotated":
        options |= {"aligned": draw(st.booleans()), "clockwise": draw(st.booleans())}
    if operator == "ps_roi_pool":
        options["convention"] = draw(st.sampled_from(["torchvision", "rfcn"]))
    if operator == "deform_roi_pool":
        options["gamma"] = draw(st.sampled_from([0.125, 1.0]))
    has = [draw(st.booleans()) if given is None else given for given in (offset, mask)]
    return Variant(
        operator, options, channels, classes, *has, needs_boxes=operator == "roi_align" and draw(st.booleans())
    )


@st.composite
def problems(draw, least_boxes=0, inside=False, dtypes=DTYPES, **kinds):
    variant = draw(variants(**kinds))
    size = draw(st.integers(7, 9)), draw(st.integers(7, 9))
    if not inside:
        size = draw(st.sampled_from([size, (1, 5), (2, 1), (3, 4)]))
    corners = []
    for _ in range(draw(st.integers(least_boxes, 4))):
        if inside:
            (y1, y2), (x1, x2) = inner(draw, size[0]), inner(draw, size[1])
            corners.append((x1, y1, x2, y2))
        else:
            corners.append(tuple(draw(corner(size[axis])) for axis in (1, 0, 1, 0)))
    if inside and variant.operator in ("roi_pool", "ps_roi_pool", "deform_psroi_pool"):
        # These round before or after they scale: with a scale of 1 a box that is inside stays so.
        variant = variant._replace(options={**variant.options, "spatial_scale": 1.0})
    batch = draw(st.integers(1, 2))
    arrays, grad_output = problem(
        variant, draw(st.sampled_from(dtypes)), corners, batch, size, draw(st.integers(0, 99))
    )
    if inside and variant.operator == "roi_align_rotated":  # so small that it is, however it is turned
        arrays["boxes"][:, 3:5] = times(arrays["boxes"][:, 3:5], 0.25)
    return Problem(variant, arrays, grad_output)


@st.composite
def adaptive_problems(draw):
    """float64, and corners that are no fractions: nothing lies exactly where the number of points changes."""
    operator = draw(st.sampled_from(["roi_align", "ps_roi_align", "deform_roi_pool", "roi_align_rotated"]))
    options: dict[str, Any] = {"output_size": (draw(st.integers(1, 3)), draw(st.integers(1, 3)))}
    options["spatial_scale"] = draw(st.sampled_from([0.3, 1.0]))
    if operator == "roi_align":
        options |= {"aligned": draw(st.booleans()), "mode": draw(st.sampled_from(["avg", "max"]))}
    if operator == "roi_align_rotated":
        options |= {"aligned": draw(st.booleans()), "clockwise": draw(st.booleans())}
    variant = Variant(operator, options, draw(st.integers(1, 5)), offset=draw(st.booleans()), mask=draw(st.booleans()))
    seed = draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-4, 12, (draw(st.integers(0, 4)), 4))
    arrays, grad_output = problem(variant, "float64", corners, draw(st.integers(1, 2)), (6, 8), seed)
    if arrays.get("offset") is not None:
        arrays["offset"] = rng.normal(0, 1, arrays["offset"].shape)
    return Problem(variant, arrays, grad_output)


def each_grad(p: Problem) -> list[str]:
    """Names of the gradients that there are."""
    names = "input", *p.variant.of_boxes
    return [name for name in names if p.arrays[name] is not None]


def assert_equal(got: Any, want: Any, what: str = "") -> None:
    """To the last bit, but for the sign of a zero."""
    assert got.dtype == want.dtype, what
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64), err_msg=what)


def times(array: Any, factor: float) -> Any:
    return (array.astype(np.float64) * factor).astype(array.dtype)


@given(problems())
@settings(max_examples=60)
def test_random_problems_against_the_oracle(backend, p):
    """Boxes inside, across the border, upside down, without area, on the last row; everything at once."""
    assert_equals_oracle(backend, p.variant, p.arrays, p.grad_output, p.dtype)


@given(adaptive_problems())
@settings(max_examples=40)
def test_random_adaptive_problems_against_the_oracle(backend, p):
    assert_equals_oracle(backend, p.variant, p.arrays, p.grad_output, "float64")


@given(problems(inside=True, least_boxes=1, offset=False, mask=False), st.sampled_from([-2.5, 0.0, 1.0]))
def test_a_constant_image_pools_to_the_constant(backend, p, constant):
    image = np.full_like(p.arrays["input"], constant)
    output = p.changed(input=image).output(backend)
    assert_close(output, np.full(output.shape, constant), p.dtype)


@given(
    problems(inside=True, least_boxes=1, offset=False, dtypes=("float64", "float32")),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_whole_pixels_of_shift_change_nothing(backend, p, dy, dx):
    """The image in a larger one, and its boxes with it."""
    image, boxes = p.arrays["input"], p.arrays["boxes"].copy()
    *_, height, width = image.shape
    larger = np.full((*image.shape[:2], height + dy + 2, width + dx + 1), 7, image.dtype)
    larger[:, :, dy : dy + height, dx : dx + width] = image
    move = [dx, dy, 0, 0, 0] if p.variant.operator == "roi_align_rotated" else [dx, dy, dx, dy]
    boxes[:, 1:] += np.array(move, boxes.dtype) / p.variant.options["spatial_scale"]
    output, grads = p.solve(backend)
    moved_output, moved_grads = p.changed(input=larger, boxes=boxes).solve(backend)
    assert_close(moved_output, output.astype(np.float64), p.dtype)
    if p.variant.moves_boxes:
        assert_close(moved_grads["boxes"], grads["boxes"].astype(np.float64), p.dtype)
    inner = moved_grads["input"][:, :, dy : dy + height, dx : dx + width].copy()
    assert_close(inner, grads["input"].astype(np.float64), p.dtype)
    moved_grads["input"][:, :, dy : dy + height, dx : dx + width] = 0
    assert not moved_grads["input"].any()


@given(problems(operators=DEFORMABLE, offset=True, dtypes=("float64", "float32")), st.booleans())
def test_zero_offsets_are_none(backend, p, by_scale):
    """Zero offsets, or offsets of any size of which none counts."""
    if by_scale:
        still = p.with_options(**{"gamma" if p.offset_name == "offset" else "trans_std": 0.0})
    else:
        still = p.changed(**{p.offset_name: np.zeros_like(p.arrays[p.offset_name])})
    output, grads = still.solve(backend)
    want, want_grads = p.changed(**{p.offset_name: None}).solve(backend)
    assert_equal(output, want)
    assert_close(grads["input"], want_grads["input"].astype(np.float64), p.dtype)
    if by_scale:
        assert not grads[p.offset_name].any()


@given(problems(operators=("deform_roi_pool",), offset=False, mask=False))
def test_deform_roi_pool_without_offset_is_roi_align(backend, p):
    options = {name: value for name, value in p.variant.options.items() if name != "gamma"}
    plain = Problem(
        p.variant._replace(operator="roi_align", options={**options, "aligned": True}),
        {name: p.arrays[name] for name in ("input", "boxes")},
        p.grad_output,
    )
    output, grads = p.solve(backend)
    want, want_grads = plain.solve(backend)
    assert_same_bits(output, want)
    assert_same_bits(grads["input"], want_grads["input"])


@given(problems(least_boxes=2))
def test_a_box_depends_on_its_own_image_and_on_no_other_box(backend, p):
    output, grads = p.solve(backend)
    own = slice(0, 1)
    arrays = {name: None if a is None else a.copy() for name, a in p.arrays.items()}
    grad_output = p.grad_output.copy()
    arrays["input"][1:] = 3
    arrays["boxes"][1:, 1:] = arrays["boxes"][:-1, 1:].copy()
    for name in (p.offset_name, "mask"):
        if arrays.get(name) is not None:
            arrays[name][1:] = 1
    grad_output[1:] = 2
    other_output, other_grads = Problem(p.variant, arrays, grad_output).solve(backend)
    assert_same_bits(other_output[own], output[own])
    for name in each_grad(p):
        if name != "input":
            assert_same_bits(other_grads[name][own], grads[name][own], name)


@given(problems(), st.sampled_from([2.0, 0.25, 8.0]))
def test_scaling_the_image_scales_the_output(backend, p, factor):
    """By powers of two, so without any rounding. The input's gradient does not change, for a maximum neither."""
    output, grads = p.solve(backend)
    got, got_grads = p.changed(input=times(p.arrays["input"], factor)).solve(backend)
    assert_equal(got, times(output, factor))
    for name in each_grad(p):
        assert_equal(got_grads[name], grads[name] if name == "input" else times(grads[name], factor), name)


@given(problems(modes=("avg",), operators=[name for name in ALL if name != "roi_pool"], dtypes=("float64",)))
def test_means_are_linear_in_the_image(backend, p):
    """f(2a - 3b) = 2 f(a) - 3 f(b)."""
    a = p.arrays["input"]
    b = np.random.default_rng(4).integers(-16, 17, a.shape) / 4
    parts = [p.changed(input=image).output(backend) for image in (a, b)]
    whole = p.changed(input=2 * a - 3 * b).output(backend)
    assert_close(whole, 2 * parts[0] - 3 * parts[1], "float64")


@given(problems(operators=DEFORMABLE, mask=True))
def test_a_mask_of_ones_is_no_mask(backend, p):
    output, grads = p.changed(mask=np.ones_like(p.arrays["mask"])).solve(backend)
    want, want_grads = p.changed(mask=None).solve(backend)
    assert_equal(output, want)
    for name in each_grad(p):
        if name != "mask":
            assert_equal(grads[name], want_grads[name], name)


@given(problems(operators=DEFORMABLE, mask=True), st.sampled_from([-2.0, 0.25, 8.0]))
def test_scaling_the_mask_scales_the_output(backend, p, factor):
    """By powers of two, so without any rounding; the mask's own gradient does not change."""
    output, grads = p.solve(backend)
    got, got_grads = p.changed(mask=times(p.arrays["mask"], factor)).solve(backend)
    assert_equal(got, times(output, factor))
    for name in each_grad(p):
        assert_equal(got_grads[name], grads[name] if name == "mask" else times(grads[name], factor), name)


@given(problems(least_boxes=1), st.sampled_from([(20, 0), (0, 20), (-30, -30), (25, -30)]))
def test_boxes_outside_are_zero(backend, p, shift):
    """A box of the image's size, far away, whatever its offsets."""
    height, width = p.arrays["input"].shape[2:]
    if (name := p.offset_name) and p.arrays[name] is not None:
        p = p.changed(**{name: np.clip(p.arrays[name], -0.5, 0.5)})
    boxes = p.arrays["boxes"].copy()
    dx, dy = shift
    corners = np.array([[dx, dy, dx + width, dy + height]]) / p.variant.options["spatial_scale"]
    boxes[...] = boxes_of(p.variant.operator, boxes[:, :1].astype(float), np.repeat(corners, len(boxes), axis=0))
    output, grads = p.changed(boxes=boxes).solve(backend)
    assert not output.any()
    assert not any(grads[name].any() for name in each_grad(p))


@given(problems(modes=("avg",), operators=[name for name in ALL if name != "roi_pool"], dtypes=("float64", "float32")))
def test_the_backward_is_the_transpose(backend, p):
    """<f(v), u> = <v, gradient of u>. With v of ones: the gradient sums to what the bins cover of the image."""
    grads = p.solve(backend)[1]["input"].astype(np.float64)
    u = p.grad_output.astype(np.float64)
    rng = np.random.default_rng(8)
    for v in (np.ones(grads.shape), rng.integers(-16, 17, grads.shape) / 8):
        forward = p.changed(input=v.astype(dtype_of(p.dtype))).output(backend).astype(np.float64)
        left, right = float((forward * u).sum()), float((v * grads).sum())
        size = float(np.abs(forward * u).sum() + np.abs(v * grads).sum())
        assert abs(left - right) <= (1e-12 if p.dtype == "float64" else 1e-5) * size


@given(problems(inside=True, offset=False, mask=False, dtypes=("float64",)))
def test_inside_the_gradient_sums_to_that_of_the_output(backend, p):
    """Also for a maximum, where one pixel or the four around a point get all."""
    grad = p.solve(backend)[1]["input"]
    assert abs(grad.sum() - p.grad_output.sum()) <= 1e-12 * np.abs(p.grad_output).sum()


@given(problems(operators=("deform_psroi_pool",), offset=True, least_boxes=1))
def test_cells_that_move_no_bin_have_no_gradient(backend, p):
    grads = p.solve(backend)[1]["trans"]
    assert not grads[:, ~reached(p.variant, "trans")].any()

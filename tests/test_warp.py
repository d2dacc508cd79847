"""warp and its backward against the oracle, grid_sample and SciPy, and on awkward numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.gather import checked, halves, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import NOT_FINITE, PlacedTests, assert_results, both, each_dtype, stay
from tests.cases.grid import MODES, PADDINGS, Warp, normalised
from tests.conftest import assert_close, assert_same_bits
from tests.test_grid_sample import of

OPERATOR = "warp"
EVERY_MODE = [
    (size, m, p) for size in ((5, 9), (3, 2, 5)) for m in MODES for p in PADDINGS if (len(size), m) != (3, "bicubic")
]


class TestWarp(PlacedTests):
    operator = OPERATOR
    arguments = "input, displacement, mode='bilinear', padding_mode='zeros'"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_mode_at_kinks(backend, dtype):
    for size, mode, padding_mode in EVERY_MODE:
        problem = make(OPERATOR, Warp(size, 3, mode, padding_mode), dtype, halves)
        try:
            assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)
        except AssertionError as error:
            raise AssertionError(f"{size}, {mode}, {padding_mode}: {error}") from error


def test_every_mode_by_differences(backend):
    for size, mode, padding_mode in EVERY_MODE:
        problem = make(OPERATOR, Warp(size, 2, mode, padding_mode))
        forward, backward, arguments = checked(backend, problem)
        report = gradcheck(
            forward, backward, arguments, kinks={"displacement": stay}, kink_margin=0.002, elements=5, directions=1
        )
        assert list(report.checked) == ["input", "displacement"]


def test_slopes_at_kinks_by_differences(backend):
    """From the right on every whole number, the outermost too; under border from the side on which nothing moves."""
    problem = make(OPERATOR, Warp((4, 5)), draw=halves)
    rng = np.random.default_rng(2)
    whole = rng.integers(-1, 4, problem.arrays["displacement"].shape) - np.indices((4, 5))
    for padding_mode, side, other in (("zeros", "right", "left"), ("border", None, None)):
        at = problem.replaced(displacement=whole.astype(float))._replace(options={"padding_mode": padding_mode})
        if side is None:
            at = at.replaced(
                displacement=np.broadcast_to(-np.indices((4, 5)), whole.shape).astype(float)
            )  # all at 0, 0
            side, other = "left", "right"
        forward, backward, arguments = checked(backend, at)
        options = {"wrt": ("displacement",), "kinks": {"displacement": stay}}
        gradcheck(forward, backward, arguments, side=side, elements=99, **options)
        with pytest.raises(AssertionError, match="displacement"):
            gradcheck(forward, backward, arguments, side=other, elements=99, **options)


# Other ways to the same numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zeros", "border", "reflection", "nearest", "bicubic", "volume"])
def test_is_grid_sample_in_pixels(backend, name):
    problem = make(OPERATOR, name)
    image, displacement = problem.arrays.values()
    lengths = np.array(image.shape[2:])
    positions = np.moveaxis(displacement + np.indices(image.shape[2:]), 1, -1)
    grid = backend.array(np.ascontiguousarray(normalised(positions, lengths, True)))
    options = {**problem.options, "align_corners": True}
    sent = backend.array(image), grid
    output, grads = both(backend, problem)
    assert_close(output, backend.numpy(pydeform.grid_sample(*sent, **options)), "float64")
    of_grid = pydeform.grid_sample_backward(backend.array(problem.grad_output), *sent, **options)
    assert_close(grads["input"], backend.numpy(of_grid.input), "float64")
    in_pixels = np.moveaxis(backend.numpy(of_grid.grid)[..., ::-1] * 2 / (lengths - 1), -1, 1)
    assert_close(grads["displacement"], in_pixels, "float64")


@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
def test_is_scipys_map_coordinates(backend, size):
    """Linear interpolation with the three boundaries that both have, one channel after the other."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")
    for padding_mode, theirs in {"zeros": "grid-constant", "border": "nearest", "reflection": "mirror"}.items():
        problem = make(OPERATOR, Warp(size, 2, padding_mode=padding_mode))
        image, displacement = problem.arrays.values()
        got = run(backend, problem)
        for b, c in np.ndindex(image.shape[:2]):
            places = np.indices(size) + displacement[b]
            want = ndimage.map_coordinates(image[b, c], places, order=1, mode=theirs)
            np.testing.assert_allclose(got[b, c], want, rtol=1e-12, atol=1e-12, err_msg=padding_mode)


# By hand --------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("mode", MODES)
def test_nothing_moved_is_the_image(backend, mode, dtype):
    for padding_mode in PADDINGS:
        problem = make(OPERATOR, Warp((4, 3), 5, mode, padding_mode), dtype)
        still = problem.replaced(displacement=np.zeros_like(problem.arrays["displacement"]))
        output, grads = both(backend, still)
        np.testing.assert_array_equal(output, problem.arrays["input"])
        np.testing.assert_array_equal(grads["input"], problem.grad_output)


def test_axes_are_in_array_order(backend):
    image = np.arange(1.0, 25).reshape(1, 1, 2, 3, 4)
    for axis in range(3):
        displacement = np.zeros((1, 3, 2, 3, 4))
        displacement[:, axis] = 1
        got = pydeform.warp(backend.array(image), backend.array(displacement))
        want = np.zeros_like(image)
        here, there = [slice(None)] * 5, [slice(None)] * 5
        here[axis + 2], there[axis + 2] = slice(None, -1), slice(1, None)
        want[tuple(here)] = image[tuple(there)]
        np.testing.assert_array_equal(backend.numpy(got), want)


@each_dtype
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_what_is_not_finite(backend, mode, value, dtype):
    """One pixel's displacement along x; in a row of one pixel as well."""
    for padding_mode in PADDINGS:
        for width in (4, 1):
            problem = make(OPERATOR, Warp((3, width), 2, mode, padding_mode, 1), dtype)
            displacement = np.zeros_like(problem.arrays["displacement"])
            displacement[0, 1, 1, 0] = value
            problem = problem.replaced(displacement=displacement)
            output, grads = results = both(backend, problem)
            assert_results(problem, results, solve_oracle(problem), dtype)
            image, slopes = problem.arrays["input"], grads["displacement"][0, :, 1, 0]
            if math.isnan(value):
                assert np.isnan(output[0, :, 1, 0]).all() and np.isnan(slopes).all()
                assert np.isnan(output).sum() == 2 == np.isnan(grads["displacement"]).sum()
            elif padding_mode == "border":
                np.testing.assert_array_equal(output[0, :, 1, 0], image[0, :, 1, 0 if value < 0 else width - 1])
                assert slopes[1] == 0
            else:
                assert not output[0, :, 1, 0].any() and not slopes.any()


# Arguments ------------------------------------------------------------------------------------------------------------

WRONG = [
    ((of(2, 3, 5), of(2, 1, 5)), {}, ValueError, r"warp: input .*got \(2, 3, 5\)"),
    ((of(2, 3, 5, 4), of(2, 2, 5, 5)), {}, ValueError, r"warp: displacement .*\(2, 2, 5, 4\), got \(2, 2, 5, 5\)"),
    ((of(2, 3, 5, 4), of(2, 5, 4, 2)), {}, ValueError, r"warp: displacement .*\(2, 2, 5, 4\), got \(2, 5, 4, 2\)"),
    ((of(2, 3, 5, 4), of(1, 2, 5, 4)), {}, ValueError, r"warp: displacement .*\(2, 2, 5, 4\), got \(1, 2, 5, 4\)"),
    ((of(2, 3, 5, 4, 6), of(2, 2, 5, 4, 6)), {}, ValueError, r"warp: displacement .*\(2, 3, 5, 4, 6\), got"),
    ((of(2, 3, 5, 4, 6), of(2, 3, 5, 4, 6)), {"mode": "bicubic"}, ValueError, r"warp: .*bicubic"),
    ((of(2, 3, 5, 4), of(2, 2, 5, 4)), {"mode": "cubic"}, ValueError, r"warp: mode .*bicubic.*'cubic'"),
    ((of(2, 3, 5, 4), of(2, 2, 5, 4)), {"padding_mode": "mirror"}, ValueError, r"warp: padding_mode .*'mirror'"),
    ((of(2, 3, 5, 4), of(2, 2, 5, 4, dtype="float32")), {}, TypeError, r"warp: displacement .*float64.*float32"),
    ((of(2, 3, 5, 4, dtype="int32"), of(2, 2, 5, 4)), {}, TypeError, r"warp: input .*int32"),
]


@pytest.mark.parametrize(("arrays", "options", "error", "text"), WRONG)
def test_wrong_arguments(backend, arrays, options, error, text):
    sent = [backend.array(a) for a in arrays]
    with pytest.raises(error, match=text):
        pydeform.warp(*sent, **options)
    with pytest.raises(error, match=text.replace("warp: ", "warp_backward: ")):
        pydeform.warp_backward(backend.array(of(2, 3, 5, 4)), *sent, **options)


def test_wrong_gradient_of_the_output(backend):
    problem = make(OPERATOR, "zeros")
    sent = [backend.array(a) for a in problem.arrays.values()]
    with pytest.raises(ValueError, match="warp_backward: grad_output"):
        pydeform.warp_backward(backend.array(problem.grad_output[:, 1:]), *sent)


def test_one_displacement_for_every_image(backend):
    """By a stride of 0."""
    problem = make(OPERATOR, "reflection", "float32")
    shared = np.broadcast_to(problem.arrays["displacement"][:1], problem.arrays["displacement"].shape)
    got, want = (run(backend, problem.replaced(displacement=d)) for d in (shared, shared.copy()))
    assert_same_bits(got, want)
    got, want = (
        run_backward(backend, problem.replaced(displacement=d), deterministic=True) for d in (shared, shared.copy())
    )
    for name in ("input", "displacement"):
        assert_same_bits(got[name], want[name])

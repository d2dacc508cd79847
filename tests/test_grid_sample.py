"""grid_sample and its backward against the oracle, PyTorch and differences, in every mode, and on awkward numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.gather import (
    DTYPES,
    Problem,
    between_pixels,
    checked,
    halves,
    make,
    run,
    run_backward,
    solve_oracle,
)
from tests.cases.gather_tests import NOT_FINITE, PlacedTests, assert_results, both, each_dtype, stay
from tests.cases.grid import MODES, PADDINGS, Grid, every_mode, normalised
from tests.conftest import assert_close, assert_same_bits

OPERATOR = "grid_sample"
each_padding = pytest.mark.parametrize("padding_mode", PADDINGS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_axes = pytest.mark.parametrize("axes", [2, 3])


class TestGridSample(PlacedTests):
    operator = OPERATOR
    arguments = "input, grid, mode='bilinear', padding_mode='zeros', align_corners=False"


def at(positions: Any, image: np.ndarray, dtype: str = "float64", **options: Any) -> Problem:
    """Each position, (y, x) or (z, y, x) in pixels, in one image (channels, *lengths)."""
    positions, lengths = np.array(positions, float), image.shape[1:]
    case = Grid(lengths, (1, len(positions), 1)[: len(lengths)], len(image), batch=1, **options)
    problem = make(OPERATOR, case, dtype)
    grid = normalised(positions, lengths, case.align_corners).reshape(problem.arrays["grid"].shape)
    some = problem.grad_output.dtype
    return problem.replaced(input=image[None].astype(some), grid=grid.astype(some))


# By hand --------------------------------------------------------------------------------------------------------------

IMAGE = np.arange(1.0, 17).reshape(1, 4, 4)
# (y, x) on 1 ... 16 as 4x4 pixels -> value, slope along y, slope along x.
BY_HAND: dict[str, dict[tuple[float, float], tuple[float, float, float]]] = {
    "zeros": {
        (1, 1): (6, 4, 1),
        (0.5, 1.5): (4.5, 4, 1),
        (-0.5, 1): (1, 2, 0.5),
        (3.5, 1): (7, -14, 0.5),
        (3, 1): (14, -14, 1),
        (4, 1): (0, 0, 0),
        (-1, 1): (0, 2, 0),  # the slope from the right
        (1, -1): (0, 0, 5),
    },
    "border": {
        (1, 1): (6, 4, 1),
        (0.5, 1.5): (4.5, 4, 1),
        (-0.5, 1): (2, 0, 1),
        (0, 1): (2, 0, 1),  # on the first and last pixel it does not move any more
        (3, 1): (14, 0, 1),
        (1, 3): (8, 4, 0),
        (9, -7.5): (13, 0, 0),
    },
    "reflection": {
        (1, 1): (6, 4, 1),
        (-0.5, 1): (2, 0, 1),
        (-1, 1): (
            2,
            0,
            1,
        ),  # over the pixel around the edge of a mirror image there is no slope
        (-2, 1): (6, -4, 1),
        (-1.5, 2): (5, -4, 1),
        (1, 5): (7, 4, -1),
        (1.5, 8): (7, 4, 0),
        (9.25, -2.5): (7.5, 4, -1),
    },
}


@each_padding
@each_dtype
def test_values_and_slopes_by_hand(backend, padding_mode, dtype):
    table = BY_HAND[padding_mode]
    problem = at(list(table), IMAGE, dtype, padding_mode=padding_mode)
    problem = problem._replace(grad_output=np.ones_like(problem.grad_output))
    value, slope_y, slope_x = np.array(list(table.values())).T
    assert_close(run(backend, problem).ravel(), value, dtype)
    grad = run_backward(backend, problem)["grid"].reshape(-1, 2)
    assert_close(grad, 2 * np.stack([slope_x, slope_y], -1), dtype)  # pixels are half of 4 times as many


@each_dtype
def test_nearest_takes_even_pixels_half_way(backend, dtype):
    x = [-0.5, 0.5, 1.5, 2.5, 3.5, -0.625, 3.375, 0.25, 2.75]
    for padding_mode, want in {
        "zeros": (1, 1, 3, 3, 0, 0, 4, 1, 4),
        "border": (1, 1, 3, 3, 4, 1, 4, 1, 4),
        "reflection": (1, 1, 3, 3, 4, 1, 4, 1, 4),
    }.items():
        problem = at([(0, p) for p in x], np.arange(1.0, 5).reshape(1, 1, 4), dtype, mode="nearest")
        problem = problem._replace(options={**problem.options, "padding_mode": padding_mode})
        assert_close(run(backend, problem).ravel(), np.array(want, float), dtype, padding_mode)
        grads = run_backward(backend, problem)
        assert not grads["grid"].any() and grads["grid"].shape == problem.arrays["grid"].shape


def test_nearest_reads_nothing_else(backend):
    """Of all pixels but one NaN."""
    for row, column in np.ndindex(3, 4):
        image = np.full((2, 3, 4), math.nan)
        image[:, row, column] = row + column
        problem = at([(row - 0.25, column + 0.375)], image, mode="nearest")
        assert_close(run(backend, problem).ravel(), image[:, row, column], "float64")


# Every mode -----------------------------------------------------------------------------------------------------------


def of_mode(axes: int, options: dict[str, Any], draw: Any, dtype: str) -> Problem:
    """On lengths for which every position, also on and half way between pixels, is exact."""
    lengths = tuple(n + options["align_corners"] for n in (4, 2, 8)[:axes])
    return make(OPERATOR, Grid(lengths, (5, 4, 3)[:axes], 3, **options), dtype, draw)


@each_axes
@pytest.mark.parametrize("draw", [between_pixels, halves], ids=["between", "halves"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mode(backend, axes, draw, dtype):
    for options in every_mode(axes):
        problem = of_mode(axes, options, draw, dtype)
        try:
            assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)
        except AssertionError as error:
            raise AssertionError(f"{options}: {error}") from error


@each_axes
@pytest.mark.parametrize("draw", [between_pixels, halves], ids=["between", "halves"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_mode_is_pytorchs(axes, draw, dtype):
    """Tensors to tensors, output and gradients."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for options in every_mode(axes):
        problem = of_mode(axes, options, draw, dtype)
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in problem.arrays.values()]
        grad_output = torch.from_numpy(problem.grad_output)
        want = torch.nn.functional.grid_sample(*tensors, **options)
        want.backward(grad_output)
        given = [tensor.detach() for tensor in tensors]
        got = pydeform.grid_sample(*given, **options)
        grads = pydeform.grid_sample_backward(grad_output, *given, **options)
        assert isinstance(got, torch.Tensor) and all(isinstance(grad, torch.Tensor) for grad in grads)
        assert_close(got.numpy(), want.detach().numpy().astype(float), dtype, str(options))
        for name, grad, tensor in zip(("input", "grid"), grads, tensors, strict=True):
            assert_close(grad.numpy(), tensor.grad.numpy().astype(float), dtype, f"{name} of {options}")


@each_axes
def test_every_mode_by_differences(backend, axes):
    for options in every_mode(axes):
        problem = of_mode(axes, options, between_pixels, "float64")
        forward, backward, arguments = checked(backend, problem)
        report = gradcheck(
            forward, backward, arguments, kinks={"grid": stay}, kink_margin=0.002, elements=5, directions=1
        )
        assert list(report.checked) == ["input", "grid"] and not any(report.kinked.values()), options


@pytest.mark.parametrize("align_corners", [False, True])
def test_slopes_at_kinks_by_differences(backend, align_corners):
    """From the right on every whole number; where the border begins, from the side on which nothing moves."""
    height, width = (3, 5) if align_corners else (2, 4)  # on such images positions are exact
    image = np.random.default_rng(3).uniform(1, 2, (3, height, width))
    inside = [(y, x) for y in range(-1, height) for x in range(-1, width)]
    for positions, padding_mode, side, other in (
        (inside, "zeros", "right", "left"),
        ([(0.5, x) for x in range(1, width)], "border", "right", "left"),
        ([(0.5, 0)], "border", "left", "right"),
        ([(0.5, x) for x in range(1, width - 1)], "reflection", "right", "left"),
    ):
        problem = at(positions, image, padding_mode=padding_mode, align_corners=align_corners)
        forward, backward, arguments = checked(backend, problem)
        options: dict[str, Any] = {"wrt": ("grid",), "kinks": {"grid": stay}}
        gradcheck(forward, backward, arguments, side=side, elements=99, **options)
        with pytest.raises(AssertionError, match="grid"):
            gradcheck(forward, backward, arguments, side=other, elements=99, **options)


# Far, infinite and NaN ------------------------------------------------------------------------------------------------


@each_dtype
@each_mode
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_finite(backend, mode, align_corners, value, axis, dtype):
    """NaN is NaN and no pixel's; infinity is outside, under border the pixel on that side, and has no slope."""
    lengths = (3, 5) if align_corners else (2, 4)
    image = 2.0 ** np.arange(math.prod(lengths)).reshape(1, *lengths)
    position = [1.0, 2.0]
    position[axis] = value
    for padding_mode in PADDINGS:
        options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        problem = at([position], image, dtype, **options)
        problem = problem._replace(grad_output=np.ones_like(problem.grad_output))
        (output,), grads = run(backend, problem).ravel(), run_backward(backend, problem)
        grad_y, grad_x = grads["grid"].ravel()[::-1]
        if math.isnan(value):
            assert math.isnan(output) and math.isnan(grad_y) and math.isnan(grad_x)
            assert not grads["input"].any()
            continue
        assert (grad_y, grad_x)[axis] == 0
        if padding_mode == "border":
            pixel = [1, 2]
            pixel[axis] = 0 if value < 0 else image.shape[1 + axis] - 1
            assert output == image[(0, *pixel)]
            assert grads["input"][(0, 0, *pixel)] == 1 == abs(grads["input"].astype(float)).sum()
        else:
            assert output == 0 and not grads["input"].any() and not grads["grid"].any()


@each_mode
@each_axes
@pytest.mark.parametrize("align_corners", [False, True])
def test_one_pixel_and_what_is_not_finite(backend, mode, axes, align_corners):
    """On an axis of one pixel all corners are one, but infinity is not there."""
    if (axes, mode) == (3, "bicubic"):
        return
    image = np.full((2, *(1,) * axes), 3.0)
    for padding_mode in PADDINGS:
        case = Grid(image.shape[1:], (1, 4, 1)[:axes], 2, mode, padding_mode, align_corners, 1)
        problem = make(OPERATOR, case).replaced(input=image[None])
        grid = np.zeros_like(problem.arrays["grid"])
        grid[0, 0, 1:, ..., -1] = np.reshape([math.inf, -math.inf, math.nan], (3, *(1,) * (axes - 2)))
        problem = problem.replaced(grid=grid)
        outside = 3.0 if padding_mode == "border" else 0.0
        want = np.array([3.0, outside, outside, math.nan])
        assert_close(run(backend, problem)[0, 0].ravel(), want, "float64", padding_mode)
        assert_results(problem, both(backend, problem), solve_oracle(problem), "float64")
        far = problem.replaced(grid=np.where(np.isfinite(grid), 1e30, grid))
        assert_results(far, both(backend, far), solve_oracle(far), "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_mirrors_far_away(backend, axis, dtype):
    """Whatever the distance, as long as numbers tell pixels from one another, and beyond that without a wild index."""
    image = np.arange(1.0, 5).reshape(1, *((1, 4) if axis else (4, 1)))
    limit = 2.0**20 if dtype == "float32" else 2.0**48
    for turn in (8.0, 8 * 1000.0, limit, -8.0, -limit):
        along = turn + np.array([0, 1, 3, 4, 5, 7, 2.5, -1, -3])
        want = [1, 2, 4, 4, 3, 1, 3.5, 1, 3]
        positions = np.zeros((len(along), 2))
        positions[:, axis] = along
        problem = at(positions, image, dtype, padding_mode="reflection")
        assert_close(run(backend, problem).ravel(), np.array(want, float), dtype)
    largest = float(np.finfo(dtype).max)
    for mode in MODES:
        for far in (2.0**24, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 1e30, largest / 16, largest):
            for sign in (-1, 1):
                position = [0.0, 0.0]
                position[axis] = sign * far
                for options in every_mode(2):
                    if options["mode"] == mode:
                        with np.errstate(over="ignore"):
                            problem = at([position], image, dtype, **options)
                        want = solve_oracle(problem)[0]
                        assert_close(run(backend, problem), want, dtype, f"{options} at {sign * far}")
                        assert np.isfinite(run_backward(backend, problem)["input"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_elsewhere_in_the_image_is_not_read(backend, mode):
    """A sample outside, and one in a corner, beside an image of NaN but for that corner."""
    image = np.full((2, 9, 8), math.nan)
    image[:, :4, :4] = 1.5
    problem = at([(-30, -30), (-3, 2), (1, 1), (1.5, 1.25)], image, mode=mode)
    assert_close(run(backend, problem)[0, 0].ravel(), np.array([0, 0, 1.5, 1.5]), "float64")


# Arguments ------------------------------------------------------------------------------------------------------------


def test_grid_of_one_image_in_every_batch(backend):
    """One grid for all images, by a stride of 0, is what its copies are."""
    problem = make(OPERATOR, "reflection")
    shared = np.broadcast_to(problem.arrays["grid"][:1], problem.arrays["grid"].shape)
    got, want = (both(backend, problem.replaced(grid=g), deterministic=True) for g in (shared, shared.copy()))
    assert_same_bits(got[0], want[0])
    for name in ("input", "grid"):
        assert_same_bits(got[1][name], want[1][name])


def of(*shape: int, dtype: str = "float64") -> np.ndarray:
    return np.zeros(shape, dtype)


IMAGE_OF = of(2, 3, 5, 4)
WRONG = [
    ((of(2, 3, 5), of(2, 6, 7, 2)), {}, ValueError, r"grid_sample: input .*got \(2, 3, 5\)"),
    ((of(2, 3, 5, 4, 3, 2), of(2, 6, 7, 2)), {}, ValueError, r"grid_sample: input .*got \(2, 3, 5, 4, 3, 2\)"),
    ((of(2, 3, 0, 4), of(2, 6, 7, 2)), {}, ValueError, r"grid_sample: input .*0"),
    ((IMAGE_OF, of(2, 6, 7)), {}, ValueError, r"grid_sample: grid .*got \(2, 6, 7\)"),
    ((IMAGE_OF, of(2, 6, 7, 3)), {}, ValueError, r"grid_sample: grid .*2\).*got \(2, 6, 7, 3\)"),
    ((IMAGE_OF, of(1, 6, 7, 2)), {}, ValueError, r"grid_sample: grid .*\(2, .*got \(1, 6, 7, 2\)"),
    ((of(2, 3, 5, 4, 6), of(2, 6, 7, 2)), {}, ValueError, r"grid_sample: grid .*got \(2, 6, 7, 2\)"),
    ((of(2, 3, 5, 4, 6), of(2, 6, 7, 4, 2)), {}, ValueError, r"grid_sample: grid .*got \(2, 6, 7, 4, 2\)"),
    ((of(2, 3, 5, 4, 6), of(2, 6, 7, 4, 3)), {"mode": "bicubic"}, ValueError, r"grid_sample: .*bicubic"),
    ((IMAGE_OF, of(2, 6, 7, 2)), {"mode": "linear"}, ValueError, r"grid_sample: mode .*bilinear.*'linear'"),
    ((IMAGE_OF, of(2, 6, 7, 2)), {"padding_mode": "wrap"}, ValueError, r"padding_mode .*reflection.*'wrap'"),
    ((IMAGE_OF, of(2, 6, 7, 2, dtype="float32")), {}, TypeError, r"grid_sample: grid .*float64.*float32"),
    ((of(2, 3, 5, 4, dtype="float32"), of(2, 6, 7, 2)), {}, TypeError, r"grid_sample: grid .*float32.*float64"),
    ((of(2, 3, 5, 4, dtype="int64"), of(2, 6, 7, 2)), {}, TypeError, r"grid_sample: input .*int64"),
    ((IMAGE_OF, [[0.0, 0.0]]), {}, TypeError, r"grid_sample: grid .*list"),
]


@pytest.mark.parametrize(("arrays", "options", "error", "text"), WRONG)
def test_wrong_arguments(backend, arrays, options, error, text):
    sent = [backend.array(a) if isinstance(a, np.ndarray) else a for a in arrays]
    with pytest.raises(error, match=text):
        pydeform.grid_sample(*sent, **options)
    with pytest.raises(error, match=text.replace("grid_sample: ", "grid_sample_backward: ")):
        pydeform.grid_sample_backward(backend.array(of(2, 3, 6, 7)), *sent, **options)


def test_wrong_arguments_of_the_backward(backend):
    problem = make(OPERATOR, "zeros")
    sent = [backend.array(a) for a in problem.arrays.values()]
    for wrong, error in ((problem.grad_output[:, :, 1:], ValueError), (problem.grad_output.astype("f4"), TypeError)):
        with pytest.raises(error, match="grid_sample_backward: grad_output"):
            pydeform.grid_sample_backward(backend.array(wrong), *sent)
    with pytest.raises(ValueError, match=r"grid_sample_backward: needs .*'offset'"):
        pydeform.grid_sample_backward(backend.array(problem.grad_output), *sent, needs=("offset",))

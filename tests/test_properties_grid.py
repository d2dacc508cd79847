"""What must hold for any problem of grid_sample, warp and affine_grid, and between them: hypothesis draws the sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydeform
from tests.cases.gather import DTYPES, Problem, halves, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import assert_results, both
from tests.cases.grid import MODES, PADDINGS, Grid, Warp, every_mode, normalised
from tests.conftest import assert_same_bits
from tests.test_properties_gather import assert_near

CHANNELS = st.sampled_from([1, 2, 3, 8, 17])
each_operator = pytest.mark.parametrize("operator", ["grid_sample", "warp"])


@st.composite
def grids(draw: Any, axes: int | None = None, smallest: int = 1, **fixed: Any) -> Grid:
    axes = axes or draw(st.sampled_from([2, 2, 3]))
    longest = 7 if axes == 2 else 4
    values = {
        "in_size": draw(st.tuples(*[st.integers(smallest, longest)] * axes)),
        "out_size": draw(st.tuples(*[st.integers(1, longest)] * axes)),
        "channels": draw(CHANNELS),
        "batch": draw(st.integers(1, 3)),
        **draw(st.sampled_from(every_mode(axes))),
    }
    return Grid(**{**values, **fixed})


@st.composite
def warps(draw: Any, axes: int | None = None, smallest: int = 1, **fixed: Any) -> Warp:
    like = draw(grids(axes, smallest))
    values = {name: getattr(like, name) for name in Warp._fields}
    return Warp(**{**values, **fixed})


def drawn(data: Any, operator: str, dtype: str = "float64", *args: Any, **fixed: Any) -> Problem:
    return make(operator, data.draw((grids if operator == "grid_sample" else warps)(*args, **fixed)), dtype)


def integers(shape: Any, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-16, 17, shape) / 8


def with_options(problem: Problem, **options: Any) -> Problem:
    return problem._replace(options={**problem.options, **options})


@each_operator
@given(st.data(), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_random_problems_against_the_oracle(backend, operator, data, dtype):
    problem = drawn(data, operator, dtype, mode=data.draw(st.sampled_from(["bilinear", "nearest"])))
    assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)


@each_operator
@given(st.data())
@settings(max_examples=60)
def test_random_bicubic_problems_against_the_oracle(backend, operator, data):
    """Its shares and slopes may leave nothing of each other, as on an image of one pixel."""
    problem = drawn(data, operator, "float64", 2, mode="bicubic")
    (output, grads), (want, want_grads) = both(backend, problem), solve_oracle(problem)
    image, grad = abs(problem.arrays["input"]).max(), abs(problem.grad_output).max()
    assert_near(output, want, image)
    assert_near(grads["input"], want_grads["input"], grad * problem.grad_output[0, 0].size)
    assert_near(grads[problem.place], want_grads[problem.place], 10 * image * grad * problem.arrays["input"].size)


# Of both --------------------------------------------------------------------------------------------------------------


@each_operator
@given(st.data())
def test_linear_in_the_image(backend, operator, data):
    problem = drawn(data, operator)
    a, b = problem.arrays["input"], integers(problem.arrays["input"].shape)
    of_a, of_b = (run(backend, problem.replaced(input=image)) for image in (a, b))
    assert_near(run(backend, problem.replaced(input=2 * a - 3 * b)), 2 * of_a - 3 * of_b, of_a, of_b)


@each_operator
@given(st.data())
def test_backward_is_the_transpose(backend, operator, data):
    """<f(image), grad> = <image, gradient of the image>."""
    problem = drawn(data, operator)
    output, grads = both(backend, problem)
    left, right = (output * problem.grad_output).sum(), (problem.arrays["input"] * grads["input"]).sum()
    assert_near(left, right, abs(output * problem.grad_output).sum())


@each_operator
@given(st.data(), st.sampled_from(["float64", "float32"]))
def test_order_of_images_and_channels(backend, operator, data, dtype):
    """Both may be turned around, bit for bit; the gradient of a place sums over channels in another order."""
    problem = drawn(data, operator, dtype)
    output, grads = both(backend, problem)
    image, place = problem.arrays["input"], problem.place
    turned = problem.replaced(input=image[::-1, ::-1], **{place: problem.arrays[place][::-1]})
    turned = turned._replace(grad_output=problem.grad_output[::-1, ::-1])
    got, got_grads = both(backend, turned)
    assert_same_bits(got, np.ascontiguousarray(output[::-1, ::-1]))
    if backend.on_cpu:
        assert_same_bits(got_grads["input"], np.ascontiguousarray(grads["input"][::-1, ::-1]))
    scale = abs(grads[place]).max() + abs(image).max() * abs(problem.grad_output).max() * len(image[0])
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(got_grads[place], grads[place][::-1], rtol=0, atol=10 * tolerance * scale)


@each_operator
@given(st.data())
def test_nearest_takes_pixels(backend, operator, data):
    """Nothing but the image's own numbers, and zeros where there is padding with them."""
    padding_mode = data.draw(st.sampled_from(PADDINGS))
    problem = drawn(data, operator, mode="nearest", padding_mode=padding_mode)
    output, image = run(backend, problem), problem.arrays["input"]
    for b, c in np.ndindex(*image.shape[:2]):
        pixels = image[b, c].ravel()
        assert np.isin(output[b, c], np.append(pixels, 0) if padding_mode == "zeros" else pixels).all()


@each_operator
@given(st.data())
def test_a_constant_image_stays(backend, operator, data):
    """Shares add up to 1 wherever every pixel is there, so that no place has a slope."""
    problem = drawn(data, operator, padding_mode=data.draw(st.sampled_from(["border", "reflection"])))
    problem = problem.replaced(input=np.full_like(problem.arrays["input"], 2.5))
    output, grads = both(backend, problem)
    assert_near(output, np.full_like(output, 2.5))
    grad = abs(problem.grad_output).max() * problem.arrays["input"].shape[1]
    assert_near(grads[problem.place], 0, 2.5 * grad * 10)


# Of grid_sample -------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(["float64", "float32"]))
def test_order_of_points(backend, data, dtype):
    """The points of an image in another order and shape give the same samples, bit for bit."""
    problem = drawn(data, "grid_sample", dtype)
    grid = problem.arrays["grid"]
    batch, axes = len(grid), grid.shape[-1]
    order = np.random.default_rng(0).permutation(grid[0, ..., 0].size)
    mixed = problem.replaced(grid=grid.reshape(batch, -1, *(1,) * (axes - 1), axes)[:, order])
    flat = problem.grad_output.reshape(*problem.grad_output.shape[:2], -1, *(1,) * (axes - 1))
    mixed = mixed._replace(grad_output=flat[:, :, order])
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, mixed)
    assert_same_bits(got, np.ascontiguousarray(output.reshape(flat.shape)[:, :, order]))
    want = grads["grid"].reshape(batch, -1, *(1,) * (axes - 1), axes)[:, order]
    assert_same_bits(got_grads["grid"], np.ascontiguousarray(want))


@given(st.data())
def test_the_grid_of_pixels_gives_the_image(backend, data):
    """Their own positions, with each align_corners; the backward gives back the gradient."""
    problem = drawn(data, "grid_sample")
    image = problem.arrays["input"]
    positions = np.moveaxis(np.indices(image.shape[2:]), 0, -1)
    grid = normalised(positions, image.shape[2:], problem.options["align_corners"])
    grid = np.broadcast_to(grid, (len(image), *grid.shape))
    still = problem.replaced(grid=grid)._replace(grad_output=integers(image.shape))
    output, grads = both(backend, still)
    np.testing.assert_allclose(output, image, rtol=0, atol=1e-13)
    np.testing.assert_allclose(grads["input"], still.grad_output, rtol=0, atol=1e-13)


@given(st.data())
def test_flips(backend, data):
    """An image and a grid turned around along one axis: the same samples, and its slope changes sign. Places are off
    the kinks, where a slope is that from the right; of nearest they are not half way."""
    problem = drawn(data, "grid_sample")
    image, grid = problem.arrays["input"], problem.arrays["grid"]
    axis = data.draw(st.integers(0, image.ndim - 3))
    sign = np.ones(grid.shape[-1])
    sign[-1 - axis] = -1
    output, grads = both(backend, problem)
    got, got_grads = both(backend, problem.replaced(input=np.flip(image, axis + 2), grid=grid * sign))
    assert_near(got, output, image)
    assert_near(got_grads["input"], np.flip(grads["input"], axis + 2), problem.grad_output)
    assert_near(got_grads["grid"], grads["grid"] * sign, 10 * image.size * abs(image).max())


@given(st.data())
def test_axes_change_places(backend, data):
    """A transposed image under a grid whose coordinates are swapped."""
    problem = drawn(data, "grid_sample", "float64", 2)
    image, grid = problem.arrays["input"], problem.arrays["grid"]
    output, grads = both(backend, problem)
    turned = problem.replaced(input=image.swapaxes(2, 3), grid=grid[..., ::-1])
    got, got_grads = both(backend, turned)
    assert_near(got, output, image)
    assert_near(got_grads["input"], grads["input"].swapaxes(2, 3), problem.grad_output)
    assert_near(got_grads["grid"], grads["grid"][..., ::-1], 10 * image.size * abs(image).max())


@given(st.data())
def test_paddings_are_one_inside(backend, data):
    """Where all pixels that a point needs are there."""
    case = data.draw(grids(smallest=5, axes=2, batch=1))
    need = {"bilinear": 0, "nearest": 0, "bicubic": 1}[case.mode]

    def inside(rng: Any, lengths: Any, shape: Any) -> Any:
        return need + rng.integers(1, 16 * (np.array(lengths) - 1 - 2 * need), shape) / 16

    results = [
        both(backend, make("grid_sample", case._replace(padding_mode=padding), draw=inside)) for padding in PADDINGS
    ]
    for output, grads in results[1:]:
        assert_near(output, results[0][0])
        for name, grad in results[0][1].items():
            assert_near(grads[name], grad, 10.0)


@given(st.data())
def test_padding_is_sampling_a_larger_image(backend, data):
    """Of zeros, of copies of the border or of mirror images around the image, as numpy.pad makes them."""
    problem = drawn(data, "grid_sample", mode="bilinear", batch=1, align_corners=data.draw(st.booleans()))
    image, grid = problem.arrays["input"], problem.arrays["grid"]
    align_corners, lengths = problem.options["align_corners"], np.array(image.shape[2:])
    if align_corners and 1 in lengths:
        return
    scale = (lengths - 1, lengths)[not align_corners] / 2
    positions = (grid[..., ::-1] + 1) * scale - (0 if align_corners else 0.5)
    kind = {"zeros": "constant", "border": "edge", "reflection": "reflect" if align_corners else "symmetric"}
    around = [(0, 0), (0, 0), *[(4, 4)] * len(lengths)]
    for padding_mode, pad in kind.items():
        larger = np.pad(image, around, pad)
        moved = normalised(positions + 4, lengths + 8, align_corners)
        want = run(backend, with_options(problem.replaced(input=larger, grid=moved), padding_mode="zeros"))
        got = run(backend, with_options(problem, padding_mode=padding_mode))
        assert_near(got, want, image)


@given(st.data())
def test_a_volume_of_one_slice_is_an_image(backend, data):
    """Under border and reflection wherever its third coordinate is, under zeros in the middle of the slice."""
    case = data.draw(grids(axes=2, mode=data.draw(st.sampled_from(["bilinear", "nearest"]))))
    problem = make("grid_sample", case)
    image, grid = problem.arrays["input"], problem.arrays["grid"]
    depth = np.zeros(grid[..., :1].shape) if case.padding_mode == "zeros" else integers(grid[..., :1].shape)
    volume = problem.replaced(input=image[:, :, None], grid=np.concatenate([grid, depth], -1)[:, None])
    volume = volume._replace(grad_output=problem.grad_output[:, :, None])
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, volume)
    assert_near(got[:, :, 0], output, image)
    assert_near(got_grads["input"][:, :, 0], grads["input"], problem.grad_output)
    assert_near(got_grads["grid"][:, 0, ..., :2], grads["grid"], 10 * image.size * abs(image).max())


@given(st.data())
def test_smooth_modes_reproduce_a_ramp(backend, data):
    """Inside, bilinear samples of a plane lie on it, and its slope is the grid's gradient. Those of bicubic, which is
    not exact for planes, do so on and half way between pixels."""
    mode = data.draw(st.sampled_from(["bilinear", "bicubic"]))
    case = data.draw(grids(axes=2, smallest=5, channels=1, mode=mode))

    def inside(rng: Any, lengths: Any, shape: Any) -> Any:
        if mode == "bicubic":
            return 1 + rng.integers(0, 2 * (np.array(lengths) - 3), shape) / 2
        return 1 + rng.integers(0, np.array(lengths) - 3, shape) + (2 * rng.integers(0, 8, shape) + 1) / 16

    problem = make("grid_sample", case, draw=inside)
    height, width = case.in_size
    plane = 1.5 + 0.25 * np.arange(height)[:, None] - 0.75 * np.arange(width)
    problem = problem.replaced(input=np.broadcast_to(plane, problem.arrays["input"].shape))
    problem = problem._replace(grad_output=np.ones_like(problem.grad_output))
    scale = (np.array([width, height]) - case.align_corners) / 2
    positions = (problem.arrays["grid"] + 1) * scale - (0 if case.align_corners else 0.5)
    output, grads = both(backend, problem)
    np.testing.assert_allclose(output[:, 0], 1.5 + 0.25 * positions[..., 1] - 0.75 * positions[..., 0], atol=1e-12)
    if mode == "bilinear":
        slopes = np.broadcast_to([-0.75, 0.25] * scale, grads["grid"].shape)
        np.testing.assert_allclose(grads["grid"], slopes, atol=1e-11)


# Of warp --------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(-8, 8), st.integers(-8, 8))
def test_warp_by_whole_pixels_is_a_shift(backend, data, down, right):
    """As numpy.pad and a slice have it, and that of its gradient is a slice of padded zeros."""
    mode, padding_mode = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(PADDINGS))
    problem = drawn(data, "warp", "float64", 2, mode=mode, padding_mode=padding_mode)
    image, displacement = problem.arrays["input"], problem.arrays["displacement"]
    if padding_mode == "reflection" and 1 in image.shape[2:]:
        return  # numpy.pad repeats such a pixel, as does the border
    moved = np.broadcast_to(np.reshape([float(down), right], (1, 2, 1, 1)), displacement.shape)
    pad = {"zeros": "constant", "border": "edge", "reflection": "reflect"}[padding_mode]
    larger = np.pad(image, [(0, 0), (0, 0), (8, 8), (8, 8)], pad)
    height, width = image.shape[2:]
    want = larger[:, :, 8 + down :][:, :, :height, 8 + right :][..., :width]
    np.testing.assert_array_equal(run(backend, problem.replaced(displacement=moved)), want)


@given(st.data())
def test_warp_there_and_back(backend, data):
    """By whole pixels; what came from inside is there again."""
    problem = drawn(data, "warp", "float64", 2, smallest=3)
    move = np.zeros_like(problem.arrays["displacement"])
    move[:, 0] = 1
    there = run(backend, problem.replaced(displacement=move))
    back = run(backend, problem.replaced(input=there, displacement=-move))
    np.testing.assert_array_equal(back[:, :, 1:], problem.arrays["input"][:, :, 1:])


@given(st.data())
def test_gradient_of_a_displacement_is_the_images_slope(backend, data):
    """Nothing moved, bilinear: the difference to the next pixel along each axis."""
    problem = drawn(data, "warp", "float64", None, 2, mode="bilinear", padding_mode="zeros")
    still = problem.replaced(displacement=np.zeros_like(problem.arrays["displacement"]))
    image, grad = problem.arrays["input"], run_backward(backend, still)["displacement"]
    for axis in range(image.ndim - 2):
        step = np.diff(np.pad(image, [(0, int(place == axis + 2)) for place in range(image.ndim)]), axis=axis + 2)
        assert_near(grad[:, axis], (step * problem.grad_output).sum(1), 100.0)


# Of affine_grid -------------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw: Any) -> tuple[np.ndarray, tuple[int, ...], bool]:
    axes = draw(st.sampled_from([2, 3]))
    size = draw(st.integers(1, 3)), 1, *draw(st.tuples(*[st.integers(1, 5)] * axes))
    return integers((size[0], axes, axes + 1), draw(st.integers(0, 99))), size, draw(st.booleans())


def affine(backend: Any, theta: Any, size: Any, align_corners: bool) -> Any:
    return backend.numpy(pydeform.affine_grid(backend.array(theta), size, align_corners))


def identity(size: tuple[int, ...]) -> np.ndarray:
    axes = len(size) - 2
    return np.repeat(np.eye(axes, axes + 1)[None], size[0], 0)


@given(matrices())
def test_affine_grid_is_linear(backend, problem):
    theta, size, align_corners = problem
    other = integers(theta.shape, 5)
    a, b = (affine(backend, matrix, size, align_corners) for matrix in (theta, other))
    assert_near(affine(backend, 2 * theta - 3 * other, size, align_corners), 2 * a - 3 * b, 10.0)


@given(matrices())
def test_affine_grid_of_a_product(backend, problem):
    """One matrix after another maps the pixels of the other's grid."""
    theta, size, align_corners = problem
    axes = len(size) - 2
    other = integers(theta.shape, 6)
    product = np.concatenate([theta[:, :, :axes] @ other[:, :, :axes], theta[:, :, :axes] @ other[:, :, axes:]], -1)
    product[:, :, axes:] += theta[:, :, axes:]
    of_other = affine(backend, other, size, align_corners)
    flat = of_other.reshape(size[0], -1, axes) @ theta[:, :, :axes].swapaxes(1, 2) + theta[:, None, :, axes]
    assert_near(affine(backend, product, size, align_corners), flat.reshape(of_other.shape), 30.0)


@given(matrices())
def test_affine_grid_backward_is_the_transpose(backend, problem):
    theta, size, align_corners = problem
    grid = affine(backend, theta, size, align_corners)
    grad = integers(grid.shape, 7)
    sent = backend.array(grad), backend.array(theta)
    of_theta = backend.numpy(pydeform.affine_grid_backward(*sent, size, align_corners).theta)
    assert_near((grid * grad).sum(), (theta * of_theta).sum(), abs(grid * grad).sum())


@given(matrices(), st.sampled_from(PADDINGS))
def test_identity_leaves_the_image(backend, problem, padding_mode):
    _, size, align_corners = problem
    image = integers((size[0], 3, *size[2:]))
    grid = affine(backend, identity(size), size, align_corners)
    for mode in MODES if len(size) == 4 else MODES[:2]:
        got = pydeform.grid_sample(backend.array(image), backend.array(grid), mode, padding_mode, align_corners)
        np.testing.assert_allclose(backend.numpy(got), image, rtol=0, atol=1e-13)


@given(matrices(), st.data())
def test_a_shift_moves_by_pixels(backend, problem, data):
    """Two pixels of an axis are 4/L, or 4/(L - 1), as warp has them."""
    _, size, align_corners = problem
    axis = data.draw(st.integers(0, len(size) - 3))
    length = size[2 + axis] - align_corners
    if not length:
        return
    theta = identity(size)
    theta[:, -1 - axis, -1] = 4 / length
    image = integers((size[0], 2, *size[2:]))
    grid = affine(backend, theta, size, align_corners)
    got = pydeform.grid_sample(backend.array(image), backend.array(grid), "nearest", "zeros", align_corners)
    displacement = np.zeros((size[0], len(size) - 2, *size[2:]))
    displacement[:, axis] = 2
    want = pydeform.warp(backend.array(image), backend.array(displacement), "nearest")
    np.testing.assert_array_equal(backend.numpy(got), backend.numpy(want))


@given(st.data())
def test_on_kinks_against_the_oracle(backend, data):
    """On and half way between pixels of images on which positions are exact."""
    case = data.draw(grids())
    lengths = tuple(2 ** (n % 4) + (case.align_corners and n % 4 > 0) for n in case.in_size)
    problem = make("grid_sample", case._replace(in_size=lengths), "float64", halves)
    assert_results(problem, both(backend, problem), solve_oracle(problem), "float64")

"""ms_deform_attn and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.gather import Attention, Problem, checked, halves, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import PlacedTests, assert_results, both, each_dtype, stay
from tests.conftest import assert_close, assert_same_bits

OPERATOR = "ms_deform_attn"


class TestMsDeformAttn(PlacedTests):
    operator = OPERATOR
    arguments = "value, spatial_shapes, sampling_locations, attention_weights, *, points=None, method='bilinear'"


def one_level(positions: Any, value: np.ndarray, dtype: str = "float64", method: str = "bilinear") -> Problem:
    """A query for each (y, x) in pixels, of a map (h, w, channels) under one head, with a weight of 1."""
    positions, (height, width, channels) = np.array(positions, float), value.shape
    locations = (positions[:, ::-1] + 0.5) / (width, height)
    case = Attention(((height, width),), (1,), 1, channels, 1, len(positions), method=method)
    problem = make(OPERATOR, case, dtype)
    arrays = {
        "value": value.reshape(1, -1, 1, channels),
        "sampling_locations": locations.reshape(1, -1, 1, 1, 2),
        "attention_weights": np.ones((1, len(positions), 1, 1)),
    }
    some = problem.grad_output.dtype
    return problem.replaced(**{name: a.astype(some) for name, a in arrays.items()})


# By hand ------------------------------------------------------------------------------------------------------------

# (y, x) on 1 ... 16 as 4x4 pixels -> value, slope along y, slope along x.
BY_HAND = {
    (1, 1): (6, 4, 1),
    (-0.5, 1): (1, 2, 0.5),
    (3.5, 1): (7, -14, 0.5),
    (3, 1): (14, -14, 1),
    (4, 1): (0, 0, 0),
    (-1, 1): (0, 0, 0),
    (1, -1): (0, 0, 0),
    (0.5, 1.5): (4.5, 4, 1),
}


@each_dtype
def test_values_and_slopes_by_hand(backend, dtype):
    problem = one_level(list(BY_HAND), np.arange(1.0, 17).reshape(4, 4, 1), dtype)
    problem = problem._replace(grad_output=np.ones_like(problem.grad_output))
    value, slope_y, slope_x = np.array(list(BY_HAND.values())).T
    assert_close(run(backend, problem).ravel(), value, dtype)
    grad = run_backward(backend, problem)["sampling_locations"].reshape(-1, 2)
    assert_close(grad, 4 * np.stack([slope_x, slope_y], -1), dtype)


def test_slopes_from_the_right_by_differences(backend):
    """On every whole number along both axes, but at -1, where it is 0 and so the one from the left."""
    value = np.random.default_rng(3).uniform(1, 2, (2, 4, 3))
    inside = [(y, x) for y in (0, 1, 2, 3) for x in (0, 1, 2, 3, 4)]
    for positions, side, other in ((inside, "right", "left"), ([(-1, 1), (0, -1), (-1, -1)], "left", "right")):
        problem = one_level(positions, value)
        forward, backward, arguments = checked(backend, problem)
        options: dict[str, Any] = {"wrt": ("sampling_locations",), "kinks": {"sampling_locations": stay}}
        gradcheck(forward, backward, arguments, side=side, elements=99, **options)
        with pytest.raises(AssertionError, match="sampling_locations"):
            gradcheck(forward, backward, arguments, side=other, elements=99, **options)


# The discrete method ------------------------------------------------------------------------------------------------


@each_dtype
def test_discrete_reads_one_pixel(backend, dtype):
    """The centre of pixel i reads pixel i + 1, and what is outside the nearest one, however far."""
    column = np.array([0, 0.25, 0.4375, 0.5, 1, 2, 3, 4, 9, -0.5, -1, -7, math.inf, -math.inf, 1e4, -1e4])
    want = [1, 1, 1, 2, 2, 3, 4, 4, 4, 1, 1, 1, 4, 1, 4, 1]
    # In pixels as `one_level` has them, which takes half a pixel off.
    problem = one_level([(1.0, x - 0.5) for x in column], np.arange(1.0, 5).reshape(1, 4, 1), dtype, "discrete")
    got = run(backend, problem).ravel()
    # Location * 4 + 1/2, cut off, is the column counted from 0.
    assert_close(got, np.array(want, float), dtype)
    grads = run_backward(backend, problem)
    assert grads["sampling_locations"] is None
    sums = np.zeros(4)
    np.add.at(sums, np.array(want) - 1, problem.grad_output.astype(float).ravel())
    assert_close(grads["value"].ravel(), sums, dtype)


def test_discrete_reads_nothing_else(backend):
    """Of all pixels but one NaN: bilinear would multiply three of them by 0."""
    for row, column in np.ndindex(3, 4):
        value = np.full((3, 4, 2), math.nan)
        value[row, column] = row + column
        place = row - 0.75, column - 0.75
        assert_close(run(backend, one_level([place], value, method="discrete"))[0, 0], value[row, column], "float64")


@each_dtype
def test_discrete_nan_is_nan(backend, dtype):
    problem = one_level(
        [(math.nan, 1), (1, math.nan), (math.nan, math.inf), (1, 1)], np.ones((2, 4, 3)), dtype, "discrete"
    )
    output, grads = want = solve_oracle(problem)
    assert np.isnan(output[0, :3]).all() and np.isfinite(output[0, 3]).all()
    assert np.isnan(grads["attention_weights"]).sum() == 3
    assert_results(problem, both(backend, problem), want, dtype)


# How sizes and points are given -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [
        *(np.array, list, tuple),
        lambda s: np.array(s, np.int32),
        lambda s: np.array(s).T.copy().T,
        lambda s: [np.array(size) for size in s],
    ],
)
def test_sizes_as_array_or_sequence(backend, of):
    problem = make(OPERATOR, "ragged")
    given = problem.replaced(spatial_shapes=of([list(size) for size in problem.arrays["spatial_shapes"]]))
    assert_same_bits(run(backend, given), run(backend, problem))
    got, want = run_backward(backend, given), run_backward(backend, problem)
    for name in want:
        assert_same_bits(got[name], want[name])


def test_sizes_as_a_tensor():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make(OPERATOR, "ragged")
    tensors = {name: torch.from_numpy(a) for name, a in problem.numbers.items()}
    sizes = torch.tensor(problem.arrays["spatial_shapes"])
    got = pydeform.ms_deform_attn(**tensors, spatial_shapes=sizes, **problem.options)
    assert isinstance(got, torch.Tensor)
    assert_same_bits(got.numpy(), pydeform.ms_deform_attn(**problem.arrays, **problem.options))


@pytest.mark.parametrize("points", [(2, 2, 2), [2, 2, 2], np.array([2, 2, 2]), 2], ids=str)
@pytest.mark.parametrize("name", ["three_levels", "discrete"])
def test_equal_points_on_one_axis(backend, name, points):
    """The same bits, from arrays whose levels and points share an axis."""
    problem = make(OPERATOR, name)
    lead = problem.arrays["attention_weights"].shape[:3]
    one_axis = problem.replaced(
        sampling_locations=problem.arrays["sampling_locations"].reshape(*lead, -1, 2),
        attention_weights=problem.arrays["attention_weights"].reshape(*lead, -1),
    )
    one_axis = one_axis._replace(options={**problem.options, "points": points})
    assert_same_bits(run(backend, one_axis), run(backend, problem))
    got, want = run_backward(backend, one_axis), run_backward(backend, problem)
    for gradient, array in want.items():
        if array is None:
            assert got[gradient] is None
        else:
            assert_same_bits(got[gradient], array.reshape(got[gradient].shape), gradient)


# Against PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["three_levels", "odd_sizes"])
@pytest.mark.parametrize("draw", ["between", "halves"])
def test_equals_grid_sample(backend, name, draw):
    """Deformable-DETR's own fallback: grid_sample of each level, then a weighted sum. Kinks at -1 aside."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make(OPERATOR, name, "float64", *([halves] if draw == "halves" and name == "three_levels" else []))
    inputs = {n: torch.from_numpy(a).requires_grad_() for n, a in problem.numbers.items()}
    value, weights = inputs["value"], inputs["attention_weights"]
    batch, _, heads, channels = value.shape
    queries, start, output = weights.shape[1], 0, 0
    for level, (height, width) in enumerate(problem.arrays["spatial_shapes"]):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = 2 * inputs["sampling_locations"][:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        sampled = torch.nn.functional.grid_sample(maps, grid, align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        output = output + (sampled * share).sum(-1).view(batch, heads * channels, queries).transpose(1, 2)
        start += height * width
    output.backward(torch.from_numpy(problem.grad_output))
    assert_close(run(backend, problem), output.detach().numpy(), "float64")
    got = run_backward(backend, problem)
    sizes = np.array(problem.arrays["spatial_shapes"])[:, None, ::-1]
    on_the_edge = (problem.arrays["sampling_locations"] * sizes == -0.5).any(-1)  # where PyTorch has a slope
    assert on_the_edge.any() == (draw == "halves" and name == "three_levels")
    want = {n: tensor.grad.numpy() for n, tensor in inputs.items()}
    want["sampling_locations"][on_the_edge] = 0
    for n, grad in want.items():
        assert_close(got[n], grad, "float64", n)

"""deform_aggregation and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.cases.gather import Aggregation, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import PlacedTests, assert_results, both, each_dtype
from tests.conftest import assert_close, assert_same_bits

OPERATOR = "deform_aggregation"


class TestDeformAggregation(PlacedTests):
    operator = OPERATOR
    arguments = "features, spatial_shapes, sampling_locations, weights"


@each_dtype
def test_a_point_counts_inside_the_picture_alone(backend, dtype):
    """Strictly: not at 0 or 1, though pixels would reach it there; one rounding inside it does."""
    one = np.array(1).astype(make(OPERATOR, "one_map", dtype).grad_output.dtype)
    near = [2.0**-6, 1 - 2.0**-6 if dtype == "bfloat16" else 1 - 2.0**-9]
    ends = [(0.0, False), (1.0, False), (-0.0, False), (-(2.0**-6), False), (1.25, False), *((x, True) for x in near)]
    points = [(x, 0.5) for x, _ in ends] + [(0.5, y) for y, _ in ends]
    problem = make(OPERATOR, Aggregation((((4, 4),),), 1, 2, 1, len(points), 1), dtype)
    ones = {"features": np.ones((1, 16, 2)), "weights": np.ones((1, len(points), 1, 1, 1, 1))}
    ones["sampling_locations"] = np.array(points).reshape(1, -1, 1, 1, 2)
    problem = problem.replaced(**{name: a.astype(one.dtype) for name, a in ones.items()})
    results = both(backend, problem)
    assert results[0].astype(bool).reshape(2, -1, 2)[..., 0].tolist() == 2 * [[inside for _, inside in ends]]
    assert_results(problem, results, solve_oracle(problem), dtype)
    weights = results[1]["weights"].astype(float).ravel()
    assert not weights[np.array([not inside for _, inside in ends] * 2)].any()


@each_dtype
def test_nan_is_nan_wherever_the_other_coordinate_is(backend, dtype):
    problem = make(OPERATOR, Aggregation((((4, 4), (2, 2)),), 2, 3, 1, 4, 1), dtype)
    places = np.array([(math.nan, 0.5), (0.5, math.nan), (math.nan, 7.0), (math.nan, math.inf)])
    problem = problem.replaced(sampling_locations=places.reshape(1, 4, 1, 1, 2).astype(problem.grad_output.dtype))
    output, grads = both(backend, problem)
    assert np.isnan(output.astype(float)).all()
    assert np.isnan(grads["sampling_locations"].astype(float)).all()
    assert np.isnan(grads["weights"].astype(float)).all()
    assert not grads["features"].any()


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("weight", [math.nan, math.inf], ids=str)
def test_a_point_outside_has_no_part_whatever_its_weight(backend, groups, weight):
    """Neither in the output nor in any gradient."""
    problem = make(OPERATOR, Aggregation((((4, 4), (2, 2)), ((2, 4), (1, 1))), groups, 3, 1, 2, 4))
    places = np.full(problem.arrays["sampling_locations"].shape, 0.375)
    places[0, 0, 1, 0], places[0, 1, 2, 1] = (1.5, 0.5), (0.5, 0.0)
    weights = problem.arrays["weights"].copy()
    weights[0, 0, 1, 0] = weights[0, 1, 2, 1] = weight
    problem = problem.replaced(sampling_locations=places, weights=weights)
    output, grads = want = solve_oracle(problem)
    assert np.isfinite(output).all() and all(np.isfinite(grad).all() for grad in grads.values())
    assert_results(problem, both(backend, problem), want, "float64")


def test_sizes_as_an_array(backend):
    problem = make(OPERATOR, "cameras_differ")
    want, grads = run(backend, problem), run_backward(backend, problem)
    for sizes in (
        np.array(problem.arrays["spatial_shapes"]),
        [[list(s) for s in c] for c in problem.arrays["spatial_shapes"]],
    ):
        given = problem.replaced(spatial_shapes=sizes)
        assert_same_bits(run(backend, given), want)
        for name, grad in run_backward(backend, given).items():
            assert_same_bits(grad, grads[name])


def test_by_hand(backend):
    """Two cameras of which one sees the point; two scales; two groups with weights of their own."""
    shapes = (((2, 2), (1, 1)), ((1, 2), (1, 1)))
    problem = make(OPERATOR, Aggregation(shapes, 2, 1, 1, 1, 1))
    features = np.array([[1, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60], [7, 70], [8, 80.0]])
    places = np.array([[(0.5, 0.25)], [(1.5, 0.5)]]).reshape(1, 1, 1, 2, 2)
    weights = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8.0]]]).reshape(1, 1, 1, 2, 2, 2)
    problem = problem.replaced(features=features[None], sampling_locations=places, weights=weights)
    # The first scale of camera 0 at row 0, half way between columns: 1.5; the second a quarter above its centre: 3.75.
    want = np.array([1 * 1.5 + 3 * 0.75 * 5, 2 * 15 + 4 * 0.75 * 50])
    assert_close(run(backend, problem)[0, 0], want, "float64")

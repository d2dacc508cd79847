"""ms_deform_attn_fused and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.cases.gather import Attention, halves, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import PlacedTests, assert_results, both, each_dtype
from tests.conftest import assert_close

OPERATOR = "ms_deform_attn_fused"


class TestMsDeformAttnFused(PlacedTests):
    operator = OPERATOR
    arguments = (
        "value, spatial_shapes, reference_points, sampling_offsets, attention_logits, *, points=None, "
        "method='bilinear', offset_scale=0.5"
    )


# Every kind of reference: one or one a level, points or boxes.
REFERENCES = [(per_level, numbers) for per_level in (False, True) for numbers in (2, 4)]


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("references", REFERENCES, ids=str)
@pytest.mark.parametrize("points", [(2, 2), (1, 4)], ids=str)
@each_dtype
def test_references(backend, points, references, method, dtype):
    """Powers of two all over, so that places on pixels are exact in each dtype."""
    case = Attention(((4, 8), (2, 2)), points, 3, 6, flat=points == (1, 4), method=method, references=references)
    problem = make(OPERATOR, case, dtype, halves)
    assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)


@pytest.mark.parametrize("offset_scale", [0.5, 1.0, 2.0, 0.3, 1])
def test_offset_scale_is_of_boxes_alone(backend, offset_scale):
    for name, is_box in (("ragged", True), ("one_channel", False)):
        problem = make(OPERATOR, name)
        scaled = problem._replace(options={**problem.options, "offset_scale": offset_scale})
        assert_results(scaled, both(backend, scaled), solve_oracle(scaled), "float64")
        assert (run(backend, scaled) != run(backend, problem)).any() == (is_box and offset_scale != 0.5)


@pytest.mark.parametrize(("dtype", "largest"), [("float64", 1e300), ("float32", 1e38), ("float16", 6e4)])
def test_logits_of_any_size(backend, dtype, largest):
    """A power of the largest would be infinite; -inf leaves a point out, and other points of its head have the rest."""
    problem = make(OPERATOR, "ragged", dtype)
    logits = problem.arrays["attention_logits"].copy()
    logits[0, 0, 0, 3], logits[0, 1, 1, 5], logits[0, 2, 0, :] = largest, -largest, largest
    logits[1, 0, 0, :4] = -math.inf
    logits[1, 1, :, 1:] = -math.inf
    problem = problem.replaced(attention_logits=logits)
    output, grads = want = solve_oracle(problem)
    assert np.isfinite(output).all() and all(np.isfinite(grad).all() for grad in grads.values())
    assert_results(problem, both(backend, problem), want, dtype)


@pytest.mark.parametrize("logits", [math.nan, math.inf, "all -inf"], ids=str)
def test_logits_without_a_softmax(backend, logits):
    """Query and head of them are NaN, and of its gradients those that the softmax weighs; no others."""
    problem = make(OPERATOR, "ragged")
    spoilt = problem.arrays["attention_logits"].copy()
    spoilt[1, 2, 0, 4 if logits != "all -inf" else slice(None)] = -math.inf if logits == "all -inf" else logits
    problem = problem.replaced(attention_logits=spoilt)
    output, grads = both(backend, problem)
    want, want_grads = solve_oracle(problem)
    assert np.isnan(want).sum() == 5
    assert_close(output, want, "float64")
    for name, grad in want_grads.items():
        assert_close(grads[name], grad, "float64", name)


@each_dtype
@pytest.mark.parametrize("name", ["three_levels", "ragged", "ragged_per_level"])
def test_references_that_are_not_finite(backend, name, dtype):
    problem = make(OPERATOR, name, dtype)
    references = problem.arrays["reference_points"].copy()
    references[0, 0, 0, 0], references[0, 1, 0, 1] = math.nan, math.inf
    references[1, 0, -1, -1], references[1, 1, -1, 0] = math.nan, -math.inf
    problem = problem.replaced(reference_points=references)
    want = solve_oracle(problem)
    assert 0 < np.isnan(want[0]).sum() < want[0].size
    assert_results(problem, both(backend, problem), want, dtype)


def test_discrete_has_gradients_of_value_and_logits(backend):
    problem = make(OPERATOR, "discrete_ragged")
    grads = run_backward(backend, problem)
    assert {name for name, grad in grads.items() if grad is not None} == {"value", "attention_logits"}

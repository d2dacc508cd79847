"""dcnv3 and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases.gather import Dcn, make, run, solve_oracle
from tests.cases.gather_tests import PlacedTests, assert_results, both, each_dtype
from tests.conftest import assert_close, assert_same_bits

OPERATOR = "dcnv3"
ARGUMENTS = "kernel_size=3, stride=1, padding=1, dilation=1, groups=1, offset_scale=1.0, remove_center=False"


class TestDcnv3(PlacedTests):
    operator = OPERATOR
    arguments = f"input, offset, mask, {ARGUMENTS}"


def test_taps_run_along_columns(backend):
    """At zero offset each mask alone is the image shifted: the first points are those of the left column."""
    image = np.random.default_rng(0).standard_normal((1, 4, 5, 3))
    taps = [(ky, kx) for kx in range(2) for ky in range(3)]
    for point, (ky, kx) in enumerate(taps):
        mask = np.zeros((1, 2, 4, 6))
        mask[..., point] = 1
        problem = make(OPERATOR, Dcn((4, 5), 1, 3, (3, 2), padding=((0, 0), (0, 0)), batch=1))
        problem = problem.replaced(input=image, offset=np.zeros((1, 2, 4, 12)), mask=mask)
        assert_close(run(backend, problem), image[:, ky : ky + 2, kx : kx + 4], "float64")


def test_offsets_are_x_then_y(backend):
    image = np.random.default_rng(1).standard_normal((1, 4, 5, 2))
    offset = np.zeros((1, 4, 5, 2))
    offset[..., 0], offset[..., 1] = 1, -1
    problem = make(OPERATOR, Dcn((4, 5), 1, 2, (1, 1), padding=((0, 0), (0, 0)), batch=1))
    problem = problem.replaced(input=image, offset=offset, mask=np.ones((1, 4, 5, 1)))
    want = np.zeros_like(image)
    want[:, 1:, :4] = image[:, :3, 1:]
    assert_close(run(backend, problem), want, "float64")


@pytest.mark.parametrize("name", ["kernel_3", "dilation_2", "remove_center"])
@each_dtype
def test_zero_offset(backend, name, dtype):
    """As a layer begins: with padding the outer taps lie at exactly -1, where this operator has no slope."""
    problem = make(OPERATOR, name, dtype)
    problem = problem.replaced(offset=np.zeros_like(problem.arrays["offset"]))
    assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)


def test_same_padding(backend):
    """Output size ceil(size / stride); an odd pixel of padding follows the image."""
    case = Dcn((7, 6), 2, 3, (3, 2), (2, 1), ((1, 1), (0, 1)))
    problem = make(OPERATOR, case)
    same = problem._replace(options={**problem.options, "padding": "same"})
    assert problem.grad_output.shape == (2, 4, 6, 6)
    assert_results(same, both(backend, same), solve_oracle(problem), "float64")


def test_an_int_stands_for_both_axes(backend):
    problem = make(OPERATOR, Dcn((9, 8), 2, 3, (3, 3), (2, 2), ((1, 1), (1, 1)), (2, 2)))
    want = run(backend, problem)
    values = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}
    for short in (lambda v: v, lambda v: [v] * 2, lambda v: np.full(2, v), lambda v: (np.int64(v),) * 2):
        options = {**problem.options, **{name: short(value) for name, value in values.items()}}
        assert_same_bits(run(backend, problem._replace(options=options)), want)


def test_defaults(backend):
    """A 3x3 kernel with a padding of 1, one group."""
    problem = make(OPERATOR, Dcn((5, 6), 1, 4))
    assert_same_bits(run(backend, problem._replace(options={})), run(backend, problem))

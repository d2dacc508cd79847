"""active_conv2d and its backward against the oracle, against differences, and beside deform_conv2d."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases.conv import Case, make, make_grad_output, run, run_backward, solve_oracle
from tests.cases.conv_tests import PlacedTests, assert_grads
from tests.conftest import assert_close
from tests.reference.deform_conv import offset_of_positions


class TestActiveConv2d(PlacedTests):
    operator = "active_conv2d"

    @pytest.mark.parametrize("name", ["every_option", "groups_across_offset_groups", "depthwise", "mostly_outside"])
    def test_it_is_deform_conv2d_with_the_same_offset_everywhere(self, backend, name):
        """And the gradient of a position is the sum of those of the offsets that it stands for."""
        arrays, options, grad_output = self.problem(name)
        output, grads = self.both(backend, arrays, options, grad_output)
        case = self.case(name)
        others = {n: a for n, a in arrays.items() if n != "positions"}
        others["offset"] = offset_of_positions(arrays["positions"], case.batch, case.out_size, case.kernel)
        assert_close(run(backend, "deform_conv2d", others, options), output.astype(float), "float64")
        want = run_backward(backend, "deform_conv2d", grad_output, others, options)
        want["positions"] = want.pop("offset").sum(axis=(0, 2, 3))
        assert_grads(grads, {n: want[n] for n in grads}, "float64")

    def test_positions_of_zero_are_a_plain_convolution(self, backend):
        arrays, options, grad_output = self.problem("every_option")
        arrays["positions"] *= 0
        output, grads = self.both(backend, arrays, options, grad_output)
        plain = {n: a for n, a in arrays.items() if n != "positions"}
        options["groups"] = self.case("every_option").groups
        want = run(backend, "conv2d", plain, options)
        assert_close(output, want, "float64")
        for name, grad in run_backward(backend, "conv2d", grad_output, plain, options).items():
            assert_close(grads[name], grad, "float64", name)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
    def test_positions_that_are_not_finite_or_on_pixels(self, backend, dtype):
        """NaN gives NaN at every output, so each such tap has a group of its own; infinity is outside everywhere."""
        for places in ((np.nan, 0.5), (0.5, np.nan), (np.inf, np.nan), (np.inf, 0.5), (-1, 1), (-2, 0), (1, 0.5)):
            case = Case(2, 4, (4, 5), 2, (1, 2), padding=((1, 1), (1, 0)), groups=2, offset_groups=2)
            arrays, options = make(self.operator, case, dtype), case.of(self.operator).options(self.operator)
            arrays["positions"][2:4] = places  # the second tap of the first group: only the first output sees it
            self.compare(backend, arrays, options, make_grad_output(case, dtype), dtype)

    def compare(
        self, backend: Any, arrays: dict[str, Any], options: dict[str, Any], grad_output: Any, dtype: str
    ) -> None:
        want, grads = solve_oracle(self.operator, arrays, options, grad_output)
        assert np.isfinite(want[:, 1]).all()
        output, got = self.both(backend, arrays, options, grad_output)
        assert_close(output, want, dtype)
        assert_grads(got, grads, dtype)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_the_sum_over_many_pixels_keeps_its_precision(self, backend, dtype):
        """16,000 terms of one sign and of much the same size, in float32: no worse than a sum of parts."""
        rng = np.random.default_rng(0)
        case = Case(2, 1, (80, 100), 1, (1, 1), bias=False)
        arrays, options = make(self.operator, case, dtype), case.of(self.operator).options(self.operator)
        ramp = (np.arange(100) % 8 + rng.integers(0, 2, (2, 1, 80, 100)) / 64).astype(dtype)
        arrays["input"], arrays["positions"] = ramp, np.array([0.25, 0.5], dtype)
        grad_output = (rng.integers(32, 65, (2, 1, 80, 100)) / 64).astype(dtype)
        _, grads = solve_oracle(self.operator, arrays, options, grad_output)
        assert abs(grads["positions"]).max() < 60000  # of which a half has room
        _, got = self.both(backend, arrays, options, grad_output)
        assert_grads(got, grads, dtype)

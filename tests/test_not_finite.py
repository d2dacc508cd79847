"""One NaN or infinite number in one place of one argument of deform_conv2d reaches the outputs and gradients that the
equations say, and no others: whatever kernels multiply by zero on the way stays out of sight."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases.deform_conv2d import ARRAYS, Case, make, make_grad_output
from tests.conftest import assert_close, poison
from tests.reference import deform_conv2d as reference

# Channels that fill no vector, panel or tile; groups that share an offset group, and the other way round.
CASES = {
    "1 channel": Case(1, 1, 4, 5, 1, (2, 2), padding=((1, 0), (0, 1))),
    "3 channels": Case(2, 3, 3, 5, 2, (2, 1)),
    "5 channels": Case(1, 5, 4, 3, 7, (1, 2), offset_groups=5),
    "groups": Case(1, 6, 3, 4, 9, (2, 2), groups=3, offset_groups=2),
    "17 channels": Case(1, 17, 3, 3, 3, (1, 2), padding=((0, 0), (1, 0))),
    "34 channels of 2 groups": Case(1, 34, 3, 3, 4, (1, 2), groups=2, offset_groups=2),
    "two blocks of channels": Case(1, 70, 2, 3, 2, (1, 2)),
    "depthwise": Case(1, 5, 4, 4, 5, (2, 2), groups=5),
    "depthwise blocks": Case(1, 68, 2, 3, 68, (1, 2), groups=68, offset_groups=2),
    "kernel of 1": Case(2, 6, 3, 4, 5, (1, 1), groups=1, offset_groups=3),
    "kernel of 1, groups": Case(1, 12, 3, 4, 6, (1, 1), groups=3, offset_groups=2),
}
PLANTED = [
    (argument, value)
    for argument in ("input", "weight", "bias", "mask", "grad_output")
    for value in (np.nan, np.inf, -np.inf)
    if argument == "mask" or value != -np.inf
]
BOUNDARY = {"between pixels": "torchvision", "on pixels": "dcnv2"}  # the rule that has no slope at -1, where S is 0


@functools.cache
def problem(name: str, where: str) -> dict[str, np.ndarray]:
    """No number is 0, which would make NaN of an infinite one."""
    case = CASES[name]
    arrays = {**make(case), "grad_output": make_grad_output(case)}
    if where == "on pixels":
        arrays["offset"] = np.floor(arrays["offset"])
    return {n: a if n == "offset" else np.where(a == 0, 0.5, a) for n, a in arrays.items()}


def planted(name: str, where: str, argument: str, place: float, value: float) -> dict[str, np.ndarray]:
    arrays = dict(problem(name, where))
    arrays[argument] = arrays[argument].copy()
    arrays[argument].flat[int(place * (arrays[argument].size - 1))] = value
    return arrays


@functools.cache
def expected(*of_planted: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    name, where, *_ = of_planted
    arrays = planted(*of_planted)
    options = {**CASES[name].options, "boundary": BOUNDARY[where]}
    grad_output = arrays.pop("grad_output")
    with np.errstate(invalid="ignore"):
        return reference.forward(**arrays, **options), reference.backward(grad_output, **arrays, **options)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)


def check(backend: Any, dtype: str, *of_planted: Any) -> None:
    name, where, argument, _, value = of_planted
    output, grads = expected(*of_planted)
    arrays = {n: backend.array(a.astype(dtype)) for n, a in planted(*of_planted).items()}
    options = {**CASES[name].options, "boundary": BOUNDARY[where]}
    grad_output = arrays.pop("grad_output")
    what = f"{value} in {argument}: "
    assert_close(backend.numpy(pydeform.deform_conv2d(**arrays, **options)), output, dtype, what + "output")
    got = pydeform.deform_conv2d_backward(grad_output, **arrays, **options)
    for n in ARRAYS:
        grad, want = backend.numpy(getattr(got, n)), grads[n]
        if n in ("offset", "mask") and argument != "mask":
            # Differences and sums of dots with the four corners: of infinite ones NaN, where eq. 2 may have infinity.
            np.testing.assert_array_equal(np.isfinite(grad), np.isfinite(want), err_msg=what + f"grad of {n}")
            grad, want = np.where(np.isfinite(want), grad, 0), np.where(np.isfinite(want), want, 0)
        assert_close(grad, want, dtype, what + f"grad of {n}")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("argument", "value"), PLANTED)
@pytest.mark.parametrize("where", BOUNDARY)
@pytest.mark.parametrize("name", CASES)
def test_one_number_that_is_not_finite(backend, name, where, argument, value):
    check(backend, "float64", name, where, argument, 0.6, value)
    if backend.on_cpu:
        for place in 0.0, 0.6, 1.0:
            check(backend, "float32", name, where, argument, place, value)
    elif argument == "mask":
        check(backend, "float16", name, where, argument, 0.0, value)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", CASES)
def test_an_output_reads_no_pixel_at_exactly_minus_1(backend, name, value):
    """Where the rule of torchvision has a slope, which values have nothing of."""
    arrays, options = planted(name, "on pixels", "input", 0.0, value), CASES[name].options
    del arrays["grad_output"]
    with np.errstate(invalid="ignore"):
        want = reference.forward(**arrays, **options)
    for dtype in ("float64", "float16"):
        sent = {n: backend.array(a.astype(dtype)) for n, a in arrays.items()}
        assert_close(backend.numpy(pydeform.deform_conv2d(**sent, **options)), want, dtype)

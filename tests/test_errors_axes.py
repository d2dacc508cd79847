"""Messages of convolution over one and three axes and of active convolution: operator, argument, what was expected with
its numbers, what came. Those that say nothing of axes are in test_errors.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases.conv import ARRAYS, AXES, kind_of
from tests.test_errors import DTYPES, MOST, Rows, check, needs_errors, sent, zeros

OPERATORS = ("conv1d", "conv3d", "deform_conv1d", "deform_conv3d", "active_conv2d")
SIZES = {1: "L", 2: "H, W", 3: "D, H, W"}
ENDINGS = {1: ("",), 2: ("_h", "_w"), 3: ("_d", "_h", "_w")}
COORDINATES = {1: "x", 2: "yx", 3: "dyx"}
BOUNDARY = "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got 'zeros'"


def named(what: str, axes: int, between: str = ", ") -> str:
    return between.join(what + ending for ending in ENDINGS[axes])


class Good:
    """N 2, C 12; O 4 in 2 groups, 3 offset groups; image 4x7x9, kernel 2x3x2, output 3x5x8, the last of them where
    there are fewer axes."""

    def __init__(self, operator: str) -> None:
        self.operator, self.axes, self.kind = operator, AXES[operator], kind_of(operator)
        self.size, self.kernel, self.out = ((*a,)[-self.axes :] for a in ((4, 7, 9), (2, 3, 2), (3, 5, 8)))
        self.taps = math.prod(self.kernel)
        shapes = {
            "input": (2, 12, *self.size),
            "offset": (2, 3 * self.axes * self.taps, *self.out),
            "positions": (3 * self.axes * self.taps,),
            "weight": (4, 6, *self.kernel),
            "bias": (4,),
            "mask": (2, 3 * self.taps, *self.out),
        }
        self.arrays = {name: zeros(*shapes[name]) for name in ARRAYS[self.kind]}
        self.options = {"groups": 2} if self.kind == "conv" else {}
        self.grad_output = zeros(2, 4, *self.out)

    def rows(self) -> Rows:
        found = [*self.kinds(), *self.shapes(), *self.numbers()]
        if self.kind == "deform":
            found += [*self.of_offset(), ({"boundary": "zeros"}, ValueError, BOUNDARY)]
        elif self.kind == "active":
            found += self.of_positions()
        else:
            found.append(({"groups": 5}, ValueError, "groups must divide the 12 channels of input, got 5"))
        return found

    def kinds(self) -> Rows:
        rows: Rows = [
            ({"input": None}, TypeError, "input must be an array, got None"),
            ({"input": self.arrays["input"].astype(int)}, TypeError, f"input must have dtype {DTYPES}, got int64"),
        ]
        for name, array in self.arrays.items():
            if name != "input":
                text = f"{name} must have the dtype of input, float32, got float64"
                rows.append(({name: array.astype(np.float64)}, TypeError, text))
        return rows

    def shapes(self) -> Rows:
        weight = f"(O, C/groups, {named('kernel', self.axes)})"
        less, flat = (12, *self.size), (4, 6, *self.kernel[1:])
        empty = (2, 12, *self.size[1:], 0)
        return [
            ({"input": zeros(*less)}, ValueError, f"input must have shape (N, C, {SIZES[self.axes]}), got {less}"),
            ({"weight": zeros(*flat)}, ValueError, f"weight must have shape {weight}, got {flat}"),
            (
                {"input": zeros(*empty)},
                ValueError,
                f"input must have at least one channel and one pixel, got shape {empty}",
            ),
            (
                {"weight": zeros(5, 6, *self.kernel)},
                ValueError,
                f"weight must have shape {weight} with O a multiple of groups = 2, got {(5, 6, *self.kernel)}",
            ),
            ({"bias": zeros(3)}, ValueError, "bias must have shape (O,) = (4,), got (3,)"),
        ]

    def numbers(self) -> Rows:
        """stride, padding, dilation: one of each for every axis."""
        n = self.axes
        per_axis = "an int >= 1" + (f" or {n} of them" if n > 1 else "")
        padding = f"an int >= 0, {n} of them, {n} (before, after) pairs, or 'same'"
        many = (1,) * (n + 1)
        rows: Rows = [
            ({"padding": -1}, ValueError, f"padding must be {padding}, got -1"),
            ({"padding": many}, ValueError, f"padding must be {padding}, got {many}"),
            ({"padding": "valid"}, ValueError, f"padding must be {padding}, got 'valid'"),
            ({"padding": ((1, 1, 1),) * n}, ValueError, f"padding must be {padding}, got {((1, 1, 1),) * n}"),
            ({"padding": 2**31}, ValueError, f"padding must be {MOST}, got {2**31}"),
        ]
        for name in ("stride", "dilation"):
            if name == "stride" or self.kind != "active":
                rows += [
                    ({name: 0}, ValueError, f"{name} must be {per_axis}, got 0"),
                    ({name: many}, ValueError, f"{name} must be {per_axis}, got {many}"),
                    ({name: 1.0}, TypeError, f"{name} must be {per_axis}, got 1.0"),
                ]
        if self.kind != "active":
            dilated = tuple(19 * (k - 1) + 1 for k in self.kernel)
            text = f"input must be at least as large as the dilated kernel, {dilated}, got {self.size} with padding"
            rows.append(({"dilation": 19}, ValueError, text))
        if self.kind == "deform":  # float32 has no 2**24 + 1
            end = self.size[0] - 1
            text = (
                "taps must be within 16777216 pixels of the first one, as far as float32 coordinates are exact, "
                f"got {COORDINATES[n][0]} from -16777217 to {end}"
            )
            rows.append(({"padding": ((2**24 + 1, 0), *[(0, 0)] * (n - 1))}, ValueError, text))
        return rows

    def of_offset(self) -> Rows:
        n, kernel, out = self.axes, named("kernel", self.axes, "*"), named("out", self.axes)
        channels = 3 * self.taps
        mask = f"(N, offset_groups*{kernel}, {out})"
        offset = f"(N, {n}*offset_groups*{kernel}, {out})" if n > 1 else mask
        right = (2, n * channels, *self.out)
        one, other = (1, *right[1:]), (2, n * channels + 1, *self.out)
        five, wrong = (2, 5 * n * self.taps, *self.out), (2, self.taps, *self.out)
        return [
            ({"offset": None}, TypeError, "offset must be an array, got None"),
            ({"offset": zeros(*right[:-1])}, ValueError, f"offset must have shape {offset}, got {right[:-1]}"),
            ({"offset": zeros(*one)}, ValueError, f"offset must have shape {offset} = {right}, got {one}"),
            ({"offset": zeros(*other)}, ValueError, f"offset must have shape {offset} = {right}, got {other}"),
            (
                {"offset": zeros(*five)},
                ValueError,
                f"offset must have shape {offset} with offset_groups a divisor of C = 12, got {five}, "
                "which has offset_groups = 5",
            ),
            (
                {"mask": zeros(*wrong)},
                ValueError,
                f"mask must have shape {mask} = {(2, channels, *self.out)}, got {wrong}",
            ),
        ]

    def of_positions(self) -> Rows:
        formula, size = "(2*groups_of_positions*kernel_h*kernel_w,)", 2 * self.taps
        return [
            ({"positions": None}, TypeError, "positions must be an array, got None"),
            ({"positions": zeros(6, 6)}, ValueError, f"positions must have shape {formula}, got (6, 6)"),
            (
                {"positions": zeros(3 * size + 1)},
                ValueError,
                f"positions must have shape {formula} = ({3 * size},), got ({3 * size + 1},)",
            ),
            (
                {"positions": zeros(size // 2)},  # fewer than one group
                ValueError,
                f"positions must have shape {formula} = ({size},), got ({size // 2},)",
            ),
            (
                {"positions": zeros(5 * size)},
                ValueError,
                f"positions must have shape {formula} with groups_of_positions a divisor of C = 12, got ({5 * size},), "
                "which has groups_of_positions = 5",
            ),
        ]

    def of_backward(self) -> Rows:
        formula, right = f"(N, O, {named('out', self.axes)})", self.grad_output.shape
        wrong = (*right[:-1], right[-1] + 1)
        return [
            (
                {"grad_output": zeros(*wrong)},
                ValueError,
                f"grad_output must have shape {formula} = {right}, got {wrong}",
            ),
            (
                {"grad_output": self.grad_output.astype(np.float16)},
                TypeError,
                "grad_output must have the dtype of input, float32, got float16",
            ),
            *needs_errors(", ".join(self.arrays)),
        ]


def cases(backward: bool) -> list[Any]:
    found = []
    for operator in OPERATORS:
        good = Good(operator)
        rows = good.rows() + (good.of_backward() if backward else [])
        found += [
            pytest.param(operator, *row, id=f"{operator}.{number}-{'-'.join(row[0])}")
            for number, row in enumerate(rows)
        ]
    return found


@pytest.mark.parametrize(("operator", "change", "error", "text"), cases(backward=False))
def test_forward(backend, operator, change, error, text):
    good = Good(operator)
    check(backend, getattr(pydeform, operator), {**good.arrays, **good.options}, change, error, text)


@pytest.mark.parametrize(("operator", "change", "error", "text"), cases(backward=True))
def test_backward(backend, operator, change, error, text):
    good = Good(operator)
    arguments = {"grad_output": good.grad_output, **good.arrays, **good.options}
    check(backend, getattr(pydeform, f"{operator}_backward"), arguments, change, error, text)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_unchanged_calls_are_good(backend, operator):
    """Otherwise the tables above would show one mistake for another."""
    good = Good(operator)
    arrays = sent(backend, good.arrays)
    assert getattr(pydeform, operator)(**arrays, **good.options).shape == good.grad_output.shape
    grads = getattr(pydeform, f"{operator}_backward")(backend.array(good.grad_output), **arrays, **good.options)
    assert {n: g.shape for n, g in grads._asdict().items()} == {n: a.shape for n, a in good.arrays.items()}


@pytest.mark.parametrize("name", ["dilation", "groups", "mask", "boundary"])
def test_active_convolution_has_no_such_option(name):
    with pytest.raises(TypeError, match=name):
        pydeform.active_conv2d(**Good("active_conv2d").arrays, **{name: 1})


@pytest.mark.parametrize("operator", OPERATORS)
def test_things_that_are_no_arrays(operator):
    good = Good(operator)
    for name in good.arrays:
        for thing, kind in (([1.0], "list"), (1.5, "float"), ("text", "str")):
            with pytest.raises(TypeError, match=rf"^{operator}: {name} must be an array .*got .*{kind}"):
                getattr(pydeform, operator)(**{**good.arrays, **good.options, name: thing})

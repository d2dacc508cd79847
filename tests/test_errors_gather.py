"""Messages of attention, aggregation, DCNv3 and DCNv4: operator, argument, what was expected with its numbers, what
came. Each row is a change of a good call, the kind of error, and what its text has to say, in that order."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases.gather import OPERATORS, Aggregation, Attention, Dcn, Problem, make, run, run_backward
from tests.cases.gather import sent as sent_problem
from tests.test_errors import DTYPES, MOST, Unsent, needs_errors, sent, zeros

Row = tuple[dict[str, Any], type[Exception], tuple[str, ...]]

ATTENTION = Attention(((4, 5), (2, 3)), (2, 2), 3, 6, batch=2, queries=7, flat=False, references=(True, 4))
CASES = {
    "ms_deform_attn": ATTENTION,
    "ms_deform_attn_fused": ATTENTION,
    "deform_aggregation": Aggregation((((4, 5), (2, 3)), ((3, 3), (1, 2))), 3, 4, 2, 7, 5),
    "dcnv3": Dcn((7, 9), 3, 4, (3, 2), padding=((0, 0), (0, 0))),
    "dcnv4": Dcn((7, 9), 3, 4, (3, 2), padding=((0, 0), (0, 0))),
}


def good(operator: str) -> Problem:
    """Attention: N 2, S 26, Lq 7, 3 heads of 6 channels, 2 levels of 2 points. Aggregation: B 2, S 37, 7 anchors, 5
    points, 2 cameras, 2 scales, 3 groups of 4 channels. DCN: N 2, 7x9, 3 groups of 4 channels, kernel 3x2, out 5x8."""
    return make(operator, CASES[operator], "float32")


def shape_row(name: str, came: tuple[int, ...], formula: str, expected: Any = None) -> Row:
    """`expected`: numbers, where the message can tell them."""
    parts = [f"{name} must have shape {formula}"] + ([f"= {expected}"] if expected else [])
    return {name: zeros(*came)}, ValueError, (*parts, f"got {came}")


def kinds(operator: str) -> list[Row]:
    problem = good(operator)
    first, *others = problem.numbers
    rows: list[Row] = [
        ({first: None}, TypeError, (f"{first} must be an array", "got None")),
        ({first: [1.0]}, TypeError, (f"{first} must be an array", "got", "list")),
        ({first: problem.arrays[first].astype(int)}, TypeError, (f"{first} must have dtype {DTYPES}", "got int64")),
        ({first: problem.arrays[first].astype(complex)}, TypeError, (f"{first} must have dtype", "got complex128")),
    ]
    for name in others:
        array = problem.arrays[name]
        rows += [
            ({name: None}, TypeError, (f"{name} must be an array", "got None")),
            ({name: array.astype(np.float64)}, TypeError, (f"{name} must have the dtype of {first}", "got float64")),
            ({name: array.astype(np.float16)}, TypeError, (f"{name} must have the dtype of {first}", "got float16")),
        ]
    return rows


SIZES = "spatial_shapes must"


def of_attention(operator: str) -> list[Row]:
    places, weights = list(good(operator).numbers)[-2:]
    value, formula = "(N, S", "(N, Lq, heads, L, P"
    rows = [
        shape_row("value", (2, 26, 18), value),
        shape_row("value", (2, 27, 3, 6), value, (2, 26, 3, 6)),
        ({"value": zeros(2, 26, 3, 0)}, ValueError, ("value must", "(2, 26, 3, 0)")),
        shape_row(places, (2, 7, 3, 4, 2), f"{formula}, 2)"),
        shape_row(places, (2, 7, 3, 2, 2, 3), f"{formula}, 2)", (2, 7, 3, 2, 2, 2)),
        shape_row(places, (2, 7, 4, 2, 2, 2), f"{formula}, 2)", (2, 7, 3, 2, 2, 2)),
        shape_row(places, (1, 7, 3, 2, 2, 2), f"{formula}, 2)", (2, 7, 3, 2, 2, 2)),
        ({places: zeros(2, 7, 3, 2, 0, 2)}, ValueError, (f"{places} must", "(2, 7, 3, 2, 0, 2)")),
        shape_row(weights, (2, 7, 3, 2, 3), f"{formula})", (2, 7, 3, 2, 2)),
        shape_row(weights, (2, 7, 3, 4), f"{formula})", (2, 7, 3, 2, 2)),
        ({"spatial_shapes": ((4, 5),)}, ValueError, ("value must", "(2, 20, 3, 6)", "got (2, 26, 3, 6)")),
        ({"spatial_shapes": ((4, 5), (2, 3, 1))}, ValueError, (SIZES, "(2, 3, 1)")),
        ({"spatial_shapes": ((4, 5), (0, 3))}, ValueError, (SIZES, "(0, 3)")),
        ({"spatial_shapes": ((4, 5), (-2, -3))}, ValueError, (SIZES, "(-2, -3)")),
        ({"spatial_shapes": ((4, 5), (2.0, 3.0))}, TypeError, (SIZES, "ints >= 1 of shape (L, 2)", "(2.0, 3.0)")),
        ({"spatial_shapes": ()}, ValueError, (SIZES, "(L, 2)", "got ()")),
        ({"spatial_shapes": (4, 5)}, ValueError, (SIZES, "(L, 2)", "got (4, 5)")),
        ({"spatial_shapes": Unsent(np.zeros((2, 2)))}, TypeError, (SIZES,)),
        ({"spatial_shapes": None}, (TypeError, ValueError), (SIZES, "got None")),
        ({"points": (4, 1)}, ValueError, (f"{places} must have shape (N, Lq, heads, sum(points), 2)", "got")),
        ({"points": (4, 1, 1)}, ValueError, ("points must be", "2 of them", "got (4, 1, 1)")),
        ({"points": (4, -1)}, ValueError, ("points must be", "got (4, -1)")),
        ({"points": (2.0, 2.0)}, TypeError, ("points must be", "got (2.0, 2.0)")),
        ({"method": "nearest"}, ValueError, ("method must be one of 'bilinear', 'discrete'", "got 'nearest'")),
        ({"method": None}, ValueError, ("method must be one of", "got None")),
    ]
    flat = {"points": (3, 1), places: zeros(2, 7, 3, 4, 2), weights: zeros(2, 7, 3, 5)}
    expected = f"{weights} must have shape (N, Lq, heads, sum(points)) = (2, 7, 3, 4)"
    rows.append((flat, ValueError, (expected, "got (2, 7, 3, 5)")))
    flat = {"points": (3, 2), places: zeros(2, 7, 3, 4, 2), weights: zeros(2, 7, 3, 4)}
    expected = f"{places} must have shape (N, Lq, heads, sum(points), 2) = (2, 7, 3, 5, 2)"
    rows.append((flat, ValueError, (expected, "got (2, 7, 3, 4, 2)")))
    if operator.endswith("fused"):
        formula = "(N, Lq, 1 or L, 2 or 4)"
        came = [(2, 7, 2), (2, 7, 2, 4, 1), (2, 7, 3, 4), (2, 7, 2, 3), (1, 7, 2, 4), (2, 6, 2, 4)]
        rows += [shape_row("reference_points", shape, formula) for shape in came]
        rows += [
            ({"offset_scale": None}, TypeError, ("offset_scale must be a finite number", "got None")),
            ({"offset_scale": float("nan")}, ValueError, ("offset_scale must be a finite number", "got nan")),
            ({"offset_scale": 1e39}, ValueError, ("offset_scale must be finite in float32", "got 1e+39")),
        ]
    return rows


def of_aggregation() -> list[Row]:
    places, weights = "(B, anchors, points, cameras, 2)", "(B, anchors, points, cameras, scales, groups)"
    return [
        shape_row("features", (2, 37, 3, 4), "(B, S"),
        shape_row("features", (2, 36, 12), "(B, S", (2, 37, 12)),
        ({"features": zeros(2, 37, 0)}, ValueError, ("features must", "(2, 37, 0)")),
        shape_row("sampling_locations", (2, 7, 5, 2), places),
        shape_row("sampling_locations", (2, 7, 5, 3, 2), places, (2, 7, 5, 2, 2)),
        shape_row("sampling_locations", (2, 7, 5, 2, 3), places, (2, 7, 5, 2, 2)),
        shape_row("sampling_locations", (1, 7, 5, 2, 2), places, (2, 7, 5, 2, 2)),
        shape_row("weights", (2, 7, 5, 2, 2), weights),
        shape_row("weights", (2, 7, 5, 2, 3, 3), weights, (2, 7, 5, 2, 2, 3)),
        shape_row("weights", (2, 7, 4, 2, 2, 3), weights, (2, 7, 5, 2, 2, 3)),
        (
            {"weights": zeros(2, 7, 5, 2, 2, 5)},
            ValueError,
            (f"weights must have shape {weights}", "groups a divisor of C = 12", "got (2, 7, 5, 2, 2, 5)"),
        ),
        ({"weights": zeros(2, 7, 5, 2, 2, 0)}, ValueError, ("weights must", "got (2, 7, 5, 2, 2, 0)")),
        ({"spatial_shapes": ((4, 5), (2, 3))}, ValueError, (SIZES, "(cameras, scales, 2)", "got")),
        ({"spatial_shapes": (((4, 5), (2, 3)), ((3, 3),))}, ValueError, (SIZES, "(cameras, scales, 2)", "((3, 3),)")),
        ({"spatial_shapes": (((4, 5), (2, 3)), ((3, 0), (1, 2)))}, ValueError, (SIZES, "(3, 0)")),
        ({"spatial_shapes": (((4, 5), (2, 3)),)}, ValueError, ("features must", "(2, 26, 12)", "got (2, 37, 12)")),
        ({"spatial_shapes": None}, (TypeError, ValueError), (SIZES, "got None")),
    ]


def of_dcn(operator: str) -> list[Row]:
    per_axis, padding = "an int >= 1 or 2 of them", "an int >= 0, 2 of them, 2 (before, after) pairs, or 'same'"
    rows: list[Row] = [
        shape_row("input", (2, 7, 108), "(N, H, W, C)"),
        ({"input": zeros(2, 7, 0, 12)}, ValueError, ("input must have at least one", "got shape (2, 7, 0, 12)")),
        ({"groups": 5}, ValueError, ("groups must divide the 12 channels of input", "got 5")),
        ({"groups": 0}, ValueError, ("groups must be an int >= 1", "got 0")),
        ({"groups": 1.0}, TypeError, ("groups must be an int >= 1", "got 1.0")),
        ({"padding": -1}, ValueError, (f"padding must be {padding}", "got -1")),
        ({"padding": "valid"}, ValueError, (f"padding must be {padding}", "got 'valid'")),
        ({"padding": ((1, 1, 1),) * 2}, ValueError, (f"padding must be {padding}", "got ((1, 1, 1), (1, 1, 1))")),
        ({"kernel_size": 2**31}, ValueError, (f"kernel_size must be {MOST}", f"got {2**31}")),
        ({"remove_center": True}, ValueError, ("remove_center", "square", "odd", "(3, 2)")),
        ({"kernel_size": 2, "remove_center": True}, ValueError, ("remove_center", "square", "odd", "(2, 2)")),
        ({"kernel_size": 1, "remove_center": True}, ValueError, ("remove_center", "(1, 1)")),
        ({"offset_scale": "1"}, TypeError, ("offset_scale must be a finite number", "got '1'")),
        ({"offset_scale": float("inf")}, ValueError, ("offset_scale must be a finite number", "got inf")),
        ({"kernel_size": (8, 1)}, ValueError, ("input must be at least as large", "(8, 1)", "got (7, 9) with padding")),
    ]
    for name in ("kernel_size", "stride", "dilation"):
        rows += [
            ({name: 0}, ValueError, (f"{name} must be {per_axis}", "got 0")),
            ({name: (1, 1, 1)}, ValueError, (f"{name} must be {per_axis}", "got (1, 1, 1)")),
            ({name: 1.5}, TypeError, (f"{name} must be {per_axis}", "got 1.5")),
        ]
    if operator == "dcnv3":
        points = (2, 5, 8, 36), (2, 5, 8, 18)
        rows += [
            shape_row("offset", (2, 5, 8, 18), "(N, out_h, out_w, groups*P*2)", points[0]),
            shape_row("offset", (2, 36, 5, 8), "(N, out_h, out_w, groups*P*2)", points[0]),
            shape_row("offset", (2, 5, 36), "(N, out_h, out_w, groups*P*2)"),
            shape_row("mask", (2, 5, 8, 36), "(N, out_h, out_w, groups*P)", points[1]),
            shape_row("mask", (1, 5, 8, 18), "(N, out_h, out_w, groups*P)", points[1]),
        ]
    else:  # 3 groups of 6 points of 3 numbers: 54, in rows of 56
        formula = "(N, out_h, out_w, ceil(groups*P*3"
        rows += [shape_row("offset_mask", (2, 5, 8, n), formula, (2, 5, 8, 56)) for n in (54, 48, 64)]
        rows += [shape_row("offset_mask", (2, 7, 9, 56), formula, (2, 5, 8, 56))]
    return rows


def rows_of(operator: str) -> list[Row]:
    if operator.startswith("ms_"):
        return kinds(operator) + of_attention(operator)
    return kinds(operator) + (of_aggregation() if operator == "deform_aggregation" else of_dcn(operator))


def of_backward(operator: str) -> list[Row]:
    right = good(operator).grad_output
    wrong = (*right.shape[:-1], right.shape[-1] + 1)
    names = ", ".join(good(operator).numbers)
    rows = [({"grad_output": zeros(*wrong)}, ValueError, ("grad_output must", f"= {right.shape}", f"got {wrong}"))]
    rows += [({"grad_output": right.astype(np.float16)}, TypeError, ("grad_output must have the dtype", "got float16"))]
    rows += [({"grad_output": None}, TypeError, ("grad_output must be an array", "got None"))]
    return rows + [(change, error, (text,)) for change, error, text in needs_errors(names)]


def check(backend: Any, function: Any, arguments: dict[str, Any], row: Row) -> None:
    change, error, parts = row
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**sent(backend, {**arguments, **change}))
    said = re.fullmatch(f"{function.__name__}: " + ".*".join(map(re.escape, parts)) + ".*", str(caught.value))
    assert said, f"{caught.value}\nhas not, in this order: {', '.join(map(repr, parts))}"
    assert isinstance(caught.value, error) and type(caught.value) in (TypeError, ValueError)


def cases(backward: bool) -> list[Any]:
    return [
        pytest.param(operator, row, id=f"{operator}.{number}-{'-'.join(row[0])}")
        for operator in OPERATORS
        for number, row in enumerate(rows_of(operator) + (of_backward(operator) if backward else []))
    ]


@pytest.mark.parametrize(("operator", "row"), cases(backward=False))
def test_forward(backend, operator, row):
    problem = good(operator)
    check(backend, getattr(pydeform, operator), {**problem.arrays, **problem.options}, row)


@pytest.mark.parametrize(("operator", "row"), cases(backward=True))
def test_backward(backend, operator, row):
    problem = good(operator)
    arguments = {"grad_output": problem.grad_output, **problem.arrays, **problem.options}
    check(backend, getattr(pydeform, f"{operator}_backward"), arguments, row)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_unchanged_calls_are_good(backend, operator):
    """Otherwise the tables above would show one mistake for another."""
    problem = good(operator)
    assert run(backend, problem).shape == problem.grad_output.shape
    shapes = {name: grad.shape for name, grad in run_backward(backend, problem).items()}
    assert shapes == {name: array.shape for name, array in problem.numbers.items()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_unknown_option(backend, operator):
    problem = good(operator)
    with pytest.raises(TypeError, match="boundary"):
        getattr(pydeform, operator)(**sent_problem(backend, problem), **problem.options, boundary="dcnv2")


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "dcnv4"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_places_alone_may_be_float32_beside_halves(backend, operator, half):
    problem = make(operator, CASES[operator], half)
    places = ("sampling_locations", "reference_points", "sampling_offsets", "offset")
    for name, array in list(problem.numbers.items())[1:]:
        wide = problem.replaced(**{name: array.astype(np.float32)})
        if name in places:
            assert run_backward(backend, wide)[name].dtype == np.float32
        else:
            with pytest.raises(TypeError, match=f"^{operator}: {name} must have the dtype of .*{half}.*got float32"):
                run(backend, wide)


@pytest.mark.parametrize("operator", ["ms_deform_attn", "deform_aggregation", "dcnv3"])
@pytest.mark.parametrize("what, size, channels", [("pixels in an image", 2**16, 1), ("channels in all", 1, 2**31)])
def test_more_than_32_bits_count(operator, what, size, channels):
    value = np.broadcast_to(np.float32(0), (1, size, size // 2 or 1, channels))
    count = max(channels, value.size // channels)
    if operator == "dcnv3":
        arguments = {"input": value, "offset": zeros(1, 1, 1, 18), "mask": zeros(1, 1, 1, 9)}
    elif operator == "ms_deform_attn":
        options = {"spatial_shapes": (value.shape[1:3],)}
        arguments = {"value": value.reshape(1, -1, 1, channels), **options}
        arguments |= {"sampling_locations": zeros(1, 1, 1, 1, 1, 2), "attention_weights": zeros(1, 1, 1, 1, 1)}
    else:
        options = {"spatial_shapes": ((value.shape[1:3],),)}
        arguments = {"features": value.reshape(1, -1, channels), **options}
        arguments |= {"sampling_locations": zeros(1, 1, 1, 1, 2), "weights": zeros(1, 1, 1, 1, 1, 1)}
    with pytest.raises(ValueError, match=f"{operator}: .* must have at most {2**31 - 1} {what}, got {count}"):
        getattr(pydeform, operator)(**arguments)


@pytest.mark.parametrize("operator", ["dcnv3", "dcnv4"])
def test_rows_with_padding_are_numbers_of_the_coordinates_type(operator):
    """Beyond 2^24 float32 does not have every whole number."""
    arrays = {"input": zeros(1, 4, 3, 1)}
    if operator == "dcnv3":
        arrays |= {"offset": zeros(1, 1, 1, 18), "mask": zeros(1, 1, 1, 9)}
    else:
        arrays["offset_mask"] = zeros(1, 1, 1, 32)

    def run(dtype: str, padding: int) -> Any:
        options = {"padding": (padding, 0), "stride": (2**26, 1)}
        return getattr(pydeform, operator)(**{name: a.astype(dtype) for name, a in arrays.items()}, **options)

    said = f"{operator}: input must have at most {2**24} rows and columns with padding, got \\({2**24 + 2}, 3\\)"
    with pytest.raises(ValueError, match=said):
        run("float32", 2**23 - 1)
    for dtype, padding in (("float32", 2**23 - 2), ("float64", 2**23 - 1)):
        np.testing.assert_array_equal(run(dtype, padding), np.zeros((1, 1, 1, 1), dtype))


@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_a_map_are_numbers_of_the_coordinates_type(turned):
    def run(rows: int) -> Any:
        size = (1, rows) if turned else (rows, 1)
        return pydeform.ms_deform_attn(huge(1, rows, 1, 1), (size,), zeros(1, 1, 1, 1, 1, 2), zeros(1, 1, 1, 1, 1))

    said = f"ms_deform_attn: a map must have at most {2**24} rows and columns, got {2**24 + 1}"
    with pytest.raises(ValueError, match=said):
        run(2**24 + 1)
    np.testing.assert_array_equal(run(2**24), np.zeros((1, 1, 1), np.float32))


def huge(*shape: int) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize(
    "operator, named, arguments",
    [
        ("grid_sample", "(N, C, out_h, out_w)", lambda c: (huge(1, c, 2, 2), huge(1, 2**30, 2**29, 2))),
        (
            "ms_deform_attn",
            "(N, Lq, heads*channels)",
            lambda c: (huge(1, 6, 1, c), ((2, 3),), huge(1, 2**59, 1, 1, 1, 2), huge(1, 2**59, 1, 1, 1)),
        ),
        (
            "deform_aggregation",
            "(B, anchors, C)",
            lambda c: (huge(1, 6, c), (((2, 3),),), huge(1, 2**59, 1, 1, 2), huge(1, 2**59, 1, 1, 1, 1)),
        ),
        ("affine_grid", "(N, out_h, out_w, 2)", lambda c: (huge(c, 2, 3), (c, 7, 2**29, 2**29))),
    ],
)
def test_a_result_has_less_than_2_to_the_63_bytes(operator, named, arguments):
    """Half as much as that is refused by the system alone."""
    with pytest.raises(
        ValueError, match=re.escape(f"{operator}: the result must have less than 2**63 bytes, got shape {named}")
    ):
        getattr(pydeform, operator)(*arguments(4))
    with pytest.raises(MemoryError):
        getattr(pydeform, operator)(*arguments(2))

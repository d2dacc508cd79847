"""Every message of the eight RoI operators: operator, argument, what was expected with its numbers, what came."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.test_errors import DTYPES, Unsent, cases, check, needs_errors, scalars, sent, too_large, zeros
from tests.test_roi import OPERATORS

# What is changed of a good call -> error and text, which follows the operator's name.
Rows = list[tuple[dict[str, Any], type[Exception], str]]


def good(operator: str) -> dict[str, Any]:
    """N 2, 7x9 pixels, 5 boxes; 2x3 bins or 3x3, 4 output channels, 2 classes."""
    pooled: dict[str, Any] = {"boxes": zeros(5, 5), "output_size": (2, 3)}
    return {
        "roi_pool": {"input": zeros(2, 4, 7, 9), **pooled},
        "roi_align": {"input": zeros(2, 4, 7, 9), **pooled},
        "ps_roi_pool": {"input": zeros(2, 24, 7, 9), **pooled},
        "ps_roi_align": {"input": zeros(2, 24, 7, 9), **pooled},
        "deform_roi_pool": {
            "input": zeros(2, 4, 7, 9),
            **pooled,
            "offset": zeros(5, 2, 2, 3),
            "mask": zeros(5, 1, 2, 3),
        },
        "deform_psroi_pool": {
            "input": zeros(2, 16, 7, 9),
            "boxes": zeros(5, 5),
            "trans": zeros(5, 4, 6, 6),
            "mask": zeros(5, 1, 3, 3),
            "output_dim": 4,
            "pooled_size": 3,
            "group_size": 2,
            "part_size": 6,
        },
        "roi_align_rotated": {"input": zeros(2, 4, 7, 9), **pooled, "boxes": zeros(5, 6)},
        "prroi_pool": {"input": zeros(2, 4, 7, 9), **pooled},
    }[operator]


def grad_shape(operator: str) -> tuple[int, ...]:
    return (5, 4, 3, 3) if operator == "deform_psroi_pool" else (5, 4, 2, 3)


def of_input_dtype(name: str, array: np.ndarray) -> Rows:
    """An array that comes after input has its dtype."""
    return [
        ({name: array.astype(kind)}, TypeError, f"{name} must have the dtype of input, float32, got {got}")
        for kind, got in ((np.float64, "float64"), (np.float16, "float16"), (int, "int64"), (complex, "complex128"))
    ]


def positive_int(name: str) -> Rows:
    return [
        *scalars(name, "an int >= 1"),
        *too_large(name),
        *(
            ({name: value}, error, f"{name} must be an int >= 1, got {value!r}")
            for value, error in (
                (0, ValueError),
                (-1, ValueError),
                (True, ValueError),
                (1.0, TypeError),
                ("7", TypeError),
                ((2, 3), ValueError),
            )
        ),
    ]


def finite(name: str, values: Any = (np.nan, np.inf, -np.inf), expected: str = "a finite number") -> Rows:
    return [
        *(({name: value}, ValueError, f"{name} must be {expected}, got {value!r}") for value in values),
        *(({name: value}, TypeError, f"{name} must be {expected}, got {value!r}") for value in ("x", None, True, 1j)),
        *(
            ({name: value}, TypeError, f"{name} must be {expected}, got {value!r}")
            for value in (
                *(b"1", np.True_, np.complex64(1), (1.0,), {1.0}, np.timedelta64(1, "s")),
                *(Unsent(np.array(a)) for a in ([1.0], True, 1j, "1")),
            )
        ),
        ({name: 10**400}, ValueError, f"{name} must be {expected}, got 1{'0' * 199}..."),
        ({name: 1e39}, ValueError, f"{name} must be finite in float32, got 1e+39"),
    ]


WITH_GRADIENT = ("roi_align", "prroi_pool")  # of boxes
POOLED = "an int >= 1 or 2 of them"

ALL: Rows = [
    # kinds and dtypes
    ({"input": None}, TypeError, "input must be an array, got None"),
    ({"boxes": None}, TypeError, "boxes must be an array, got None"),
    *(
        ({"input": zeros(2, 24, 7, 9, dtype=kind)}, TypeError, f"input must have dtype {DTYPES}, got {got}")
        for kind, got in ((int, "int64"), (bool, "bool"), (complex, "complex128"), (">f4", ">f4"))
    ),
    # shapes
    ({"input": zeros(24, 7, 9)}, ValueError, "input must have shape (N, C, H, W), got (24, 7, 9)"),
    ({"input": zeros(1, 2, 24, 7, 9)}, ValueError, "input must have shape (N, C, H, W), got (1, 2, 24, 7, 9)"),
    *(
        ({"input": zeros(*shape)}, ValueError, f"input must have at least one channel and one pixel, got shape {shape}")
        for shape in ((2, 0, 7, 9), (2, 24, 0, 9), (2, 24, 7, 0))
    ),
    *finite("spatial_scale", (0, 0.0, -1, np.nan, np.inf), "a finite number > 0"),
]


def box_errors(operator: str) -> Rows:
    columns = good(operator)["boxes"].shape[1]
    names = "batch index, cx, cy, w, h, theta" if operator == "roi_align_rotated" else "batch index, x1, y1, x2, y2"
    return [
        *of_input_dtype("boxes", zeros(5, columns)),
        (
            {"boxes": zeros(5, columns, dtype=">f4")},
            TypeError,
            "boxes must have the dtype of input, float32, got >f4",
        ),
        *(
            ({"boxes": zeros(*shape)}, ValueError, f"boxes must have shape (R, {columns}), rows [{names}], got {shape}")
            for shape in ((5, 4), (5,), (1, 5, columns), (0,), (5, 11 - columns))
        ),
    ]


OUTPUT_SIZE: Rows = [
    *scalars("output_size", POOLED),
    *too_large("output_size"),
    ({"output_size": (2, 2**31)}, ValueError, "output_size must be at most 2147483647, got (2, 2147483648)"),
    *(
        ({"output_size": value}, error, f"output_size must be {POOLED}, got {value!r}")
        for value, error in (
            (0, ValueError),
            (-1, ValueError),
            (True, ValueError),
            ((2, 0), ValueError),
            ((1, 2, 3), ValueError),
            ((2,), ValueError),
            ((), ValueError),
            ("7", TypeError),
            (2.0, TypeError),
            ((2, 3.0), TypeError),
            (None, TypeError),
            ({2, 3}, TypeError),
            ({2: 3, 3: 2}, TypeError),
            (itertools.count(1), TypeError),
        )
    ),
]
MANY_BINS: Rows = [
    ({"output_size": 2**16}, ValueError, "a box must have at most 2147483647 bins, got 65536 * 65536"),
]

SAMPLING_RATIO: Rows = [
    *too_large("sampling_ratio"),
    *(
        ({"sampling_ratio": value}, error, f"sampling_ratio must be an int >= -1, got {value!r}")
        for value, error in (
            (-2, ValueError),
            (-(2**63) - 1, ValueError),
            (True, ValueError),
            (1.5, TypeError),
            ("2", TypeError),
            (None, TypeError),
            (Unsent(np.array(True)), ValueError),
            (Unsent(np.array(2.0)), TypeError),
        )
    ),
]

GROUPS: Rows = [
    (
        {"input": zeros(2, 25, 7, 9)},
        ValueError,
        "input must have shape (N, C, H, W) with C a multiple of output_h*output_w = 6, got (2, 25, 7, 9)",
    ),
    (
        {"output_size": 5},
        ValueError,
        "input must have shape (N, C, H, W) with C a multiple of output_h*output_w = 25, got (2, 24, 7, 9)",
    ),
]


def mask_errors(shape: tuple[int, ...], *wrong: tuple[int, ...]) -> Rows:
    return [
        *of_input_dtype("mask", zeros(*shape)),
        *(
            ({"mask": zeros(*w)}, ValueError, f"mask must have shape (R, 1, pooled_h, pooled_w) = {shape}, got {w}")
            for w in wrong
        ),
    ]


TRANS = "(R, 2*classes, part_size, part_size)"
OWN: dict[str, Rows] = {
    "roi_pool": [*OUTPUT_SIZE, *MANY_BINS],
    "roi_align": [
        *OUTPUT_SIZE,
        *MANY_BINS,
        *SAMPLING_RATIO,
        *(
            ({"mode": value}, ValueError, f"mode must be one of 'avg', 'max', got {value!r}")
            for value in ("mean", "AVG", None, 0)
        ),
    ],
    "ps_roi_pool": [
        *OUTPUT_SIZE,
        *GROUPS,
        *(
            ({"convention": value}, ValueError, f"convention must be one of 'torchvision', 'rfcn', got {value!r}")
            for value in ("mxnet", None)
        ),
    ],
    "ps_roi_align": [*OUTPUT_SIZE, *GROUPS, *SAMPLING_RATIO],
    "deform_roi_pool": [
        *OUTPUT_SIZE,
        *MANY_BINS,
        *SAMPLING_RATIO,
        *finite("gamma"),
        *of_input_dtype("offset", zeros(5, 2, 2, 3)),
        *(
            (
                {"offset": zeros(*shape)},
                ValueError,
                f"offset must have shape (R, 2, pooled_h, pooled_w) = (5, 2, 2, 3), got {shape}",
            )
            for shape in ((4, 2, 2, 3), (5, 4, 2, 3), (5, 2, 3, 2), (5, 2, 6), (5, 2, 2, 3, 1), (5, 12))
        ),
        (
            {"output_size": 7},
            ValueError,
            "offset must have shape (R, 2, pooled_h, pooled_w) = (5, 2, 7, 7), got (5, 2, 2, 3)",
        ),
        *mask_errors((5, 1, 2, 3), (4, 1, 2, 3), (5, 2, 2, 3), (5, 1, 3, 2), (5, 2, 3), (5, 1, 2, 3, 1)),
    ],
    "deform_psroi_pool": [
        *(
            row
            for name in ("output_dim", "pooled_size", "group_size", "part_size", "sample_per_part")
            for row in positive_int(name)
        ),
        *(
            ({name: None}, TypeError, f"{name} must be an int >= 1, got None")
            for name in ("output_dim", "pooled_size", "group_size", "sample_per_part")
        ),
        ({"pooled_size": 2**16}, ValueError, "a box must have at most 2147483647 bins, got 65536 * 65536"),
        *finite("trans_std"),
        (
            {"input": zeros(2, 15, 7, 9)},
            ValueError,
            "input must have shape (N, output_dim*group_size**2, H, W) = (2, 16, 7, 9), got (2, 15, 7, 9)",
        ),
        (
            {"group_size": 3},
            ValueError,
            "input must have shape (N, output_dim*group_size**2, H, W) = (2, 36, 7, 9), got (2, 16, 7, 9)",
        ),
        *of_input_dtype("trans", zeros(5, 4, 6, 6)),
        *(
            ({"trans": zeros(*shape)}, ValueError, f"trans must have shape {TRANS}, got {shape}")
            for shape in ((5, 4, 36), (4, 6, 6), (5, 4, 6, 6, 1))
        ),
        *(
            ({"trans": zeros(*shape)}, ValueError, f"trans must have shape {TRANS} = {expected}, got {shape}")
            for shape, expected in {
                (4, 4, 6, 6): (5, 4, 6, 6),
                (5, 4, 3, 3): (5, 4, 6, 6),
                (5, 5, 6, 6): (5, 4, 6, 6),  # x and y of each class
                (5, 1, 6, 6): (5, 2, 6, 6),  # one class at least
                (5, 0, 6, 6): (5, 2, 6, 6),
            }.items()
        ),
        ({"part_size": None}, ValueError, f"trans must have shape {TRANS} = (5, 4, 3, 3), got (5, 4, 6, 6)"),
        (
            {"trans": zeros(5, 6, 6, 6)},
            ValueError,
            f"trans must have shape {TRANS} with classes a divisor of output_dim = 4, got (5, 6, 6, 6), "
            "which has classes = 3",
        ),
        (
            {"trans": zeros(5, 16, 6, 6)},
            ValueError,
            f"trans must have shape {TRANS} with classes a divisor of output_dim = 4, got (5, 16, 6, 6), "
            "which has classes = 8",
        ),
        *mask_errors((5, 1, 3, 3), (5, 1, 6, 6), (4, 1, 3, 3), (5, 2, 3, 3), (5, 9)),
    ],
    "roi_align_rotated": [*OUTPUT_SIZE, *MANY_BINS, *SAMPLING_RATIO],
    "prroi_pool": [*OUTPUT_SIZE, *MANY_BINS],
}


WITH_GRADIENT = ("roi_align", "prroi_pool")  # of boxes


def backward_errors(operator: str) -> Rows:
    shape = grad_shape(operator)
    names = ", ".join(name for name in OPERATORS[operator] if name != "boxes" or operator in WITH_GRADIENT)
    without = [] if operator in WITH_GRADIENT else ["boxes"]
    return [
        ({"grad_output": None}, TypeError, "grad_output must be an array, got None"),
        *of_input_dtype("grad_output", zeros(*shape)),
        *(
            (
                {"grad_output": zeros(*wrong)},
                ValueError,
                f"grad_output must have shape (R, C, pooled_h, pooled_w) = {shape}, got {wrong}",
            )
            for wrong in ((4, *shape[1:]), (5, 3, *shape[2:]), (*shape[:2], 4, 1), shape[1:], (*shape, 1))
        ),
        *needs_errors(names),
        *(
            ({"needs": (name,)}, ValueError, f"needs must name gradients among {names}, got {name!r}")
            for name in without
        ),
    ]


def every_error(operator: str) -> Rows:
    return ALL + box_errors(operator) + OWN[operator]


def rows(table: Any) -> list[Any]:
    """(operator, change, error, text) of every operator."""
    return [
        pytest.param(operator, *case.values, id=f"{operator}.{case.id}")
        for operator in OPERATORS
        for case in cases(table(operator))
    ]


@pytest.mark.parametrize(("operator", "change", "error", "text"), rows(every_error))
def test_forward(backend, operator, change, error, text):
    check(backend, getattr(pydeform, operator), good(operator), change, error, text)


@pytest.mark.parametrize(
    ("operator", "change", "error", "text"), rows(lambda operator: every_error(operator) + backward_errors(operator))
)
def test_backward(backend, operator, change, error, text):
    arguments = {"grad_output": zeros(*grad_shape(operator)), **good(operator)}
    check(backend, getattr(pydeform, f"{operator}_backward"), arguments, change, error, text)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_unchanged_calls_are_good(backend, operator):
    """Otherwise the tables above would show one mistake for another."""
    arguments, grad = sent(backend, good(operator)), backend.array(zeros(*grad_shape(operator)))
    assert getattr(pydeform, operator)(**arguments).shape == grad_shape(operator)
    grads = getattr(pydeform, f"{operator}_backward")(grad, **arguments)
    assert [None if g is None else g.shape for g in grads] == [
        None if name == "boxes" and operator != "prroi_pool" else arguments[name].shape for name in OPERATORS[operator]
    ]


@pytest.mark.parametrize("operator", ["roi_pool", "roi_align", "deform_roi_pool", "roi_align_rotated", "prroi_pool"])
def test_more_bytes_than_an_array_has(operator):
    """Boxes that take no memory ask for a result that no memory can hold: said before anything is counted."""
    arguments = {**good(operator), "output_size": (2**10, 2**10)}
    arguments["boxes"] = np.broadcast_to(arguments["boxes"][:1], (2**40, arguments["boxes"].shape[1]))
    arguments = {name: a for name, a in arguments.items() if name not in ("offset", "mask")}
    text = (
        f"the result must have less than 2**63 bytes, got shape (R, C, pooled_h, pooled_w) = ({2**40}, 4, 1024, 1024)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(f'{operator}: {text}')}$"):
        getattr(pydeform, operator)(**arguments)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("index", [-1, 2, 0.5, 1e6, np.nan, np.inf])
def test_batch_index(operator, index):
    """On the CPU; test_roi.py says what CUDA does. The first wrong row is named."""
    arguments = good(operator)
    arguments["boxes"][3:, 0] = index
    text = f"boxes must have a whole number >= 0 and < N = 2 in column 0, the batch index, got {index:g} in row 3"
    for name, more in ((operator, {}), (f"{operator}_backward", {"grad_output": zeros(*grad_shape(operator))})):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {text}')}$"):
            getattr(pydeform, name)(**more, **arguments)


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, names in OPERATORS.items() for name in names]
)
def test_things_that_are_no_arrays(operator, name):
    for thing, kind in (([1.0], "list"), (1.5, "float"), ("text", "str")):
        with pytest.raises(TypeError, match=rf"^{operator}: {name} must be an array .*got .*{kind}"):
            getattr(pydeform, operator)(**{**good(operator), name: thing})


@pytest.mark.parametrize("operator", OPERATORS)
def test_arrays_of_two_devices_are_named(backend, operator):
    if backend.on_cpu:
        pytest.skip("needs arrays of two devices")
    for name in OPERATORS[operator]:
        arguments = sent(backend, good(operator)) | {name: good(operator)[name]}
        kinds = {n: "numpy" if n == name else "cupy" for n in OPERATORS[operator]}
        listed = ", ".join(f"{n} is {kind}" for n, kind in kinds.items())
        text = f"{operator}: all arrays must be on one device, got {listed}"
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            getattr(pydeform, operator)(**arguments)


def test_options_of_deform_psroi_pool_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        pydeform.deform_psroi_pool(zeros(2, 16, 7, 9), zeros(5, 5), None, 4, 3)
    with pytest.raises(TypeError, match="output_dim"):
        pydeform.deform_psroi_pool(zeros(2, 16, 7, 9), zeros(5, 5), pooled_size=3)

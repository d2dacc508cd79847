"""Every message of conv2d and deform_conv2d: operator, argument, what was expected with its numbers, what came."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _backend


class Unsent(np.ndarray):
    """An option that stays a NumPy array on every backend."""

    def __new__(cls, array: np.ndarray) -> Unsent:
        return array.view(cls)

    def __repr__(self) -> str:
        return repr(self.view(np.ndarray))


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def good_deform() -> dict[str, Any]:
    """N 2, C 12, 7x9; O 4 in 2 groups, kernel 3x2, 3 offset groups; output 5x8."""
    return {
        "input": zeros(2, 12, 7, 9),
        "offset": zeros(2, 36, 5, 8),
        "weight": zeros(4, 6, 3, 2),
        "bias": zeros(4),
        "mask": zeros(2, 18, 5, 8),
    }


def good_conv() -> dict[str, Any]:
    return {"input": zeros(2, 12, 7, 9), "weight": zeros(4, 6, 3, 2), "bias": zeros(4), "groups": 2}


WEIGHT = "(O, C/groups, kernel_h, kernel_w)"
OFFSET = "(N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w)"
MASK = "(N, offset_groups*kernel_h*kernel_w, out_h, out_w)"
PER_AXIS = "an int >= 1 or 2 of them"
PADDING = "an int >= 0, 2 of them, 2 (before, after) pairs, or 'same'"
DTYPES = "float64, float32, float16, bfloat16"
KERNEL = "input must be at least as large as the dilated kernel"

MOST = "at most 2147483647"
Rows = list[tuple[dict[str, Any], type[Exception], str]]


def scalars(name: str, expected: str) -> Rows:
    """Arrays without axes, and NumPy's numbers: a bool is a wrong value as True is, other kinds are wrong kinds."""
    return [
        ({name: value}, error, f"{name} must be {expected}, got {value!r}")
        for value, error in (
            (Unsent(np.array(True)), ValueError),
            (np.True_, ValueError),
            (Unsent(np.array(1.0)), TypeError),
            (np.float32(1), TypeError),
            (Unsent(np.array("1")), TypeError),
            (Unsent(np.array(-1)), ValueError),
        )
    ]


def too_large(name: str) -> Rows:
    """More than a kernel's int of 32 bits, more than one of 64, and more digits than an error should have."""
    rows: Rows = [({name: value}, ValueError, f"{name} must be {MOST}, got {value}") for value in (2**31, 2**32, 2**63)]
    return [*rows, ({name: 10**300}, ValueError, f"{name} must be {MOST}, got 1{'0' * 199}...")]


# What is changed of a good call -> error and text, which follows the operator's name.
BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    # kinds and dtypes
    ({"input": None}, TypeError, "input must be an array, got None"),
    ({"weight": None}, TypeError, "weight must be an array, got None"),
    ({"input": zeros(2, 12, 7, 9, dtype=int)}, TypeError, f"input must have dtype {DTYPES}, got int64"),
    ({"input": zeros(2, 12, 7, 9, dtype=bool)}, TypeError, f"input must have dtype {DTYPES}, got bool"),
    ({"input": zeros(2, 12, 7, 9, dtype=complex)}, TypeError, f"input must have dtype {DTYPES}, got complex128"),
    ({"input": zeros(2, 12, 7, 9, dtype=">f4")}, TypeError, f"input must have dtype {DTYPES}, got >f4"),
    ({"bias": zeros(4, dtype=">f4")}, TypeError, "bias must have the dtype of input, float32, got >f4"),
    ({"bias": zeros(4, dtype="U3")}, TypeError, "bias must have the dtype of input, float32, got <U3"),
    (
        {"weight": zeros(4, 6, 3, 2, dtype=np.float64)},
        TypeError,
        "weight must have the dtype of input, float32, got float64",
    ),
    ({"bias": zeros(4, dtype=np.float16)}, TypeError, "bias must have the dtype of input, float32, got float16"),
    # shapes
    ({"input": zeros(12, 7, 9)}, ValueError, "input must have shape (N, C, H, W), got (12, 7, 9)"),
    ({"weight": zeros(4, 6, 3)}, ValueError, f"weight must have shape {WEIGHT}, got (4, 6, 3)"),
    (
        {"input": zeros(2, 0, 7, 9)},
        ValueError,
        "input must have at least one channel and one pixel, got shape (2, 0, 7, 9)",
    ),
    (
        {"input": zeros(2, 12, 7, 0)},
        ValueError,
        "input must have at least one channel and one pixel, got shape (2, 12, 7, 0)",
    ),
    (
        {"weight": zeros(4, 6, 3, 0)},
        ValueError,
        "weight must have no axis of length 0, got shape (4, 6, 3, 0)",
    ),
    (
        {"weight": zeros(5, 6, 3, 2)},
        ValueError,
        f"weight must have shape {WEIGHT} with O a multiple of groups = 2, got (5, 6, 3, 2)",
    ),
    ({"bias": zeros(3)}, ValueError, "bias must have shape (O,) = (4,), got (3,)"),
    ({"bias": zeros(4, 1)}, ValueError, "bias must have shape (O,) = (4,), got (4, 1)"),
    # stride, dilation
    ({"stride": 0}, ValueError, f"stride must be {PER_AXIS}, got 0"),
    ({"stride": (1, -1)}, ValueError, f"stride must be {PER_AXIS}, got (1, -1)"),
    ({"stride": (1, 1, 1)}, ValueError, f"stride must be {PER_AXIS}, got (1, 1, 1)"),
    ({"stride": 1.0}, TypeError, f"stride must be {PER_AXIS}, got 1.0"),
    ({"stride": True}, ValueError, f"stride must be {PER_AXIS}, got True"),
    ({"stride": "12"}, TypeError, f"stride must be {PER_AXIS}, got '12'"),
    ({"stride": None}, TypeError, f"stride must be {PER_AXIS}, got None"),
    ({"dilation": 0}, ValueError, f"dilation must be {PER_AXIS}, got 0"),
    ({"dilation": (2,)}, ValueError, f"dilation must be {PER_AXIS}, got (2,)"),
    ({"dilation": (1.5, 1)}, TypeError, f"dilation must be {PER_AXIS}, got (1.5, 1)"),
    ({"stride": b"12"}, TypeError, f"stride must be {PER_AXIS}, got b'12'"),
    ({"stride": {1, 2}}, TypeError, f"stride must be {PER_AXIS}, got {{1, 2}}"),
    ({"stride": {1: 1, 2: 2}}, TypeError, f"stride must be {PER_AXIS}, got {{1: 1, 2: 2}}"),
    ({"stride": itertools.count()}, TypeError, f"stride must be {PER_AXIS}, got count(0)"),
    ({"dilation": itertools.repeat(1)}, TypeError, f"dilation must be {PER_AXIS}, got repeat(1)"),
    ({"stride": range(10**9)}, ValueError, f"stride must be {PER_AXIS}, got range(0, 1000000000)"),
    *scalars("stride", PER_AXIS),
    *scalars("dilation", PER_AXIS),
    *too_large("stride"),
    *too_large("dilation"),
    # padding
    *scalars("padding", PADDING),
    *too_large("padding"),
    ({"padding": ((0, 0), (2**31, 0))}, ValueError, f"padding must be {MOST}, got ((0, 0), (2147483648, 0))"),
    ({"padding": (1, (0, 2**63))}, ValueError, f"padding must be {MOST}, got (1, (0, {2**63}))"),
    ({"padding": {1, 2}}, TypeError, f"padding must be {PADDING}, got {{1, 2}}"),
    ({"padding": itertools.count(1)}, TypeError, f"padding must be {PADDING}, got count(1)"),
    ({"padding": (itertools.count(1), 0)}, TypeError, f"padding must be {PADDING}, got (count(1), 0)"),
    ({"padding": b"same"}, TypeError, f"padding must be {PADDING}, got b'same'"),
    ({"padding": ((True, 1), 0)}, ValueError, f"padding must be {PADDING}, got ((True, 1), 0)"),
    ({"padding": -1}, ValueError, f"padding must be {PADDING}, got -1"),
    ({"padding": 0.5}, TypeError, f"padding must be {PADDING}, got 0.5"),
    ({"padding": None}, TypeError, f"padding must be {PADDING}, got None"),
    ({"padding": "valid"}, ValueError, f"padding must be {PADDING}, got 'valid'"),
    ({"padding": (1, 1, 1, 1)}, ValueError, f"padding must be {PADDING}, got (1, 1, 1, 1)"),
    ({"padding": ((1, 1, 1), 0)}, ValueError, f"padding must be {PADDING}, got ((1, 1, 1), 0)"),
    ({"padding": ((1, -2), 0)}, ValueError, f"padding must be {PADDING}, got ((1, -2), 0)"),
    ({"padding": ("same", "same")}, TypeError, f"padding must be {PADDING}, got ('same', 'same')"),
    # the kernel does not fit
    ({"dilation": (4, 1)}, ValueError, f"{KERNEL}, (9, 2), got (7, 9) with padding"),
    ({"dilation": (5, 11), "padding": (2, (0, 1))}, ValueError, f"{KERNEL}, (11, 12), got (11, 10) with padding"),
    # what the numbers give together: more rows than an int counts, more bytes than an array has
    (
        {"padding": 2**30},
        ValueError,
        f"input must have {MOST} pixels along an axis with padding, got (2147483655, 2147483657) of them",
    ),
    (
        {"padding": "same", "dilation": (2**31 - 1, 1)},
        ValueError,
        f"input must have {MOST} pixels along an axis with padding, got (4294967301, 10) of them",
    ),
    (
        {"padding": 2**30 - 5},
        ValueError,
        "the result must have less than 2**63 bytes, got shape (N, O, out_h, out_w) = (2, 4, 2147483643, 2147483646)",
    ),
]

CONV: list[tuple[dict[str, Any], type[Exception], str]] = [
    *scalars("groups", "an int >= 1"),
    *too_large("groups"),
    ({"groups": 0}, ValueError, "groups must be an int >= 1, got 0"),
    ({"groups": None}, TypeError, "groups must be an int >= 1, got None"),
    ({"groups": 5}, ValueError, "groups must divide the 12 channels of input, got 5"),
    ({"groups": 3}, ValueError, f"weight must have shape {WEIGHT} = (4, 4, 3, 2), got (4, 6, 3, 2)"),
]

TAPS = "taps must be within 16777216 pixels of the first one, as far as float32 coordinates are exact"
DEFORM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"offset": None}, TypeError, "offset must be an array, got None"),
    (
        {"offset": zeros(2, 36, 5, 8, dtype=np.float64)},
        TypeError,
        "offset must have the dtype of input, float32, got float64",
    ),
    ({"mask": zeros(2, 18, 5, 8, dtype=np.int8)}, TypeError, "mask must have the dtype of input, float32, got int8"),
    (
        {"weight": zeros(4, 5, 3, 2)},
        ValueError,
        f"weight must have shape {WEIGHT} with C = 12 a multiple of its second axis, got (4, 5, 3, 2)",
    ),
    (
        {"weight": zeros(4, 24, 3, 2)},
        ValueError,
        f"weight must have shape {WEIGHT} with C = 12 a multiple of its second axis, got (4, 24, 3, 2)",
    ),
    ({"boundary": "zeros"}, ValueError, "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got 'zeros'"),
    (
        {"boundary": ["dcnv2"]},
        ValueError,
        "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got ['dcnv2']",
    ),
    (
        {"boundary": Unsent(np.array(["dcnv2", "dcnv1"]))},
        ValueError,
        "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got array(['dcnv2', 'dcnv1'], dtype='<U5')",
    ),
    # float32 has no 2**24 + 1
    (
        {"padding": ((2**24 + 1, 0), 0)},
        ValueError,
        f"{TAPS}, got y from -16777217 to 6",
    ),
    (
        {"padding": (0, (0, 2**24))},
        ValueError,
        f"{TAPS}, got x from 0 to 16777224",
    ),
    ({"boundary": None}, ValueError, "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got None"),
    ({"offset": zeros(2, 36, 40)}, ValueError, f"offset must have shape {OFFSET}, got (2, 36, 40)"),
    (
        {"offset": zeros(1, 36, 5, 8)},
        ValueError,
        f"offset must have shape {OFFSET} = (2, 36, 5, 8), got (1, 36, 5, 8)",
    ),
    (
        {"offset": zeros(2, 36, 8, 5)},
        ValueError,
        f"offset must have shape {OFFSET} = (2, 36, 5, 8), got (2, 36, 8, 5)",
    ),
    (
        {"stride": 2},
        ValueError,
        f"offset must have shape {OFFSET} = (2, 36, 3, 4), got (2, 36, 5, 8)",
    ),
    (
        {"offset": zeros(2, 37, 5, 8)},
        ValueError,
        f"offset must have shape {OFFSET} = (2, 36, 5, 8), got (2, 37, 5, 8)",
    ),
    (
        {"offset": zeros(2, 6, 5, 8)},  # fewer than one offset group
        ValueError,
        f"offset must have shape {OFFSET} = (2, 12, 5, 8), got (2, 6, 5, 8)",
    ),
    (
        {"offset": zeros(2, 60, 5, 8)},
        ValueError,
        f"offset must have shape {OFFSET} with offset_groups a divisor of C = 12, got (2, 60, 5, 8), "
        "which has offset_groups = 5",
    ),
    (
        {"mask": zeros(2, 6, 5, 8)},
        ValueError,
        f"mask must have shape {MASK} = (2, 18, 5, 8), got (2, 6, 5, 8)",
    ),
    (
        {"mask": zeros(2, 18, 5, 8, 1)},
        ValueError,
        f"mask must have shape {MASK} = (2, 18, 5, 8), got (2, 18, 5, 8, 1)",
    ),
]

# Backward only.
GRAD_OUTPUT = "(N, O, out_h, out_w)"
BACKWARD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"grad_output": zeros(2, 4, 8, 5)},
        ValueError,
        f"grad_output must have shape {GRAD_OUTPUT} = (2, 4, 5, 8), got (2, 4, 8, 5)",
    ),
    (
        {"grad_output": zeros(4, 5, 8)},
        ValueError,
        f"grad_output must have shape {GRAD_OUTPUT} = (2, 4, 5, 8), got (4, 5, 8)",
    ),
    (
        {"grad_output": zeros(2, 4, 5, 8, dtype=np.float16)},
        TypeError,
        "grad_output must have the dtype of input, float32, got float16",
    ),
    (
        {"grad_output": zeros(2, 4, 5, 8, dtype=int)},
        TypeError,
        "grad_output must have the dtype of input, float32, got int64",
    ),
    ({"grad_output": None}, TypeError, "grad_output must be an array, got None"),
]


def needs_errors(names: str) -> list[tuple[dict[str, Any], type[Exception], str]]:
    return [
        ({"needs": "input"}, TypeError, f"needs must be a tuple of names from {names}, got 'input'"),
        (
            {"needs": Unsent(np.array("input"))},
            TypeError,
            f"needs must be a tuple of names from {names}, got array('input', dtype='<U5')",
        ),
        ({"needs": 5}, TypeError, f"needs must be a tuple of names from {names}, got 5"),
        (
            {"needs": itertools.repeat("input")},
            TypeError,
            f"needs must be a tuple of names from {names}, got repeat('input')",
        ),
        ({"needs": (["input"],)}, ValueError, f"needs must name gradients among {names}, got ['input']"),
        ({"needs": (names.split(", ")[0], "grad")}, ValueError, f"needs must name gradients among {names}, got 'grad'"),
    ]


def cases(*tables: list[tuple[dict[str, Any], type[Exception], str]]) -> list[Any]:
    rows = [row for table in tables for row in table]
    return [pytest.param(*row, id=f"{number}-{'-'.join(row[0])}") for number, row in enumerate(rows)]


def sent(backend: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arrays on the backend, but for those of types that only NumPy has."""
    return {
        name: backend.array(a) if type(a) is np.ndarray and a.dtype.isnative and a.dtype.kind in "fiub" else a
        for name, a in arguments.items()
    }


def check(
    backend: Any,
    function: Any,
    arguments: dict[str, Any],
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**sent(backend, {**arguments, **change}))
    assert str(caught.value) == f"{function.__name__}: {text}"
    assert type(caught.value) is error


@pytest.mark.parametrize(("change", "error", "text"), cases(BOTH, CONV))
def test_conv2d(backend, change, error, text):
    check(backend, pydeform.conv2d, good_conv(), change, error, text)


@pytest.mark.parametrize(("change", "error", "text"), cases(BOTH, DEFORM))
def test_deform_conv2d(backend, change, error, text):
    check(backend, pydeform.deform_conv2d, good_deform(), change, error, text)


@pytest.mark.parametrize(("change", "error", "text"), cases(BOTH, CONV, BACKWARD, needs_errors("input, weight, bias")))
def test_conv2d_backward(backend, change, error, text):
    check(backend, pydeform.conv2d_backward, {"grad_output": zeros(2, 4, 5, 8), **good_conv()}, change, error, text)


@pytest.mark.parametrize(
    ("change", "error", "text"), cases(BOTH, DEFORM, BACKWARD, needs_errors("input, offset, weight, bias, mask"))
)
def test_deform_conv2d_backward(backend, change, error, text):
    check(
        backend,
        pydeform.deform_conv2d_backward,
        {"grad_output": zeros(2, 4, 5, 8), **good_deform()},
        change,
        error,
        text,
    )


def test_the_unchanged_calls_are_good(backend):
    """Otherwise the tables above would show one mistake for another."""
    conv, deform, grad = sent(backend, good_conv()), sent(backend, good_deform()), backend.array(zeros(2, 4, 5, 8))
    assert pydeform.conv2d(**conv).shape == (2, 4, 5, 8)
    assert pydeform.deform_conv2d(**deform).shape == (2, 4, 5, 8)
    assert pydeform.conv2d_backward(grad, **conv).bias.shape == (4,)
    assert pydeform.deform_conv2d_backward(grad, **deform).mask.shape == (2, 18, 5, 8)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_things_that_are_no_arrays(name):
    for thing, kind in (([1.0], "list"), (1.5, "float"), ("text", "str")):
        with pytest.raises(TypeError, match=rf"^deform_conv2d: {name} must be an array .*got .*{kind}"):
            pydeform.deform_conv2d(**{**good_deform(), name: thing})


def test_arrays_of_two_devices_are_named():
    """Without a GPU: what the backend looks at is where the type of an array comes from."""
    on_gpu = type("ndarray", (), {"__module__": "cupy"})()
    text = "deform_conv2d: all arrays must be on one device, got input is numpy, weight is cupy"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        _backend.backend_for("deform_conv2d", "deform_conv2d", {"input": zeros(1), "mask": None, "weight": on_gpu})


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_sequences_without_an_end(name):
    class Endless(list[int]):
        def __iter__(self) -> Any:
            return itertools.repeat(1)

        def __repr__(self) -> str:
            return "Endless()"

    with pytest.raises(ValueError, match=rf"^conv2d: {name} must be .*, got Endless\(\)$"):
        pydeform.conv2d(**{**good_conv(), name: Endless()})
    with pytest.raises(TypeError, match=rf"^conv2d: {name} must be .*, got <memory at "):
        pydeform.conv2d(**{**good_conv(), name: memoryview(b"\1\1")})


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_values_that_have_no_text(name):
    """Python prints no int of so many digits, and an object may print anything."""

    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

    for value, error, kind in ((10**5000, ValueError, "int"), (Silent(), TypeError, "Silent")):
        with pytest.raises(
            error, match=rf"^conv2d: {name} must be .*, got (a value of type \S*{kind}|10{{199}}\.\.\.)$"
        ):
            pydeform.conv2d(**{**good_conv(), name: value})


def test_an_operator_without_a_twin_says_so():
    with pytest.raises(NotImplementedError, match=r"^warp: not available on cpu yet$"):
        _backend.backend_for("warp", "warp", {"input": zeros(1)})


@pytest.mark.parametrize("count", [0, -1, True])
def test_set_num_threads_value(count):
    with pytest.raises(ValueError, match=rf"^set_num_threads: count must be an int >= 1, got {count}$"):
        pydeform.set_num_threads(count)


def test_set_num_threads_kind():
    with pytest.raises(TypeError, match=r"^set_num_threads: count must be an int >= 1, got 1\.5$"):
        pydeform.set_num_threads(1.5)

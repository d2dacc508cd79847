"""Argument checks shared by all operators, and the text of every error they raise."""

from __future__ import annotations

import functools
import itertools
import math
import operator as _operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pydeform._types import Needs

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
MOST = 2**31 - 1  # of an option, and of rows and columns: kernels hold them, and where taps read, in ints of 32 bits
MOST_BYTES = 2**63 - 1  # of an array
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
LONGEST_TEXT = 200  # of what came, in an error


def check_present(op: str, arrays: dict[str, Any], *names: str) -> None:
    for name in names:
        if arrays[name] is None:
            raise TypeError(f"{op}: {name} must be an array, got None")


def check_dtypes(op: str, arrays: dict[str, Any], coordinates: Sequence[str] = ()) -> None:
    """Every array present has one and the same native float dtype; `arrays` is in the order of the arguments.

    Arrays named in `coordinates` may be float32 beside half types, in which pixels past 256 or 2,048 have no numbers.
    """
    first: Any = None
    for name, array in arrays.items():
        if array is None:
            continue
        dtype = array.dtype
        if first is None:
            if not _is_float(dtype):
                raise TypeError(f"{op}: {name} must have dtype {', '.join(FLOAT_DTYPES)}, got {dtype}")
            first, first_name = dtype, name
        elif dtype is not first and dtype != first:
            or_float32 = name in coordinates and first.itemsize == 2
            if not (or_float32 and _is_float(dtype) and dtype.itemsize == 4):
                expected = f"the dtype of {first_name}, {first}" + (", or float32" if or_float32 else "")
                raise TypeError(f"{op}: {name} must have {expected}, got {dtype}")


@functools.cache
def _is_float(dtype: Any) -> bool:
    return dtype.name in FLOAT_DTYPES and dtype.isnative


def check_ndim(op: str, name: str, shape: Sequence[int], formula: str, ndim: int) -> None:
    if len(shape) != ndim:
        raise ValueError(f"{op}: {name} must have shape {formula}, got {tuple(shape)}")


def check_shape(op: str, name: str, shape: Sequence[int], formula: str, expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {formula} = {tuple(expected)}, got {tuple(shape)}")


def check_result(op: str, formula: str, shape: Sequence[int], itemsize: int) -> None:
    """NumPy and CuPy can address it, in float32 at least. Axes of length 0 do not count, as to them."""
    if math.prod(max(n, 1) for n in shape) * max(itemsize, 4) > MOST_BYTES:
        raise ValueError(f"{op}: the result must have less than 2**63 bytes, got shape {formula} = {tuple(shape)}")


def check_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def flag(op: str, name: str, value: Any) -> bool:
    """Any other value would be true or false without a word."""
    if type(value) is bool:  # the usual case is a quick one
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """What came, for an error's text: no value may spoil it by being long or having no text."""
    try:
        text = repr(value)
    except Exception:  # of an int with more digits than Python prints, or of anything else
        return f"a value of type {type(value).__qualname__}"
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def is_plain(value: Any) -> bool:
    """Ints, texts, None, and tuples of such: two that are equal mean the same, which 1, 1.0 and True do not."""
    kind = type(value)
    return kind is int or kind is str or value is None or (kind is tuple and all(map(is_plain, value)))


def _is_number(value: Any) -> bool:
    """Not a text, nor an array that has axes or holds something else, which float() or index() might take as well."""
    dtype = str(getattr(value, "dtype", "int"))  # a library's own, whose text names the kind
    return (
        not isinstance(value, str | bytes | bytearray)
        and getattr(value, "ndim", 0) == 0
        and ("int" in dtype or "float" in dtype)
    )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or ("bool" in str(getattr(value, "dtype", "")) and getattr(value, "ndim", 0) == 0)


def items_of(value: Any, most: int) -> tuple[Any, ...] | None:
    """What a list, a tuple, or an array of one axis or more has, not much more than `most`; None: it must be a number.

    Texts, sets, dicts and iterators, which may have no end, have no items that count.
    """
    if type(value) is tuple:
        return value
    ndim = getattr(value, "ndim", None)
    has_axes = isinstance(value, Sequence) or (isinstance(ndim, int) and ndim > 0)
    if not has_axes or isinstance(value, str | bytes | bytearray | memoryview):
        return None
    return tuple(itertools.islice(value, most + 1))


def as_int(op: str, name: str, item: Any, minimum: int, expected: str, value: Any) -> int:
    """`item` of the argument `value` as an int."""
    if type(item) is int and minimum <= item <= MOST:
        return item
    if _is_bool(item):
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(value)}")
    try:
        number = _operator.index(item)
    except Exception:  # each library has its own for an array that is no int, or whose value nobody knows
        raise TypeError(f"{op}: {name} must be {expected}, got {shown(value)}") from None
    if number < minimum:
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(value)}")
    if number > MOST:
        raise ValueError(f"{op}: {name} must be at most {MOST}, got {shown(value)}")
    return number


def number(op: str, name: str, value: Any, *, positive: bool = False, dtype: Any = None) -> float:
    """A finite real number as a float. `dtype`: of the data, which may be computed in float32."""
    if type(value) is float and 0 < value <= FLOAT32_MAX:  # the usual case is a quick one
        return value
    expected = "a finite number" + (" > 0" if positive else "")
    try:
        if isinstance(value, bool) or not _is_number(value):
            raise TypeError
        converted = float(value)
    except OverflowError:
        converted = math.inf
    except Exception:  # as above
        raise TypeError(f"{op}: {name} must be {expected}, got {shown(value)}") from None
    if not math.isfinite(converted) or (positive and converted <= 0):
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(value)}")
    if dtype is not None and dtype.name != "float64" and abs(converted) > FLOAT32_MAX:
        raise ValueError(f"{op}: {name} must be finite in float32, got {shown(value)}")
    return converted


def per_axis(op: str, name: str, value: Any, axes: int, minimum: int) -> tuple[int, ...]:
    """An int, or a sequence or array of one int per axis, as a tuple of `axes` ints not below `minimum`."""
    if type(value) is int and minimum <= value <= MOST:  # the usual case is a quick one
        return (value,) * axes
    expected = f"an int >= {minimum}" + (f" or {axes} of them" if axes > 1 else "")
    items = items_of(value, axes)
    if items is None:
        return (as_int(op, name, value, minimum, expected, value),) * axes
    if len(items) != axes:
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(value)}")
    return tuple(as_int(op, name, item, minimum, expected, value) for item in items)


def padding_pairs(
    op: str,
    padding: Any,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """(before, after) for each axis. "same" gives ceil(size / stride) outputs; an odd pixel goes after the image."""
    axes = len(sizes)
    if type(padding) is int and 0 <= padding <= MOST:
        return ((padding,) * 2,) * axes
    expected = f"an int >= 0, {axes} of them, {axes} (before, after) pairs, or 'same'"
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"{op}: padding must be {expected}, got {shown(padding)}")
        totals = [
            max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    items = items_of(padding, axes)
    if items is None:
        return ((as_int(op, "padding", padding, 0, expected, padding),) * 2,) * axes
    if len(items) != axes:
        raise ValueError(f"{op}: padding must be {expected}, got {shown(padding)}")
    pairs = []
    for item in items:
        pair = items_of(item, 2)
        if pair is not None and len(pair) != 2:
            raise ValueError(f"{op}: padding must be {expected}, got {shown(padding)}")
        sides = (item, item) if pair is None else pair
        before, after = (as_int(op, "padding", side, 0, expected, padding) for side in sides)
        pairs.append((before, after))
    return tuple(pairs)


def needed(op: str, needs: Needs, arrays: dict[str, Any]) -> frozenset[str]:
    """The names of the gradients to compute: those asked for whose argument is present."""
    wanted = arrays if needs is None else needs
    if isinstance(needs, str) or not isinstance(wanted, Collection) or getattr(needs, "ndim", 1) == 0:
        raise TypeError(f"{op}: needs must be a tuple of names from {', '.join(arrays)}, got {shown(needs)}")
    for name in wanted:
        if not isinstance(name, str) or name not in arrays:
            raise ValueError(f"{op}: needs must name gradients among {', '.join(arrays)}, got {shown(name)}")
    return frozenset(name for name in wanted if arrays[name] is not None)

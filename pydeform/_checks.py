"""Argument checks shared by all operators, and the text of every error they raise."""

from __future__ import annotations

import functools
import math
import operator as _operator
from collections.abc import Iterable, Sequence
from typing import Any

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


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


def check_ndim(op: str, name: str, array: Any, formula: str, ndim: int) -> None:
    if array.ndim != ndim:
        raise ValueError(f"{op}: {name} must have shape {formula}, got {tuple(array.shape)}")


def check_shape(op: str, name: str, array: Any, formula: str, expected: Sequence[int]) -> None:
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {formula} = {tuple(expected)}, got {tuple(array.shape)}")


def check_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _as_int(op: str, name: str, item: Any, minimum: int, expected: str, value: Any) -> int:
    """`item` of the argument `value` as an int."""
    try:
        number = _operator.index(item)
    except TypeError:
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}") from None
    if isinstance(item, bool) or number < minimum:
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")
    return number


def number(op: str, name: str, value: Any, *, positive: bool = False) -> float:
    """A finite real number as a float."""
    expected = "a finite number" + (" > 0" if positive else "")
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")
    try:
        converted = float(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}") from None
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or (positive and converted <= 0):
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")
    return converted


def per_axis(op: str, name: str, value: Any, axes: int, minimum: int) -> tuple[int, ...]:
    """An int, or one int per axis, as a tuple of `axes` ints not below `minimum`."""
    expected = f"an int >= {minimum}" + (f" or {axes} of them" if axes > 1 else "")
    if isinstance(value, str):
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")
    if not isinstance(value, Iterable):
        return (_as_int(op, name, value, minimum, expected, value),) * axes
    items = tuple(value)
    if len(items) != axes:
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")
    return tuple(_as_int(op, name, item, minimum, expected, value) for item in items)


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
    expected = f"an int >= 0, {axes} of them, {axes} (before, after) pairs, or 'same'"
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"{op}: padding must be {expected}, got {padding!r}")
        totals = [
            max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    if not isinstance(padding, Iterable):
        return ((_as_int(op, "padding", padding, 0, expected, padding),) * 2,) * axes
    items = tuple(padding)
    if len(items) != axes:
        raise ValueError(f"{op}: padding must be {expected}, got {padding!r}")
    pairs = []
    for item in items:
        pair = tuple(item) if isinstance(item, Iterable) and not isinstance(item, str) else (item, item)
        if len(pair) != 2:
            raise ValueError(f"{op}: padding must be {expected}, got {padding!r}")
        before, after = (_as_int(op, "padding", side, 0, expected, padding) for side in pair)
        pairs.append((before, after))
    return tuple(pairs)


def needed(op: str, needs: Iterable[str] | None, arrays: dict[str, Any]) -> frozenset[str]:
    """The names of the gradients to compute: those asked for whose argument is present."""
    if isinstance(needs, str):
        raise TypeError(f"{op}: needs must be a tuple of names from {', '.join(arrays)}, got {needs!r}")
    wanted = tuple(arrays) if needs is None else tuple(needs)
    for name in wanted:
        if name not in arrays:
            raise ValueError(f"{op}: needs must name gradients among {', '.join(arrays)}, got {name!r}")
    return frozenset(name for name in wanted if arrays[name] is not None)

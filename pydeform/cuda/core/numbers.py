"""How kernels name the types of data, sums and places, and how sizes are rounded. Nothing here needs a device."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

C_TYPES = {"float64": "double", "float32": "float", "float16": "f16", "bfloat16": "bf16"}
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INT32_ELEMENTS = 2**31 - 2**16  # what threads past the end of an array add stays within an int


def index_type(*sizes: int) -> str:
    """C++ type for places in arrays of so many elements."""
    return "int" if max(sizes) <= INT32_ELEMENTS else "long long"


def own_types(data: Any, *coordinates: Any) -> str:
    """The last template arguments of a kernel: types of its coordinates, where one is wider than that of its data.

    None stands for an array that is absent. Kernels read both types, since a copy of all offsets in float32 would cost
    those who have them in half precision.
    """
    types = [(data if array is None else array).dtype for array in coordinates]
    while types and types[-1] == data.dtype:
        types.pop()
    return "".join(f", {C_TYPES[dtype.name]}" for dtype in types)


def integer(index: str, value: int) -> Any:
    """A kernel's parameter of index type."""
    return np.int32(value) if index == "int" else np.int64(value)


def compute_dtype(dtype: Any) -> np.dtype:
    """Of coordinates and sums."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)

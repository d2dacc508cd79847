"""What layers do with CuPy arrays besides computing: change their dtype, and bring them to the device."""

from __future__ import annotations

from typing import Any

import cupy


def available() -> bool:
    return bool(cupy.is_available())


def to_device(array: Any) -> Any:
    """A NumPy array's values on the current device."""
    return cupy.asarray(array)


def widened(array: Any) -> Any:
    return array.astype(cupy.float32)


def rounded(array: Any, dtype: Any) -> Any:
    return array.astype(dtype)

"""Sizes and tables that every family's plans are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import inline

PAGE = 4096  # bytes of memory that are mapped together, at least
SERIAL_FLOPS = 3e6  # below this a second thread costs more than it saves


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pixel_dtype(pixels: int) -> Any:
    """Type of a pixel's index: int64 halves the speed of locating samples, so only where int32 is too narrow."""
    return np.dtype(np.int32 if pixels < 2**31 - 1 else np.int64)


@inline
def volume(numbers: Any) -> int:
    """The product of a tuple's numbers, in a kernel: what `math.prod` is elsewhere."""
    result = numbers[0]
    for i in range(1, len(numbers)):
        result *= numbers[i]
    return result


def table(names: str, rows: list[Any]) -> Any:
    """Rows of integers as an array of records, so that a kernel reads `row.channel`, not row[3]."""
    return np.array([tuple(row) for row in rows], [(name, np.int64) for name in names.split()])

"""Sizes and tables that every family's plans are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

SERIAL_FLOPS = 3e6  # below this a second thread costs more than it saves


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pixel_dtype(g: Any) -> Any:
    """Type of a pixel's index; the wide one halves the speed of `locate`, so only where it must be."""
    return np.dtype(np.int32 if g.in_h * g.in_w < 2**31 - 1 else np.int64)


def table(names: str, rows: list[Any]) -> Any:
    """Rows of integers as an array of records, so that a kernel reads `row.channel`, not row[3]."""
    return np.array([tuple(row) for row in rows], [(name, np.int64) for name in names.split()])

"""Orders and roundings of sums: launches of core/sums.cuh."""

from __future__ import annotations

from typing import Any

from pydeform.cuda.core.launch import kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, index_type, integer
from pydeform.cuda.core.source import Code

THREADS = 256


def convert(code: Code, sums: Any, result: Any) -> None:
    """Sums, rounded to the type of the result."""
    index = index_type(result.size)
    _launch(code, f"convert<{C_TYPES[result.dtype.name]}, {index}>", result.size, sums, result, index=index)


def sort_bins(code: Code, starts: Any, ids: Any, bins: int, index: str) -> None:
    """Each bin's ids in ascending order."""
    _launch(code, f"sort_bins<{index}>", bins, starts, ids, index=index)


def _launch(code: Code, expression: str, threads: int, *arrays: Any, index: str) -> None:
    arguments = (*arrays, integer(index, threads))
    launch(kernel(code, expression), (ceil_div(threads, THREADS),), THREADS, arguments)

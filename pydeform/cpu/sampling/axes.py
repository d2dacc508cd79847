"""What a coordinate names along one axis: the rules that all families share, the twin of cuda/sampling/axes.cuh."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import inline_always
from pydeform.cpu.core.vector import convert, floor, select


@inline_always
def in_range(p: Any, low: Any, end: Any) -> Any:
    """Where coordinates are inside; NaN is not."""
    return (p >= low) & (p < end)


@inline_always
def axis_corners(p: Any, low: Any, end: Any, size: Any, last: Any, integer: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Of vectors of coordinates the two pixels, whether there are such, and the share of the second, NaN of NaN.

    Pixels are 0 to size - 1, and a coordinate is inside from `low` to below `end`, the size as a coordinate. The second
    pixel is at most `last`. `integer` points to the type of a pixel's number.
    """
    is_inside = in_range(p, low, end)
    within = select(is_inside, p, low)
    at_first = floor(within)
    first = convert(at_first, integer)
    second = select(first < last, first + 1, last)
    has_first, has_second = is_inside & (first >= 0), is_inside & (second >= 0) & (second < size)
    return first, second, has_first, has_second, select(p == p, within - at_first, np.nan)

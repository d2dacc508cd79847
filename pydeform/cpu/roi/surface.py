"""What a bin of a box reads on one axis where its mean is exact (docs/math/roi.md, eq. 10 and 11)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import inline, inline_always


@inline
def surface_read(
    start: Any, bin_size: Any, length: int, boxes: Any, index: Any, weights: Any, slopes: Any, ends: Any
) -> tuple[int, Any]:
    """Eq. 10, as a list of pixels, and of eq. 11 where there is room for `ends`: entries, and the number to divide by.

    Cell k lies between pixel k and the next; beyond the image there are zeros. A part of the bin within a cell is so
    wide (`width`) and its middle there in the cell (`place`). Each is found without differences of close numbers, which
    would leave nothing of a small bin: `lost` is what the end loses when rounded, exactly.
    """
    real = boxes.dtype.type
    zero, one, half = real(0), real(1), real(0.5)
    end, base = start + bin_size, np.floor(max(start, zero))
    if not ((bin_size > zero) & (base < length)):
        return 0, one
    added = end - start
    lost = (start - (end - added)) + (bin_size - added)
    first = np.int64(base)
    k = -1 if start < zero else first
    left = -start if start < zero else one - (start - base)  # from the start to the end of the cell
    right = ((end - base) - real(k - first)) + lost  # from the begin of the cell to the end
    n, weight, slope, late = 0, zero, zero, zero  # of pixel k so far, by the cell before
    while k < length and right > zero:
        inside = (left < one) & (right < one)
        width = bin_size if inside else min(min(left, right), one)
        share = width / bin_size
        place = half * width
        if left < one:
            place = (one - left) + place if inside else one - place
        low, high = share * (one - place), share * place
        edges = zero, zero, zero, zero
        if ends is not None:
            edges = _edges(low, high, (share, bin_size), left, right, boxes)
        if k >= 0:
            index[n], weights[n], slopes[n] = k, weight + low, slope + edges[0]
            if ends is not None:
                ends[n] = late + edges[2]
            n += 1
        weight, slope, late = high, edges[1], edges[3]
        k, left = k + 1, real(2)  # any number that is more than a cell
        right = ((end - base) - real(k - first)) + lost
    if weight > zero and k < length:
        index[n], weights[n], slopes[n] = k, weight, slope
        if ends is not None:
            ends[n] = late
        n += 1
    return n, one


@inline_always
def _edges(low: Any, high: Any, part: Any, left: Any, right: Any, boxes: Any) -> tuple[Any, Any, Any, Any]:
    """Eq. 11 for a part of a bin, of the names that it has in `surface_read`: derivatives of the lower and the upper
    pixel's weight, by the start of the bin, then by its end."""
    real = boxes.dtype.type
    zero, one, half = real(0), real(1), real(0.5)
    share, bin_size = part
    if bin_size < one:  # the differences below would be of close numbers
        late = half * share  # the middle of the part, as a part of the bin
        if not left < one:
            late = one - late
        elif right < one:
            late = half
        by_end = share * late
        by_start = share - by_end
        return -by_start, by_start, -by_end, by_end
    at_start, at_end = left <= one, right <= one
    return (
        (low - (left if at_start else zero)) / bin_size,
        (high - (one - left if at_start else zero)) / bin_size,
        ((one - right if at_end else zero) - low) / bin_size,
        ((right if at_end else zero) - high) / bin_size,
    )

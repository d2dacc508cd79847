"""The input's gradient without float atomics: launches of conv/gather.cuh."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from pydeform.cuda.conv.plan import pixels
from pydeform.cuda.core.launch import geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, index_type, own_types
from pydeform.cuda.core.source import Code
from pydeform.cuda.core.sums import sort_bins

THREADS = 256


def accumulate(
    code: Code,
    columns: Any,
    offset: Any,
    mask: Any,
    accumulator: Any,
    g: Any,
    channels: int,
    first: int,
    count: int,
    tap0: int,
    taps: int,
) -> None:
    """Add to accumulator (N, P, channels) what the samples of one chunk give back to their pixels (eq. 5).

    The chunk is output pixels [first, first + count) of the flattened (b, p) and taps [tap0, tap0 + taps); columns
    (taps, count, channels) are its column gradients, without mask. Both arrays have the type of sums. `channels` are
    those in memory, an equal number for each offset group. The host waits for nothing, so a graph can be captured.
    """
    images = (first + count - 1) // pixels(g) - first // pixels(g) + 1
    bins = images * g.offset_groups * math.prod(size + 1 for size in g.in_size)
    samples = g.offset_groups * taps * count
    index = index_type(bins, samples, offset.size, accumulator.size, columns.size)
    integer = np.int32 if index == "int" else np.int64
    types = f"{C_TYPES[offset.dtype.name]}, {index}"
    chunk = (geometry(g), integer(first), integer(count), np.int32(tap0), np.int32(taps))
    counts = cupy.zeros((bins + 1,), np.int32)
    _launch(code, f"count_samples<{types}>", samples, (offset, counts, *chunk))
    starts = cupy.cumsum(counts, dtype=integer)
    ids = cupy.empty((samples,), np.int32)
    _launch(code, f"fill_bins<{types}>", samples, (offset, counts, starts, ids, *chunk))
    sort_bins(code, starts, ids, bins, index)
    data = offset if mask is None else mask
    _launch(
        code,
        f"gather_bins<{C_TYPES[data.dtype.name]}, {index}{own_types(data, offset)}>",
        32 * images * g.offset_groups * math.prod(g.in_size),
        (
            *(columns, offset, mask, starts, ids, accumulator, geometry(g)),
            *(np.int32(channels), np.int32(images), integer(first), integer(count), np.int32(tap0)),
        ),
    )


def bin_bytes(g: Any) -> int:
    """Of the counts and starts of an image's bins."""
    return int(g.offset_groups * math.prod(size + 1 for size in g.in_size) * 8)


def _launch(code: Code, expression: str, threads: int, arguments: tuple[Any, ...]) -> None:
    launch(kernel(code, expression), (ceil_div(threads, THREADS),), THREADS, arguments)
